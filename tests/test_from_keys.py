"""Values predicted from keys (--reconstructor=keys): the path masked and packed, what is stored,
saved and refused, against loops in float64. The fit: test_key_maps.py."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from helpers import (
    BY_NORM,
    TINY,
    error_line,
    grouped_model,
    randomise,
    read_in_pieces,
    tiny_model,
    tokens,
)
from stores import selecting

import kv_router
import runs
from config import KVConfig
from loaders.runs import load_run
from model import apply_rope, rope_table
from reconstruct import straight_through
from report.rows import setting_of
from settings.storing import check_fitted
from storage import from_keys
from storage.as_dense import as_dense
from storage.cache import KVCache
from storage.from_keys import FromKeys, attend_predicted, attend_predicted_ref
from storage.kernel_base import triton
from storage.layout import top_k_mask

pytestmark = pytest.mark.usefixtures("own_cache")
KEYS = dict(reconstructor="keys", value_basis="output")
SETTINGS = {
    "norm": dict(BY_NORM, n_groups=4, topk_groups=2, kv_tail=3, kv_sinks=2),
    "one mask, blocks": dict(
        n_groups=8,
        topk_groups=3,
        value_router="norm",
        mask_scope="layer",
        kv_tail=2,
        kv_tail_block=5,
    ),
    "linear, no tail": dict(
        n_groups=16, topk_groups=5, value_router="linear", mask_scope="layer", kv_tail=0, kv_sinks=0
    ),
    "maps": dict(BY_NORM, n_groups=8, topk_groups=1, kv_tail=1, learn_basis=True),
    "keys alone": dict(BY_NORM, n_groups=4, topk_groups=0, kv_tail=3, kv_sinks=1),
    "own heads": dict(BY_NORM, reconstructor="own_keys", n_groups=4, topk_groups=2, kv_tail=3),
}
each = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def predicting(fold: bool = True, cfg=TINY, **kv):
    """grouped_model whose maps from keys are not those that were fitted."""
    model = grouped_model(fold=False, cfg=cfg, **{**KEYS, **kv})
    for path in kv_router.paths(model).values():
        torch.nn.init.normal_(path.key_map, std=0.2)
    return kv_router.fold(model) if fold else model


def by_loops(model, x: torch.Tensor, exact_until: int = 0) -> list[torch.Tensor]:
    """What each layer's path of an unfolded model returns, (B, H, T, D), for the inputs it gets
    while tokens x are read: token by token and head by head. The first exact_until tokens read
    whole values."""
    seen = []
    paths = list(kv_router.paths(model).values())
    for path in paths:
        path.register_forward_pre_hook(lambda _, args: seen.append(args[:4]))
    model(x)
    out = []
    for path, (h, q, k, v) in zip(paths, seen, strict=True):
        B, H, T, D = q.shape
        n = H // path.Hkv
        d = D // path.S
        half = D // 2
        cos, sin = rope_table(TINY)
        y = torch.zeros_like(q)
        for b in range(B):
            read = torch.zeros(T, path.Hkv, D, dtype=q.dtype)
            for t in range(T):
                raw = torch.zeros(path.Hkv, D, dtype=q.dtype)
                for head in range(path.Hkv):
                    for i in range(half):
                        c, s = float(cos[t, i]), float(sin[t, i])
                        one, other = k[b, head, t, i], k[b, head, t, i + half]
                        raw[head, i] = one * c + other * s
                        raw[head, i + half] = other * c - one * s
                if path.key_map.ndim == 3:  # of own heads
                    told = torch.stack([raw[j] @ path.key_map[j] for j in range(path.Hkv)])
                else:
                    told = (raw.flatten() @ path.key_map).view(path.Hkv, D)
                z = torch.stack([v[b, j, t] @ path.enc[j] for j in range(path.Hkv)])
                rest = z - told
                energy = rest.view(path.Hkv, path.S, d).square().sum(-1)
                if path.router is not None:
                    energy = path.router(h[b, t]).view(path.mask_heads, path.S)
                elif path.mask_heads == 1:
                    energy = energy.sum(0, keepdim=True)
                for head in range(path.Hkv):
                    row = energy[head % path.mask_heads]
                    best = sorted(range(path.S), key=lambda g, row=row: (-float(row[g]), g))
                    z_read = told[head].clone()
                    for g in best[: path.k]:
                        z_read[g * d : (g + 1) * d] = z[head, g * d : (g + 1) * d]
                    read[t, head] = z_read @ path.dec[head]
            for t in range(T):
                tail, leaves = path.cfg.kv_tail, path.cfg.kv_tail_block
                first = path.cfg.first_whole
                packed = first + max(0, (t + 1 - first - tail) // leaves * leaves)
                for head in range(H):
                    j = head // n
                    p = (k[b, j, : t + 1] @ q[b, head, t] / D**0.5).softmax(0)
                    whole = t < exact_until
                    values = [
                        v[b, j, i] if whole or i >= packed or i < first else read[i, j]
                        for i in range(t + 1)
                    ]
                    y[b, head, t] = sum(p[i] * values[i] for i in range(t + 1))
        out.append(y)
    return out


def test_keys_are_turned_back_to_what_was_projected():
    """heads_before_rope undoes apply_rope at every sequence's own positions, and puts all heads beside one
    another."""
    cos, sin = (t.double() for t in rope_table(TINY))
    raw = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    position = torch.tensor([[0], [91]]) + torch.arange(7)
    k = apply_rope(raw, cos[position][:, None], sin[position][:, None])
    got = FromKeys(torch.eye(48), cos, sin).heads_before_rope(k, position)
    assert (got - raw.transpose(1, 2).flatten(2)).abs().max() < 1e-6
    assert (k - raw).abs().max() > 0.1
    # slots without a token may have any position
    beyond = FromKeys(torch.eye(48), cos, sin).heads_before_rope(k, position + 10**6)
    assert beyond.isfinite().all()


@torch.no_grad()
def test_weights_of_keys_sum_to_one_in_bfloat16(monkeypatch):
    """Beside attention over rows that computes in float32, as a kernel does, the sum of bfloat16
    keys has weights of its own precision: all keys ones, what they tell is W's sums."""
    model = predicting(**SETTINGS["norm"]).to(torch.bfloat16)
    cache = model.new_cache(1, 40)
    read_in_pieces(model, tokens(1, 29), cache, [29])
    layer = cache.layers[1]
    basis = layer.basis.from_keys
    layer.rows.zero_()
    layer.keys *= 16
    g = torch.Generator().manual_seed(0)
    q = 9 * torch.randn(1, 6, 1, 16, generator=g).to(torch.bfloat16)
    told = []
    monkeypatch.setattr(
        FromKeys, "heads_before_rope", lambda self, k, at: torch.ones(1, at.size(-1), 48)
    )
    plain = from_keys.packed_attention

    def wide(q, packed, *more, **about):
        packed = packed._replace(keys=packed.keys.float(), rows=packed.rows.float())
        told.append(1)
        out, lse = plain(q.float(), packed, *more, **about)
        return out.to(q.dtype), lse

    monkeypatch.setattr(from_keys, "packed_attention", wide)
    got, _ = attend_predicted(q, layer.view().packed[0], basis, layer.packed_positions())
    want = basis.weight.float().sum(0).view(3, 1, 16).repeat_interleave(2, 0)
    assert told and ((got[0].float() - want) / want.abs().amax()).abs().max() < 0.006


