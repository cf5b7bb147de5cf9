"""A base model's tensors: by name, checked against a model's files, and put one by one into a
model without storage, so that loading needs the model's size and one tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config import ModelConfig, check
from loaders.tokenizer import one_line
from model import Transformer
from storage.state import copy_tensors, listed


def model_state(model: Transformer) -> dict[str, Tensor]:
    """Return the base model's tensors by name; a tied head is left out."""
    state = dict(model.state_dict())
    if model.cfg.tie_embeddings:
        state.pop("lm_head.weight", None)
    return state


def load_model_state(model: Transformer, saved: dict[str, Tensor], what: str) -> None:
    """Copy a base model's tensors, strictly (ValueError lists what does not fit)."""
    copy_tensors(model_state(model), saved, what)


@dataclass
class ModelFiles:
    """The opened files of a model that another project wrote.

    config: as in a config.json; shapes: of each tensor, under our names; read(name): one tensor in
    the file's dtype, on the CPU; definition: its tokenizer.json, parsed, or None; weights: the
    files to be hashed."""

    name: str
    config: dict
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    definition: dict | None
    weights: list[Path]


def weights_hash(files: list[Path]) -> str:
    """Return the sha256 over the sha256 of each file: the identity of a model's weights."""
    all_files = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            all_files.update(hashlib.file_digest(f, "sha256").digest())
    return all_files.hexdigest()


class _Undrawn(TorchFunctionMode):
    """Makes modules keep the weights they get: drawing them would be in vain, and on the meta
    device costs a second of imports and 150 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def build_model(
    cfg: ModelConfig, files: ModelFiles, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """Make the model of cfg from its files, on a device, its weights in dtype. Raises ValueError,
    one line, for tensors that do not fit or cannot be read."""
    with torch.device("meta"), _Undrawn():
        model = Transformer(cfg)
    want = {k: tuple(t.shape) for k, t in model_state(model).items()}
    _check_shapes(want, files, cfg)
    for name in want:
        t = _read_checked(files, name, device, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(t))
    if cfg.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.rope_cos = model.rope_cos.to(device)
    model.rope_sin = model.rope_sin.to(device)
    return model


def _check_shapes(want: dict[str, tuple], files: ModelFiles, cfg: ModelConfig) -> None:
    """Raise ValueError unless the files hold every tensor of `want` in its shape, and no other."""
    shapes = dict(files.shapes)
    if cfg.tie_embeddings:
        shapes.pop("lm_head.weight", None)  # some files hold the shared matrix twice
    faults = {
        "missing": [k for k in want if k not in shapes],
        "unexpected": [k for k in shapes if k not in want],
        "of another shape": [
            f"{k} {shapes[k]} for {want[k]}" for k in want if k in shapes and shapes[k] != want[k]
        ],
    }
    text = listed(faults)
    check(
        not text,
        f"the tensors of {files.name} do not fit its config: {text}",
        "every name and shape must",
        "use the model's own files",
    )


def _read_checked(files: ModelFiles, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read one tensor to its place and dtype. Raises ValueError where it is damaged or
    quantised."""
    try:
        t = files.read(name)
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{files.name}: {name} cannot be read ({one_line(e)}); copy the file again"
        ) from None
    # not float8, whose scales lie elsewhere
    wide = t.is_floating_point() and t.element_size() > 1
    check(
        wide,
        f"{files.name}: {name} is {t.dtype}",
        "bfloat16, float16, float32 and float64 are read",
        "use unquantised weights",
    )
    t = t.to(device, dtype, copy=True)
    check(
        bool(torch.isfinite(t).all()),
        f"{files.name}: {name}",
        f"not all finite in {dtype}",
        "copy the file again",
    )
    return t
