"""Models of the Hugging Face hub, fetched by its own client into its own cache."""

from __future__ import annotations

from pathlib import Path

from config import check
from settings.fields import one_line

# no file that can run code is asked for
WANTED = [
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
]
UNWANTED = ["*/*", "consolidated*"]


def hub_folder(name: str, revision: str) -> Path:
    """Return the local folder of hf:ORG/NAME at a revision (empty: main), named by its commit."""
    check(
        name.count("/") == 1 and all(name.split("/")),
        f"hf:{name}",
        "a model is named hf:ORG/NAME",
        "for example hf:HuggingFaceTB/SmolLM2-135M",
    )
    try:
        from huggingface_hub import snapshot_download  # here: an optional extra
    except ImportError:
        raise ValueError(
            f"hf:{name} needs the package huggingface_hub; pip install huggingface_hub, or give a "
            "folder"
        ) from None
    revision = revision or "main"
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    # OSError and ValueError of the hub's own; its transport (httpx, hf_xet) raises other kinds
    except Exception as e:
        raise ValueError(
            f"hf:{name} at revision {revision} cannot be had ({one_line(e)[:200]}): the hub or its "
            "local cache must have it; go online, check name and --revision, or give a folder"
        ) from None
    return Path(folder)
