"""Query-aware selection: packed equals masked, keeping everything is dense, and what a cache holds
is read alike by every verb."""

from __future__ import annotations

import itertools

import pytest
import torch
from choosing import (
    ALL,
    PAD,
    N,
    T,
    W,
    X,
    Y,
    config,
    dense,
    made,
    prefilled,
    real,
    run,
    selecting,
    settings,
)
from helpers import error_line, tiny_model

import selector
from config import SCOPES
from generate import generate
from storage.cache import KVCache
from storage.ragged import BASES, SHARED

# -------------------- packed, masked, whole


@ALL
def test_packed_equals_masked(scope, prefill):
    """Prompt and continuation through the cache give the logits of one uncached pass that reads the
    context as the choice kept it, left padding and a row without context included, for every
    allocation, budget and signal."""
    m = made(scope, prefill)
    for cfg in settings(scope, prefill):
        a, b, choice, _ = run(m, cfg)
        with torch.no_grad(), selector.masked_replay(m, choice, T - W):
            full = m(torch.cat((X, Y), 1), pad=torch.tensor(PAD))
        torch.testing.assert_close(real(a), real(full[:, :T]), rtol=0, atol=1e-9, msg=str(cfg))
        torch.testing.assert_close(b, full[:, T:], rtol=0, atol=1e-9, msg=str(cfg))
        valid = torch.arange(T - W) >= torch.tensor(PAD)[:, None]
        assert (
            not (choice.keep & ~valid[:, None]).any()
            and not (choice.mask & ~choice.keep[..., None]).any()
        )
        assert (choice.keep | ~(valid & (valid.cumsum(-1) <= 2))[:, None]).all()  # sinks
        assert 0.05 < choice.mask[:, :2].float().mean() < 0.6


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_a_routed_prefill_cannot_share_one_budget_between_layers(scope):
    """One line says so and what to do, when it is attached and when it is set."""
    assert "--allocation=layer" in error_line(
        selecting, scope, "routed", cfg=config(allocation="global")
    )
    assert "--allocation=layer" in error_line(
        made(scope, "routed").selector.set, config(allocation="global")
    )


@ALL
@pytest.mark.parametrize(
    "keep",
    [
        dict(token_keep=1.0, value_keep=1.0),
        dict(kv_keep=1.0),
        dict(token_keep=1.0, value_keep=1.0, fixed_k=True),
    ],
    ids=["shares", "joint", "fixed_k"],
)
def test_keeping_everything_is_dense(scope, prefill, keep):
    """Every token and group of the context is kept, padding is not, and the logits are the dense
    model's."""
    for fold in (True, False):
        for allocation in ("head", "layer"):
            a, b, choice, _ = run(made(scope, prefill, fold), config(allocation=allocation, **keep))
            valid = (torch.arange(T - W) >= torch.tensor(PAD)[:, None])[None, :, None]
            assert torch.equal(choice.keep, valid.expand_as(choice.keep)) and torch.equal(
                choice.mask, choice.keep[..., None].expand_as(choice.mask)
            )
            for got, want in zip((real(a), b), (real(dense()[0]), dense()[1]), strict=True):
                # folding rounds the weights
                torch.testing.assert_close(got, want, rtol=0, atol=1e-9 if fold else 1e-12)


@pytest.mark.parametrize("prefill", ["exact", "routed"])
def test_fold_leaves_the_logits(prefill):
    """Folded and not, the same prompt is kept the same way and gives the same logits; only an exact
    prefill's prompt is the dense one."""
    for cfg in (config(), config(relevance="predictor", kv_keep=0.4)):
        (a, b, choice, _), (a2, b2, choice2, _) = (
            run(made("head", prefill, fold), cfg) for fold in (False, True)
        )
        assert torch.equal(choice.mask, choice2.mask)
        torch.testing.assert_close(real(a), real(a2), rtol=0, atol=1e-9)
        torch.testing.assert_close(b, b2, rtol=0, atol=1e-9)
        same = (real(a) - real(dense()[0])).abs().max()
        assert (same < 1e-12) == (prefill == "exact") and (b - dense()[1]).abs().max() > 1e-3


