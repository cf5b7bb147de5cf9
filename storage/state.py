"""What does not fit is refused: named tensors that are copied into a model, all of them or none,
and settings and tensors in which two caches differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from config import check


def few(names: list[str]) -> str:
    """Join the first eight names, and say how many more there are."""
    text = ", ".join(names[:8])
    if len(names) > 8:
        text += f" and {len(names) - 8} more"
    return text


def listed(faults: dict[str, list[str]]) -> str:
    """Write faults, {kind: names}, as one line; empty where there is no name."""
    return "; ".join(f"{kind}: {few(names)}" for kind, names in faults.items() if names)


def check_fit(own: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Raise ValueError, one line that lists the names at fault, unless `saved` has every tensor of
    `own`, no other, all of the same shapes, and every number is finite. `what` says whose tensors
    these are."""
    shared = [k for k in saved if k in own]
    faults = {
        "missing": [k for k in own if k not in saved],
        "unexpected": [k for k in saved if k not in own],
        "of another shape": [
            f"{k} {tuple(saved[k].shape)} for {tuple(own[k].shape)}"
            for k in shared
            if saved[k].shape != own[k].shape
        ],
        "not finite": [k for k, t in saved.items() if not torch.isfinite(t).all()],
    }
    text = listed(faults)
    check(
        not text,
        f"{what} does not fit",
        text,
        "use the checkpoint's own config, or another checkpoint",
    )


@torch.no_grad()
def copy_tensors(own: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy `saved` into the tensors `own`, all or nothing: see check_fit."""
    check_fit(own, saved, what)
    for k, t in own.items():
        t.copy_(saved[k])


def refuse_difference(wanted: dict, found: dict, what: str) -> None:
    """Raise ValueError that names the first setting in which two caches differ."""
    for name in [*wanted, *(n for n in found if n not in wanted)]:
        check(
            wanted.get(name) == found.get(name),
            f"{what}: {name} is {found.get(name)!r}",
            f"{wanted.get(name)!r} is needed",
            "use caches of one model and one way of storing",
        )


def is_alike(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors have one dtype, device and shape."""
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are alike and lie at the same place."""
    return is_alike(a, b) and (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride())


def equal(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal, of one dtype and on one device, which is not asked about a
    tensor that lies at the same place."""
    return is_same(a, b) or (is_alike(a, b) and torch.equal(a, b))


def which_equal(pairs: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> list[bool]:
    """Say of each pair of sets of tensors whether they have the same names, and equal tensors by
    them: `equal`, but the device is asked once for all pairs."""
    answers = []
    asked = {}  # by the number of a pair: 0-d bool, what the device says
    for i, (a, b) in enumerate(pairs):
        alike = a.keys() == b.keys() and all(is_alike(a[name], b[name]) for name in a)
        answers.append(alike)
        apart = [name for name in a if alike and not is_same(a[name], b[name])]
        if apart:
            asked[i] = torch.stack([(a[name] == b[name]).all() for name in apart]).all()
    if asked:
        device = next(iter(asked.values())).device  # layers may lie on several
        told = torch.stack([t.to(device) for t in asked.values()]).tolist()
        for i, same in zip(asked, told, strict=True):
            answers[i] = same
    return answers


def refuse_constants(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError that names the first tensor in which two caches' models differ."""
    for name in sorted({*wanted, *found}):
        a = wanted.get(name)
        b = found.get(name)
        same = a is b or (a is not None and b is not None and equal(a, b))
        check(
            same,
            f"caches to be joined: other {name}",
            "what was packed with one is not read with another",
            "use caches that were filled after the change",
        )
