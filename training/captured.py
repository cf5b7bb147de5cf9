"""The optimizer step as one CUDA graph, looked at some steps later.

The problem: a step of a small model is thousands of kernels, and starting one costs the host more
time than running it costs the device. The host waits, too, for the loss of every step before it
begins the next. The idea: all steps do the same to other numbers. So one of them is captured, from
the first micro-batch to the last moment of AdamW, and replayed: the host starts one graph a step.

A replay runs no Python, so whatever differs between steps has to lie on the device:

    batch, rates    in tensors that the graph reads, filled from pinned memory before a replay
    dropout         the graph reads the seed of PyTorch's generator, which is set before a replay:
                    the masks are those of the same step run kernel by kernel
    what is found   loss and gradient norm are copied to pinned memory, with an event behind them;
                    the host reads those of step i before step i + LATE begins
    whether it is   a loss or norm that is not finite sets `bad`, which stays set: from then on the
    good            optimizer's kernels leave weights, moments and step counters as they are
    whether to      each process puts 0 or 1 into a tensor that is summed over all; like loss and
    stop            norm the sum is read late, by all of them before the same step

What Python decides (how many value groups are kept, say) is the step's phase: another phase is
another graph. On a CPU the same step runs without a graph.

Of several processes each captures its own step. Sums over all of them are part of it: NCCL's
kernels are captured like others, once the steps that warm up have started NCCL. Loss and norm are
those of all, so each process finds the same steps bad.

    step = CapturedStep(gradients, opt, shape=(8, 512), device=device)
    for i in range(100):
        if step.is_full:
            print(step.take())                       # the result of step i - LATE
        step.begin(*batch(i), step=i, lr=1e-3, seed=i)  # stop=True: to be told to all
    while step.under_way:
        print(step.take())
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from settings.fields import check
from settings.train import TrainConfig
from training.world import CannotCapture, World

LATE = 4  # steps that have begun and not been looked at, at most
WARM = 3  # steps before the one that is captured: kernels are loaded and compiled, moments made


class Result(NamedTuple):
    """What came out of an optimizer step."""

    step: int
    lr: float
    loss: float
    norm: float  # of the gradient, before clipping
    seconds: float  # since the step before it, or since it began
    stop: bool = False  # whether any process was told to stop when it began this step


def why_not_captured(stage, cfg: TrainConfig, w: World) -> str:
    """Why a stage's steps are not CUDA graphs, in words; "" where they are."""
    if w.device.type != "cuda":
        return "there is no GPU"
    if not cfg.capture:
        return "--capture=false"
    if cfg.shard:
        return "sharded weights are gathered by the host"
    if stage.kv.kv == "select":
        return "the host looks at windows and their tokens"
    return ""


class HostEvent:
    """What a CUDA event is, for steps that run on the host."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        """Return the milliseconds from this event to `end`."""
        return 1e3 * (end.at - self.at)


class Flight:
    """The host's side of a step that is under way: pinned memory for what goes in and comes out,
    and the events around it."""

    step: int
    lr: float
    since: torch.cuda.Event | HostEvent  # behind the step before it, or where it began
    end: torch.cuda.Event | HostEvent  # behind this step

    def __init__(self, shape: tuple[int, int], n_rates: int, on_gpu: bool):
        self.x = torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu)
        self.y = torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu)
        self.rates = torch.empty(n_rates, pin_memory=on_gpu)
        self.stop = torch.empty((), dtype=torch.float64, pin_memory=on_gpu)
        self.numbers = torch.empty(3, dtype=torch.float64, pin_memory=on_gpu)
        self.new_event = partial(torch.cuda.Event, enable_timing=True) if on_gpu else HostEvent

    def fill(self, x: Tensor, y: Tensor, rates: list[float], stop: bool) -> None:
        """Write down what goes into the step."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.rates.copy_(torch.tensor(rates))
        self.stop.fill_(stop)

    def mark(self):
        """Return an event behind all that the device was asked to do."""
        event = self.new_event()
        event.record()
        return event


