"""Faults that caches of every kind must not have: rows that depend on their neighbours, on padding
or on how a prompt was cut; state shared between caches; settings that reach back into caches; files
of another model that load; caches left half-changed. Each test runs over every way to store."""

from __future__ import annotations

import copy
import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from helpers import BY_NORM, INT4, TINY, error_line, grouped_model, randomise, tiny_model, tokens
from oracle import Oracle, Row
from safetensors import safe_open
from safetensors.torch import save_file

import kv_router
import lora
import mixsga
import selector
from baselines import kivi, quest, shared_heads
from baselines.align import Moments, align_heads, calibrate
from config import KVConfig, SelectConfig
from generate import DecodeGraph, generate, prefill
from model import Transformer
from routing.bases import read_metric
from selection import calibration
from settings.adapters import AdapterConfig
from settings.experts import MixConfig
from storage.cache import KVCache
from storage.integers.codecs import IntCodec
from storage.ragged import RaggedCache
from storage.saved import fingerprint, numbers_hash


def selecting(seed: int = 0, fold: bool = True, sel: dict | None = None, **kv) -> Transformer:
    """A model whose every layer keeps half of a context, or what `sel` says."""
    model = tiny_model(seed)
    cfg = KVConfig(**{**dict(kv="select", kv_tail=3, value_basis="output"), **kv})
    choice = SelectConfig(**{**dict(relevance="observed", kv_keep=0.5), **(sel or {})})
    selector.attach(model, cfg, choice, [tokens(2, 70, seed=seed + 1)], seed)
    return kv_router.fold(model) if fold else model


def levelled(seed: int = 0) -> Transformer:
    bits = dict(key_bits=4, value_bits=0, key_block=16)
    return selecting(seed, sel=dict(kv_keep=0.0, kv_bytes=0.7), **bits)


def mixed(
    seed: int = 0, kv: str = "mixsga", ints: bool = False, tail: int = 2, **mix
) -> Transformer:
    """A model whose heads or layers share what is stored."""
    model = tiny_model(seed)
    experts = dict(group_sizes="1,3", expert_ratios="1:1")
    cfg = KVConfig(kv=kv, kv_tail=tail)
    shared_heads.attach(model, cfg, MixConfig(**{**experts, **mix}))
    for path in mixsga.experts(model):
        randomise(path)
        if ints:
            bits = dict(key_bits=4, value_bits=4, key_block=16, kv_sinks=0)
            path.stored_as = replace(path.stored_as, **bits)
    return model.double().eval()


EXACT = dict(**BY_NORM, value_basis="output")
PATHS = {
    "dense": tiny_model,
    "value groups": lambda: grouped_model(**EXACT, kv_tail=4),
    "no tail": lambda: grouped_model(**EXACT, kv_tail=0),
    "no tail, blocks": lambda: grouped_model(**EXACT, kv_tail=0, kv_tail_block=3),
    "tail of blocks": lambda: grouped_model(**EXACT, kv_tail=3, kv_tail_block=4, n_groups=8),
    "not folded": lambda: grouped_model(**EXACT, kv_tail=2, fold=False),
    "routed prefill": lambda: grouped_model(kv_tail=2, kv_tail_block=2),
    "rebuilt": lambda: grouped_model(**EXACT, kv_tail=1, reconstructor="mlp"),
    "from keys": lambda: grouped_model(**EXACT, kv_tail=1, kv_sinks=2, reconstructor="keys"),
    "last layer": lambda: grouped_model(**EXACT, kv_tail=2, kv_layers="1"),
    "integers": lambda: grouped_model(**EXACT, **INT4, kv_tail=2),
    "integers, no tail": lambda: grouped_model(**EXACT, **INT4, kv_tail=0, topk_groups=4),
    "selection": selecting,
    "selection, not folded": lambda: selecting(fold=False),
    "selection, routed": lambda: selecting(prefill="routed", sel=dict(allocation="layer")),
    "selection, shared": lambda: selecting(mask_scope="shared", prefill="routed"),
    "selection, last layer": lambda: selecting(kv_layers="1"),
    "selection, everything": lambda: selecting(sel=dict(kv_keep=1.0)),
    "selection, integers": lambda: selecting(key_bits=4, value_bits=4, key_block=16),
    "levels": levelled,
    "mixsga": mixed,
    "mixsga, no tail": lambda: mixed(tail=0),
    "mixsga, integers": lambda: mixed(ints=True),
    "gqa": lambda: mixed(kv="gqa", kv_share=0.4),
    "cla": lambda: mixed(kv="cla"),
}
made: dict[str, Transformer] = {}


