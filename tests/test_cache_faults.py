"""Faults that caches of every kind must not have: rows that depend on their neighbours, on padding
or on how a prompt was cut; state shared between caches; settings that reach back into caches; files
of another model that load; caches left half-changed. Each test runs over every way to store."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers import INT4, error_line, grouped_model, tiny_model, tokens
from oracle import Oracle, Row
from stores import (  # noqa: F401 (fixtures)
    EXACT,
    PATHS,
    agree,
    decoded,
    filled,
    model,
    name,
    padded,
    takes_pieces,
)

import kv_router
import lora
import selector
from config import KVConfig, SelectConfig
from generate import generate, prefill
from routing.bases import read_metric
from settings.adapters import AdapterConfig
from storage.cache import KVCache
from storage.saved import fingerprint

# -------------------- rows for themselves


def test_joined_caches_of_unequal_capacity_decode_as_each_alone(model):
    """Caches of unequal max_len and length, some grown by decoding, are joined: every row goes on
    as alone."""
    lengths = (30, 1, 9, 17)
    steps_before = (0, 3, 0, 7)
    caches = []
    for b, (n, more) in enumerate(zip(lengths, steps_before, strict=True)):
        cache = filled(model, tokens(n, seed=b), max_len=100 - 15 * b)
        if more:
            decoded(model, cache, more, [b])
        caches.append(cache)
    joined = KVCache.cat(caches)
    assert joined.lengths.tolist() == [n + m for n, m in zip(lengths, steps_before, strict=True)]
    got = decoded(model, joined, 8)
    for b, cache in enumerate(caches):
        agree(got[b : b + 1], decoded(model, cache, 8, [b]))


def test_a_cache_of_no_sequence_is_fitted_and_joined(model):
    """What is left when no sequence is picked takes every verb of storage, and adds nothing to
    what it is joined with."""
    cache = filled(model, tokens(9))
    none = cache.select_sequences([])
    none.fit(0)
    none.fit(5)
    none.truncate(4)
    assert len(none.lengths) == 0
    agree(decoded(model, KVCache.cat([none, cache]), 3), decoded(model, cache, 3))


@pytest.mark.parametrize("lengths", [(1, 0, 30), (3, 0)])
def test_integers_joined_before_their_first_tokens_are_full(lengths):
    """Rows of which some, or all, may still fill the tokens that stay whole: joined, in any order,
    they decode as alone, over blocks that form."""
    model = grouped_model(**EXACT, **INT4, kv_tail=2, kv_sinks=4)
    caches = []
    for b, n in enumerate(lengths):
        caches.append(filled(model, tokens(n, seed=b)) if n else model.new_cache(1, 30))
    for order in (range(len(lengths)), reversed(range(len(lengths)))):
        order = list(order)
        joined = KVCache.cat([caches[b].select_sequences([0]) for b in order])
        got = decoded(model, joined, 26, order)
        for i, b in enumerate(order):
            agree(got[i : i + 1], decoded(model, caches[b].select_sequences([0]), 26, [b]))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("tail", "block"), [(0, 1), (0, 3), (0, 4), (1, 4), (4, 4), (2, 5)])
def test_a_window_of_blocks_is_read_alike_by_every_verb(tail, block, fold):
    """Without a tail and with blocks, too: the uncached forward, a routed prefill, one in pieces
    and decoding token by token all give the oracle's logits."""
    cfg = dict(**{**EXACT, "prefill": "routed"}, kv_tail=tail, kv_tail_block=block, topk_groups=1)
    plain = grouped_model(**cfg, fold=False)
    row = Row(Oracle(plain, fold))
    model = kv_router.fold(plain) if fold else plain
    idx = tokens(1, 30, seed=3)
    want = torch.tensor(np.stack([row.decode(int(t)) for t in idx[0]]))[None]
    with torch.no_grad():
        agree(model(idx), want)
        cache = model.new_cache(1, 30)
        agree(model.prefill(idx, cache, last_only=False), want)
        cache = model.new_cache(1, 30)
        pieces = [model.prefill(part, cache, last_only=False) for part in idx.split(7, 1)]
        agree(torch.cat(pieces, 1), want)
        cache = model.new_cache(1, 30)
        agree(torch.cat([model.decode(idx[:, t : t + 1], cache) for t in range(30)], 1), want)


