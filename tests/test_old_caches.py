"""Caches know how they were packed: settings that change later leave them as they were, and caches
from before the weights changed are refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import INT4, TINY, error_line, randomise, tiny_model, tokens
from stores import (  # noqa: F401 (fixtures)
    EXACT,
    VALUE_GROUPS,
    agree,
    calibrate_anew,
    decoded,
    filled,
    levelled,
    mixed,
    model,
    name,
    selecting,
)

import kv_router
import lora
import mixsga
import selector
from baselines import quest, shared_heads
from baselines.align import Moments, align_heads, calibrate
from config import KVConfig
from generate import DecodeGraph
from model import Transformer
from settings.adapters import AdapterConfig
from settings.experts import MixConfig
from storage.cache import KVCache

# -------------------- caches that know how they were packed


def learned_quest() -> Transformer:
    cfg = KVConfig(n_groups=4, topk_groups=2, kv_tail=3, learn_basis=True)
    return quest.attach(tiny_model(), cfg, 32, 0, [tokens(2, 70)])


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


def load_other_levels(model: Transformer) -> None:
    doubled = {name: 2 * t for name, t in selector.state(model).items()}
    selector.load_state(model, doubled)


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
    "trained basis under Quest": (learned_quest, set_other_basis),
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
