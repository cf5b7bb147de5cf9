"""The caches of shared KV heads: their bytes, and that they are joined, cut and loaded as others
are."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model, tokens
from shared_head_models import EIGHT, SETTINGS, made

import mixsga
from baselines import shared_heads
from storage.as_dense import as_dense
from storage.cache import KVCache, NewTokens
from storage.experts import ExpertCache


@pytest.mark.parametrize("tail", [0, 20])
def test_bytes_are_those_of_the_kept_heads(tail):
    """The cache of a prompt holds the experts' heads, a byte of mask for each of their tokens, the
    newest tokens whole with a byte each, and counters; at most 6 % more here, where sequences have
    other experts among their newest."""
    model = made(dtype=torch.float32, tail=tail)
    T = 150
    cache = model.new_cache(4, T)
    model.prefill(tokens(4, T), cache)
    least = 0
    for layer in cache.layers:
        heads = sum(int(p.n_packed.sum()) * p.Hkv for p in layer.parts) + 4 * tail * 8
        least += heads * 2 * 16 * 4 + 4 * T
    assert least <= cache.nbytes() < 1.06 * least + 4000
    assert tail or heads / (4 * 8 * T) == 0.5
    kept = shared_heads.kept_shares(model, cache)
    assert abs(kept - (least - 2 * 4 * T) / (2 * 4 * T * 8 * 2 * 16 * 4)) < 1e-9


@pytest.mark.parametrize("tail", [0, 3])
def test_a_cla_layer_holds_its_newest_tokens_alone(tail):
    """Half of the layers hold keys and values, the others those of the newest tokens."""
    model = made("cla", tail=tail)
    cache = model.new_cache(1, 10)
    model.prefill(tokens(1, 10), cache)
    dense = tiny_model(cfg=EIGHT).new_cache(1, 10)
    counters = 8 * 2  # lengths, or n_packed and n_window
    assert cache.nbytes() - counters - 8 == (dense.nbytes() - counters) * (10 + tail) / 20
    assert shared_heads.kept_shares(model, cache) == (10 + tail) / 20


@pytest.mark.parametrize("name", ["two", "tail", "cla tail"])
def test_caches_of_any_lengths_join(name):
    """All pairs of prompts of some lengths, whose experts' capacities differ, joined: two steps
    have the logits of one batch that was never cut."""
    lengths = (1, 2, 3, 5, 6, 9, 12)
    model = made(**SETTINGS[name])
    after = tokens(2, 2, seed=3)
    with torch.no_grad():
        alone = {}
        for n in lengths:
            for row in range(2):
                cache = model.new_cache(1, n + 2)
                model.prefill(tokens(1, n, seed=100 * row + n), cache)
                alone[row, n] = cache
        for a in lengths:
            for b in lengths:
                T = max(a, b)
                idx = torch.zeros(2, T, dtype=torch.int64)
                idx[0, T - a :] = tokens(a, seed=a)
                idx[1, T - b :] = tokens(b, seed=100 + b)
                whole = model.new_cache(2, T + 2)
                model.prefill(idx, whole, torch.tensor([T - a, T - b]))
                joined = KVCache.cat([alone[0, a], alone[1, b]])
                for t in range(2):
                    want = model.decode(after[:, t : t + 1], whole)
                    got = model.decode(after[:, t : t + 1], joined)
                    assert (got - want).abs().max() < 1e-10, (a, b, t)


def test_truncation_gives_back_the_window_or_says_why_not():
    """One expert: any cut. Random routers: what is in the window. Learned ones: nothing or all,
    since scores are summed up. What is left goes on as if the rest had never been."""
    x = tokens(2, 20)
    more = tokens(2, 1, seed=5)
    cases = {"gqa tail": [19, 7, 0, 20], "cla tail": [18, 0, 20], "tail": [0, 20], "random": [0]}
    for name, cuts in cases.items():
        for n in cuts:
            model = made(**SETTINGS[name])
            with torch.no_grad(), shared_heads.routing(model, "score"):
                cache = model.new_cache(2, 21)
                model.prefill(x, cache)
                cache.truncate(n)
                assert cache.lengths.tolist() == [n, n]
                got = model.decode(more, cache)
                assert got.isfinite().all()
                if name == "tail" or not n:
                    want = model(torch.cat((x[:, :n], more), 1))[:, -1:]
                    assert (got - want).abs().max() < 1e-10
    for name, n in (("tail", 18), ("random", 18), ("two", 3)):
        model = made(**SETTINGS[name])
        cache = model.new_cache(2, 20)
        model.prefill(x, cache)
        with pytest.raises(ValueError, match=f"truncating to {n} tokens"):
            cache.truncate(n)
        assert cache.lengths.tolist() == [20, 20]


def test_a_cut_window_fills_up_again():
    """Tokens of a window are dropped, of each sequence other ones, and come again: the same tokens
    lie in the same places as if none had been dropped."""
    path = mixsga.experts(made(tail=6, expert_router="random"))[0]
    k, v = torch.randn(2, 2, 8, 24, 16, dtype=torch.float64)
    index = torch.randint(0, 3, (2, 24))
    whole = path.new_cache(2, 30, k)
    cut = path.new_cache(2, 30, k)
    for cache in (whole, cut):
        cache.append(NewTokens(k[:, :, :20], v[:, :, :20], None, index[:, :20]))
    cut.truncate(torch.tensor([17, 19]))
    assert cut.n_packed.tolist() == [14, 14] and cut.n_window.tolist() == [3, 5]
    whole.append(NewTokens(k[:, :, 20:], v[:, :, 20:], None, index[:, 20:]))
    n_pad = torch.tensor([0, 2])
    cut.append(NewTokens(k[:, :, 17:], v[:, :, 17:], n_pad, index[:, 17:]))
    for key, t in whole.state_dict().items():
        n = min(len(t), len(cut.state_dict()[key]))
        assert torch.equal(t[:n], cut.state_dict()[key][:n]) or "." in key, key
    for ours, theirs in zip(whole.parts, cut.parts, strict=True):
        for got, want in zip(as_dense(ours), as_dense(theirs), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("1.keys"),
        lambda s: s.update({"3.keys": s["1.keys"]}),
        lambda s: s.update(window_k=s["window_k"].float()),
        lambda s: s.update(n_packed=s["n_packed"] + 1),
        lambda s: s.update(n_window=s["n_window"] + 9),
        lambda s: s.update({"0.n_packed": s["0.n_packed"] + 1000}),
        lambda s: s.update({"0.keys": s["0.keys"][:, :8]}),
    ],
)
def test_a_state_that_is_not_its_own_is_refused(change):
    """Names, types and counts are looked at, of the parts as well; a cache that refuses is as it
    was."""
    model = made(tail=4)
    cache = model.new_cache(2, 15)
    model.prefill(tokens(2, 15), cache)
    other = model.new_cache(2, 15).layers[0]
    before = other.state_dict()
    state = dict(cache.layers[0].state_dict())
    change(state)
    with pytest.raises(ValueError):
        other.load_state_dict(state)
    assert all(t is before[key] for key, t in other.state_dict().items()) and other.fresh
    other.load_state_dict(cache.layers[0].state_dict())
    assert other.lengths.tolist() == [15, 15]


def test_caches_of_other_experts_do_not_join():
    """Group sizes, windows and routers are settings: what differs is named."""
    layers = []
    for setting in (dict(), dict(tail=2), dict(expert_router="random"), dict(expert_groups=2)):
        layers.append(made(**setting).new_cache(1, 9).layers[0])
    for other in layers[1:]:
        with pytest.raises(ValueError, match="is needed"):
            ExpertCache.cat([layers[0], other])


def test_a_layer_of_cla_keeps_nothing_of_an_uncached_forward():
    """Its last reader clears what the source has put down for those above."""
    model = made(**SETTINGS["cla tail"])
    model(tokens(3, 7))
    assert not any(getattr(path, "seen", None) for path in shared_heads.sharing(model))
