"""What is done for all layers at once: the caches of a selecting model are made, filled and joined
with as many operators however many layers there are, and hold what each layer's own would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import TINY, tiny_model, tokens
from stores import PATHS, agree, decoded, padded
from torch.utils._python_dispatch import TorchDispatchMode

import kv_router
import selector
from benchmarks.parts import PARTS
from config import KVConfig, SelectConfig
from model import Transformer
from storage.cache import KVCache
from storage.kernel_base import ANYWHERE
from storage.layout import ALIGNED, cat_each
from storage.ragged import RaggedCache

WAYS = {
    "whole numbers": (dict(), dict(kv_keep=0.5)),
    "integers": (dict(key_bits=4, value_bits=4, key_block=16), dict(kv_keep=0.5)),
    "levels": (dict(key_bits=4, value_bits=0, key_block=16), dict(kv_bytes=0.7)),
}
SELECTING = [kind for kind in PATHS if kind.startswith("selection") or kind == "levels"]


def deep(way: str, n_layer: int) -> Transformer:
    """A selecting model of so many layers."""
    kv, choice = WAYS[way]
    model = tiny_model(cfg=replace(TINY, n_layer=n_layer))
    cfg = KVConfig(kv="select", kv_tail=3, value_basis="output", **kv)
    selector.attach(model, cfg, SelectConfig(**choice), [tokens(2, 70, seed=1)])
    return kv_router.fold(model)


class Launches(TorchDispatchMode):
    """Counts operators that compute something: no views, no memory that is not written."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [out.alias_info for out in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not is_view and "empty" not in function._schema.name
        return function(*args, **(kwargs or {}))