def test_straight_through_is_the_hard_mask():
    """Zeros and ones exactly, whatever the softmax's digits are."""
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        mask = top_k_mask(logits, 3)
        assert torch.equal(straight_through(logits.to(dtype), mask), mask.to(dtype))


@each
@torch.no_grad()
def test_forward_equals_the_loops(setting):
    """The masked path gives, to 1e-10, what loops over tokens, heads and groups give: kept groups
    as they are, others as the token's turned-back keys tell."""
    model = predicting(fold=False, **setting)
    x = tokens(2, 13)
    got = []
    for path in kv_router.paths(model).values():
        path.register_forward_hook(lambda _, args, y: got.append(y))
    want = by_loops(model, x)
    for a, b in zip(got[:2], want, strict=True):
        assert (a - b).abs().max() < 1e-10


@each
@pytest.mark.parametrize("fold", [True, False])
def test_routed_prefill_and_decoding_equal_the_masked_model(setting, fold):
    """A prompt at once, in pieces, and token by token give the logits of the masked model, with
    padding: what is stored is the residual, what is read is the value."""
    model = predicting(fold=fold, **{**setting, "prefill": "routed"})
    x = tokens(2, 33)
    pad = torch.tensor([0, 5])
    with torch.no_grad():
        want = model(x, pad)
    for sizes in ([33], [1] * 33, [7, 13] + [1] * 13):
        got = read_in_pieces(model, x, model.new_cache(2, 40), sizes, pad)
        for b, first in enumerate(pad.tolist()):
            assert (got - want)[b, first:].abs().max() < 1e-10
    dense = tiny_model()(x)
    assert (want[0] - dense[0]).abs().max() > 1e-3