# ----------------------------------------------------------------------------- decoding and storing


@ALL
def test_token_by_token_equals_one_call(scope, prefill):
    """After the prompt, tokens one at a time, decoded or as pieces, two at a time or at once: the
    same logits."""
    m = made(scope, prefill)
    for cfg in (
        config(token_keep=0.5, allocation="layer"),
        config(relevance="predictor_query", kv_keep=0.3, allocation="head"),
    ):
        whole = run(m, cfg)[1]
        for step, verb in ((1, "decode"), (1, "prefill"), (2, "prefill")):
            cache = prefilled(m)
            more = {} if verb == "decode" else {"last_only": False}
            with torch.no_grad():
                parts = [getattr(m, verb)(part, cache, **more) for part in Y.split(step, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
            assert cache.length == T + N
            assert cache.lengths.tolist() == [T + N - pad for pad in PAD]


@pytest.mark.parametrize("prefill", ["exact", "routed"])
@pytest.mark.parametrize(
    ("first", "pad"), [(7, (0, 3, 6)), (3, (0, 2, 5))], ids=["short", "padding_of_two_calls"]
)
def test_a_prompt_within_the_query_region_stays_whole(first, pad, prefill):
    """Nothing is chosen of a first call that is no longer than the region, and nothing later: the
    logits are the dense model's, also where a row's padding reaches into the second call."""
    m = made("head", prefill)
    x = X[:, :20]
    pad = torch.tensor(pad)
    m.selector.set(config(kv_keep=0.3))
    m.selector.keeps_choice = True
    m.selector.chosen = None
    parts = []
    with torch.no_grad():
        cache = m.new_cache(3, 20)
        for start, end in ((0, first), (first, 15), (15, 20)):
            rest = (pad - start).clamp(0, end - start)
            parts.append(m.prefill(x[:, start:end], cache, rest, last_only=False))
        want = tiny_model()(x, pad=pad)
    got = torch.cat(parts, 1)
    pad = pad.tolist()
    torch.testing.assert_close(real(got, pad), real(want, pad), rtol=0, atol=1e-9)
    assert m.selector.chosen is None


def test_a_cache_chooses_for_its_own_prompt():
    """Two prompts whose layers take turns, and one after a pass that failed half-way, are kept as
    each alone: no state of a prompt lies where two caches meet."""
    cfg = config(relevance="future", kv_keep=0.3)
    for prefill in ("exact", "routed"):
        m = made("shared", prefill)
        want = [run(m, cfg, x, Y[:1], None)[1] for x in (X[:1], X[1:2])]
        caches = [m.new_cache(1, T + N) for _ in want]
        with torch.no_grad():
            x = [m.embed_tokens(ids) for ids in (X[:1], X[1:2])]
            for i, block in enumerate(m.layers):
                for c, cache in enumerate(caches):
                    tables = m.rope_cos[:T], m.rope_sin[:T]
                    x[c] = block(x[c], *tables, "prefill", cache.layers[i])
            for cache in caches:
                cache.length = T
            for cache, logits in zip(caches, want, strict=True):
                got = m.prefill(Y[:1], cache, last_only=False)
                torch.testing.assert_close(got, logits, rtol=0, atol=1e-9)

            cache = m.new_cache(1, T + N)
            hook = m.layers[1].register_forward_pre_hook(stop)
            with pytest.raises(InterruptedError):
                m.prefill(X[1:2], cache)
            hook.remove()
            m.prefill(X[:1], cache)
            assert torch.equal(
                m.prefill(Y[:1], cache, last_only=False), run(m, cfg, X[:1], Y[:1], None)[1]
            )


def stop(module, args):
    """A hook that ends a pass."""
    raise InterruptedError


def test_generate_continues_prompts_of_any_length():
    """Greedy tokens of a ragged batch, two prompts within the query region, one of them a single
    token, are those of each prompt alone fed by hand."""
    m = made()
    prompts = [X[0].tolist(), X[1, :37].tolist(), X[2, :4].tolist(), X[2, :1].tolist()]
    m.selector.set(config(relevance="future", kv_keep=0.3))
    rows, _ = generate(m, prompts, 6)
    for prompt, row in zip(prompts, rows, strict=True):
        cache = m.new_cache(1, len(prompt) + 6)
        with torch.no_grad():
            idx = m.prefill(torch.tensor([prompt]), cache).argmax(-1)
            for token in row:
                assert int(idx) == token
                idx = m.decode(idx, cache).argmax(-1)


@pytest.mark.parametrize("scope", SCOPES)
def test_saved_joined_and_picked_caches_give_equal_logits(scope, tmp_path):
    """A cache written to a file and read again, rows taken out of one in any order, and caches of
    prompts that were read apart, joined, continue as the original does."""
    m = made(scope)
    cfg = config(token_keep=0.5, value_keep=0.4)
    b = run(m, cfg)[1]
    for rows in ([2, 0], [1], [0, 1, 2]):
        part = prefilled(m).select_sequences(rows)
        with torch.no_grad():
            got = m.prefill(Y[rows], part, last_only=False)
        torch.testing.assert_close(got, b[rows], rtol=0, atol=1e-9)
    apart = [prefilled(m, X[i : i + 1, pad:], None, more=i) for i, pad in enumerate(PAD)]
    with torch.no_grad():
        got = m.prefill(Y, KVCache.cat(apart), last_only=False)
    torch.testing.assert_close(got, b, rtol=0, atol=1e-9)
    cache = prefilled(m)
    cache.save(tmp_path / "cache.safetensors")
    again = KVCache.load(tmp_path / "cache.safetensors", m)
    with torch.no_grad():
        assert torch.equal(m.prefill(Y, again), m.prefill(Y, cache))


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "not folded"])
def test_settings_that_change_later_leave_a_cache_alone(fold):
    """A prompt that was packed goes on as it was packed, whatever the selector would do by now."""
    m = made("head", "exact", fold)
    settings = [config(kv_keep=0.5), config(kv_keep=1.0), config(kv_bytes=0.5)]
    for before, after in itertools.permutations(settings, 2):
        want = run(m, before)[1]
        cache = prefilled(m)
        m.selector.set(after)
        with torch.no_grad():
            assert torch.equal(m.prefill(Y, cache, last_only=False), want)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "not folded"])
