"""Layers that slide: what they read, what they hold, and what a cache of them can be asked."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from helpers import TINY, error_line, read_in_pieces, tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import save_file

import kv_router
import mixsga
from baselines import kivi, quest, shared_heads
from config import KVConfig
from kernels import append_window
from model import Transformer
from settings.experts import MixConfig
from storage.cache import KVCache, NewTokens
from storage.kernel_base import triton
from storage.layout import WindowView
from storage.saved import numbers_hash
from storage.sliding import SlidingCache

W = 6
T = 25
SLIDING = replace(TINY, n_layer=3, sliding_window=W, global_every=3, rope_local_theta=50.0)
PAD = torch.tensor([0, 9])


def sliding_model(**changes) -> Transformer:
    return tiny_model(cfg=replace(SLIDING, **changes))


def cached(model: Transformer, x, pieces, pad=None) -> tuple[torch.Tensor, KVCache]:
    """Logits of x (2, T) read in pieces, and the cache."""
    cache = model.new_cache(len(x), x.size(1) + 5)
    return read_in_pieces(model, x, cache, pieces, pad), cache


@torch.no_grad()
def by_hand(model: Transformer, x: torch.Tensor) -> torch.Tensor:
    """Logits (1, T, vocab): every query reads its own list of tokens, one head at a time; RoPE by
    the layer's own base, angle by angle."""
    cfg = model.cfg
    D = cfg.head_dim
    h = model.embed_tokens(x)
    place = torch.arange(x.size(1), dtype=torch.float64)
    for i, block in enumerate(model.layers):
        base = cfg.rope_theta if i == 2 else cfg.rope_local_theta
        angle = place[:, None] * base ** (-torch.arange(0, D, 2) / D)
        _, q, k, v = block.before(h, angle.cos(), angle.sin())
        y = torch.zeros_like(q)
        for head in range(cfg.n_head):
            kv = head // 2
            for t in range(x.size(1)):
                read = [j for j in range(t + 1) if i == 2 or t - j < W]
                p = (k[0, kv, read] @ q[0, head, t] / D**0.5).softmax(0)
                y[0, head, t] = p @ v[0, kv, read]
        h = block.after(h, y)
    return model.lm_head(model.norm(h))


def test_a_layer_that_slides_reads_its_window_and_its_own_rotations():
    """Logits equal loops in which layers 0 and 1 read 6 tokens, with a RoPE base of their own, and
    layer 2 reads all."""
    model = sliding_model()
    x = tokens(1, T)
    with torch.no_grad():
        assert (model(x) - by_hand(model, x)).abs().max() < 1e-6  # tables are float32


@pytest.mark.parametrize("pad", [None, PAD])
@pytest.mark.parametrize("pieces", [(T,), (1,) * T, (4, 1, 9, 1, 1, 2, 7), (13, 12)])
def test_cached_equals_uncached(pieces, pad):
    """In any pieces, some longer than the window, with padding."""
    model = sliding_model()
    x = tokens(2, T)
    with torch.no_grad():
        want = model(x, pad=pad)
    got, cache = cached(model, x, pieces, pad)
    for b, first in enumerate([0, 0] if pad is None else pad.tolist()):
        assert (got[b, first:] - want[b, first:]).abs().max() < 1e-10
    assert cache.lengths.tolist() == ([T, T] if pad is None else (T - PAD).tolist())


def test_only_the_window_is_held_and_counted():
    """Two of three layers hold W tokens of each sequence, whole, whatever its length; dense bytes
    count as many for them."""
    model = sliding_model()
    _, cache = cached(model, tokens(2, T), (T,))
    number = 8 * 2 * 3 * 16  # bytes of a token's keys and values in a layer
    counts = 2 * 8  # of each layer
    assert cache.layers[0].nbytes() == cache.layers[1].nbytes() == 2 * W * number + counts
    assert cache.layers[2].nbytes() == 2 * (T + 5) * number + counts
    assert model.dense_bytes(2 * T, cache) == (2 * 2 * W + 2 * T) * number
    short = model.new_cache(1, 4)
    model.prefill(tokens(1, 4), short)
    assert short.nbytes() == 3 * (4 * number + 8) and model.dense_bytes(4, short) == 12 * number


def test_caches_are_picked_joined_saved_and_tried_again(tmp_path):
    """Of several lengths, below and past the window, one with room for less than a window: logits
    of what follows are those of each sequence alone; a failed prefill leaves a ring as it was."""
    model = sliding_model()
    x = tokens(3, T, seed=3)
    alone = []
    for row, n in zip(x, (T, 2, 11), strict=True):
        cache = model.new_cache(1, n + 3)
        model.prefill(row[None, :n], cache)
        alone.append(cache)
    y = tokens(3, 3, seed=9)
    with torch.no_grad():
        want = torch.cat(
            [
                model.prefill(y[i : i + 1], KVCache.cat([c.select_sequences([0])]), last_only=False)
                for i, c in enumerate(alone)
            ]
        )
        joined = KVCache.cat(alone).select_sequences([2, 0, 1])
        joined.save(tmp_path / "cache", model)
        loaded = KVCache.load(tmp_path / "cache", model)
        for cache in (joined, loaded):
            saved = cache.snapshot()
            model.prefill(y, cache)
            cache.restore(saved)
            got = model.prefill(y[[2, 0, 1]], cache, last_only=False)
            assert (got - want[[2, 0, 1]]).abs().max() < 1e-10