@torch.no_grad()
def test_decoding_after_an_exact_prompt_equals_the_loops():
    """After an exact prefill of one layer, that reads itself whole, decoding reads what was packed
    as predicted: the loops' values."""
    cfg = replace(TINY, n_layer=1)
    model = predicting(fold=False, cfg=cfg, **SETTINGS["norm"])
    x = tokens(2, 13)
    got = []
    (path,) = kv_router.paths(model).values()
    (want,) = by_loops(model, x, exact_until=9)
    for verb in ("prefill", "decode"):
        run = getattr(path, verb)
        setattr(path, verb, lambda *a, run=run: got.append(run(*a)) or got[-1])
    read_in_pieces(model, x, model.new_cache(2, 13), [9, 1, 1, 1, 1])
    assert (torch.cat(got, 2) - want).abs().max() < 1e-10


@pytest.mark.parametrize("K", [0, 2])
@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("cap", [0.0, 5.0])
@torch.no_grad()
def test_summing_keys_equals_writing_values_out(scope, cap, K):
    """Equation (1), one sum of keys, equals attention over values that are written out: several
    queries, sequences of other lengths, and slots behind the last token that hold old ones."""
    model = predicting(**{**SETTINGS["norm"], "mask_scope": scope, "topk_groups": K})
    cache = model.new_cache(3, 40)
    read_in_pieces(model, tokens(3, 29), cache, [29], torch.tensor([0, 3, 29]))
    layer = cache.layers[1]
    layer.keys *= 200  # old keys, too large for exp where they are not left out
    layer.truncate(torch.tensor([21, 26, 0]))
    layer.keys.view(3, 3, -1, 16)[:, :, :19] /= 200
    packed = layer.view().packed[0]
    assert layer.n_packed.tolist() == [19, 21, 0]
    for row, n in enumerate(layer.n_packed.tolist()):
        layer.keys.view(3, 3, -1, 16)[row, :, n:] = float("nan")
    q = torch.randn(3, 6, 2, 16, dtype=torch.float64)
    want, want_lse = attend_predicted_ref(
        q, packed, layer.basis.from_keys, layer.packed_positions(), cap
    )
    got, lse = attend_predicted(q, packed, layer.basis.from_keys, layer.packed_positions(), cap)
    assert (got - want).abs().max() < 1e-10 and torch.allclose(lse, want_lse, rtol=0, atol=1e-12)
    assert got[0].abs().max() > 0.1 and not got[2].any()