def test_one_token_alone_is_what_it_is_in_a_padded_batch(name, model):
    """Prompts of 1, 2 and 24 tokens: the uncached forward, the prefill and the steps after it give
    every row what it gets alone."""
    lengths = (24, 1, 2, 1)
    idx, pad = padded(lengths)
    with torch.no_grad():
        if name != "mixsga, integers":  # refused without a cache
            together = model(idx, pad=pad)
            for b, n in enumerate(lengths):
                agree(together[b : b + 1, -n:], model(idx[b : b + 1, -n:]))
        cache = model.new_cache(len(lengths), 60)
        logits = model.prefill(idx, cache, pad)
    steps = decoded(model, cache, 10)
    for b, n in enumerate(lengths):
        alone = model.new_cache(1, 60)
        with torch.no_grad():
            agree(logits[b : b + 1], model.prefill(idx[b : b + 1, -n:], alone))
        agree(steps[b : b + 1], decoded(model, alone, 10, [b]))


def test_a_last_piece_of_one_token_is_a_piece(model):
    """Prompts cut so that one token is left, alone and beside others: logits, and steps after, are
    those of pieces read one by one; where a prompt is read as a whole, those of the whole."""
    lengths = (13, 5, 1)
    idx, pad = padded(lengths)
    for at_once in (12, 4):
        logits, cache = prefill(model, idx, 60, pad, at_once)
        steps = decoded(model, cache, 5)
        for b, n in enumerate(lengths):
            alone = model.new_cache(1, 60)
            prompt = idx[b : b + 1, -n:]
            # rows that fit together are read at once
            size = at_once if takes_pieces(model) and at_once < 13 else n
            with torch.no_grad():
                for piece in prompt.split(size, 1):
                    want = model.prefill(piece, alone)[:, -1]
            agree(logits[b : b + 1], want)
            agree(steps[b : b + 1], decoded(model, alone, 5, [b]))


def test_a_piece_of_one_token_is_read_by_the_equations():
    """The exact prefill of pieces of 12 and 1 tokens, without a tail: the last token reads itself
    whole, and what came before as it is stored."""
    plain = grouped_model(**EXACT, kv_tail=0, fold=False)
    row = Row(Oracle(plain, True))
    model = kv_router.fold(plain)
    idx = tokens(1, 13, seed=4)
    row.prefill(idx[0, :12].tolist())
    want = row.prefill(idx[0, 12:].tolist())
    got, cache = prefill(model, idx, 40, None, 12)
    agree(got, torch.tensor(want))
    follow = [int(t) for t in tokens(6, seed=80)]
    after = torch.tensor(np.stack([row.decode(t) for t in follow]))[None]
    agree(decoded(model, cache, 6), after)


def test_generated_tokens_do_not_depend_on_how_prompts_are_cut(model):
    """generate with prefill_tokens: greedy tokens of a row are those it gets alone."""
    prompts = [tokens(n, seed=n).tolist() for n in (11, 1, 4, 20)]
    for at_once in (1, 10):
        together, _ = generate(model, prompts, 3, prefill_tokens=at_once)
        # alone, a prompt is cut where it is cut in the batch
        if takes_pieces(model):
            size = at_once if 0 < at_once < 20 else 0
        else:
            size = 0
        alone = [generate(model, [p], 3, prefill_tokens=size)[0][0] for p in prompts]
        assert together == alone, at_once


# -------------------- gradients


def test_verbs_outside_no_grad_give_the_same(name, model):
    """Parameters that want gradients, no torch.no_grad: every verb gives the same logits, or, where
    integers have no masked execution, says so by one line."""
    idx, pad = padded((24, 3))
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        cache = model.new_cache(2, 90)
        want = [model.prefill(idx, cache, pad)]
        want += [decoded(model, cache, 20)]
    cache = model.new_cache(2, 90)
    got = [model.prefill(idx, cache, pad)]
    follow = torch.cat([tokens(1, 20, seed=80 + b) for b in range(2)])
    steps = [model.decode(follow[:, i : i + 1], cache) for i in range(20)]
    got.append(torch.cat(steps, 1))
    if name == "mixsga, integers":
        assert "cache" in error_line(model, idx)
    else:
        with torch.no_grad():
            want.append(model(idx, pad=pad)[:, -3:])
        got.append(model(idx, pad=pad)[:, -3:])
    for a, b in zip(got, want, strict=True):
        agree(a, b)


