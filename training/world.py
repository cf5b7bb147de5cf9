"""This process among its peers: torchrun's variables decide, and one process is a world of its own.

torchrun --nproc_per_node=2 train.py --stage=pretrain
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from loaders.device import pick_device
from model import Transformer


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())


@contextmanager
def world(device_name: str):
    """This process's World: torchrun's variables decide; the process group lives inside the
    `with`."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name)
    if size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def share_parameters(model: Transformer, w: World) -> None:
    """Every rank starts from rank 0's weights and value bases."""
    if w.size > 1:
        for t in (*model.parameters(), *model.buffers()):
            dist.broadcast(t.data, 0)
