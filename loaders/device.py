"""Where a model computes and in which numbers: the device, autocast, and the dtype of its
weights."""

from __future__ import annotations

import ctypes
import platform
import sys

import torch

from config import check
from model import Transformer

# mallopt's names (malloc.h), and the longest block that it lets the heap hold
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LONGEST_BLOCK = 32 * 2**20


def pick_device(name: str) -> torch.device:
    """Return auto, cpu, cuda or cuda:N as a device that exists. Raises ValueError otherwise."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    if n_gpus:
        known = ["cpu", "cuda", *(f"cuda:{i}" for i in range(n_gpus))]
        allowed = f"auto, cpu, cuda:0..{n_gpus - 1}"
    else:
        known = ["cpu"]
        allowed = "auto, cpu (no GPU here)"
    check(name in known, f"device={name!r}", allowed, "choose one")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors on a CPU leave, in blocks of up to
    LONGEST_BLOCK, for those of the next step. Given back and asked for anew, each of its pages is
    cleared again by the system. Without glibc nothing changes."""
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LONGEST_BLOCK)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """Name the card, or the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def in_bfloat16(device: torch.device, dtype: str) -> bool:
    """Say whether --dtype computes in bfloat16 on this device; auto: on a GPU that has it."""
    if dtype == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Make the context in which the model computes: bfloat16 autocast, or float32 as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, dtype))


def check_weights(weights: str, device: torch.device, dtype: str) -> None:
    """Raise ValueError where weights held in bfloat16 would meet a computation in float32."""
    check(
        weights == "float32" or in_bfloat16(device, dtype),
        f"weights={weights} with dtype={dtype} on {device.type}",
        "they need computing in bfloat16",
        "give --dtype=bfloat16 or --weights=float32",
    )


def place(model: Transformer, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """Move the model to a device and its weights to dtype, in place, and return it. The tables of
    positions keep their dtype: bfloat16 would blur them."""
    tables = model.rope_tables()
    model.to(device, dtype)
    for name, table in tables.items():
        setattr(model, name, table.to(device))
    return model