@pytest.mark.parametrize("name", ["selection", "mixsga"])
def test_an_empty_cache_is_not_joined_where_a_first_prompt_counts(name):
    """What is chosen from a first prompt as a whole would not be chosen after the join: refused by
    name, either way round."""
    model = PATHS[name]()
    filled = model.new_cache(1, 40)
    with torch.no_grad():
        model.prefill(tokens(1, 30), filled)
    for caches in ([model.new_cache(1, 40), filled], [filled, model.new_cache(1, 40)]):
        assert "an empty cache to be joined" in error_line(KVCache.cat, caches)


def test_a_fingerprint_sees_any_number_and_an_adapters_scale():
    """One weight of a large tensor, however far from those that are looked at, and the scale that
    an adapter's update is multiplied by."""
    model = tiny_model()
    model.embed_tokens = torch.nn.Embedding(40_003, 40)
    seen = {fingerprint(model)}
    with torch.no_grad():
        model.embed_tokens.weight[20_001, 7] += 1e-3
    seen.add(fingerprint(model))
    lora.attach(model, AdapterConfig(adapter="lora", r=2))
    seen.add(fingerprint(model))
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 2
    seen.add(fingerprint(model))
    assert len(seen) == 4


def test_a_cache_saved_before_dropped_tokens_were_measured_is_read(tmp_path):
    """What weighs heads when tokens are chosen is no part of what reads them: a model without that
    measurement, as before there was one, has the same fingerprint, and its cache is read. Any other
    tensor of the selector counts."""
    kv = KVConfig(kv="select", n_groups=4, kv_tail=4)
    model = tiny_model()
    selector.attach(model, kv, SelectConfig(relevance="future", kv_keep=0.5), [tokens(2, 40)])
    drop_weight = model.selector.drop_weight
    assert not torch.equal(drop_weight, torch.ones_like(drop_weight))
    seen = fingerprint(model)
    cache = model.new_cache(1, 40)
    with torch.no_grad():
        model.prefill(tokens(1, 30), cache)
    model.selector.drop_weight = None
    assert fingerprint(model) == seen
    cache.save(tmp_path / "cache", model)
    model.selector.drop_weight = drop_weight
    assert KVCache.load(tmp_path / "cache", model).nbytes() == cache.nbytes()
    model.selector.output_gain += 1
    assert fingerprint(model) != seen


def test_a_cache_keeps_its_window_where_a_prompt_reads_routed():
    """A piece into a cache made with another window is read by the cache's own: the logits are
    those of a model that has it for good."""
    want = grouped_model(prefill="routed", kv_tail=4)
    model = grouped_model(prefill="routed", kv_tail=4)
    x = tokens(1, 40)
    caches = [m.new_cache(1, 40) for m in (want, model)]
    with torch.no_grad():
        exact = want.prefill(x, caches[0], last_only=False)
        with kv_router.storing(model, kv_tail=16):
            got = model.prefill(x, caches[1], last_only=False)
    assert (got - exact).abs().max() < 1e-12


def test_a_snapshot_serves_more_than_once(model):
    """What is appended after a restore does not reach the snapshot."""
    x = tokens(1, 33)
    cache = model.new_cache(1, 40)
    with torch.no_grad():
        model.prefill(x[:, :30], cache)
        before = cache.snapshot()
        seen = []
        for _ in range(3):
            seen.append(torch.cat([model.decode(x[:, t : t + 1], cache) for t in (30, 31, 32)]))
            cache.restore(before)
            assert cache.length == 30 and cache.lengths.tolist() == [30]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_the_basis_of_folded_trained_maps_is_refused():
    """They lie in the projections then: one line says so, and what o_proj reads is still known."""
    model = grouped_model(**EXACT, learn_basis=True)
    path = model.layers[0].self_attn.kv_path
    assert "folded" in error_line(path.basis)
    assert read_metric(model.layers[0].self_attn).shape == (3, 16, 16)


def test_forwards_on_threads_leave_a_reconstructor_as_it_was():
    """Many forwards without a cache at a time: every parameter still is the one that it was, and
    still wants its gradient. (Weights that are constants to the loss were once put in its place.)"""
    model = grouped_model(**EXACT, kv_tail=1, reconstructor="mlp")
    before = {name: id(p) for name, p in model.named_parameters()}
    idx = tokens(1, 12)

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                model(idx)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters())