@pytest.mark.skipif(
    triton is None or torch.cuda.is_available(), reason="the kernel is asked on a CPU"
)
@pytest.mark.parametrize("K", [0, 2])
@torch.no_grad()
def test_a_step_by_kernel_gives_the_same_logits(monkeypatch, K):
    """Decoding with maps of own heads reads packed tokens and window by one kernel, first tokens
    beside it: the logits of the plain form, with padding."""
    logits = {}
    asked = []
    right = from_keys.attend_with_key_sums

    def count(q, packed, window, *more):
        asked.append(window)
        return right(q, packed, window, *more)

    monkeypatch.setattr(from_keys, "attend_with_key_sums", count)
    for by_kernel in (False, True):
        torch.manual_seed(0)
        model = predicting(**{**SETTINGS["own heads"], "topk_groups": K}).float()
        monkeypatch.setattr(from_keys, "use_triton", lambda *_, yes=by_kernel: yes)
        cache = model.new_cache(2, 40)
        pieces = [20, *[1] * 9]
        logits[by_kernel] = read_in_pieces(
            model, tokens(2, 29), cache, pieces, torch.tensor([0, 5])
        )
    assert asked and asked[0] is not None
    assert (logits[True] - logits[False]).abs().max() < 1e-4


@pytest.mark.parametrize("prefill", ["exact", "routed"])
def test_all_groups_kept_is_dense(prefill):
    """K = S is the dense model, bit for bit, and its cache asks no map and holds no more. With
    fewer, the cache grows by the first tokens' whole keys and values alone: maps are weights."""
    x = tokens(2, 21)
    model = predicting(fold=False, n_groups=8, topk_groups=8, prefill=prefill)
    dense = tiny_model()
    assert torch.equal(model(x), dense(x))
    cache = model.new_cache(2, 21)
    assert cache.layers[0].basis.from_keys is None
    assert (read_in_pieces(model, x, cache, [12] + [1] * 9) - dense(x)).abs().max() < 1e-9
    n_sinks = (8 + 2 * 3 * 2 * 16 * 8) * 2 * 2  # a count, keys and values; two sequences and layers
    for K, more in ((2, n_sinks), (4, 0)):
        sizes = []
        for kind in ("zero", "keys"):
            cfg = {**SETTINGS["norm"], "topk_groups": K, "reconstructor": kind}
            fewer = grouped_model(value_basis="output", **cfg)
            held = fewer.new_cache(2, 21)
            fewer.prefill(x, held)
            sizes.append(held.nbytes())
        assert sizes[1] - sizes[0] == more


@torch.no_grad()
def test_keys_alone_are_half_of_the_bytes(tmp_path):
    """With K = 0 a packed token holds its keys and nothing beside, no mask; sequences that are
    joined, picked, saved and loaded, cut and read on give what each gave alone."""
    model = predicting(**SETTINGS["keys alone"])
    sizes = []
    for n in (20, 120):
        cache = model.new_cache(2, n)
        model.prefill(tokens(2, n), cache)
        sizes.append(cache.nbytes())
    keys_of_a_token = 2 * 2 * 3 * 16 * 8  # sequences, layers, heads, numbers, float64
    assert sizes[1] - sizes[0] == 100 * keys_of_a_token
    x = tokens(2, 30)
    want = [read_in_pieces(model, row[None], model.new_cache(1, 30), [25] + [1] * 5) for row in x]
    halves = []
    for row in x:
        halves.append(model.new_cache(1, 25))
        model.prefill(row[None, :25], halves[-1])
    both = KVCache.cat(halves)
    both.save(tmp_path / "cache")
    both = KVCache.load(tmp_path / "cache", model)
    both = both.select_sequences([1, 0])
    for i in range(25, 30):
        got = model.decode(x.flip(0)[:, i : i + 1], both)[:, 0]
        assert (got - torch.cat([w[:, i] for w in want]).flip(0)).abs().max() < 1e-10


