"""Integers in caches and paths: what the caches hold of them and what decoding reads, against
loops. Formats: test_format.py; kernels: test_int_kernels.py."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, error_line, grouped_model, read_in_pieces, tiny_model, tokens
from views import normal, uniform_by_hand

import kv_router
import mixsga
from baselines import shared_heads
from config import KVConfig
from generate import generate
from routing.in_window import plain_windowed_attention
from settings.experts import MixConfig
from storage import packed as packed_cache
from storage.cache import KVCache, NewTokens
from storage.integers import format as quant
from storage.integers.codecs import IntCodec, codec_of
from storage.kernel_base import triton
from storage.layout import expand_mask, group_energy, top_k_mask
from storage.packed import PackedCache
from storage.ragged import RaggedCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------- a context


def context(
    kb: int, vb: int, Hm: int, *, B=2, Hkv=3, C=75, D=32, S=4, block=32, dtype=torch.float32, seed=0
):
    """A random context in a RaggedCache of integers with five whole tokens after it, and what went
    in."""
    g = torch.Generator().manual_seed(seed)
    k = normal(B, Hkv, C, D, seed=seed)
    z = normal(B, Hkv, C, D, seed=seed + 1)
    keep = torch.rand(B, Hm, C, generator=g) < 0.7
    levels = torch.randint(0, 4, (B, Hm, C, S), generator=g, dtype=torch.uint8)
    valid = torch.arange(C) >= torch.tensor([0, 7, 3][:B])[:, None]
    fmt = quant.IntFormat(kb, vb, block, torch.rand(Hkv, D, generator=g).to(DEVICE) + 0.5)
    codec = IntCodec(fmt, 0)
    cache = RaggedCache(B, C + 5, Hkv, D, S, Hm, k[:0].to(DEVICE, dtype), codec)
    cache.pack(*(t.to(DEVICE) for t in (k, z, keep, levels > 0 if vb else levels, valid)))
    new_k, new_v = normal(2, B, Hkv, 5, D, seed=seed + 2).to(DEVICE, dtype)
    cache.append(NewTokens(new_k, new_v, None))
    return cache, k, z, keep & valid[:, None], levels


@pytest.mark.parametrize(
    ("kb", "vb", "Hm"), [(4, 4, 3), (8, 4, 1), (3, 2, 3), (2, 8, 1), (4, 0, 3), (3, 0, 1)]
)
def test_a_context_comes_back_as_by_hand(kb, vb, Hm):
    """Ragged survivors, padding, masks shared or not: keys of every full or partial block, values
    of every token, nothing else; and no more bytes than these take."""
    cache, k, z, keep, levels = context(kb, vb, Hm)
    got_k, got_z, got_mask, got_valid = (
        t.cpu() for t in cache.view().packed[0].unpack(torch.float64)
    )
    B, Hkv, C, D = k.shape
    S = levels.size(-1)
    tokens_held = 0
    blocks = 0
    units = 0
    for b in range(B):
        for h in range(Hkv):
            m = h if Hm > 1 else 0
            mine = [t for t in range(C) if keep[b, m, t]]
            assert got_valid[b, m].tolist() == [i < len(mine) for i in range(got_valid.size(-1))]
            tokens_held = tokens_held + len(mine)
            blocks = blocks + -(-len(mine) // 32)
            for first in range(0, len(mine), 32):
                part = mine[first : first + 32]
                for c in (0, 13, D - 1):
                    want = uniform_by_hand(k[b, h, part, c], kb)
                    torch.testing.assert_close(
                        got_k[b, h, first : first + 32, c][: len(part)], want, rtol=1e-6, atol=1e-6
                    )
            for i, t in enumerate(mine):
                kept = (levels[b, m, t] > 0).repeat_interleave(D // S)
                assert not got_z[b, h, i, ~kept].any()
                if vb:
                    assert torch.equal(got_mask[b, m, i], levels[b, m, t] > 0)
                    units += int((levels[b, m, t] > 0).sum()) * vb // 2
                    if kept.any():
                        torch.testing.assert_close(
                            got_z[b, h, i, kept],
                            uniform_by_hand(z[b, h, t, kept], vb),
                            rtol=1e-6,
                            atol=1e-6,
                        )
                else:
                    assert torch.equal(got_mask[b, m, i], levels[b, m, t])
                    units += int(quant.bit_planes(levels[b, m, t]).sum())
                    s = cache.value_scale[tokens_held - len(mine) + i, 0].item()
                    gain = cache.codec.fmt.gain[h].cpu()
                    for x, level in enumerate(levels[b, m, t].tolist()):
                        bits = quant.LEVEL_BITS[level]
                        unit = quant.LEVEL_STEPS[level] * s
                        middle = 1.5 if bits == 2 else 2.0 ** (bits - 1)
                        for c in range(x * D // S, (x + 1) * D // S if level else 0):
                            code = min(
                                max(round(float(z[b, h, t, c] / gain[c]) / unit + middle), 0),
                                2**bits - 1,
                            )
                            assert got_z[b, h, i, c].item() == pytest.approx(
                                (code - middle) * unit * gain[c].item(), rel=1e-4, abs=1e-6
                            )
    assert (
        cache.keys.numel() == tokens_held * D * kb // 8
        and cache.rows.numel() == units * D // S // 4
    )
    assert (
        cache.key_scale.numel() == blocks * 2 * D
        and cache.value_scale.numel() == tokens_held * (2 if vb else 1)
    )
    assert cache.nbytes() == sum(t.numel() * t.element_size() for t in cache.state_dict().values())


def test_a_cache_of_integers_is_selected_joined_saved_and_not_cut_inside(tmp_path):
    """Selections and joins give the same numbers, a file too; truncating keeps the context or says
    why not."""

    def unpacked(cache: RaggedCache) -> tuple[torch.Tensor, ...]:
        return cache.view().packed[0].unpack()

    for vb in (4, 0):
        cache = context(4, vb, 3)[0]
        one = cache.select_sequences([1])
        two = cache.select_sequences([0, 1])
        back = RaggedCache.cat([cache.select_sequences([0]), one])
        for other in (two, back):
            same = zip(unpacked(cache), unpacked(other), strict=True)
            assert all(torch.equal(x, y) for x, y in same)
        n = int(one.n_packed.max())
        assert torch.equal(unpacked(one)[1][0], unpacked(cache)[1][1, :, :n])
        assert one.nbytes() < cache.nbytes()
        assert cache.lengths.tolist() == [80, 73]
        assert "truncating to [74, 74]" in error_line(cache.truncate, 74)
        assert cache.lengths.tolist() == [80, 73]
        cache.truncate(77)
        assert cache.lengths.tolist() == [77, 73]
        assert cache.n_window.tolist() == [2, 5]
    model = grouped_model(
        dtype=torch.float32, prefill="exact", key_bits=4, value_bits=4, key_block=16, topk_groups=2
    )
    idx = tokens(2, 90)
    with torch.no_grad():
        cache = model.new_cache(2, 90)
        model.prefill(idx[:, :80], cache)
        cache.save(tmp_path / "c.safetensors")
        again = KVCache.load(tmp_path / "c.safetensors", model)
        for step in idx[:, 80:].split(1, 1):
            assert torch.equal(model.decode(step, cache), model.decode(step, again))


# ----------------------------------------------------------------------------- decoding


def path_by_hand(path, q, k, v) -> torch.Tensor:
    """ValueGroupPath over integers, token by token: before each query whole blocks have left the
    tail, keys with a step per channel of their block, values with a step per token and head; the
    first tokens are whole."""
    (B, H, T, D) = q.shape
    Hkv = k.size(1)
    cfg = path.cfg
    out = torch.zeros_like(q)
    d = D // cfg.n_groups
    G = cfg.block
    for b in range(B):
        for h in range(H):
            kv = h * Hkv // H
            for t in range(T):
                n = max(0, (t + 1 - cfg.first_whole - cfg.kv_tail) // G * G)
                ks = k[b, kv, : t + 1].double().clone()
                vs = v[b, kv, : t + 1].double().clone()
                for first in range(cfg.first_whole, cfg.first_whole + n, G):
                    for c in range(D):
                        ks[first : first + G, c] = uniform_by_hand(
                            k[b, kv, first : first + G, c], cfg.key_bits
                        )
                for j in range(cfg.first_whole, cfg.first_whole + n):
                    norm = [
                        float(v[b, kv, j, g * d : (g + 1) * d].square().sum())
                        for g in range(cfg.n_groups)
                    ]
                    best = sorted(range(cfg.n_groups), key=lambda g, s=norm: (-s[g], g))[: path.k]
                    kept = torch.zeros(D, dtype=torch.bool)
                    for g in best:
                        kept[g * d : (g + 1) * d] = True
                    vs[j] = 0
                    vs[j, kept] = uniform_by_hand(v[b, kv, j, kept], cfg.value_bits)
                s = ks @ q[b, h, t].double() / D**0.5
                out[b, h, t] = s.softmax(0) @ vs
    return out


@pytest.mark.parametrize(
    "kv",
    [
        dict(topk_groups=4, key_bits=4, value_bits=4),
        dict(topk_groups=2, key_bits=8, value_bits=2, kv_sinks=0),
        dict(topk_groups=3, key_bits=3, value_bits=4, kv_tail=5),
    ],
    ids=["whole", "half", "tail"],
)
def test_decode_mode_is_what_tokens_one_by_one_read(kv):
    """Without a cache, through a cache token by token, in training and by hand: the same outputs."""
    torch.manual_seed(0)
    cfg = KVConfig(
        **{
            **dict(n_groups=4, mask_scope="head", value_basis="native", key_block=16, kv_tail=2),
            **kv,
        }
    )
    model_cfg = TINY.__class__(**{**TINY.__dict__, "head_dim": 32})
    path = kv_router.ValueGroupPath(model_cfg, cfg).double().eval()
    x = torch.randn(1, 45, TINY.n_embd).double()
    q = normal(1, 6, 45, 32).double()
    (k, v) = normal(2, 1, 3, 45, 32, seed=1).double()
    with torch.no_grad():
        got = path(x, q, k, v)
        cache = path.new_cache(1, 45, k)
        steps = []
        for t in range(45):
            at = slice(t, t + 1)
            new = (q[:, :, at], k[:, :, at], v[:, :, at])
            steps.append(path.decode(x[:, at], *new, cache))
    torch.testing.assert_close(got, torch.cat(steps, 2), rtol=1e-9, atol=1e-9)
    trained = path.train()(x, q, k, v)
    torch.testing.assert_close(got, path_by_hand(path, q, k, v), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained, got, rtol=1e-9, atol=1e-9)
    assert int(cache.n_packed) == (45 - cfg.first_whole - cfg.kv_tail) // 16 * 16
    sinks = cache.view().sinks
    assert (0 if sinks is None else int(sinks.count)) == cfg.first_whole


def test_training_over_integers_passes_gradients_straight_through():
    """The gradient of what was rounded is that of what came: as if rounding had added constants to
    keys and kept values; a dropped group of a token that was never read whole has none."""
    torch.manual_seed(0)
    how = dict(n_groups=4, topk_groups=2, key_bits=4, value_bits=2, key_block=16, kv_tail=1)
    cfg = KVConfig(**how, mask_scope="head", value_basis="native", kv_sinks=2)
    model_cfg = TINY.__class__(**{**TINY.__dict__, "head_dim": 32})
    path = kv_router.ValueGroupPath(model_cfg, cfg).double().train()
    q = normal(1, 6, 39, 32).double()
    inputs = [t.double().requires_grad_() for t in normal(2, 1, 3, 39, 32, seed=1)]
    weight = normal(1, 6, 39, 32, seed=2).double()
    (weight * path(None, q, *inputs)).sum().backward()
    k, v = (t.detach() for t in inputs)
    mask = top_k_mask(group_energy(v, 4, 3), 2)
    keys, values = path._rounded(k, v, v * expand_mask(mask, 32), mask)
    shifts = [(keys - k), (values - v)]
    again = [t.clone().requires_grad_() for t in (k, v)]
    stored = [a + s for a, s in zip(again, shifts, strict=True)]
    stored[1] = torch.where(expand_mask(mask, 32), stored[1], values)
    stored[1] = torch.cat((again[1][:, :, :2], stored[1][:, :, 2:]), 2)
    (weight * plain_windowed_attention(q, *again, *stored, path.window)).sum().backward()
    for got, want in zip(inputs, again, strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    assert float(inputs[0].grad.abs().min()) > 0


def test_whole_means_not_even_rounded():
    """What a teacher and a warm-up read is what came, whatever is stored, in training and measuring;
    padding is refused where keys are rounded by blocks of a row."""
    idx = tokens(2, 60)
    want = tiny_model()(idx)
    kv = KVConfig(topk_groups=4, key_bits=4, value_bits=4, key_block=16)
    model = kv_router.attach(tiny_model(), kv, [idx])
    for mode in (model.train, model.eval):
        mode()
        kv_router.set_kept(model, 4, whole=True)
        torch.testing.assert_close(model(idx), want, rtol=1e-9, atol=1e-9)
        kv_router.set_kept(model, 4)
        assert not torch.allclose(model(idx), want, rtol=1e-3, atol=1e-3)
    pad = torch.tensor([0, 3])
    assert "training over integers with padding" in error_line(model.train(), idx, pad)


def test_routers_learn_over_integers_as_over_numbers():
    """With --lm_to_router a router's gradient over 8 bits is that over whole numbers but for
    rounding: dropped groups have a part in it, too."""
    how = dict(n_groups=4, topk_groups=2, value_router="linear", lm_to_router=True, kv_tail=1)
    storage = (dict(kv_tail_block=16), dict(key_bits=8, value_bits=8, key_block=16, kv_sinks=0))
    model_cfg = TINY.__class__(**{**TINY.__dict__, "head_dim": 32})
    q = normal(1, 6, 60, 32).double()
    k, v = normal(2, 1, 3, 60, 32, seed=1).double()
    x = normal(1, 60, TINY.n_embd, seed=3).double()
    grads = []
    for stored in storage:
        torch.manual_seed(1)
        path = kv_router.ValueGroupPath(model_cfg, KVConfig(**how, **stored)).double().train()
        (path(x, q, k, v) * normal(1, 6, 60, 32, seed=2)).sum().backward()
        grads.append(path.router.weight.grad.flatten())
    assert torch.cosine_similarity(*grads, 0) > 0.99


@pytest.mark.skipif(triton is None, reason="the kernels need triton")
@pytest.mark.parametrize(
    ("S", "K", "kb", "vb", "scope", "D"),
    [
        (4, 4, 4, 4, "layer", 32),
        (4, 2, 4, 4, "head", 64),
        (8, 3, 8, 4, "head", 32),
        (2, 1, 4, 8, "layer", 16),
        (4, 4, 2, 2, "head", 32),
        (4, 3, 8, 2, "layer", 64),
        (4, 2, 3, 3, "head", 64),
        (2, 1, 4, 3, "layer", 16),
    ],
)
def test_tokens_by_kernel_form_the_blocks_that_append_forms(S, K, kb, vb, scope, D, monkeypatch):
    """Token by token by kernel from ragged lengths, past two blocks: the same codes, steps, masks,
    counts, window and first tokens, bit for bit."""
    B = 2
    Hkv = 3
    T = 30
    more = 37
    cfg = KVConfig(
        n_groups=S,
        topk_groups=K,
        mask_scope=scope,
        kv_tail=2,
        key_bits=kb,
        value_bits=vb,
        key_block=16,
        kv_sinks=3,
    )
    k, v = normal(2, B, Hkv, T + more, D).to(DEVICE)
    mask = top_k_mask(group_energy(v, S, Hkv if scope == "head" else 1), K)
    calls = []
    right = packed_cache.append_packed

    def counted(*args, **kw) -> None:
        calls.append(args)
        right(*args, **kw)

    monkeypatch.setattr(packed_cache, "append_packed", counted)

    def filled(kernel: bool) -> tuple[PackedCache, list]:
        """A cache of T tokens at once and `more` one by one, and its counts after each."""
        monkeypatch.setattr(packed_cache, "use_triton", lambda *about: kernel)
        cache = PackedCache(B, T + more, Hkv, D, cfg, K, k, codec=codec_of(cfg))
        n_pad = torch.tensor([0, 5], device=DEVICE)
        cache.append(NewTokens(k[:, :, :T], v[:, :, :T], n_pad, mask[:, :, :T]))
        counts = []
        for t in range(T, T + more):
            at = slice(t, t + 1)
            route = None if kernel else mask[:, :, at]  # the kernel finds it by itself
            cache.append(NewTokens(k[:, :, at], v[:, :, at], None, route))
            counts.append((cache.n_packed.tolist(), cache.n_window.tolist()))
        return cache, counts

    by_append, want = filled(False)
    assert not calls
    by_kernel, got = filled(True)
    assert len(calls) == more
    assert got == want
    assert by_kernel.n_packed.tolist() == [48, 48]
    held = by_kernel.state_dict()
    for name, a in by_append.state_dict().items():
        assert torch.equal(a, held[name]), name


def test_rows_of_a_batch_are_alone_and_prompts_may_come_in_pieces():
    """Prompts of several lengths together or alone, whole or in pieces of 7 tokens: the same tokens
    follow."""
    model = grouped_model(
        dtype=torch.float64,
        prefill="exact",
        mask_scope="head",
        value_router="norm",
        kv_tail=2,
        topk_groups=2,
        key_bits=4,
        value_bits=4,
        key_block=16,
    )
    prompts = [tokens(n, seed=n).tolist() for n in (3, 61, 40)]
    together = generate(model, prompts, 30)[0]
    for p, row in zip(prompts, together, strict=True):
        assert generate(model, [p], 30)[0][0] == row
    pieces = generate(model, prompts[1:], 30, prefill_tokens=200)[0]
    assert pieces == together[1:]


def test_padded_rows_without_a_cache_are_what_they_are_alone():
    """Integers read in decode mode: a row behind padding gets what it gets alone."""
    four = dict(key_bits=4, value_bits=4, key_block=16, kv_tail=2, topk_groups=2)
    model = grouped_model(prefill="exact", mask_scope="head", value_router="norm", **four)
    x = tokens(2, 60)
    with torch.no_grad():
        got = model(x, pad=torch.tensor([0, 13]))
        assert (got[0] - model(x[:1])[0]).abs().max() < 1e-9
        assert (got[1, 13:] - model(x[1:, 13:])[0]).abs().max() < 1e-9


def test_integers_are_refused_where_they_cannot_be():
    """One line each: rows that do not fill bytes, one kind of integer only, reconstructors, cuts
    inside a block."""
    four = dict(key_bits=4, value_bits=4)
    for bad, said in (
        (dict(key_bits=4), "value_bits=16"),
        ({**four, "key_bits": 5}, "key_bits=5"),
        ({**four, "value_bits": 0}, "kv_bytes"),
        ({**four, "reconstructor": "mlp"}, "mlp"),
        ({**four, "kv_sinks": -2}, "kv_sinks=-2"),
        ({**four, "prefill": "routed"}, "routed"),
        ({**four, "key_block": 48}, "key_block=48"),
    ):
        assert said in error_line(KVConfig, **bad)
    assert "must fill bytes" in error_line(
        KVConfig(n_groups=8, key_bits=4, value_bits=2).check_model, TINY
    )
    model = grouped_model(
        prefill="exact",
        key_bits=4,
        value_bits=4,
        key_block=16,
        mask_scope="head",
        value_router="norm",
    ).eval()
    with torch.no_grad():
        cache = model.new_cache(1, 80)
        model.prefill(tokens(1, 80), cache)
    assert "blocks of 16" in error_line(cache.layers[0].truncate, 30)
    cache.layers[0].truncate(4 + 32)
    assert cache.layers[0].n_packed.tolist() == [32]
    assert cache.layers[0].n_window.tolist() == [0]


def test_integers_are_close_to_dense_and_closer_with_more_bits():
    """8 bits of everything change logits little, 4 more, 2 most; training reads the same."""
    dense = tiny_model(dtype=torch.float32)
    idx = tokens(1, 120)
    errors = []
    with torch.no_grad():
        want = dense(idx)
        for bits in (8, 4, 2):
            cfg = KVConfig(topk_groups=4, key_bits=bits, value_bits=bits, key_block=16)
            model = kv_router.attach(tiny_model(dtype=torch.float32), cfg, [idx]).eval()
            errors.append((model(idx) - want).abs().mean().item())
    assert 0 < 4 * errors[0] < errors[1] and 2 * errors[1] < errors[2]
    trained = model.train()(idx)
    torch.testing.assert_close(trained, model.eval()(idx), rtol=1e-4, atol=1e-4)


def test_experts_hold_integers(tmp_path):
    """mixSGA's experts over integers: nearer with more bits, fewer bytes, the same after a selection,
    a join and a file; refused where it would not count."""
    cfg = TINY.__class__(**{**TINY.__dict__, "n_head": 4, "n_kv_head": 4})
    idx = tokens(2, 140)
    model = (
        shared_heads.attach(
            tiny_model(cfg=cfg), KVConfig(kv="mixsga", kv_tail=5), MixConfig(expert_ratios="1:1:2")
        )
        .double()
        .eval()
    )

    def decoded() -> tuple[torch.Tensor, KVCache]:
        with torch.no_grad():
            cache = model.new_cache(2, 150)
            return read_in_pieces(model, idx, cache, [120] + [1] * 20)[:, 120:], cache

    want, whole = decoded()
    errors = []
    for bits in (8, 4, 2):
        with mixsga.stored_in(model, bits, bits, 16), torch.no_grad():
            got, cache = decoded()
            errors.append((got - want).abs().mean().item())
            assert cache.nbytes() < 0.55 * whole.nbytes()
            assert shared_heads.kept_shares(model, cache) == pytest.approx(
                shared_heads.kept_shares(model, whole), rel=0.01
            )
            for part in cache.layers[0].parts:
                assert not (part.n_packed % 16).any() and (part.n_window < 16).all()
            cache.save(tmp_path / "c")
            again = KVCache.load(tmp_path / "c", model)
            one = KVCache.cat([cache.select_sequences([b]) for b in range(2)])
            following = [model.decode(idx[:, :1], c) for c in (cache, again, one)]
            assert torch.equal(following[0], following[1])
            torch.testing.assert_close(following[0], following[2])
            assert "integers without a cache" in error_line(model, idx)
    assert 0 < 4 * errors[0] < errors[1] and 2 * errors[1] < errors[2]
    assert "levels take 2 S" in error_line(
        KVConfig, kv="select", n_groups=64, key_bits=4, value_bits=0
    )
    assert "whole numbers" in error_line(
        shared_heads.attach,
        tiny_model(cfg=cfg),
        KVConfig(kv="mixsga", key_bits=4, value_bits=4),
        MixConfig(),
    )
