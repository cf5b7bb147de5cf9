"""The training loop: one stage, its steps over any number of processes, checkpoints, logs.

What is random is a pure function of (seed, step, rank): batches, and the dropout stream, which is
seeded anew at every step. So evaluation and sampling cannot change training, and a resumed run
needs no stored generator state to repeat itself bit for bit. Gradients are summed over micro-steps
and ranks with the weight each sequence has in the global batch, while the backward pass runs
(training/world.py): any split of a batch, uneven or empty shares too, means the same step. On a
GPU a step is a CUDA graph, and what it logs comes a few steps late (training/captured.py).

    torchrun --nproc_per_node=2 -- train.py --stage=pretrain
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import kv_router
import lora
from cli import say_fewer
from data import batch, count_windows, sequential
from generate import generate
from loaders import checkpoint
from loaders.device import autocast, in_bfloat16
from model import evaluating
from report.progress import progress
from settings.train import TrainConfig
from tasks.text import mean_loss
from training.captured import CapturedStep, Result, why_not_captured
from training.distillation import of_one_budget
from training.messages import end_of, start_of
from training.optimizer import (
    learning_rate,
    make_optimizer,
    optimizer_settings,
    optimizer_state,
    set_rate,
)
from training.same_run import check_same_run
from training.sharded import (
    check_shares,
    clip,
    gathered,
    is_sharded,
    load_optimizer,
    shard,
)
from training.stage import Stage
from training.world import GradientSums, World


class NonFinite(Exception):
    """A loss or gradient that is not a number, found before the optimizer step: what was found, and
    what to do."""

    def __init__(self, what: str, do: str):
        super().__init__(f"{what}; {do}")
        self.what = what


# -- the gradient of one step


def with_side_losses(stage: Stage, loss: Tensor) -> Tensor:
    """The loss, and what routers of the last forward are trained by besides it."""
    loss = loss + stage.adapter.balance_weight * lora.balance_loss(stage.model)
    weights = {"aux": stage.kv.aux_weight, "consistency": 1.0}  # the latter is weighed already
    for name, side in stage.model.kv_losses().items():
        loss = loss + weights[name] * side
    return loss


def micro_batches(x: Tensor, y: Tensor, n: int):
    """x, y (b, T) cut into at most n parts of sizes that differ by at most one; none if b = 0."""
    if not len(x):
        return ()
    n = min(n, len(x))
    return zip(x.tensor_split(n), y.tensor_split(n), strict=True)


def training_batch(stage: Stage, step: int, w: World) -> tuple[Tensor, Tensor]:
    """This rank's share x, y (b, T) of a training step's batch, on the CPU."""
    sizes = (stage.batch_size, stage.window)
    return batch(stage.corpus.train, "train", stage.seed, step, *sizes, w.rank, w.size)


def dropout_seed(stage: Stage, step: int, w: World) -> int:
    """What the generators are seeded with at a training step."""
    return (stage.seed * 1_000_003 + step) * 4099 + w.rank


def add_gradients(
    stage: Stage, forward, x: Tensor, y: Tensor, cfg: TrainConfig, before_last=None
) -> Tensor:
    """Add to .grad what x, y (b, T), on the device, have in the gradient of the global batch's mean
    loss; returns their part of the loss, () float64. before_last: called ahead of the last
    micro-batch's backward pass."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    parts = list(of_one_budget(micro_batches(x, y, cfg.accumulation), stage.byte_budgets))
    for i, (xb, yb, budget) in enumerate(parts):
        share = len(xb) / stage.batch_size
        with autocast(x.device, cfg.dtype):
            loss = stage.loss(forward, xb, yb, budget)
        if before_last is not None and i == len(parts) - 1:
            before_last()
        (with_side_losses(stage, loss) * share).backward()
        total += loss.detach().double() * share
    return total


