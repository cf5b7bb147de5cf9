"""Selection whose values are told by keys (--kv=select --reconstructor=keys): what is chosen, stored
and read, against loops in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from choosing import PAD, X, Y, config, real, run, selecting
from helpers import TINY, error_line, tiny_model, tokens
from select_runs import base, measure, select  # noqa: F401 (fixtures)
from test_select_bits import greedy

import kv_router
import selector
from config import PLANNED_SINKS, KVConfig
from loaders.runs import find_checkpoint, load_run
from model import rope_table
from report.rows import filled_cache
from runs import tensors
from selection.budgets import REFINED, half_bytes_for, prices
from selection.calibration import look, see_layers
from selection.relevance import pooled
from storage.cache import KVCache
from storage.integers.format import LEVEL_ERRORS, bit_planes, dequantise_levels, quantise_levels

W = 9
T = X.size(1)


def predicting(scope: str = "head", fold: bool = True, **kv):
    """selecting with maps from keys that are not those that were fitted."""
    m = selecting(scope, fold=False, reconstructor="keys", **kv)
    for path in kv_router.paths(m).values():
        torch.nn.init.normal_(path.key_map, std=0.2)
    return kv_router.fold(m) if fold else m


def told_by_loops(path, k: torch.Tensor, head: int, position: int) -> torch.Tensor:
    """The coordinates (D,) that one stored key k (D,) of a head tells."""
    cos, sin = rope_table(TINY)
    half = len(k) // 2
    raw = torch.zeros_like(k)
    for i in range(half):
        c, s = float(cos[position, i]), float(sin[position, i])
        raw[i] = k[i] * c + k[i + half] * s
        raw[i + half] = k[i + half] * c - k[i] * s
    return raw @ path.key_map[head]


def test_keys_are_a_head_s_own_by_either_name():
    """Under a selection reconstructor=keys and own_keys fit the same maps and store the same."""
    one, other = (
        selecting(fold=False, cfg=config(kv_bytes=0.3), reconstructor=name)
        for name in ("keys", "own_keys")
    )
    caches = [filled_cache(m, X) for m in (one, other)]
    maps = [[path.key_map for path in kv_router.paths(m).values()] for m in (one, other)]
    assert all(torch.equal(a, b) and a.ndim == 3 for a, b in zip(*maps, strict=True))
    assert caches[0].nbytes() == caches[1].nbytes()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_packed_equals_masked(scope, fold):
    """In 16 bits prompt and continuation through the cache give the logits of one uncached pass
    that reads the context as it was chosen, a dropped group as keys tell it, with padding."""
    m = predicting(scope, fold)
    budgets = (dict(kv_keep=0.3), dict(token_keep=0.5, value_keep=0.5), dict(kv_keep=0.05))
    for relevance, budget in zip(("observed", "future", "predictor_query"), budgets, strict=True):
        a, b, choice, _ = run(m, config(relevance=relevance, **budget))
        with torch.no_grad(), selector.masked_replay(m, choice, T - W):
            full = m(torch.cat((X, Y), 1), pad=torch.tensor(PAD))
        torch.testing.assert_close(real(a), real(full[:, :T]), rtol=0, atol=1e-9)
        torch.testing.assert_close(b, full[:, T:], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "kv", [{}, dict(mask_scope="layer"), dict(key_bits=4, value_bits=4)], ids=str
)
@torch.no_grad()
def test_integers_are_stored_and_read_as_loops_do(kv):
    """Levels, or uniform bits, code what is left of a value by its key as it is stored; what
    decoding reads is that and what the key tells, at each token's own position, with padding."""
    m = predicting(**kv)
    pad = (0, 7, 55)
    _, _, choice, cache = run(m, config(kv_bytes=0.6, allocation="head"), pad=pad)
    _, _, _, z = see_layers(m.selector, m, X, torch.tensor(pad))
    for i, (path, c) in enumerate(zip(kv_router.paths(m).values(), cache.layers, strict=True)):
        view = c.view()
        k, rest, level, _ = view.packed[0].unpack()
        q = torch.randn(3, 6, 2, 16, dtype=torch.float64)
        got = path._read(q, view, c)
        for b in range(3):
            n = int(view.window.count[b])
            for head in range(6):
                h = head // 2
                mask_head = h if path.mask_heads > 1 else 0
                kept = choice.keep[i, b, mask_head].nonzero().flatten().tolist()
                kept = [t for t in kept if t >= pad[b] + PLANNED_SINKS]
                told = [told_by_loops(path, k[b, h, j], h, t - pad[b]) for j, t in enumerate(kept)]
                values = [rest[b, h, j] + told[j] for j in range(len(kept))]
                whole = [view.window.v[b, h, j] for j in range(n)]
                keys = torch.cat((k[b, h, : len(kept)], view.window.k[b, h, :n]))
                for t in range(2):  # the newest token's query reads all, the one before all but it
                    seen = len(keys) - 1 + t
                    p = (keys[:seen] @ q[b, head, t] / 4).softmax(0)
                    want = p @ torch.stack(values + whole)[:seen]
                    assert (got[b, head, t] - want).abs().max() < 1e-6
                if path.cfg.key_bits == 4 or not kept:
                    continue
                untold = torch.stack([z[i][b, h, t] - told[j] for j, t in enumerate(kept)])
                mine = level[b, mask_head, : len(kept)]
                planes = bit_planes(mine).sum(-1)
                at = planes.cumsum(0) - planes
                gain = c.codec.fmt.gain[h].expand_as(untold)
                rows, step = quantise_levels(untold, mine, at, int(planes.sum()), gain)
                again = dequantise_levels(rows, mine, at, step, gain, torch.float64)
                assert (again - rest[b, h, : len(kept)]).abs().max() < 1e-6
    assert choice.keep[:, 0].any()