def test_a_loaded_cache_is_read_as_it_was_packed(fold, tmp_path):
    """Whether values lie in the basis or as they are is told by the file, not by what the selector
    would do by now; a loaded cache joins the one that was saved."""
    m = made("head", "exact", fold)
    for before, after in ((1.0, 0.5), (0.5, 1.0)):
        want = run(m, config(kv_keep=before))[1]
        cache = prefilled(m)
        cache.save(tmp_path / "cache")
        m.selector.set(config(kv_keep=after))
        again = KVCache.load(tmp_path / "cache", m)
        with torch.no_grad():
            got = m.prefill(Y.repeat(2, 1), KVCache.cat([again, cache]), last_only=False)
        torch.testing.assert_close(got, want.repeat(2, 1, 1), rtol=0, atol=1e-12)


def test_fewer_bytes_are_held_and_shared_masks_once():
    """Less than dense; each layer's keys and rows are as many as the choice kept; masks shared by
    layers are one set of tensors: the cache is smaller than with masks per layer by exactly those
    of every other layer."""
    cfg = config(relevance="uniform", token_keep=0.5, value_keep=0.5, allocation="layer")
    *_, shared, one = run(made("shared"), cfg, X[:1], Y[:1], None)
    *_, each = run(made("layer"), cfg, X[:1], Y[:1], None)
    held = one.layers[1].state_dict()
    masks = sum(held[name].nbytes for name in (*SHARED, *BASES, "n_context"))
    assert each.nbytes() - one.nbytes() == masks > 0
    assert one.layers[0].bits.data_ptr() == one.layers[1].bits.data_ptr()
    assert each.layers[0].bits.data_ptr() != each.layers[1].bits.data_ptr()
    for cache in one.layers:
        assert len(cache.keys) == int(shared.keep.sum()) * 3 == 26 * 3
        assert len(cache.rows) == int(shared.mask.sum()) * 3 == 52 * 3
    assert one.nbytes() < each.nbytes() < made().dense_bytes(T + N, one)
