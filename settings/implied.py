"""What the flags that are given imply for those that are not: a preset, an adapter, and with
--resume all that the run in --out_dir was started with."""

from __future__ import annotations

import json
from pathlib import Path

from settings.fields import check, from_dict, to_dict
from settings.train import PAPER

# What a resumed run may be given anew: none of it changes a step.
FREE = (
    "resume",
    "out_dir",
    "init_from",
    "data_dir",
    "device",
    "compile",
    "capture",
    "shard",
    "accumulation",
    "eval_interval",
    "eval_sequences",
    "sample_interval",
    "save_interval",
    "keep_checkpoints",
    "seeds",
    "max_minutes",
)
# Peak rates for what is pretrained, which the default for a small new model would ruin.
RATE = 1e-3
WHOLE_RATE = 1e-4  # of all weights
MORE = ("pretrain_steps", "adapt_steps", "select_steps")  # may grow


def implied(given: dict, configs: dict[str, type]) -> tuple[dict, set[str]]:
    """The values that settings have by the flags that are given, defaults left out, and the names
    of those that somebody has chosen. ValueError where a run would be resumed as another."""
    saved = Path(given.get("out_dir", "")) / "config.json"
    if given.get("resume") and given.get("out_dir") and saved.is_file():
        return resumed(saved, given, configs)
    chosen = dict(given)
    if given.get("stage") == "adapt" and given.get("adapter") == "lora":
        chosen.setdefault("kv", "dense")  # plain LoRA: whole values
    if given.get("preset") == "paper":
        chosen = PAPER | chosen
    if is_pretrained(given.get("init_from", "")):
        chosen.setdefault("adapt_lr", WHOLE_RATE if given.get("stage") == "continue" else RATE)
    return chosen, set(given)


def is_pretrained(where: str) -> bool:
    """Whether --init_from names a model that another project wrote, by its name or by a folder's
    config.json."""
    if where.startswith("hf:") or where.lower().endswith(".gguf"):
        return True
    try:
        found = json.loads((Path(where).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # it is refused, or read, where it is loaded
    return isinstance(found, dict) and "model_type" in found


def resumed(saved: Path, given: dict, configs: dict[str, type]) -> tuple[dict, set[str]]:
    """The settings of the run whose config.json this is, and those given that may differ. Raises
    ValueError, which names the flag, for one that may not."""
    values, named = read_settings(saved, configs)
    for name, value in given.items():
        if name in FREE or name not in values:
            continue
        grows = name in MORE and value > values[name]
        check(
            grows or value == values[name],
            f"{name}={value} with resume",
            f"the run in {saved.parent} has {values[name]!r}",
            f"leave --{name} out, "
            + ("or give more" if name in MORE else "or start anew in another folder"),
        )
    return values | given, named | {*given}


def read_settings(saved: Path, configs: dict[str, type]) -> tuple[dict, set[str]]:
    """The settings in a run's config.json, and the names of those that flags gave. ValueError
    where it is damaged."""
    try:
        found = json.loads(saved.read_text(encoding="utf-8"))
        groups = {key: found[key] for key in configs if key in found}
        named = found.get("given")
        whole = all(isinstance(group, dict) for group in groups.values())
    except (OSError, ValueError, TypeError, AttributeError):
        whole = False
    check(whole, f"{saved}", "is damaged", "start anew in another folder")
    values: dict = {}
    for key, group in groups.items():
        values |= to_dict(from_dict(configs[key], group))
    if named is None:  # of an older run: what is not the default was given
        usual: dict = {}
        for cls in configs.values():
            usual |= {name: f.default for name, f in cls.__dataclass_fields__.items()}
        named = [name for name, value in values.items() if value != usual[name]]
    return values, set(named)