@torch.no_grad()
def test_the_choice_is_the_greedy_one():
    """Tokens and levels are those of the greedy rule in loops: a key is worth what it tells, and
    for its price comes first."""
    m = predicting()
    s = m.selector
    s.set(config(kv_bytes=0.2, allocation="head", relevance="observed"))
    n_prompt = 90
    prompt, _ = look(s, m, tokens(1, n_prompt, seed=9), n_prompt - W, n_prompt)
    paths = kv_router.paths(m).values()
    untold = [p.untold(k, z) for p, k, z in zip(paths, prompt.k, prompt.z, strict=True)]
    choice = s.choose(replace(prompt, untold=untold))
    alpha = pooled(prompt.observed, s.cfg.pool)
    C = n_prompt - W
    price = prices(s.stored, 16, 1)
    cost = [*price.step * s.S, 1]
    m_bytes = half_bytes_for(0.2, C, W, PLANNED_SINKS, 16, 1, True)
    for i in range(2):
        for h in range(3):
            weight = float(s.layer_sensitivity[i]) ** 0.4 * float(s.output_gain[i, h])
            weight *= float(s.drop_weight[i, h])
            value = []
            for t in range(C):
                score = (float(alpha[i, 0, h, t]) ** 0.4 * weight) ** 2
                energy = untold[i][0, h, t].view(s.S, -1).square().sum(-1) * score
                parts = []
                for g in range(s.S):
                    off = [LEVEL_ERRORS[j] - LEVEL_ERRORS[j + 1] for j in range(3)]
                    parts += [
                        float(energy[g]) * a for a in (off[0], *(REFINED * o for o in off[1:]))
                    ]
                told = float(prompt.z[i][0, h, t].square().sum() * score - energy.sum())
                first = max(p / c for p, c in zip(parts, cost, strict=False))
                value.append([*parts, max(told, first * (1 + 1e-6))])
            for t in range(PLANNED_SINKS):
                value[t] = [float("-inf")] * len(cost)
            want = torch.tensor(greedy(value, price.key - 1, cost, m_bytes))
            assert torch.equal(choice.keep[i, 0, h], want.any(-1))
            assert torch.equal(choice.mask[i, 0, h].long(), want[:, :-1].view(C, s.S, 3).sum(-1))
            assert choice.keep[i, 0, h].any()


