"""Memory that tensors on a CPU leave is kept for the next ones (loaders/device.py)."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

HAS_MALLOPT = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")
ROUNDS = """
import resource
import torch
from loaders.device import keep_freed_memory
if {kept}:
    keep_freed_memory()
def once():
    return [torch.ones(2**20) for _ in range(16)]  # 64 MiB, 16,384 pages
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    """Pages that the system cleared while the same memory was asked for three times more."""
    command = [sys.executable, "-c", ROUNDS.format(kept=kept)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not HAS_MALLOPT, reason="an option of glibc")
def test_freed_memory_is_not_asked_for_again():
    """Of three times 64 MiB a quarter of the pages at most is cleared anew that is without it."""
    assert 4 * faults(kept=True) < faults(kept=False)