def gradients(
    stage: Stage, forward, step: int, cfg: TrainConfig, w: World, stop: bool
) -> tuple[float, float, bool]:
    """Fill .grad with the gradient of the global batch's mean loss; returns (loss, gradient norm
    after the sum, any rank's stop)."""
    torch.manual_seed(dropout_seed(stage, step, w))
    x, y = training_batch(stage, step, w)
    numbers = torch.zeros(2, dtype=torch.float64, device=w.device)  # loss, stop
    numbers[1] = float(stop)
    sums = GradientSums([p for p in stage.params if not is_sharded(p)], w)
    # of a sharded model blocks are gathered meanwhile
    before_last = None if cfg.shard else sums.start
    on_device = (x.to(w.device), y.to(w.device))
    numbers[0] = add_gradients(stage, forward, *on_device, cfg, before_last)
    numbers = torch.cat([numbers, sums.has()])
    sums.finish(numbers)
    norm = clip(stage.params, cfg.grad_clip or math.inf, w)
    # the step's one wait for the device
    norm, total, stopped, *has = torch.cat([norm.double()[None], numbers]).tolist()
    sums.drop(has)
    return total, norm, bool(stopped)


def validation_loss(stage: Stage, cfg: TrainConfig, w: World) -> float:
    """Mean loss over cfg.eval_sequences validation windows, decode mode, shared out over the
    ranks."""
    x, y = sequential(stage.corpus.val, cfg.eval_sequences, stage.window)
    mine = slice(w.rank, None, w.size)
    n = len(x[mine])
    total = torch.zeros(1, dtype=torch.float64, device=w.device)
    if n and stage.kv.kv == "select":
        with evaluating(stage.model), autocast(w.device, cfg.dtype):
            parts = ((part, part) for part in x[mine].to(w.device).split(stage.batch_size))
            for part, _, budget in of_one_budget(parts, stage.byte_budgets):
                total += stage.loss(stage.model, part, part, budget).double() * len(part)
    elif n:
        total += mean_loss(stage.model, x[mine], y[mine], 16, cfg.dtype) * n
    return w.sum(total).item() / len(x)


# -- the loop