def test_the_share_of_dense_is_the_budget():
    """Bytes held, the bits that say where tokens stood among them, are never above the budget, and
    near it; they are those of the tensors."""
    n = 2047
    model = tiny_model(dtype=torch.float32, cfg=replace(TINY, block_size=n))
    m = selecting(model=model, reconstructor="keys")
    for share in (0.5, 0.125, 0.0625):
        m.selector.set(config(kv_bytes=share))
        cache = filled_cache(m, tokens(1, n, seed=8), "float32")
        assert 0.9 * share < m.share_of_dense(n, cache) <= share
        assert all(len(c.place) == 3 * 255 for c in cache.layers)  # (2047 - 9 - 4) / 8


@pytest.mark.parametrize("kv", [dict(fold=True), dict(fold=False, learn_basis=True)], ids=str)
@torch.no_grad()
def test_a_cache_keeps_the_maps_it_was_packed_with(kv):
    """What training writes into maps in place does not reach a context that was stored before."""
    m = predicting(**kv)
    m.selector.set(config(kv_bytes=0.3))
    caches = [m.new_cache(3, T + 1) for _ in range(2)]
    for cache in caches:
        m.prefill(X, cache)
    path = kv_router.paths(m)["layers.1.self_attn.kv_path"]  # the last: nothing else reads it
    layers = [cache.layers[1] for cache in caches]
    q = torch.randn(3, 6, 1, 16, dtype=torch.float64)
    want = path._read(q, layers[0].view(), layers[0])
    for p in path.parameters():
        p.add_(0.1)
    assert torch.equal(path._read(q, layers[1].view(), layers[1]), want)


@pytest.mark.parametrize("kv_bytes", [0.0, 0.5])
@torch.no_grad()
def test_sequences_joined_picked_and_loaded_read_as_alone(kv_bytes, tmp_path):
    """Where tokens stood goes with them: caches of several lengths that are joined, saved, loaded
    and picked from give what each gave alone; those of another map are refused."""
    m = predicting()
    m.selector.set(config(kv_bytes=kv_bytes, kv_keep=0.0 if kv_bytes else 0.3))
    want = []
    caches = []
    for b, n in enumerate((61, 50, 33)):
        caches.append(m.new_cache(1, n + 5))
        m.prefill(X[b : b + 1, :n], caches[-1])
        again = m.new_cache(1, n + 5)
        m.prefill(X[b : b + 1, :n], again)
        want.append(torch.cat([m.decode(Y[b : b + 1, i : i + 1], again) for i in range(3)], 1))
    joined = KVCache.cat(caches)
    joined.save(tmp_path / "cache")
    loaded = KVCache.load(tmp_path / "cache", m)
    picked = loaded.select_sequences([2, 0])
    for i in range(3):
        got = m.decode(Y[[2, 0], i : i + 1], picked)
        assert (got - torch.cat((want[2], want[0]))[:, i : i + 1]).abs().max() < 1e-9
    other = predicting()
    other.selector.set(m.selector.cfg)
    for path in kv_router.paths(other).values():
        path.key_map.mul_(2)
    assert "from keys" in error_line(KVCache.load, tmp_path / "cache", other)