@pytest.fixture(params=PATHS)
def name(request) -> str:
    """A way to store."""
    return request.param


@pytest.fixture
def model(name) -> Transformer:
    """A model that stores so; tests leave it as it was."""
    if name not in made:
        made[name] = PATHS[name]()
    return made[name]


def takes_pieces(model: Transformer) -> bool:
    """Whether a prompt may come in pieces."""
    return all(block.self_attn.kv_path.reads_pieces for block in model.layers)


def padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch of prompts of these lengths, and its padding."""
    T = max(lengths)
    idx = torch.zeros(len(lengths), T, dtype=torch.int64)
    for b, n in enumerate(lengths):
        idx[b, T - n :] = tokens(n, seed=b)
    return idx, torch.tensor([T - n for n in lengths])


@torch.no_grad()
def decoded(model: Transformer, cache: KVCache, n: int, rows: list[int] | None = None):
    """Logits (B, n, V) of n steps; rows: which of the batch's continuations each sequence gets."""
    rows = list(range(len(cache.lengths))) if rows is None else rows
    follow = torch.cat([tokens(1, n, seed=80 + b) for b in rows])
    return torch.cat([model.decode(follow[:, i : i + 1], cache) for i in range(n)], 1)


@torch.no_grad()
def filled(model: Transformer, prompt: torch.Tensor, max_len: int = 120) -> KVCache:
    """The cache of one prompt (T,)."""
    cache = model.new_cache(1, max_len)
    model.prefill(prompt[None], cache)
    return cache