def test_layers_that_slide_stay_as_they_are():
    """Beside sliding layers only the others predict, with a window of the newest tokens: token by
    token gives what the masked model gives."""
    cfg = replace(TINY, sliding_window=6, global_every=2)
    model = predicting(cfg=cfg, **{**SETTINGS["norm"], "prefill": "routed"})
    assert len(kv_router.paths(model)) == 1
    x = tokens(1, 27)
    with torch.no_grad():
        want = model(x)
    assert (read_in_pieces(model, x, model.new_cache(1, 27), [1] * 27) - want).abs().max() < 1e-10


@pytest.mark.parametrize("learned", [False, True])
def test_losses_reach_the_map(learned):
    """L_aux trains the map, by the gradient of finite differences; the language-model loss trains
    it where it trains the basis, else not."""
    settings = {**SETTINGS["norm"], "learn_basis": learned}
    model = predicting(fold=False, **settings).train()
    path = next(iter(kv_router.paths(model).values()))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 40, generator=g, dtype=torch.float64)
    q = torch.randn(1, 6, 7, 16, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 1, 3, 7, 16, generator=g, dtype=torch.float64)

    def run(weight: torch.Tensor, what: str) -> torch.Tensor:
        y = torch.func.functional_call(path, {"key_map": weight}, (x, q, k, v))
        return path.losses["aux"] if what == "aux" else y

    weight = path.key_map.detach().clone().requires_grad_(True)
    for what in ("aux", "lm"):
        if what == "aux" or learned:
            assert torch.autograd.gradcheck(lambda w, s=what: run(w, s), weight, fast_mode=True)
    kv_router.trainable(model)
    model(tokens(2, 21)).square().mean().backward()
    assert (path.key_map.grad is not None) == learned


def test_a_cache_keeps_the_map_it_was_packed_with():
    """Training writes into the map; a cache that exists reads on as it was packed."""
    model = predicting(**SETTINGS["norm"])
    x = tokens(1, 23)
    want = read_in_pieces(model, x, model.new_cache(1, 23), [20, 1, 1, 1])
    cache = model.new_cache(1, 23)
    before = read_in_pieces(model, x[:, :20], cache, [20])
    for path in kv_router.paths(model).values():
        randomise(torch.nn.ParameterList([path.key_map]))
    after = read_in_pieces(model, x[:, 20:], cache, [1, 1, 1])
    assert torch.equal(torch.cat((before, after), 1), want)


@pytest.mark.parametrize("kind", ["all heads", "own heads", "learned", "folded", "selected"])
def test_caches_read_one_copy_of_the_maps(kind):
    """Caches read maps that are no tensors of theirs and not the trained ones: one copy for all of
    a path's caches until training writes, then another; also after the model changes its dtype."""
    if kind == "selected":
        model = selecting(fold=False, reconstructor="keys")
    else:
        named = {"own heads": "own heads", "learned": "maps", "folded": "maps"}
        model = predicting(fold=kind == "folded", **SETTINGS[named.get(kind, "norm")])
    path = next(iter(kv_router.paths(model).values()))
    trained = {t.untyped_storage().data_ptr() for t in path.parameters()}

    def places() -> list[int]:
        layer = model.new_cache(1, 9).layers[0]
        maps = layer.constants()
        assert maps and layer.nbytes() == sum(t.nbytes for t in layer.state_dict().values())
        found = [t.untyped_storage().data_ptr() for t in maps.values()]
        held = {t.untyped_storage().data_ptr() for t in layer.state_dict().values()}
        assert not {*found} & (held | trained)
        return found

    kept = model.new_cache(1, 9)  # its maps live on
    first = places()
    assert places() == first and kept.nbytes() == model.new_cache(1, 9).nbytes()
    with torch.no_grad():
        path.key_map[..., 0] += 1
    second = places()
    assert places() == second and second != first
    model.float()
    maps = model.new_cache(1, 9).layers[0].constants()
    assert {t.dtype for t in maps.values()} == {torch.float32}


