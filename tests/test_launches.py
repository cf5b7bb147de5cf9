"""How many kernels a decode step launches: what a step of one sequence takes, for its work is little
and its launches are many."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import HostReads, Questions, tokens
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import generate
import kernels
import kv_router
import selector
from config import KVConfig, ModelConfig, SelectConfig
from generate import DecodeGraph, prefill
from model import Transformer
from storage import dense as dense_cache
from storage import layout
from storage import packed as packed_cache
from storage.copies import all_read
from storage.from_keys import FromKeys
from storage.kernel_base import triton

pytestmark = pytest.mark.skipif(
    triton is None or torch.cuda.is_available(), reason="counted in Triton's interpreter"
)

AROUND = Counter(_heads_kernel=1, _gate_kernel=1, _add_kernel=2)
PROMPT = 41


class Launches(TorchDispatchMode):
    """Counts, by name, kernels and operators that compute something: no views, no memory that is
    not written."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.names = Counter()
        executor = triton.runtime.interpreter.GridExecutor
        run = executor.__call__

        def counted(kernel, *args, **kwargs):
            self.names[kernel.fn.__name__] += 1
            with _disable_current_modes():  # the interpreter's own
                return run(kernel, *args, **kwargs)

        patch.setattr(executor, "__call__", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [out.alias_info for out in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if not is_view and "empty" not in function._schema.name:
            self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def model_of(n_layer: int, storage: str, fold: bool = True) -> Transformer:
    """A model, folded, whose blocks run as kernels, and which stores so."""
    torch.manual_seed(0)
    shape = dict(n_embd=40, n_head=4, n_kv_head=2, head_dim=32, n_inner=50)
    model = Transformer(ModelConfig(n_layer=n_layer, vocab_size=101, block_size=128, **shape))
    seen = [tokens(2, 70, seed=1)]
    if storage == "groups":
        cfg = KVConfig(n_groups=4, topk_groups=2, kv_tail=3, value_router="norm")
        kv_router.attach(model, cfg, seen)
    if storage in ("told by keys", "told by own keys", "trained basis"):
        told = {"told by keys": "keys", "told by own keys": "own_keys"}.get(storage, "zero")
        cfg = KVConfig(n_groups=4, topk_groups=2, kv_tail=3, kv_sinks=2, reconstructor=told)
        cfg = replace(cfg, learn_basis=storage == "trained basis")
        kv_router.attach(model, replace(cfg, value_basis="output", value_router="norm"), seen)
    if storage in ("select", "levels", "select told by keys"):
        levels = storage == "levels"
        kv = KVConfig(kv="select", n_groups=4, kv_tail=5, key_block=16)
        if storage == "select told by keys":
            kv = replace(kv, reconstructor="keys", value_basis="output")
        cfg = SelectConfig(kv_bytes=0.5) if levels else SelectConfig(kv_keep=0.5)
        selector.attach(model, kv, cfg, seen)
    return (kv_router.fold(model) if fold else model).eval()


def with_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let kernels run in the interpreter where a GPU would run them."""
    for module in (generate, kernels, dense_cache, packed_cache):
        patch.setattr(module, "use_triton", lambda impl, *about: impl != "torch")


def launches_of_a_step(patch: pytest.MonkeyPatch, n_layer: int, storage: str) -> Counter:
    """Count what a step launches that DecodeGraph would capture."""
    model = model_of(n_layer, storage)
    with_kernels(patch)

    def likeliest(logits: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1, keepdim=True)

    with torch.no_grad():
        _, cache = prefill(model, tokens(1, PROMPT), PROMPT + 9)
        graph = DecodeGraph(model, cache, tokens(1, 1), likeliest, 9)
        graph._once()  # what is made once is made now
        with Launches(patch) as launches:
            graph._once()
    return launches.names


@pytest.mark.parametrize(
    ("storage", "append", "attention"),
    [
        ("dense", "_append_window_kernel", "_attention_kernel"),
        ("select", "_append_window_kernel", "_attention_kernel"),
        ("levels", "_append_window_kernel", "_word_attention_kernel"),
        ("groups", "_append_packed_kernel", "_attention_kernel"),
    ],
)
def test_a_layer_of_a_step_is_seven_launches(storage, append, attention, monkeypatch):
    """What a step of four layers has more than one of two, however the context is stored: append,
    attention and the join of its pieces, and four around them; not one operator of PyTorch."""
    counts = []
    for n_layer in (2, 4):
        with monkeypatch.context() as patch:
            counts.append(launches_of_a_step(patch, n_layer, storage))
    two = Counter({**AROUND, append: 1, attention: 1, "_merge_kernel": 1})
    assert counts[1] - counts[0] == two + two


@pytest.mark.parametrize("lengths", [(41, 30), (6, 4)], ids=str)
def test_values_told_by_all_heads_ask_the_device_nothing(lengths, monkeypatch):
    """A step whose dropped groups are told by the keys of all heads waits for no number of the
    device: not while the window fills, nor where one of two sequences packs a token. It reads as
    many slots as the longest sequence has packed, however many are reserved."""
    model = model_of(2, "told by keys")
    read = []
    before_rope = FromKeys.heads_before_rope

    def counted(maps, k, position):
        if k.size(2) > 1:  # one is the token that is packed
            read.append(k.size(2))
        return before_rope(maps, k, position)

    with_kernels(monkeypatch)
    monkeypatch.setattr(layout, "is_read_here", lambda x: False)  # what a CPU alone does
    questions = Questions()
    reads = HostReads()
    idx = tokens(2, max(lengths))
    n_pad = torch.tensor([max(lengths) - n for n in lengths])
    with torch.no_grad():
        cache = model.new_cache(2, 60)
        model.prefill(idx, cache, n_pad)
        cache.reserve(60)
        monkeypatch.setattr(FromKeys, "heads_before_rope", counted)
        with questions, reads:
            for i in range(9):
                model.decode(tokens(2, 1, seed=i), cache)
    assert questions.asked == reads.asked == []
    assert cache.layers[0].n_packed.tolist() == [n - 2 + 9 - 3 for n in lengths]
    packed = [max(lengths) - 2 + i - 3 for i in range(1, 10)]
    assert read == [n for n in packed if n > 1 for _ in model.layers]


@pytest.mark.parametrize(
    "storage", ["told by keys", "told by own keys", "trained basis", "select told by keys"]
)
def test_a_new_cache_asks_about_its_maps_once(storage):
    """However many layers have trained maps, making a cache waits for the device once, to learn
    which of them have been written since the cache before; the first never. Layers whose maps
    stayed share what they read, one whose map was written reads anew."""
    for n_layer in (2, 4):
        model = model_of(n_layer, storage, fold=storage != "trained basis")
        made = []
        for written in (False, False, True):
            if written:
                with torch.no_grad():
                    next(model.layers[1].self_attn.kv_path.parameters()).mul_(1.5)
            questions = Questions()
            reads = HostReads()
            with questions, reads:
                made.append(model.new_cache(1, 20))
            assert len(questions.asked + reads.asked) == (len(made) > 1)
        first, again, after = [[maps_at(layer) for layer in cache.layers] for cache in made]
        assert first == again
        shared = [a == b for a, b in zip(again, after, strict=True)]
        assert shared == [i != 1 for i in range(n_layer)]


@pytest.mark.parametrize("storage", ["dense", "groups", "select"])
def test_a_new_cache_without_trained_maps_asks_nothing(storage):
    """Not the first, nor those after it."""
    model = model_of(2, storage)
    questions = Questions()
    reads = HostReads()
    with questions, reads:
        for _ in range(3):
            model.new_cache(1, 20)
    assert questions.asked == reads.asked == []


def maps_at(cache) -> list[int]:
    """Where the maps lie that a layer's cache reads."""
    return [t.data_ptr() for t in all_read(cache.basis).values()]