class Trainer:
    """Runs a stage to its end: steps, checkpoints, logs. `clock` gives seconds."""

    def __init__(self, stage: Stage, cfg: TrainConfig, w: World, clock=time.perf_counter):
        self.s = stage
        self.cfg = cfg
        self.w = w
        self.clock = clock
        self.began = clock()
        if cfg.shard:
            windows, _ = sequential(stage.corpus.val, cfg.eval_sequences, stage.window)
            check_shares(cfg, w, stage.batch_size, len(windows))
            bfloat16 = in_bfloat16(w.device, cfg.dtype)
            stage.params = shard(stage.model, stage.params, w, bfloat16)
        self.opt = make_optimizer(stage.params, cfg)
        self.step = 0
        self.first = 0  # the first step that this start does
        self.best = math.inf
        self.val = math.nan  # the newest validation loss
        self.forward = stage.model
        if cfg.compile:
            # stages before this one count towards the limit past which nothing is compiled
            torch.compiler.reset()
            self.forward = torch.compile(stage.model)
        self.bar: tqdm | None = None
        self.why_not_captured = why_not_captured(stage, cfg, w)
        self.captured: CapturedStep | None = None
        self.has: dict[tuple, list[float]] = {}  # by phase: how many ranks have each gradient
        self.asked_to_stop = False  # whether a captured step said that some rank was told to stop
        if not self.why_not_captured:
            mine, _ = training_batch(stage, 0, w)
            gradients_of = self.device_gradients
            self.captured = CapturedStep(gradients_of, self.opt, mine.shape, w.device, w.size)

    @property
    def config(self) -> dict:
        """What a checkpoint says of the run."""
        return self.s.config | {"optimizer": optimizer_settings(self.cfg)}

    @property
    def metrics(self) -> Path:
        return self.s.folder / "metrics.jsonl"

    def run(self) -> None:
        """Train to the last step. Raises SystemExit after a signal (one checkpoint is saved),
        NonFinite before a bad update."""
        self.s.model.train()
        if self.w.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.w.device)
        self.bar = progress(self.s.name, self.s.steps, "step", begin=self.step, shown=self.w.main)
        try:
            with checkpoint.GracefulStop() as stop, self.bar:
                self.run_steps(stop)
        finally:
            if self.captured is not None:  # its memory goes with it
                self.opt.zero_grad()
                self.captured.close()
                self.captured = None

    def run_steps(self, stop: checkpoint.GracefulStop) -> None:
        """Do the steps that are left, and what is due after each."""
        while self.step < self.s.steps:
            stopping = self.one_step(stop)
            last = self.step == self.s.steps
            if self.s.folder is not None:
                self.keep(last, stopping)
            # A signal may have come since; and no rank goes on before rank 0 has saved.
            if last and not stopping:
                stopping = self.w.any(stop.signal is not None)
            if stopping:
                self.bar.close()
                self.say_stopped()
                raise SystemExit(stop.exit_code or 130)
        self.settle()

    def one_step(self, stop: checkpoint.GracefulStop) -> bool:
        """One optimizer step; a captured one is only begun. Returns whether any rank was told to
        stop."""
        lr = learning_rate(self.step, self.s.steps, self.s.lr, self.cfg.warmup)
        stopping = stop.signal is not None
        if self.captured is None:
            stopping = self.eager_step(lr, stopping)
        else:
            self.begin_step(lr, stopping)
            if self.w.size > 1:  # all hear of it some steps late, before the same step
                stopping = self.asked_to_stop
        self.step += 1
        self.bar.update()
        return stopping

    def eager_step(self, lr: float, stop: bool) -> bool:
        """One optimizer step, kernel by kernel. Returns whether any rank was told to stop."""
        start = self.clock()
        set_rate(self.opt, lr)
        self.opt.zero_grad(set_to_none=True)
        self.set_kept()
        loss, norm, stop = gradients(self.s, self.forward, self.step, self.cfg, self.w, stop)
        self.check_finite(self.step, lr, loss, norm)
        self.opt.step()
        self.note(Result(self.step, lr, loss, norm, self.clock() - start))
        return stop

    def begin_step(self, lr: float, stop: bool) -> None:
        """Begin a captured step, and log one begun some steps ago. stop: whether this rank was
        told to."""
        x, y = training_batch(self.s, self.step, self.w)
        if self.captured.is_full:
            self.take()
        about = dict(step=self.step, lr=lr, seed=dropout_seed(self.s, self.step, self.w))
        self.captured.begin(x, y, **about, phase=self.phase, stop=stop)

    @property
    def phase(self) -> tuple[int, bool]:
        """What of this step Python decides: value groups kept, and whether it warms up."""
        return self.s.groups_kept(self.step), self.s.warming(self.step)

    def device_gradients(self, x: Tensor, y: Tensor, stop: Tensor) -> Tensor:
        """Fill .grad from x, y on the device, clipped, and return loss, norm and the sum of stop
        (), as CapturedStep wants them."""
        self.set_kept()
        sums = GradientSums(self.s.params, self.w)
        loss = add_gradients(self.s, self.forward, x, y, self.cfg, sums.start)
        numbers = torch.stack((loss, stop))
        sums.finish(numbers)
        if self.w.size > 1:
            if self.phase not in self.has:  # it warms up: the host may ask
                self.has[self.phase] = self.w.sum(sums.has()).tolist()
            sums.drop(self.has[self.phase])
        norm = clip(self.s.params, self.cfg.grad_clip or math.inf, self.w)
        return torch.stack((numbers[0], norm.double(), numbers[1]))

    def set_kept(self) -> None:
        """Let the model read what this step reads: value groups, or whole values."""
        n_groups, whole = self.phase
        kv_router.set_kept(self.s.model, n_groups, whole=whole)

    def take(self) -> None:
        """Check and log the oldest step that has begun."""
        r = self.captured.take()
        self.check_finite(r.step, r.lr, r.loss, r.norm)
        self.asked_to_stop |= r.stop
        self.note(r)

    def settle(self) -> None:
        """Check and log all steps that have begun."""
        while self.captured is not None and self.captured.under_way:
            self.take()

    def check_finite(self, step: int, lr: float, loss: float, norm: float) -> None:
        """Raise NonFinite for a step by which nothing was updated."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFinite(
                f"{self.s.name}: step {step}: loss {loss}, gradient norm {norm}, learning rate "
                f"{lr:.3g}",
                f"nothing was updated; {self.last_good()}; try a lower rate or --grad_clip",
            )

    def note(self, r: Result) -> None:
        """Log a step, and show it."""
        speed = self.s.batch_size * self.s.window / max(r.seconds, 1e-9)
        self.log(step=r.step, loss=r.loss, lr=r.lr, grad_norm=r.norm, tokens_per_s=speed)
        self.bar.set_postfix_str(f"loss {r.loss:.3f}, {speed:,.0f} tokens/s", refresh=False)

    def keep(self, last: bool, stopping: bool) -> None:
        """After a step: evaluate, sample and save where their intervals say so, once all steps are
        known to be good."""

        def due(interval: int) -> bool:
            return interval > 0 and self.step % interval == 0

        evaluates = due(self.cfg.eval_interval) or last
        samples = due(self.cfg.sample_interval) or (last and self.s.kind == "pretrain")
        saves = due(self.cfg.save_interval) or last or stopping
        if evaluates or samples or saves:
            self.settle()
        if evaluates or samples:
            # whole values belong to the warm-up, not to a result
            kv_router.set_kept(self.s.model, self.s.kv.topk_groups)
        if evaluates:
            if last and self.w.main:
                n = min(self.cfg.eval_sequences, count_windows(self.s.corpus.val, self.s.window))
                tqdm.write(f"{self.s.name}: validating {n} sequences ...", file=sys.stderr)
            self.evaluate()
        if samples:
            self.show_sample()
        if saves:
            self.save()

    def evaluate(self) -> None:
        """Log the validation loss after self.step steps; keep the best weights."""
        val = validation_loss(self.s, self.cfg, self.w)
        if not math.isfinite(val):
            raise NonFinite(
                f"{self.s.name}: validation loss {val} after step {self.step - 1}",
                f"{self.last_good()}; try a lower rate",
            )
        self.val = val
        on_gpu = self.w.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.w.device) if on_gpu else None
        self.log(step=self.step, after=self.step, val_loss=val, peak_memory_bytes=peak)
        if val < self.best:
            self.best = val
            if self.cfg.eval_interval:
                self.save("best")

    def show_sample(self) -> None:
        """Print some text that the model writes; a sharded one writes none: it is in parts."""
        if not self.w.main or self.cfg.shard:
            return
        tokenizer = self.s.tokenizer
        prompt = tokenizer.encode("The ")
        n = min(120, self.s.model.cfg.block_size - len(prompt))
        with autocast(self.w.device, self.cfg.dtype):
            rows, _ = generate(
                self.s.model,
                [prompt],
                n,
                temperature=0.8,
                seed=self.s.seed,
                stop=tokenizer.eot,
            )
        text = " ".join(tokenizer.decode(rows[0]).split())
        tqdm.write(f"  [{self.s.name}, step {self.step}] The {text}", file=sys.stderr)

    def say_stopped(self) -> None:
        """Say that a signal ended the run, and how to continue it."""
        end = f"{self.s.name}: stopped by a signal"
        if self.s.folder is None:
            self.say([end])
        elif self.step == self.s.steps and self.cfg.stage != "all":
            self.say([f"{end} after the last of {self.step} steps", *end_of(self)])
        else:
            folder = self.s.folder.parent
            self.say([f"{end}, saved step {self.step}; continue with --resume --out_dir={folder}"])

    # -- what lies in the stage's folder

    def log(self, **entry) -> None:
        """Append a line to metrics.jsonl."""
        if self.w.main and self.s.folder is not None:
            checkpoint.append_jsonl(self.metrics, entry)

    def save(self, name: str | None = None) -> None:
        """Write a checkpoint, named by the step unless it has a name, and drop the oldest ones."""
        tensors = gathered(self.s.tensors(), self.w.main)
        moments = gathered(optimizer_state(self.opt), self.w.main)
        if self.w.main:
            checkpoint.save(
                self.s.folder,
                name or checkpoint.step_name(self.step),
                step=self.step,
                tensors=tensors,
                config=self.config,
                state={"optimizer": moments, "best": self.best},
                # an adapter has its base's
                definition=self.s.tokenizer.definition if self.s.trains_all else None,
            )
            checkpoint.prune(self.s.folder, self.cfg.keep_checkpoints)

    def last_good(self) -> str:
        """The newest checkpoint, in words."""
        newest = None if self.s.folder is None else checkpoint.newest(self.s.folder)[0]
        return f"last good checkpoint: {newest or 'none yet'}"

    def resume(self) -> bool:
        """Continue from the stage's newest valid checkpoint, saying what was passed over; False
        where there is none."""
        self.say(checkpoint.clean(self.s.folder) if self.w.main else [])
        if self.w.size > 1:
            dist.barrier()  # no rank looks before rank 0 has cleaned
        path, why = checkpoint.newest(self.s.folder)
        self.say(why)
        if path is None:
            self.trim_metrics()
            return False
        saved = checkpoint.load(path)
        check_same_run(path, saved.config, self.config)
        before = saved.config["steps"]
        self.s.restore(saved.tensors)
        load_optimizer(self.opt, saved.state["optimizer"])
        self.step = self.first = saved.step
        self.best = saved.state["best"]
        self.trim_metrics()
        self.say([f"{self.s.name}: resumed from {path}"])
        if before < self.s.steps:
            more = f"{before} steps become {self.s.steps}, and the rate is that of so many"
            self.say([f"{self.s.name}: {more} from here"])
        elif self.step == self.s.steps:
            log = checkpoint.read_jsonl(self.metrics) if self.metrics.is_file() else []
            self.val = [math.nan, *(r["val_loss"] for r in log if "val_loss" in r)][-1]
            self.say([f"{self.s.name}: all {before} steps are done"])
        return True

    def trim_metrics(self) -> None:
        """Take out of metrics.jsonl the steps that will be done again."""
        if self.w.main and self.metrics.is_file():
            kept = [
                r
                for r in checkpoint.read_jsonl(self.metrics)
                if r["step"] < self.step or 0 < r.get("after", 0) == self.step
            ]
            checkpoint.write_jsonl(self.metrics, kept)

    def say(self, lines: list[str]) -> None:
        """Print lines to stderr, once for all ranks."""
        if self.w.main:
            for line in lines:
                print(line, file=sys.stderr)


# -- a whole stage


def train(stage: Stage, cfg: TrainConfig, w: World) -> None:
    """Run a stage, or continue it when resuming. Its last checkpoint is on disk when any rank
    returns."""
    if w.main:
        stage.folder.mkdir(parents=True, exist_ok=True)
    with out_of_memory_explained(stage.batch_size, stage.window, cfg.accumulation):
        trainer = Trainer(stage, cfg, w)
        if cfg.resume:
            trainer.resume()
        trainer.say(start_of(trainer))
        there = count_windows(stage.corpus.val, stage.window)
        say_fewer(f"{stage.name}: validation", there, cfg.eval_sequences)
        trainer.run()
        trainer.say(end_of(trainer))


@contextmanager
def out_of_memory_explained(batch_size: int | str, context: int, accumulation: int):
    """Turn running out of memory into a ValueError that names what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        known = isinstance(e, (torch.OutOfMemoryError, MemoryError))
        if not known and "allocate" not in str(e):
            raise
        raise ValueError(
            f"out of memory with batch size {batch_size}, context {context}, accumulation "
            f"{accumulation}: less is needed; lower the batch size or --block_size, or raise "
            "--accumulation"
        ) from None