def test_keys_that_tell_everything_leave_the_bytes_to_tokens():
    """Where values are linear in the keys of their own head, a budget of bytes keeps more tokens
    with keys that tell, and logits are nearer to dense."""
    base = tiny_model()
    for layer in base.layers:
        attn = layer.self_attn
        attn.v_proj.weight.data = attn.k_proj.weight.clone()
        attn.v_proj.bias.data = attn.k_proj.bias.clone()
    with torch.no_grad():
        dense = base(torch.cat((X[:1], Y[:1]), 1))[:, T:]
    off = {}
    kept = {}
    for kind in ("zero", "keys"):
        model = tiny_model()
        model.load_state_dict(base.state_dict())
        m = selecting(model=model, reconstructor=kind)
        _, after, choice, _ = run(m, config(kv_bytes=0.45), X[:1], Y[:1], None)
        off[kind] = float((after - dense).abs().mean())
        kept[kind] = int(choice.keep.sum())
    assert (choice.keep & ~choice.mask.any(-1)).any()  # keys alone
    assert kept["keys"] > 1.1 * kept["zero"] and off["keys"] < 0.9 * off["zero"]


def test_rows_of_eval_say_where_values_come_from(base, measure):
    """eval.py measures both ways at the same budgets; rows from keys say so."""
    rows = {}
    for kind in ("zero", "keys"):
        flags = ["--tasks=continuation", "--query=6", "--continuation=9", "--block_size=61"]
        flags += ["--sequences=3", "--methods=select", "--relevances=observed"]
        flags += ["--kv_byte_budgets=0.6", "--kv_budgets=0.3", f"--reconstructor={kind}"]
        rows[kind] = measure(f"--init_from={base}", *flags)
    for zero, keys in zip(*rows.values(), strict=True):
        assert "from keys" in keys["setting"] and "from keys" not in zero["setting"]
        assert keys["value"] != zero["value"]


@pytest.mark.parametrize("kind", ["keys", "own_keys", "zero"])
def test_rows_in_bfloat16_are_near_those_in_float32(base, measure, kind):
    """Under autocast prompts are packed and read by every way of storing them, refitted, too; what
    is measured is that of float32 but for its rounding."""
    flags = ["--tasks=continuation", "--query=6", "--continuation=9", "--block_size=61"]
    flags += ["--sequences=3", "--methods=select", "--relevances=observed", "--refit"]
    flags += ["--kv_byte_budgets=0.6", "--kv_budgets=0.3", f"--reconstructor={kind}"]
    wide, narrow = (
        measure(f"--init_from={base}", *flags, f"--dtype={dtype}")
        for dtype in ("float32", "bfloat16")
    )
    for a, b in zip(wide, narrow, strict=True):
        assert b["value"] == pytest.approx(a["value"], rel=0.05)


def test_a_trained_run_has_its_maps(tmp_path, text, base):
    """train.py --stage=select fits maps of own heads, and the run that is loaded has them: what is
    left by them is smaller than the values."""
    run_dir = select(tmp_path, text, base, "--reconstructor=keys", "--select_steps=1")
    model = load_run(run_dir).model
    saved = tensors(find_checkpoint(run_dir))
    file = Path(text.removeprefix("text:")) / "00.txt"
    read = list(file.read_bytes()[:400])
    _, _, k, z = see_layers(model.selector, model, torch.tensor([read]))
    for i, (name, path) in enumerate(kv_router.paths(model).items()):
        (key,) = (n for n in saved if n.endswith(f"{name}.key_map"))
        assert torch.equal(path.key_map, saved[key]) and path.key_map.ndim == 3
        whole, untold = z[i][:, :, 4:], path.untold(k[i], z[i])[:, :, 4:]
        assert float(untold.square().sum()) < 0.95 * float(whole.square().sum())


def test_what_is_not_built_is_refused():
    """A routed prefill, one mask for all layers, scores of pairs and captured steps."""
    kv = dict(kv="select", reconstructor="keys")
    assert "exact prefill" in error_line(KVConfig, **kv, prefill="routed")
    assert "mask_scope=head" in error_line(KVConfig, **kv, mask_scope="shared")
    assert "no network rebuilds" in error_line(KVConfig, kv="select", reconstructor="mlp")
    m = predicting()
    assert "predictor_query" in error_line(m.selector.set, config(relevance="predictor"))
    assert not any(path.graph_safe() for path in kv_router.paths(m).values())