class CapturedStep:
    """Optimizer steps of one shape, begun without waiting for the device.

    gradients(x, y, stop) fills .grad from x, y (B, T) int64 and returns (3,) float64: loss,
        gradient norm, and stop (), float64, all of them summed over processes; it does the same in
        every step of a phase, and never waits for the device but in a phase's first
    opt: fused AdamW of training/optimizer.py
    shape: (B, T), of this process's share; B may be 0
    ranks: processes of the job"""

    def __init__(
        self,
        gradients: Callable[[Tensor, Tensor, Tensor], Tensor],
        opt: torch.optim.AdamW,
        shape: tuple[int, int],
        device: torch.device,
        ranks: int = 1,
    ):
        self.gradients = gradients
        self.opt = opt
        self.ranks = ranks
        self.on_gpu = device.type == "cuda"
        self.x = torch.zeros(shape, dtype=torch.int64, device=device)
        self.y = torch.zeros_like(self.x)
        self.rates = torch.zeros(len(opt.param_groups), device=device)
        self.stop = torch.zeros((), dtype=torch.float64, device=device)
        self.numbers = torch.zeros(3, dtype=torch.float64, device=device)
        self.bad = torch.zeros((), device=device)  # 1 once a loss or norm was not finite
        # One stream for warming up and capturing: autograd remembers where gradients were added.
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.phase: object = self  # none yet
        self.graph: torch.cuda.CUDAGraph | None = None
        self.free = [Flight(shape, len(self.rates), self.on_gpu) for _ in range(LATE)]
        self.under_way: deque[Flight] = deque()

    # -- what the device does

    def once(self) -> None:
        """Do the whole step, on the device alone: this is what is captured."""
        self.opt.zero_grad(set_to_none=True)
        self.numbers.copy_(self.gradients(self.x, self.y, self.stop))
        self.bad.copy_(self.bad.bool() | ~self.numbers.isfinite().all())
        self.opt.step()

    def run(self) -> None:
        """Let the device do the step, once it is prepared."""
        if self.graph is None:
            self.once()
        else:
            self.graph.replay()

    def prepare(self) -> None:
        """Make self.run do the step of the phase that begins. Steps that warm up are bad ones, so
        they change nothing. CannotCapture where the step asks the device for something."""
        for group, rate in zip(self.opt.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.opt.found_inf = self.bad
        was_bad = self.bad.clone()
        self.bad.fill_(1)
        if self.on_gpu:
            self.capture()
        else:
            self.warm_up()
        self.bad.copy_(was_bad)

    def warm_up(self) -> None:
        for _ in range(WARM):
            self.once()

    def capture(self) -> None:
        """Capture the step in a CUDA graph, and let self.run replay it."""
        torch.cuda.synchronize()
        self.close()  # the last phase's graph goes, and its memory
        with torch.cuda.stream(self.stream):
            self.warm_up()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread asks for events meanwhile, which is no fault of the step's
        mode = "thread_local" if self.ranks > 1 else "global"
        try:
            self.set_in_groups(capturable=True)
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode=mode):
                self.once()
            self.set_in_groups(capturable=False)
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError) and self.ranks == 1:
                raise
            why = str(e.__context__ or e).splitlines()[0]
            raise CannotCapture(
                f"the step cannot be captured as a CUDA graph: {why}; train.py --capture=false "
                "runs it kernel by kernel"
            ) from e
        self.graph = graph

    def close(self) -> None:
        """Let the graph go, once the device is done: NCCL cannot end while one holds its sums."""
        if self.graph is not None:
            torch.cuda.synchronize()
            self.graph.reset()
            self.graph = None

    def set_in_groups(self, **settings) -> None:
        for group in self.opt.param_groups:
            group.update(settings)

    # -- what the host does

    @property
    def is_full(self) -> bool:
        """Whether a result must be taken before another step begins."""
        return not self.free

    def begin(
        self,
        x: Tensor,
        y: Tensor,
        *,
        step: int,
        lr: float,
        seed: int,
        phase: object = None,
        stop: bool = False,
    ) -> None:
        """Begin an optimizer step on x, y (B, T) at rate lr; seed: of its dropout; stop: whether
        this process was told to. ValueError for another shape, IndexError where `is_full`."""
        shape = tuple(self.x.shape)
        check(
            x.shape == y.shape == shape,
            f"a batch of {tuple(x.shape)} and {tuple(y.shape)}",
            f"all steps are of {shape}",
            "make another CapturedStep",
        )
        flight = self.free.pop()
        flight.step = step
        flight.lr = lr
        flight.since = self.under_way[-1].end if self.under_way else flight.mark()
        if phase != self.phase:
            self.prepare()
            self.phase = phase
        flight.fill(x, y, [lr * group["rate"] for group in self.opt.param_groups], stop)
        self.x.copy_(flight.x, non_blocking=True)
        self.y.copy_(flight.y, non_blocking=True)
        self.rates.copy_(flight.rates, non_blocking=True)
        self.stop.copy_(flight.stop, non_blocking=True)
        torch.manual_seed(seed)
        self.run()
        flight.numbers.copy_(self.numbers, non_blocking=True)
        flight.end = flight.mark()
        self.under_way.append(flight)

    def take(self) -> Result:
        """Return the result of the oldest step under way, once the device has done it. IndexError
        where there is none."""
        flight = self.under_way.popleft()
        flight.end.synchronize()
        loss, norm, stop = flight.numbers.tolist()
        seconds = flight.since.elapsed_time(flight.end) / 1e3
        self.free.append(flight)
        return Result(flight.step, flight.lr, loss, norm, seconds, bool(stop))