def launches_of(monkeypatch, part: str, run) -> int:
    """Count the operators of one of PARTS while run() runs."""
    place, name = PARTS[part]
    inner = getattr(place, name)
    launches = Launches()

    def counted(*args, **kwargs):
        with launches:
            return inner(*args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        static = isinstance(vars(place)[name], staticmethod)
        patch.setattr(place, name, staticmethod(counted) if static else counted)
        run()
    return launches.count


@pytest.mark.parametrize("way", WAYS)
def test_layers_cost_no_operators(way, monkeypatch):
    """Windows of five layers are filled with as many operators as those of two; a layer is
    joined with one at most for each flat tensor that has to be aligned; empty caches take none where
    caches of their shape were made before."""
    counts = {}
    for n_layer in (2, 5):
        model = deep(way, n_layer)
        parts = [tokens(2, 41, seed=1), tokens(4, 41, seed=2)]

        def prefilled(model=model, parts=parts) -> None:
            caches = [model.new_cache(len(idx), 60) for idx in parts]
            for idx, cache in zip(parts, caches, strict=True):
                model.prefill(idx, cache)
            KVCache.cat(caches)

        counts[n_layer] = {
            part: launches_of(monkeypatch, part, prefilled)
            for part in ("windows", "joining caches", "queries moved")
        }
    joining = [counts[n_layer].pop("joining caches") for n_layer in (2, 5)]
    assert counts[2] == counts[5]
    owners = model.new_cache(3, 60).layers[0].owners
    flat = [name for name, owner in owners.items() if owner not in ("sequence", "base")]
    n_aligned = sum(f"{name}_ptr" not in ANYWHERE for name in flat)
    assert joining[1] - joining[0] <= 5 * n_aligned  # of two layers perhaps none ends unaligned
    assert launches_of(monkeypatch, "empty caches", lambda: model.new_cache(3, 60)) == 0


@pytest.mark.parametrize("kind", SELECTING)
def test_layers_joined_at_once_are_those_joined_one_by_one(kind):
    """KVCache.cat gives what RaggedCache.cat gives each layer, of prompts of several lengths, with
    padding and windows of several sizes, and of some without a context or without a token."""
    model = PATHS[kind]()
    batches = [((40, 17), 60), ((33,), 41), ((2, 3, 1), 9), ((29, 5, 30), 90)]
    for some in (batches, batches[2:3] * 2, batches[:1] * 3):
        caches = []
        for lengths, max_len in some:
            idx, n_pad = padded(lengths)
            caches.append(model.new_cache(len(lengths), max_len))
            with torch.no_grad():
                model.prefill(idx, caches[-1], n_pad)
        columns = list(zip(*(cache.layers for cache in caches), strict=True))
        want = [type(same[0]).cat(same) for same in columns]
        joined = KVCache.cat(caches)
        for got, one in zip(joined.layers, want, strict=True):
            assert type(got) is type(one) and got.batch == one.batch
            assert (got.room, got.fresh) == (one.room, one.fresh)
            for name, t in one.state_dict().items():
                held = getattr(got, name)
                assert torch.equal(held, t) and held.dtype == t.dtype, name
                anywhere = f"{name}_ptr" in ANYWHERE or not held.numel()
                assert anywhere or held.data_ptr() % ALIGNED == 0, name
            if isinstance(one, RaggedCache):
                assert got.longest == one.longest
        one_by_one = caches[0]._like(want, joined.length)
        agree(decoded(model, joined, 5), decoded(model, one_by_one, 5))


@pytest.mark.parametrize("sizes", [[[3, 0, 4], [5], [0]], [[0], [0, 0]], [[16, 16], [1]]], ids=str)
@pytest.mark.parametrize("row", [(), (1,), (3,), (16,), (2, 4)], ids=str)
def test_tensors_of_groups_are_concatenated(row, sizes):
    """cat_each gives torch.cat of each group, at aligned places of one tensor."""
    drawn = torch.Generator().manual_seed(0)
    for dtype in (torch.uint8, torch.float16, torch.int64):
        groups = []
        for group in sizes:
            groups.append(
                [torch.randint(0, 99, (n, *row), generator=drawn).to(dtype) for n in group]
            )
        got = cat_each(groups)
        assert len(got) == len(groups)
        for joined, group in zip(got, groups, strict=True):
            assert torch.equal(joined, torch.cat(group)) and joined.dtype == dtype
            assert joined.data_ptr() % ALIGNED == 0 or not joined.numel()
            assert joined.is_contiguous()


@pytest.mark.parametrize("kind", SELECTING)
def test_empty_caches_never_meet(kind):
    """Empty caches share tensors, and what goes into one changes no other: not a prompt, not one
    without a context, not single tokens, not what is forgotten again."""
    model = PATHS[kind]()
    caches = [model.new_cache(2, 60) for _ in range(6)]
    long = tokens(2, 30, seed=1)
    short = tokens(2, 2, seed=2)
    got = []
    for cache, idx in zip(caches, (long, short, long, short, long[:, :1], long), strict=True):
        assert cache.lengths.tolist() == [0, 0]
        with torch.no_grad():
            model.prefill(idx, cache)
        if idx is short:
            cache.truncate(0)
            assert caches[-1].lengths.tolist() == [0, 0]
            with torch.no_grad():
                model.prefill(long, cache)
        got.append(decoded(model, cache, 4))
    for i in (1, 2, 3, 5):
        agree(got[i], got[0])
    fresh = model.new_cache(2, 60)
    assert not any(t.any() for layer in fresh.layers for t in layer.state_dict().values())


def test_layers_packed_at_once_need_few_kernels():
    """Triton compiles a kernel anew where another of its tensors begins at a multiple of 16 bytes,
    but for those that it is told not to look at: of one sequence, 12 layers' tensors begin anywhere,
    and two kernels read them all."""
    model = deep("levels", 12)
    cache = model.new_cache(1, 99)
    with torch.no_grad():
        model.prefill(tokens(1, 75, seed=2), cache)
    looked_at = set()
    all_of = set()
    for layer in cache.layers:
        (packed,) = layer.view().packed
        read = packed._asdict() | packed.ints._asdict()
        aligned = {
            f"{name}_ptr": t.data_ptr() % 16 == 0 for name, t in read.items() if torch.is_tensor(t)
        }
        assert {"bits_ptr", "mask_base_ptr"} <= {*aligned} & {*ANYWHERE}  # the same names
        all_of.add(tuple(aligned.values()))
        looked_at.add(tuple(is_so for name, is_so in aligned.items() if name not in ANYWHERE))
    assert len(looked_at) <= 2 < len(all_of)
