"""A base model's tensors: by name, checked against a model's files, and put one by one into a
model without storage, so that loading needs the model's size and one tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config import ModelConfig, check
from model import Transformer
from settings.fields import one_line
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


def model_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of model_state by name, without making any of them."""
    wide = cfg.n_head * cfg.head_dim
    narrow = cfg.n_kv_head * cfg.head_dim
    layer = {
        "input_layernorm": (cfg.n_embd,),
        "self_attn.q_proj": (wide, cfg.n_embd),
        "self_attn.k_proj": (narrow, cfg.n_embd),
        "self_attn.v_proj": (narrow, cfg.n_embd),
        "self_attn.o_proj": (cfg.n_embd, wide),
        "post_attention_layernorm": (cfg.n_embd,),
        "mlp.gate_proj": (cfg.n_inner, cfg.n_embd),
        "mlp.up_proj": (cfg.n_inner, cfg.n_embd),
        "mlp.down_proj": (cfg.n_embd, cfg.n_inner),
    }
    if not cfg.gated_mlp:
        del layer["mlp.gate_proj"]
    if cfg.qk_norm:
        layer["self_attn.q_norm"] = (cfg.head_dim,)
        layer["self_attn.k_norm"] = (cfg.head_dim,)
    if cfg.post_norms:
        layer["attn_out_norm"] = (cfg.n_embd,)
        layer["mlp_out_norm"] = (cfg.n_embd,)
    modules = {"embed_tokens": (cfg.vocab_size, cfg.n_embd)}
    if cfg.positions == "learned":
        modules["embed_positions"] = (cfg.block_size, cfg.n_embd)
    for i in range(cfg.n_layer):
        for name, shape in layer.items():
            modules[f"layers.{i}.{name}"] = shape
    modules["norm"] = (cfg.n_embd,)
    if not cfg.tie_embeddings:
        modules["lm_head"] = (cfg.vocab_size, cfg.n_embd)
    shapes = {}
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape
        if has_bias(cfg, name):
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def has_bias(cfg: ModelConfig, module: str) -> bool:
    """Say whether a module of a model of cfg, by its name, has a bias."""
    kind = module.rpartition(".")[2]
    if kind in ("q_proj", "k_proj", "v_proj"):
        return cfg.qkv_bias
    if kind.endswith("_proj"):
        return cfg.out_bias
    return cfg.norm == "layer" and kind.endswith("norm") and kind not in ("q_norm", "k_norm")


def check_shapes(
    cfg: ModelConfig, shapes: dict[str, tuple[int, ...]], what: str, more: bool = False
) -> None:
    """Raise ValueError, before anything is allocated, unless files hold every tensor of a model of
    cfg in its shape, and no other.

    shapes: of the tensors in the files; what: whose they are; more: others may be there."""
    # first, and alone: the names of a million layers would take forever
    last = f"layers.{cfg.n_layer - 1}.input_layernorm.weight"
    check(
        last in shapes,
        f"{what} does not fit its config of {cfg.n_layer} layers",
        f"missing: {last}",
        "use the model's own files",
    )
    want = model_shapes(cfg)
    faults = {
        "missing": [k for k in want if k not in shapes],
        "unexpected": [k for k in shapes if k not in want and not more],
        "of another shape": [
            f"{k} {shapes[k]} for {want[k]}" for k in want if k in shapes and shapes[k] != want[k]
        ],
    }
    text = listed(faults)
    check(
        not text,
        f"{what} does not fit its config: {text}",
        "every name and shape must",
        "use the model's own files",
    )


@dataclass
class ModelFiles:
    """The opened files of a model that another project wrote.

    config: as in a config.json; shapes: of each tensor, under our names; read(name): one tensor in
    the file's dtype, on the CPU; definition: its tokenizer.json, parsed, or None; weights: the
    files to be hashed; chat: what a .gguf file says of conversations (loaders/templates.py), or
    None."""

    name: str
    config: dict
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    definition: dict | None
    weights: list[Path]
    chat: tuple | None = None


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


def with_own_head(cfg: ModelConfig, files: ModelFiles) -> ModelConfig:
    """Return cfg, its head untied where the files hold one that differs from the embedding: what a
    file holds is believed, not what a config says of it. (Some files hold the shared matrix
    twice.)"""
    names = ("lm_head.weight", "embed_tokens.weight")
    if not cfg.tie_embeddings or any(name not in files.shapes for name in names):
        return cfg
    head = _read(files, names[0])
    embedding = _read(files, names[1])
    same = head.dtype == embedding.dtype and head.shape == embedding.shape
    # bits are compared: float8 knows no equality
    if same and torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)):
        return cfg
    return replace(cfg, tie_embeddings=False)


def build_model(
    cfg: ModelConfig, files: ModelFiles, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """Make the model of cfg from its files, on a device, its weights in dtype. Raises ValueError,
    one line, for tensors that do not fit or cannot be read."""
    shapes = dict(files.shapes)
    if cfg.tie_embeddings:
        shapes.pop("lm_head.weight", None)  # the shared matrix, twice: see with_own_head
    check_shapes(cfg, shapes, files.name)
    with torch.device("meta"), _Undrawn():
        model = Transformer(cfg)
    for name in model_shapes(cfg):
        t = _read_checked(files, name, device, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(t))
    if cfg.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for name, table in model.rope_tables().items():
        setattr(model, name, table.to(device))
    return model


def _read(files: ModelFiles, name: str) -> Tensor:
    """Read one tensor as it is. Raises ValueError where it is damaged."""
    try:
        return files.read(name)
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{files.name}: {name} cannot be read ({one_line(e)}); copy the file again"
        ) from None


def _read_checked(files: ModelFiles, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read one tensor to its place and dtype. Raises ValueError where it is damaged or
    quantised."""
    t = _read(files, name)
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
