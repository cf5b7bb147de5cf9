"""Models in and out of folders: what a run of train.py left, put together again.

A checkpoint folder holds model.safetensors (a base) or adapter.safetensors (adapters, value routers and bases, with the path of
the base they belong to), config.json and a manifest. `load_run` takes a checkpoint, a stage or a run folder.

    from pretrained import load_run
    run = load_run("out/...")
    run.model, run.tokenizer
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import kv_router
import lora
from config import AdapterConfig, KVConfig, ModelConfig, check, from_dict
from data import get_tokenizer
from model import Transformer


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a device that exists. Raises ValueError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ok = name == "cpu" or (name.split(":")[0] == "cuda" and torch.cuda.is_available()
                           and (name == "cuda" or (name[5:].isdigit() and int(name[5:]) < torch.cuda.device_count())))
    gpus = f", cuda:0..{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else " (no GPU here)"
    check(ok, f"device={name!r}", f"auto, cpu{gpus}", "choose one")
    return torch.device(name)


def autocast(device: torch.device, dtype: str):
    """The context in which the model computes: bfloat16 autocast, or float32 as it is. auto: bfloat16 on a GPU that has it."""
    use = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=use)


def model_state(model: Transformer) -> dict[str, Tensor]:
    """The base model's tensors; a tied head is left out."""
    return {k: t for k, t in model.state_dict().items() if not (model.cfg.tie_embeddings and k == "lm_head.weight")}


def load_model_state(model: Transformer, saved: dict[str, Tensor], what: str) -> None:
    """Copy a base model's tensors, strictly (ValueError lists what does not fit)."""
    checkpoint.copy_tensors(model_state(model), saved, what)


def added_state(model: Transformer) -> dict[str, Tensor]:
    """Everything that was added to a base: adapters, value routers, reconstructors, bases."""
    return {**lora.adapter_state(model), **kv_router.state(model)}


def load_added_state(model: Transformer, saved: dict[str, Tensor]) -> None:
    """Put added_state back into a model with the same things attached, not folded yet (ValueError lists what does not fit)."""
    kv_names = {k for k in saved if ".kv_path." in k}
    kv_router.load_state(model, {k: saved[k] for k in kv_names})
    lora.load_adapter_state(model, {k: t for k, t in saved.items() if k not in kv_names})


@dataclass
class Run:
    """A loaded model and where it came from. base: the base checkpoint's folder, for an adapted model."""
    model: Transformer
    tokenizer: object
    path: Path
    config: dict
    adapter: AdapterConfig
    kv: KVConfig
    base: Path


def find_checkpoint(folder: str | os.PathLike) -> Path:
    """The checkpoint meant by a folder: itself; of a stage, the best, else the newest valid; of a run, that of its first stage routed-s*,
    else of its only stage, else of pretrain. Raises ValueError that says what was found instead."""
    folder = Path(folder)
    check(folder.is_dir(), f"{folder}", "no such folder", "give a folder that train.py wrote")
    if (folder / checkpoint.MANIFEST).is_file():
        return folder
    newest, why = checkpoint.newest(folder)
    if (folder / "best").is_dir() and checkpoint.verify(folder / "best") is None:
        return folder / "best"
    if newest is not None:
        return newest
    stages = sorted(p for p in folder.iterdir() if p.is_dir() and ((p / "best").is_dir() or any(p.glob("step-*"))))
    for stage in [*(s for s in stages if s.name.startswith("routed-s")), *(stages if len(stages) == 1 else []), folder / "pretrain"]:
        if stage in stages:
            return find_checkpoint(stage)
    names = ", ".join(p.name for p in stages) or "none"
    raise ValueError(f"{folder}: no usable checkpoint ({'; '.join(why) or f'stages found: {names}'}); give a stage's folder")


def load_run(folder: str | os.PathLike, device: torch.device | str = "cpu") -> Run:
    """Load base, value groups and adapters of a checkpoint, stage or run folder. ValueError names what is damaged or does not fit."""
    path = find_checkpoint(folder)
    ckpt = checkpoint.load(path)
    entries = {"model", "tokenizer", "adapter", "kv"}
    check(entries <= set(ckpt.config), f"{path}/config.json", f"lacks {sorted(entries - set(ckpt.config))}", "was it written by train.py?")
    model = Transformer(from_dict(ModelConfig, ckpt.config["model"]))
    adapter, kv = from_dict(AdapterConfig, ckpt.config["adapter"]), from_dict(KVConfig, ckpt.config["kv"])
    base = path
    if "base" in ckpt.config:
        base = Path(os.path.normpath(path / ckpt.config["base"]))
        check(base.is_dir(), f"{path} adapts {base}", "that folder is gone", "move base and adapter together")
        base_ckpt = checkpoint.load(base)
        found = checkpoint.tensor_hash(base)
        check(found == ckpt.config["base_sha256"], f"{base}/model.safetensors has sha256 {found[:12]}...",
              f"{path} was trained on {ckpt.config['base_sha256'][:12]}...", "give the base it was trained on")
        load_model_state(model, base_ckpt.tensors["model"], str(base))
    else:
        load_model_state(model, ckpt.tensors.get("model", {}), str(path))
    model.to(device)
    if "adapter" in ckpt.tensors:
        kv_router.attach(model, kv)
        lora.attach(model, adapter)
        load_added_state(model, ckpt.tensors["adapter"])
        kv_router.fold(model)
    return Run(model.eval(), get_tokenizer(ckpt.config["tokenizer"]), path, ckpt.config, adapter, kv, base)
