"""What a resumed run must have in common with the run that its checkpoint is of."""

from __future__ import annotations

from pathlib import Path

from config import KVConfig, ModelConfig, SelectConfig, check
from settings.adapters import AdapterConfig
from settings.experts import MixConfig
from settings.fields import from_dict, to_dict
from settings.train import DataConfig

# What a checkpoint says of its run that a resumed one must say, too. Entries that a kind of stage
# lacks are lacking on both sides.
SAME_WHEN_RESUMED = (
    "model",
    "tokenizer",
    "adapter",
    "kv",
    "seed",
    "batch_size",
    "block_size",
    "lr",
    "corpus",
    "objective",
    "kv_from",
    "select",
    "kv_byte_budgets",
    "n_context",
    "mix",
    "optimizer",
    "data",
    "tokens",
    "weights",
    "base_sha256",
)
# the classes of those that are settings
SETTINGS = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "kv": KVConfig,
    "select": SelectConfig,
    "mix": MixConfig,
    "data": DataConfig,
}


def entry(config: dict, key: str):
    """Return an entry of a checkpoint's config, with the settings that an older one does not
    name."""
    value = config.get(key)
    if key not in SETTINGS or not value:
        return value
    return to_dict(from_dict(SETTINGS[key], value))


def check_same_run(path: Path, saved: dict, here: dict) -> None:
    """Raise ValueError where the config of the checkpoint at `path` says another run than this
    one's."""
    for key in SAME_WHEN_RESUMED:
        check(
            entry(saved, key) == entry(here, key),
            f"{path} was trained with {key}={saved.get(key)}",
            f"this run says {here.get(key)}",
            "resume with the same flags",
        )
    check(
        saved["steps"] <= here["steps"],
        f"{path} was trained for steps={saved['steps']}",
        f"this run says {here['steps']}",
        "give as many or more",
    )