@pytest.mark.parametrize("how", ["rounded", "given"])
@torch.no_grad()
def test_new_caches_turn_keys_by_the_tables_that_the_path_has(how):
    """Tables of positions may change beside maps that stay: rounded by bfloat16, which holds the
    maps exactly, or given anew. New caches read them, and one that exists those it was made with;
    a path that is moved to where it is shares on."""
    model = predicting(**SETTINGS["norm"]).float()
    path = next(iter(kv_router.paths(model).values()))
    path.key_map.copy_(path.key_map.bfloat16())
    read = lambda: model.new_cache(1, 9).layers[0].basis.from_keys
    old = read()
    model.float()
    assert read().weight is old.weight
    cos = old.cos.clone()
    if how == "rounded":
        model.bfloat16().float()
    else:
        path.share_rope(-path.cos, path.sin)
    new = read()
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.cos, path.cos) and not torch.equal(new.cos, cos)
    assert torch.equal(old.cos, cos)


def test_a_run_is_saved_loaded_and_resumed(tmp_path, run_stage, monkeypatch):
    """Steps, SIGTERM and --resume end with the losses and tensors of steps unbroken; the maps have
    learned, and the run that is loaded has them."""
    flags = ["--kv=value_groups", "--reconstructor=keys", "--adapter=lora", "--learn_basis"]
    flags += ["--adapt_steps=6", "--eval_interval=3"]
    whole = run_stage("adapt", tmp_path / "whole", *flags)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        runs.before_step(m, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_stage("adapt", tmp_path / "broken", *flags)
    first = runs.tensors(tmp_path / "broken" / whole.name / "step-00000004")
    broken = run_stage("adapt", tmp_path / "broken", *flags, "--resume")
    assert runs.losses(broken) == runs.losses(whole) and len(runs.losses(whole)) == 6
    ends = [runs.tensors(stage / "step-00000006") for stage in (whole, broken)]
    runs.assert_equal(*ends)
    for name, path in kv_router.paths(load_run(whole / "step-00000006").model).items():
        (saved,) = (key for key in ends[0] if key.endswith(f"{name}.key_map"))
        assert torch.equal(path.key_map, ends[0][saved])
        assert not torch.equal(ends[0][saved], first[saved])


def test_what_is_not_built_is_refused():
    """Integers, no groups without keys, and training's own reconstructor say so in one line."""
    ints = error_line(KVConfig, reconstructor="keys", key_bits=4, value_bits=4)
    assert "reconstructor=keys" in ints and "leave those out" in ints
    assert "nothing would tell a value" in error_line(KVConfig, topk_groups=0)
    with pytest.raises(ValueError, match=r"1\.\.4"):
        kv_router.set_kept(grouped_model(**BY_NORM, n_groups=4), 0)
    assert "give --reconstructor=keys" in error_line(check_fitted, KVConfig(reconstructor="mlp"))
    check_fitted(KVConfig(reconstructor="keys"))


def test_a_row_says_that_keys_tell():
    """A row of a table names the way, so that it is not taken for one of zeros."""
    shares = dict(value_keep=0.5)
    said = [
        setting_of(
            None, "value_groups", KVConfig(**{**KEYS, "reconstructor": kind}), shares, True, 9
        )
        for kind in ("zero", "keys")
    ]
    assert said == ["output S=4 K=2", "output S=4 K=2 from keys"]


def test_routers_see_the_residual():
    """The groups that are stored are those of the largest residual, not of the largest value."""
    model = predicting(**SETTINGS["norm"])
    path = next(iter(kv_router.paths(model).values()))
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 3, 9, 16, generator=g, dtype=torch.float64)
    cache = path.new_cache(1, 20, k)
    cache.append(kv_router.NewTokens(k, v, None, None))
    _, _, mask = as_dense(cache)
    told = path.own_maps().from_keys.predict(k, torch.arange(9)[None])
    packed = [z[:, :, 2:].unflatten(-1, (4, 4)).square().sum(-1) for z in (v - told, v)]
    by_rest, by_value = packed
    assert torch.equal(mask, top_k_mask(by_rest, 2))
    assert not torch.equal(mask, top_k_mask(by_value, 2))