def test_a_cache_saved_before_a_setting_had_a_name_loads(tmp_path):
    """What an older file does not say of its model has the usual value: read where that is the
    model's, refused by name where it is not."""
    x = tokens(1, T)
    for name, model in (("usual", tiny_model()), ("sliding", sliding_model())):
        _, cache = cached(model, x, (T,))
        cache.save(tmp_path / name, model)
        with safe_open(tmp_path / name, "pt") as f:
            meta = f.metadata()
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        about = json.loads(meta["about"])
        for setting in ("sliding_window", "global_every", "rope_local_theta", "qk_norm"):
            del about["model"][setting]
        meta["about"] = json.dumps(about)
        meta["sha256"] = sha256((numbers_hash(tensors) + meta["about"]).encode()).hexdigest()
        save_file(tensors, tmp_path / name, meta)
    assert KVCache.load(tmp_path / "usual", tiny_model()).lengths.tolist() == [T]
    line = error_line(KVCache.load, tmp_path / "sliding", sliding_model())
    assert "the model: sliding_window is '0'" in line


def test_truncation_within_the_window_is_exact_and_past_it_refused():
    """A sequence that never filled its window forgets its newest tokens; one that did says that
    what came before is gone, and nothing is forgotten."""
    model = sliding_model()
    x = tokens(1, T)
    with torch.no_grad():
        want = model(x[:, :6])[:, 3:]
        _, cache = cached(model, x[:, :W], (W,))
        cache.truncate(3)
        assert (model.prefill(x[:, 3:6], cache, last_only=False) - want).abs().max() < 1e-10
    _, cache = cached(model, x, (T,))
    assert f"window of {W}" in error_line(cache.truncate, T - 1)
    full = model.new_cache(1, W - 1)
    model.prefill(x[:, : W - 1], full)
    assert f"of {W - 1} tokens cannot take {W}" in error_line(model.decode, x[:, :1], full)
    assert cache.lengths.tolist() == [T]
    cache.truncate(T)


def test_a_ring_takes_more_than_it_holds_at_once():
    """Any number of new columns, padding among them: slots hold the newest W tokens, each where its
    number modulo W says."""
    g = torch.Generator().manual_seed(0)
    cache = SlidingCache(2, 50, 1, 1, torch.zeros(0), W)
    seen = [[], []]
    for n, pad in ((3, 0), (14, 9), (1, 0), (7, 2), (1, 1), (20, 0)):
        k = torch.rand(2, 1, n, 1, generator=g)
        cache.append(NewTokens(k, -k, torch.tensor([0, pad])))
        for b, skip in enumerate((0, pad)):
            seen[b] += k[b, 0, skip:, 0].tolist()
        window = cache.view().window
        for b in range(2):
            assert int(cache.lengths[b]) == len(seen[b])
            held = seen[b][-W:]
            got = window.aligned(W)[0][b, 0, : len(held), 0]
            assert got.tolist() == held and int(window.count[b]) == len(held)
            slots = {(len(seen[b]) - 1 - i) % W: v for i, v in enumerate(reversed(held))}
            assert all(float(cache.window_v[b, 0, s, 0]) == -v for s, v in slots.items())


@pytest.mark.skipif(triton is None, reason="the kernel needs triton")
def test_the_append_kernel_goes_round_a_ring():
    """As SlidingCache calls it, with a count past W: the slots that plain code writes."""
    rings = []
    for impl in ("triton", "torch"):
        ring = WindowView(
            torch.zeros(2, 3, W, 8), torch.zeros(2, 3, W, 8), None, torch.tensor([4, 17])
        )
        for i in range(5):
            k, v = torch.randn(2, 2, 3, 1, 8, generator=torch.Generator().manual_seed(i))
            append_window(ring, k, v, impl)
        rings.append(ring)
    assert all(torch.equal(a, b) for a, b in zip(rings[0], rings[1], strict=True) if a is not None)
    assert rings[0].count.tolist() == [9, 22]


# -------------------- methods leave them alone


def test_only_layers_that_read_everything_are_compressed():
    """Value groups, KIVI, Quest, mixSGA and GQA take layer 2 of 3; a choice of others, and CLA, are
    refused."""
    x = tokens(1, 40)
    attached = {
        "groups": lambda m: kv_router.attach(m, KVConfig(), [x]),
        "kivi": lambda m: kivi.attach(m, kivi.Format(4, 16, 16)),
        "quest": lambda m: quest.attach(m, KVConfig(topk_groups=4), 32, 0),
        "mixsga": lambda m: mixsga.attach(
            m, KVConfig(kv="mixsga"), MixConfig(group_sizes="1,3", expert_ratios="1:1")
        ),
        "gqa": lambda m: shared_heads.attach(
            m, KVConfig(kv="gqa"), MixConfig(group_sizes="1,3", expert_ratios="1:1")
        ),
    }
    for attach in attached.values():
        model = sliding_model()
        slides = [block.self_attn.kv_path for block in model.layers]
        attach(model)
        after = [block.self_attn.kv_path for block in model.layers]
        assert [a is b for a, b in zip(slides, after, strict=True)] == [True, True, False]
    kv = KVConfig(kv_layers="0,1")
    assert "choose layer 2" in error_line(kv_router.attach, sliding_model(), kv)
    line = error_line(shared_heads.attach, sliding_model(), KVConfig(kv="cla"), MixConfig())
    assert "kv=cla with sliding_window=6" in line
