"""How much a prefill that selects begins on a GPU once its layers are done, and how often the host
waits there: of one prompt it is this, not arithmetic, that takes the time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import Questions, tokens
from test_launches import Launches, model_of
from torch.utils._pytree import tree_leaves

import selector
from selection import relevance
from storage import levels, packing
from storage.integers import contexts
from storage.kernel_base import triton

pytestmark = pytest.mark.skipif(
    triton is None or torch.cuda.is_available(), reason="counted in Triton's interpreter"
)

WITH_KERNELS = (relevance, levels, packing, contexts)


def is_on_host(t: torch.Tensor) -> bool:
    """Say whether a GPU's tensor, or what was computed of it, would lie on the host here."""
    return getattr(t, "on_host", False)


class DeviceLaunches(Launches):
    """Counts, by name, what a GPU would be given: kernels, operators and copies to it, but not what
    is computed on the host of tensors that Tensor.cpu brought there. waits: how often the host
    waits for a tensor of the device, by the operator that does. late: those of the waits that
    follow a kernel that packs. mixed: operators that get tensors of both, which a GPU refuses."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__(patch)
        self.waits: Counter = Counter()
        self.late: Counter = Counter()
        self.mixed: Counter = Counter()
        to = torch.Tensor.to
        tolist = torch.Tensor.tolist

        def brought(t: torch.Tensor) -> torch.Tensor:
            self.wait("cpu")
            out = t.clone()
            out.on_host = True
            return out

        def moved(t: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            if not is_on_host(t):
                return to(t, *args, **kwargs)
            self.names["copy to the device"] += 1
            if not kwargs.get("non_blocking", False):
                self.wait("to")
            out = t.clone()
            out.on_host = False
            return out

        def listed(t: torch.Tensor) -> Any:
            if not is_on_host(t):
                self.wait("tolist")
            return tolist(t)

        for name, method in (("cpu", brought), ("to", moved), ("tolist", listed)):
            patch.setattr(torch.Tensor, name, method)

    def clear(self) -> None:
        """Begin to count anew."""
        for counts in (self.names, self.waits, self.late, self.mixed):
            counts.clear()

    def packs(self) -> bool:
        """Say whether a kernel that packs has begun."""
        return any(name.startswith("_pack") for name in self.names)

    def wait(self, name: str) -> None:
        """Count a wait of the host."""
        self.waits[name] += 1
        self.late[name] += self.packs()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(map(is_on_host, inputs)):
            self.mixed[str(function)] += not all(is_on_host(t) for t in inputs if t.ndim)
            out = function(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    t.on_host = True
            return out
        name = function._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if by_mask or unsized or name in Questions.WAIT:
            self.wait(name)
        return super().__torch_dispatch__(function, types, args, kwargs)


def counted(patch: pytest.MonkeyPatch) -> DeviceLaunches:
    """Count, from now on, what runs inside Selector.finish, with kernels."""
    for module in WITH_KERNELS:
        patch.setattr(module, "use_triton", lambda impl, *about: impl != "torch")
    launches = DeviceLaunches(patch)
    inner = selector.Selector.finish

    def finish(*args) -> None:
        with launches:
            inner(*args)

    patch.setattr(selector.Selector, "finish", finish)
    return launches


@pytest.mark.parametrize(
    ("storage", "padded", "most", "waits"),
    [
        ("levels", False, 180, dict(cpu=1, nonzero=1)),
        ("levels", True, 190, dict(cpu=1, nonzero=1, tolist=1, lift_fresh=1)),
        ("select", False, 160, dict(cpu=1)),
    ],
)
def test_choosing_and_packing_launch_few(storage, padded, most, waits, monkeypatch):
    """What follows the last layer of a prompt is bounded, and is as much of four layers as of two:
    working out on the device where things lie took 1.2 to 1.4 times as much. The host waits for
    counts and for which tokens they are, where there is padding for lengths and to copy the budgets
    of such rows back, and for no kernel that packs."""
    taken = []
    for n_layer in (2, 4):
        model = model_of(n_layer, storage)
        idx = tokens(2 if padded else 1, 60)
        n_pad = torch.tensor([0, 7]) if padded else None
        with monkeypatch.context() as patch, torch.no_grad():
            launches = counted(patch)
            for _ in range(2):  # what is made once is made the first time
                launches.clear()
                model.prefill(idx, model.new_cache(len(idx), 80), n_pad)
        taken.append(launches.names)
        assert launches.names.total() <= most
        assert not +launches.mixed
        assert +launches.waits == waits
        assert launches.packs() and not +launches.late
    assert taken[0] == taken[1]
