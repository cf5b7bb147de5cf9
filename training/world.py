"""This process among its peers: torchrun's variables decide, and one process is a world of its own.

torchrun --nproc_per_node=2 -- train.py --stage=pretrain
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from loaders.device import keep_freed_memory, pick_device
from model import Transformer
from settings.begin import end_rank

BUCKET_BYTES = 32 * 2**20  # of gradients that are summed at once
NOTICE_SECONDS = 1.0  # that a process has to end by itself after a peer went
GOODBYE = b"."  # what a process that has done its part sends
PEER_GONE = 4  # exit code of a process that ends because another did


class CannotCapture(ValueError):
    """An optimizer step that cannot be captured as a CUDA graph: why, and what to do."""


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

    def start_sum(self, t: Tensor) -> dist.Work:
        """Begin to sum over ranks, in place; there are several. Returns what to wait() for."""
        return dist.all_reduce(t, async_op=True)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())


@contextmanager
def world(device_name: str):
    """This process's World: torchrun's variables decide; the process group lives inside the
    `with`, and in it a process whose peer is killed, or that is told to end, says so and ends."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name)
    if device.index is not None:  # streams and graphs are made where the model is
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    if size == 1:
        yield World(rank, size, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    with ended_by_sigterm():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        peers = Peers(rank, size)
    try:
        with ended_by_sigterm():
            yield World(rank, size, device)
        peers.say_goodbye()
    except CannotCapture as e:
        # NCCL may wait for ever for what was captured in part: nothing is taken down.
        print(f"rank {rank} of {size}: {e}", file=sys.stderr, flush=True)
        os._exit(2)
    except RuntimeError:
        # If a peer went, the watch says so and ends this process meanwhile; torchrun's signal,
        # which comes then, would end it unsaid.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(2 * NOTICE_SECONDS)
        raise
    finally:
        peers.leave()
        dist.destroy_process_group()


@contextmanager
def ended_by_sigterm():
    """Let SIGTERM, inside the `with`, end this process by one line at once, even where it waits in
    a collective, which no handler of Python's would end. While another handler is installed, that
    one answers; afterwards none does, for the process has said its end then."""
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait(*_) -> None:
        """Do nothing as a handler: the thread acts."""

    def watch() -> None:
        with reader:
            for signum in iter(lambda: reader.recv(1), b""):
                if signum[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is wait:
                    end_rank()

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGTERM, wait)
    wakeup = signal.set_wakeup_fd(writer.fileno())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        writer.close()


class Peers:
    """Ends this process soon after another one of the job was killed, with one line, instead of
    waiting in a collective for what will not come.

    Every process holds a connection to rank 0, which the system closes when either process ends,
    however it does; one that has done its part says goodbye over it first, and the other works on.
    Rank 0 notices the others, and they notice it."""

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.size = size
        self.leaving = False
        self.links = self._host() if rank == 0 else self._join()
        for link in self.links:
            threading.Thread(target=self._watch, args=(link,), daemon=True).start()

    def _host(self) -> list[socket.socket]:
        """Take a connection from every other rank."""
        try:
            server = socket.create_server((os.environ["MASTER_ADDR"], 0))
        except OSError:  # a name that this host has for others only
            server = socket.create_server(("", 0))
        with server:
            server.settimeout(60)
            dist.broadcast_object_list([server.getsockname()[1]], 0)
            return [server.accept()[0] for _ in range(self.size - 1)]

    def _join(self) -> list[socket.socket]:
        """Connect to rank 0."""
        port = [0]
        dist.broadcast_object_list(port, 0)
        return [socket.create_connection((os.environ["MASTER_ADDR"], port[0]), timeout=60)]

    def _watch(self, link: socket.socket) -> None:
        """Wait until the other end says goodbye or is closed; where it is closed without, end this
        process unless it is ending itself."""
        with suppress(OSError):
            link.settimeout(None)
            if link.recv(1) == GOODBYE:
                return
        time.sleep(NOTICE_SECONDS)  # where all end by one error, each says its own
        if not self.leaving:
            print(
                f"rank {self.rank} of {self.size}: another process of this job is gone, so this "
                "one ends, too; start the job again with --resume",
                file=sys.stderr,
                flush=True,
            )
            os._exit(PEER_GONE)

    def say_goodbye(self) -> None:
        """Tell the others that this process has done its part: its end is no reason for theirs."""
        for link in self.links:
            with suppress(OSError):
                link.sendall(GOODBYE)

    def leave(self) -> None:
        """Close the connections: the end is meant."""
        self.leaving = True
        for link in self.links:
            link.close()


def share_parameters(model: Transformer, w: World) -> None:
    """Every rank starts from rank 0's weights and value bases."""
    if w.size > 1:
        for t in (*model.parameters(), *model.buffers()):
            dist.broadcast(t.data, 0)


# -- sums of gradients


class GradientSums:
    """Replaces gradients by their sums over the ranks, and begins with it while the backward pass
    still runs: a bucket of gradients is on its way as soon as all of it is there.

    Buckets leave in one order, the same on every rank, whatever gradients a rank has: one that it
    lacks counts as zeros. What no rank has a gradient of has none after it, either.

        sums = GradientSums(params, w)
        sums.start()                     # before the last backward pass, on ranks that have one
        loss.backward()
        has = sums.has()
        sums.finish(numbers)             # (n,) float64, summed too
        sums.drop(w.sum(has).tolist())"""

    def __init__(self, params: list[torch.nn.Parameter], w: World):
        self.params = params
        self.w = w
        self.buckets = in_buckets(params) if w.size > 1 else []
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients yet to come
        self.absent: set[torch.nn.Parameter] = set()  # what this rank has no gradient of
        self.works: list = []  # of the buckets that have left
        self.hooks: list = []

    def start(self) -> None:
        """Before the step's last backward pass: let buckets leave while it runs."""
        for i, bucket in enumerate(self.buckets):
            for p in bucket:
                hook = p.register_post_accumulate_grad_hook(lambda _, i=i: self._came(i))
                self.hooks.append(hook)

    def _came(self, i: int) -> None:
        """Note a gradient of bucket i, and send what is complete and next."""
        self.missing[i] -= 1
        while len(self.works) < len(self.buckets) and not self.missing[len(self.works)]:
            self._send()

    def _send(self) -> None:
        """Begin to sum the next bucket, in one piece, of which its gradients are views then."""
        bucket = self.buckets[len(self.works)]
        self.absent |= {p for p in bucket if p.grad is None}
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.flatten() for g in mine])
        for p, g in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = g.view_as(p)
        self.works.append(self.w.start_sum(flat))

    def has(self) -> Tensor:
        """After the backward pass: 1 for each parameter that this rank has a gradient of, else 0,
        (n_params,) float64, on the device. Summed over the ranks it is for drop."""
        has = [float(p.grad is not None and p not in self.absent) for p in self.params]
        return torch.tensor(has, dtype=torch.float64).to(self.w.device, non_blocking=True)

    def finish(self, numbers: Tensor) -> None:
        """After the backward pass: all sums are in .grad, of absent gradients as zeros. numbers
        (n,) float64 are summed, too, in place."""
        for hook in self.hooks:
            hook.remove()
        while len(self.works) < len(self.buckets):
            self._send()
        for work in self.works:
            work.wait()
        self.w.sum(numbers)

    def drop(self, has: list[float]) -> None:
        """Take the zeros away of what no rank has a gradient of. has: summed over the ranks."""
        for p, n in zip(self.params, has, strict=True):
            if not n:
                p.grad = None


def in_buckets(params: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters in buckets of about BUCKET_BYTES and one dtype each, the last ones first, as the
    backward pass reaches them."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = 0
    for p in reversed(params):
        if not buckets or size >= BUCKET_BYTES or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.nbytes
    return buckets
