"""State of a prompt is its cache's own: prompts interleaved, on two threads, failed half-way or
emptied leave every other as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import TINY, error_line, tokens
from stores import (  # noqa: F401 (fixtures)
    PATHS,
    agree,
    decoded,
    filled,
    kivi_codes,
    model,
    name,
    named,
    padded,
    quest_pages,
)

import selector
from generate import DecodeGraph, generate
from model import Transformer
from storage.cache import KVCache
from storage.integers.codecs import IntCodec
from storage.ragged import RaggedCache


def test_interleaved_prompts_do_not_meet(model):
    """Between every two layers of a prompt another one is read into another cache, by the same
    model: both go on as alone."""
    first = tokens(1, 31, seed=1)
    second = tokens(1, 23, seed=2)
    want = [decoded(model, filled(model, p[0]), 5) for p in (first, second)]
    for i in range(len(model.layers)):
        cache = model.new_cache(1, 90)
        other = model.new_cache(1, 90)
        inside = []

        def between(module, args, other=other, inside=inside):
            if not inside:
                inside.append(True)
                model.prefill(second, other)

        hook = model.layers[i].mlp.register_forward_pre_hook(between)
        try:
            with torch.no_grad():
                model.prefill(first, cache)
        finally:
            hook.remove()
        assert inside
        agree(decoded(model, cache, 5), want[0])
        agree(decoded(model, other, 5), want[1])


def test_two_threads_on_one_model_do_not_meet(name, model):
    """Two threads read prompts of their own and generate, and compute logits without a cache, with
    one model: each gets what it gets alone."""
    prompts = [tokens(n, seed=n).tolist() for n in (33, 21)]
    want = [generate(model, [p], 5)[0][0] for p in prompts]
    uncached = name != "mixsga, integers"
    with torch.no_grad():
        logits = [model(torch.tensor([p])) if uncached else None for p in prompts]
    failed = []
    start = threading.Barrier(2)

    def work(i: int) -> None:
        try:
            start.wait()
            for _ in range(2):
                if generate(model, [prompts[i]], 5)[0][0] != want[i]:
                    failed.append(f"thread {i}: other tokens")
                with torch.no_grad():
                    if uncached and not torch.equal(model(torch.tensor([prompts[i]])), logits[i]):
                        failed.append(f"thread {i}: other logits")
        except Exception as e:
            failed.append(f"thread {i}: {type(e).__name__}: {e}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_another_thread_between_two_layers_is_not_met(name, model):
    """The same without chance: while logits of a sequence are computed without a cache, another
    thread computes those of another one between every two layers."""
    if name == "mixsga, integers":  # refused without a cache
        return
    first = tokens(1, 31, seed=1)
    second = tokens(1, 23, seed=2)
    with torch.no_grad():
        want = model(first), model(second)
    for i in range(len(model.layers)):
        got = []

        def work(got=got):
            with torch.no_grad():
                got.append(model(second))

        def between(module, args, got=got, work=work):
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()

        hook = model.layers[i].mlp.register_forward_pre_hook(between)
        try:
            with torch.no_grad():
                agree(model(first), want[0])
        finally:
            hook.remove()
        agree(got[0], want[1])


class Failed(Exception):
    """What is thrown."""


def fail(*args, **kwargs):
    raise Failed


def places(model: Transformer) -> list:
    """Modules at which a prompt may fail: before a layer stores, after it, after all of them."""
    out = []
    for block in model.layers:
        out += [block.input_layernorm, block.self_attn.o_proj, block.mlp]
    return [*out, model.lm_head]


def test_a_prefill_that_failed_half_way_is_tried_again(model):
    """At every place, as the first prompt and as what follows one: the cache is as it was, and the
    same prompt again gives what it would have given."""
    idx, pad = padded((26, 7, 1))
    more, more_pad = padded((5, 2, 4))
    cache = model.new_cache(3, 90)
    with torch.no_grad():
        want = [model.prefill(idx, cache, pad), model.prefill(more, cache, more_pad)]
    want = [*want, decoded(model, cache, 3)]
    for place in places(model):
        cache = model.new_cache(3, 90)
        got = []
        for part, n_pad in ((idx, pad), (more, more_pad)):
            before = cache.lengths.tolist(), cache.length
            hook = place.register_forward_pre_hook(fail)
            with pytest.raises(Failed), torch.no_grad():
                model.prefill(part, cache, n_pad)
            hook.remove()
            assert (cache.lengths.tolist(), cache.length) == before
            with torch.no_grad():
                got.append(model.prefill(part, cache, n_pad))
        got.append(decoded(model, cache, 3))
        for a, b in zip(got, want, strict=True):
            agree(a, b)


@pytest.mark.parametrize("kind", ["selection", "selection, shared", "selection, integers"])
def test_packing_that_failed_half_way_is_tried_again(kind, monkeypatch):
    """The same where a layer's context cannot be packed, after others were, or its window cannot be
    filled once keys lie there."""
    model = PATHS[kind]()
    idx = tokens(1, 30, seed=2)
    want = decoded(model, filled(model, idx[0]), 10)
    verbs = (
        (RaggedCache, "pack"),
        (selector, "fill_windows"),
        (RaggedCache, "take"),
        (IntCodec, "ints"),
    )
    failures = 0
    for owner, verb in verbs:
        for after in (0, 1, 2):
            cache = model.new_cache(1, 90)
            calls = []
            inner = getattr(owner, verb)

            def failing(self, *args, calls=calls, inner=inner, after=after, **kwargs):
                calls.append(1)
                if len(calls) > after:
                    raise Failed
                return inner(self, *args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, verb, failing)
                try:
                    with torch.no_grad():
                        model.prefill(idx, cache)
                except Failed:
                    failures += 1
                    with torch.no_grad():
                        patch.undo()
                        assert cache.lengths.tolist() == [0]
                        model.prefill(idx, cache)
            agree(decoded(model, cache, 10), want)
    assert failures >= 3


def test_a_decode_that_failed_leaves_a_cache_that_says_so(model, tmp_path):
    """Some layers have the token, others do not: every later use is refused by one line."""
    idx = tokens(1, 12, seed=1)
    step = tokens(1, 1, seed=2)
    for i in range(len(model.layers)):
        cache = filled(model, idx[0])
        hook = model.layers[i].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Failed), torch.no_grad():
            model.decode(step, cache)
        hook.remove()
        for use in (
            lambda c: model.decode(step, c),
            lambda c: model.prefill(step, c),
            lambda c: c.save(tmp_path / "c.safetensors"),
            lambda c: KVCache.cat([filled(model, idx[0]), c]),
            lambda c: KVCache.cat([c, filled(model, idx[0])]),
            lambda c: model.decode(step, c.select_sequences([0])),
            lambda c: model.decode(step, KVCache.cat([c])),
            lambda c: DecodeGraph(model, c, step, fail, 1),
        ):
            with torch.no_grad():
                assert "failed half-way" in error_line(use, cache)


def test_a_refused_cut_changes_no_layer(name, model):
    """truncate to every third length: it is done in every layer or in none, and decoding goes on."""
    idx, pad = padded((26, 9, 1))
    with torch.no_grad():
        full = model.new_cache(3, 90)
        model.prefill(idx, full, pad)
    refused = 0
    for n in range(0, 27, 3):
        cache = full.select_sequences([0, 1, 2])
        before = cache.lengths.tolist()
        try:
            cache.truncate(n)
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e)
            wanted = before
        else:
            wanted = [min(n, length) for length in before]
        for layer in cache.layers:
            assert layer.lengths.tolist() == wanted
        assert torch.isfinite(decoded(model, cache, 2)).all()
    possible = name.startswith(("dense", "value", "no tail", "tail", "not", "rout", "reb", "cla"))
    assert not refused if possible else refused < 9


@pytest.mark.parametrize("ways", [*PATHS, quest_pages, kivi_codes], ids=named)
@pytest.mark.parametrize("n", [26, 2], ids=["long", "short"])
def test_an_emptied_cache_is_as_good_as_new(ways, n):
    """After truncate(0) another prompt, in rows of two lengths, a piece and steps give the logits
    of a cache that was never filled; only a selected context is not forgotten."""
    model = ways() if callable(ways) else PATHS[ways]()
    idx, pad = padded((24, 11))
    with torch.no_grad():
        used = model.new_cache(2, 90)
        model.prefill(tokens(2, n, seed=9), used)
        decoded(model, used, 3)
        if n > 3 and isinstance(used.layers[-1], RaggedCache):
            assert "selected context" in error_line(used.truncate, 0)
            return
        used.truncate(0)
        new = model.new_cache(2, 90)
        for cache in (used, new):
            cache.logits = [model.prefill(idx, cache, pad)]
            cache.logits.append(model.prefill(tokens(2, 3, seed=4), cache))
            cache.logits.append(decoded(model, cache, 3))
    assert used.lengths.tolist() == new.lengths.tolist() == [30, 17]
    assert used.length == new.length
    for got, want in zip(used.logits, new.logits, strict=True):
        assert torch.equal(got, want)


def test_length_is_no_more_than_what_is_held(model):
    """What the host knows of the longest row never refuses tokens that fit: a long row is dropped,
    or rows get their tokens in turn, and the others fill the model's context."""
    with torch.no_grad():
        idx, pad = padded((150, 3))
        cache = model.new_cache(2, TINY.block_size)
        model.prefill(idx, cache, pad)
        short = cache.select_sequences([1])
        assert torch.isfinite(decoded(model, short, 12)).all()
        assert short.lengths.tolist() == [15]
        cache = model.new_cache(2, TINY.block_size)
        model.prefill(tokens(2, 3, seed=1), cache)
        for turn in range(2):
            n_pad = torch.tensor([0, 100] if turn else [100, 0])
            model.prefill(tokens(2, 100, seed=turn), cache, n_pad)
        assert cache.lengths.tolist() == [103, 103]
        assert "context" in error_line(model.prefill, tokens(2, 58, seed=3), cache)
