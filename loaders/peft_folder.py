"""An adapter that PEFT wrote, or lora.export_peft: adapter_config.json, adapter_model.safetensors.

Plain LoRA on the projections of attention and MLP is read, the same in every layer. What PEFT can
do besides is refused by name."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import check
from loaders.huggingface import read_json
from settings.adapters import TARGETS, AdapterConfig
from settings.fields import one_line
from settings.places import HUB_NAME

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WHOLE = ("model.safetensors", "model.safetensors.index.json")  # with these it is a model's folder
NAME = re.compile(
    r"base_model\.model\.model\.(layers\.[0-9]+\.(?:self_attn|mlp)\.([a-z]+)_proj)\.(lora_[AB])\.weight"
)
# settings with which an adapter is another one than ours, and the values of them read here
ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
    "layer_replication": ([], None),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": ([], None),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}


class PeftFolder(NamedTuple):
    """What such a folder holds."""

    adapter: AdapterConfig
    base: str  # path or hf:ORG/NAME of the model that it adapts
    revision: str
    tensors: dict[str, Tensor]  # as lora.adapter_state names them


def is_peft(where: str | os.PathLike) -> bool:
    """Say whether a folder holds an adapter that PEFT wrote, and no whole model."""
    folder = Path(where)
    whole = any((folder / name).exists() for name in WHOLE)
    return (folder / CONFIG).is_file() and not whole


def open_peft(folder: Path) -> PeftFolder:
    """Read an adapter's settings and tensors, in the file's dtype. Raises ValueError, one line,
    for what is missing, damaged, or not plain LoRA."""
    config = read_json(folder / CONFIG)
    where = f"{folder / CONFIG}"
    for key, allowed in ONLY.items():
        came = config.get(key)
        # `in` alone takes 0 for False
        check(
            any(came == a and type(came) is type(a) for a in allowed),
            f"{where}: {key}={came!r}",
            f"only {allowed[0]!r} is supported",
            "merge it with PEFT and give the merged model",
        )
    r = config.get("r")
    alpha = config.get("lora_alpha")
    ok = type(r) is int and r >= 1 and type(alpha) in (int, float) and 0 < alpha < math.inf
    check(ok, f"{where}: r={r!r}, lora_alpha={alpha!r}", "positive numbers", "copy it again")
    base = config.get("base_model_name_or_path")
    check(isinstance(base, str), f"{where}: its base {base!r}", "a name is needed", "edit it")
    tensors, targets = _read_tensors(folder, r)
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(r)  # scaled by alpha / sqrt(r) there
    adapter = AdapterConfig(
        adapter="lora",
        r=r,
        alpha=float(alpha),
        lora_dropout=_dropout(config, where),
        lora_targets=",".join(t for t in TARGETS if t in targets),
    )
    here = Path(base).exists() or (folder / base).exists()
    if HUB_NAME.fullmatch(base) and not here:
        base = f"hf:{base}"
    return PeftFolder(adapter, base, config.get("revision") or "", tensors)


def _dropout(config: dict, where: str) -> float:
    """Return the dropout of an adapter's input."""
    p = config.get("lora_dropout") or 0.0
    ok = type(p) in (int, float) and 0 <= p < 1
    check(ok, f"{where}: lora_dropout={p!r}", "a number in [0, 1)", "copy it again")
    return float(p)


def _read_tensors(folder: Path, r: int) -> tuple[dict[str, Tensor], set[str]]:
    """Read the tensors, under our names, and which projections they adapt. Their rank is looked up
    in the header first."""
    path = folder / WEIGHTS
    check(path.is_file(), f"{folder} lacks {WEIGHTS}", "its weights", "save it as safetensors")
    tensors = {}
    targets = set()
    try:
        with safe_open(path, "pt") as f:
            for theirs in f.keys():  # noqa: SIM118 (not a dict)
                found = NAME.fullmatch(theirs)
                known = found is not None and found[2] in TARGETS
                check(
                    known,
                    f"{path}: tensor {theirs}",
                    f"LoRA of the projections {', '.join(TARGETS)} is supported",
                    "merge it with PEFT and give the merged model",
                )
                shape = f.get_slice(theirs).get_shape()
                rank = shape[0 if found[3] == "lora_A" else -1] if len(shape) == 2 else None
                check(
                    rank == r,
                    f"{path}: tensor {theirs} {tuple(shape)}",
                    f"its config says r={r}",
                    "use the adapter's own config",
                )
                tensors[f"{found[1]}.{found[3]}"] = f.get_tensor(theirs)
                targets.add(found[2])
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} cannot be read ({one_line(e)}); copy it again") from None
    check(bool(tensors), f"{path}", "holds no tensors", "copy it again")
    return tensors, targets