def agree(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Logits are the same but for the order of sums."""
    assert torch.isfinite(got).all()
    error = (got - want).abs().max() / want.abs().max()
    assert error < tolerance, f"differ by {error:.2g}"


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


# -------------------- caches that know how they were packed


def set_other_basis(model: Transformer) -> None:
    for path in kv_router.paths(model).values():
        maps = torch.linalg.qr(torch.randn(path.Hkv, path.D, path.D, dtype=torch.float64))[0]
        path.set_basis(maps, maps.mT)


def set_storing(model: Transformer) -> None:
    for path in kv_router.paths(model).values():
        path.cfg = replace(path.cfg, kv_tail=9, kv_tail_block=4)


def set_ints(model: Transformer) -> None:
    bits = dict(key_bits=2, value_bits=2, key_block=32)
    for path in mixsga.experts(model):
        path.stored_as = replace(path.stored_as, **bits)


def set_routing(model: Transformer) -> None:
    for path in shared_heads.sharing(model):
        path.by = "choice"


def set_h2o(model: Transformer) -> None:
    shared_heads.routing(model, "score", h2o=0.3).__enter__()


def choose_everything(model: Transformer) -> None:
    model.selector.set(model.selector.cfg.everything())


def choose_less(model: Transformer) -> None:
    cfg = model.selector.cfg
    less = dict(kv_bytes=0.3) if cfg.kv_bytes else dict(kv_keep=0.1, allocation="head")
    model.selector.set(replace(cfg, **less))


def calibrate_anew(model: Transformer) -> None:
    calibration.calibrate(model.selector, model, [tokens(3, 50, seed=77)])


def load_other_levels(model: Transformer) -> None:
    doubled = {name: 2 * t for name, t in selector.state(model).items()}
    selector.load_state(model, doubled)


VALUE_GROUPS = lambda **kv: lambda: grouped_model(**EXACT, kv_tail=2, **kv)
CHANGES = {
    "basis": (VALUE_GROUPS(fold=False), set_other_basis),
    "basis of rebuilt values": (VALUE_GROUPS(fold=False, reconstructor="mlp"), set_other_basis),
    "basis of integers": (VALUE_GROUPS(fold=False, **INT4), set_other_basis),
    "K = 1": (VALUE_GROUPS(), lambda model: kv_router.set_kept(model, 1)),
    "K = S": (VALUE_GROUPS(fold=False), lambda model: kv_router.set_kept(model, 4)),
    "K < S": (VALUE_GROUPS(topk_groups=4), lambda model: kv_router.set_kept(model, 2)),
    "K of integers": (VALUE_GROUPS(**INT4), lambda model: kv_router.set_kept(model, 4)),
    "K of rebuilt values": (
        VALUE_GROUPS(reconstructor="mlp"),
        lambda model: kv_router.set_kept(model, 4),
    ),
    "trained basis": (VALUE_GROUPS(fold=False, learn_basis=True), set_other_basis),
    "window": (VALUE_GROUPS(), set_storing),
    "selection's basis": (lambda: selecting(fold=False), set_other_basis),
    "selection of everything": (lambda: selecting(fold=False), choose_everything),
    "selection, then less": (selecting, choose_less),
    "everything, then less": (lambda: selecting(fold=False, sel=dict(kv_keep=1.0)), choose_less),
    "selection calibrated": (selecting, calibrate_anew),
    "selection's window": (selecting, set_storing),
    "levels calibrated": (levelled, calibrate_anew),
    "levels loaded": (levelled, load_other_levels),
    "levels, then less": (levelled, choose_less),
    "experts' routing": (mixed, set_routing),
    "experts' bits": (mixed, set_ints),
    "integer experts' bits": (lambda: mixed(ints=True), set_ints),
    "experts under H2O": (mixed, set_h2o),
    "CLA under H2O": (lambda: mixed(kv="cla"), set_h2o),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_changed_after_packing_leave_a_cache_as_it_was(change, tmp_path):
    """Basis, K, window, bits, selection, calibration and routing are changed between prompt and
    decoding: logits stay. A file of such a cache, or joining it with one packed after the change,
    gives the same logits again or is refused by one line."""
    make, apply = CHANGES[change]
    model = make()
    prompt = tokens(1, 40, seed=6)
    with torch.no_grad():
        caches = [model.new_cache(1, 90) for _ in range(4)]
        for cache in caches:
            model.prefill(prompt, cache)
    want = decoded(model, caches[0], 9)
    caches[1].save(tmp_path / "before.safetensors")
    apply(model)
    agree(decoded(model, caches[1], 9), want)

    for path in ("before.safetensors", "after.safetensors"):
        try:
            if path.startswith("after"):
                caches[2].save(tmp_path / path)
            loaded = KVCache.load(tmp_path / path, model)
        except ValueError as e:
            assert "\n" not in str(e)
        else:
            agree(decoded(model, loaded, 9), want)

    new = filled(model, prompt[0])
    own = decoded(model, filled(model, prompt[0]), 9)
    try:
        joined = KVCache.cat([caches[3], new])
    except ValueError as e:
        assert "\n" not in str(e)
    else:
        both = decoded(model, joined, 9, [0, 0])
        agree(both[:1], want)
        agree(both[1:], own)


def test_a_change_is_seen_where_it_should_be():
    """The comparison above would notice: caches made after the change differ."""
    model = VALUE_GROUPS(fold=False)()
    before = decoded(model, filled(model, tokens(40, seed=6)), 9)
    set_other_basis(model)
    after = decoded(model, filled(model, tokens(40, seed=6)), 9)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


# -------------------- caches from before the weights changed


def attach_anew(model: Transformer) -> None:
    kv_router.attach(model, KVConfig(**EXACT), [tokens(2, 70)])


def share_heads(model: Transformer) -> None:
    mix = MixConfig(group_sizes="1,3", expert_ratios="1:1")
    shared_heads.attach(model, KVConfig(kv="mixsga"), mix)


def load_own_state(model: Transformer) -> None:
    state = kv_router.state(model)
    kv_router.load_state(model, {name: t.detach().clone() for name, t in state.items()})


def align(model: Transformer) -> None:
    for attn in (block.self_attn for block in model.layers):
        moments = Moments()
        k, v = torch.randn(2, 1, attn.n_kv_head, 50, attn.head_dim, dtype=torch.float64)
        moments.add(None, None, k, v)
        align_heads(attn, moments.vv, moments.kk, (3,))


def calibrate_routers(model: Transformer) -> None:
    for path in mixsga.experts(model):
        x = torch.randn(100, TINY.n_embd, dtype=torch.float64)
        calibrate(path, x, torch.randn(100, dtype=torch.float64))


MEANINGS = {  # by verb: a model, and what gives its caches' numbers another meaning
    "fold": (VALUE_GROUPS(fold=False), kv_router.fold),
    "fold, every group": (VALUE_GROUPS(fold=False, topk_groups=4), kv_router.fold),
    "fold, trained maps": (VALUE_GROUPS(fold=False, learn_basis=True), kv_router.fold),
    "fold, integers": (VALUE_GROUPS(fold=False, **INT4), kv_router.fold),
    "fold, one layer": (VALUE_GROUPS(fold=False, kv_layers="1"), kv_router.fold),
    "fold, selection": (lambda: selecting(fold=False), kv_router.fold),
    "fold, everything": (lambda: selecting(fold=False, sel=dict(kv_keep=1.0)), kv_router.fold),
    "detach": (VALUE_GROUPS(fold=False), kv_router.detach),
    "detach, selection": (lambda: selecting(fold=False), selector.detach),
    "attach": (tiny_model, attach_anew),
    "attach, anew": (VALUE_GROUPS(fold=False), attach_anew),
    "attach, shared heads": (tiny_model, share_heads),
    "load_state": (VALUE_GROUPS(fold=False, reconstructor="mlp"), load_own_state),
    "align_heads": (tiny_model, align),
    "align_heads, experts": (mixed, align),
    "calibrate": (mixed, calibrate_routers),
}


@pytest.mark.parametrize("change", MEANINGS)
def test_a_cache_from_before_the_weights_changed_is_refused(change, tmp_path):
    """After a change of what stored numbers mean no verb takes a cache that was made before it,
    filled or empty, nor a sequence picked from one, nor is it joined or saved: one line names the
    change; a graph of decoding steps does not run again. The cache stays as it is; one made after
    the change works."""
    make, apply = MEANINGS[change]
    model = make()
    caches = [filled(model, tokens(20, seed=6)), model.new_cache(1, 90)]
    caches.append(caches[0].select_sequences([0]))
    before = [cache.lengths.clone() for cache in caches]
    graph = DecodeGraph(model, caches[0], tokens(1, 1), torch.argmax, 3)
    apply(model)
    assert f"from before {change.split(',')[0]}:" in error_line(graph.next)
    new = filled(model, tokens(20, seed=6))
    assert torch.isfinite(decoded(model, new, 3)).all()
    for cache in caches:
        for verb in (
            lambda cache=cache: model.decode(tokens(1, 1), cache),
            lambda cache=cache: model.prefill(tokens(1, 5), cache),
            lambda cache=cache: cache.save(tmp_path / "cache.safetensors"),
            lambda cache=cache: KVCache.cat([new, cache]),
        ):
            assert f"from before {change.split(',')[0]}:" in error_line(verb)
    for cache, n in zip(caches, before, strict=True):
        assert torch.equal(cache.lengths, n)


def test_merging_an_adapter_leaves_caches_as_they_were():
    """Merged weights compute the same, so a cache from before is read on."""
    model = VALUE_GROUPS()()
    lora.attach(model, AdapterConfig(adapter="lora", r=4)).eval()
    randomise(model.layers[0].self_attn.v_proj)
    caches = [filled(model, tokens(40, seed=6)) for _ in range(2)]
    want = decoded(model, caches[0], 10)
    agree(decoded(lora.merge(model), caches[1], 10), want)


def test_a_copy_of_a_model_folds_for_itself():
    """Folding a copy refuses none of the caches of the model it was copied from."""
    model = VALUE_GROUPS(fold=False)()
    cache = filled(model, tokens(40, seed=6))
    kv_router.fold(copy.deepcopy(model))
    assert torch.isfinite(decoded(model, cache, 3)).all()


@pytest.mark.parametrize("bits_first", [True, False])
def test_a_context_chosen_for_another_way_of_storing_is_refused(bits_first):
    """A cache is made, then the selector is set to store otherwise: the prompt is refused by one
    line, whether levels meet a cache of whole numbers or the other way round."""
    shares = [dict(kv_keep=0.0, kv_bytes=0.4), dict(kv_keep=0.5, kv_bytes=0.0)]
    first, second = shares if bits_first else reversed(shares)
    model = selecting(sel=first)
    cache = model.new_cache(1, 90)
    model.selector.set(replace(model.selector.cfg, **second))
    line = error_line(model.prefill, tokens(1, 40), cache)
    assert "another way of storing" in line
    assert filled(model, tokens(40)).length == 40


# -------------------- state of a prompt


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
        (functional, "pad"),  # of both windows
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


def named(way) -> str:
    """The name of a way to store, or of the function that makes it."""
    return getattr(way, "__name__", way)


def quest_pages() -> Transformer:
    return quest.attach(tiny_model(), KVConfig(topk_groups=4), read_tokens=16, whole_layers=0)


def kivi_codes() -> Transformer:
    return kivi.attach(tiny_model(), kivi.Format(4, group=8, residual=16))


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


# -------------------- files


def saved(model: Transformer, path, n: int = 40) -> torch.Tensor:
    """Save the cache of a prompt; return logits of the steps after it."""
    cache = model.new_cache(2, 90)
    with torch.no_grad():
        model.prefill(tokens(2, n, seed=1), cache)
    cache.save(path)
    return decoded(model, cache, 8)


def test_a_loaded_cache_goes_on_as_the_saved_one(model, tmp_path):
    """Of any max_len, filled or empty: what is loaded decodes, grows and takes prompts."""
    path = tmp_path / "c.safetensors"
    want = saved(model, path)
    agree(decoded(model, KVCache.load(path, model), 8), want)
    idx = tokens(2, 30, seed=4)
    for max_len in (60, 90):
        empty = model.new_cache(2, max_len)
        empty.save(path)
        loaded = KVCache.load(path, model)
        assert loaded.lengths.tolist() == [0, 0]
        with torch.no_grad():
            agree(model.prefill(idx, loaded), model.prefill(idx, empty))
        agree(decoded(model, loaded, 5), decoded(model, empty, 5))


def other(cfg: dict) -> Transformer:
    return tiny_model(cfg=replace(TINY, **cfg))


INTS = dict(**EXACT, **INT4, kv_tail=2)
FOREIGN = {  # who saved, who loads, what the line must name
    "weights": (tiny_model, lambda: tiny_model(1), "weights"),
    "one number": (tiny_model, lambda: one_number(tiny_model()), "weights"),
    "heads": (tiny_model, lambda: other(dict(n_kv_head=2)), "shape"),
    "head size": (tiny_model, lambda: other(dict(head_dim=8)), "shape"),
    "layers": (tiny_model, lambda: other(dict(n_layer=3)), "layers"),
    "dtype": (tiny_model, lambda: tiny_model(dtype=torch.float32), "dtype"),
    "positions": (tiny_model, lambda: other(dict(rope_theta=500.0)), "rope_theta"),
    "scaled positions": (tiny_model, lambda: other(dict(rope_factor=4.0)), "rope_factor"),
    "epsilon": (tiny_model, lambda: other(dict(norm_eps=1e-2)), "norm_eps"),
    "kind": (tiny_model, VALUE_GROUPS(), "kind"),
    "kind of a layer": (
        lambda: grouped_model(**EXACT, kv_tail=2, kv_layers="0"),
        lambda: grouped_model(**EXACT, kv_tail=2, kv_layers="1"),
        "layer 0: kind",
    ),
    "selection into value groups": (selecting, VALUE_GROUPS(), "kind"),
    "experts into CLA": (mixed, lambda: mixed(kv="cla"), "kind"),
    "groups' weights": (VALUE_GROUPS(), VALUE_GROUPS(seed=3), "weights"),
    "basis": (
        lambda: grouped_model(**EXACT, kv_tail=2, fold=False),
        lambda: grouped_model(**{**EXACT, "value_basis": "native"}, kv_tail=2, fold=False),
        "maps",
    ),
    "fold": (VALUE_GROUPS(fold=False), VALUE_GROUPS(), "maps"),
    "K": (VALUE_GROUPS(), VALUE_GROUPS(topk_groups=3), "topk_groups"),
    "S": (VALUE_GROUPS(), VALUE_GROUPS(n_groups=8), "n_groups"),
    "scope": (VALUE_GROUPS(), lambda: grouped_model(kv_tail=2, prefill="exact"), "mask_heads"),
    "tail": (VALUE_GROUPS(), lambda: grouped_model(**EXACT, kv_tail=8), "kv_tail"),
    "smaller tail": (lambda: grouped_model(**EXACT, kv_tail=8), VALUE_GROUPS(), "kv_tail"),
    "block": (VALUE_GROUPS(kv_tail_block=4), VALUE_GROUPS(), "block"),
    "router": (VALUE_GROUPS(), VALUE_GROUPS(reconstructor="mlp"), "weights"),
    "keys": (VALUE_GROUPS(), VALUE_GROUPS(reconstructor="keys", kv_sinks=0), "maps from keys"),
    "bits": (lambda: grouped_model(**INTS), VALUE_GROUPS(), "bits"),
    "more bits": (
        lambda: grouped_model(**INTS),
        lambda: grouped_model(**{**INTS, "value_bits": 8}),
        "bits",
    ),
    "key block": (
        lambda: grouped_model(**INTS),
        lambda: grouped_model(**{**INTS, "key_block": 32}),
        "block",
    ),
    "first tokens": (
        lambda: grouped_model(**INTS),
        lambda: grouped_model(**INTS, kv_sinks=2),
        "n_sinks",
    ),
    "levels": (levelled, lambda: levelled(3), "gain"),
    "levels' calibration": (levelled, lambda: calibrated(levelled()), "gain"),
    "experts": (mixed, lambda: mixed(group_sizes="1", expert_ratios="1"), "experts"),
    "experts' scores": (mixed, lambda: mixed(expert_router="random"), "scores"),
    "experts' bits": (mixed, lambda: mixed(ints=True), "bits"),
    "experts' window": (mixed, lambda: mixed(tail=3), "kv_tail"),
}


def one_number(model: Transformer) -> Transformer:
    with torch.no_grad():
        model.embed_tokens.weight[7, 3] += 1e-3
    return model


def calibrated(model: Transformer) -> Transformer:
    calibrate_anew(model)
    return model


@pytest.mark.parametrize("difference", FOREIGN)
def test_a_file_of_another_model_is_refused_by_name(difference, tmp_path):
    """Other weights, shapes, types, positions, ways to store: one line that names the difference
    and the file. The model it was saved with still loads it."""
    saver, loader, word = FOREIGN[difference]
    path = tmp_path / "c.safetensors"
    model = saver()
    want = saved(model, path)
    line = error_line(KVCache.load, path, loader())
    assert word in line and str(path) in line, line
    agree(decoded(model, KVCache.load(path, saver()), 8), want)


@pytest.mark.parametrize("kind", ["value groups", "integers", "levels", "mixsga", "cla"])
def test_a_damaged_file_is_refused(kind, tmp_path):
    """Cut anywhere, or with one bit turned anywhere that counts: one line, no raw error."""
    model = PATHS[kind]()
    path = tmp_path / "c.safetensors"
    want = saved(model, path)
    data = path.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for n in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:n])
        assert str(bad) in error_line(KVCache.load, bad, model)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    at = [*range(8), *range(8, header, max(1, header // 60))]
    at += list(range(header, len(data), len(data) // 40))
    for i in at:
        turned = bytearray(data)
        turned[i] ^= 1 << i % 8
        bad.write_bytes(turned)
        try:
            loaded = KVCache.load(bad, model)
        except ValueError as e:
            assert type(e) is ValueError and "\n" not in str(e) and str(bad) in str(e)
            refused += 1
        else:  # blanks that fill the header
            assert i < header
            agree(decoded(model, loaded, 8), want)
    assert refused > len(at) - 4


def test_what_is_no_cache_is_refused(tmp_path):
    """Files of weights, of text, of nothing, folders, places where nothing is: one line."""
    model = tiny_model()
    weights = tmp_path / "weights.safetensors"
    save_file({"0.window_k": torch.zeros(2, 3, 4, 16)}, weights)
    named = tmp_path / "named.safetensors"
    save_file({"n_window": torch.zeros(2)}, named, {"format": "pt"})
    text = tmp_path / "text.safetensors"
    text.write_text("a cache\n" * 20)
    for path in (weights, named, text, tmp_path, tmp_path / "none.safetensors"):
        assert str(path) in error_line(KVCache.load, path, model)


def forge(to, meta: dict, tensors: dict) -> None:
    """Write a cache's file of these tensors, with a checksum that fits."""
    digest = hashlib.sha256((numbers_hash(tensors) + meta["about"]).encode()).hexdigest()
    save_file({k: t.contiguous() for k, t in tensors.items()}, to, {**meta, "sha256": digest})


@pytest.mark.parametrize("kind", ["dense", "value groups", "integers", "levels", "mixsga", "cla"])
def test_a_file_whose_parts_do_not_fit_is_refused(kind, tmp_path):
    """Every tensor in turn is missing, shorter, of another type or shape, and every count out of
    range, under a checksum that fits: one line."""
    model = PATHS[kind]()
    path = tmp_path / "c.safetensors"
    saved(model, path)
    bad = tmp_path / "bad.safetensors"
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    forge(bad, meta, tensors)
    KVCache.load(bad, model)  # the checksum does fit
    for name, t in tensors.items():
        changes = {
            "missing": None,
            "another type": t.half(),
            "another shape": t[None],
            "a scalar": t.new_zeros(()),
        }
        if t.numel() and not name.endswith("_base"):  # those follow from the others
            changes["shorter"] = t[:-1]
        if name.split(".")[-1].startswith("n_"):
            changes["negative"] = torch.full_like(t, -1)
            changes["huge"] = torch.full_like(t, 2**40)
        for what, changed in changes.items():
            if what == "another type" and t.dtype == torch.float16:
                continue
            others = {k: other for k, other in tensors.items() if k != name}
            forge(bad, meta, others if changed is None else {**others, name: changed})
            try:
                assert str(bad) in error_line(KVCache.load, bad, model)
            except BaseException as e:
                raise AssertionError(f"{name}: {what}") from e


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
