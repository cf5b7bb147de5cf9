"""The training loop under train.py: one stage, its steps over any number of processes, checkpoints,
logs.

What is random is a pure function of (seed, step, rank): batches, and the dropout stream, which is
seeded anew at every step. So evaluation and sampling cannot change training, and a resumed run
needs no stored generator state to repeat itself bit for bit. Gradients are summed over micro-steps
and ranks with the weight each sequence has in the global batch, by one all-reduce after the
backward pass: any split of a batch, uneven or empty shares too, means the same step.

    torchrun --nproc_per_node=2 train.py --stage=pretrain
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import kv_router
import lora
import mixsga
from config import AdapterConfig, KVConfig, check
from data import batch, sequential
from loaders import checkpoint
from loaders.device import autocast, pick_device
from loaders.runs import added_state, load_added_state
from loaders.weights import load_model_state, model_state
from model import Transformer, generate, lm_loss
from settings.train import TrainConfig
from storage.layout import at_least_float32
from tasks.text import mean_loss


class NonFinite(Exception):
    """A loss or gradient that is not a number, found before the optimizer step."""


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


@contextmanager
def world(device_name: str):
    """This process's World: torchrun's variables decide; the process group lives inside the
    `with`."""
    rank, size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = pick_device(device_name)
    if size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear over the first warmup share, then
    a cosine to zero at the end."""
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(params: list[torch.nn.Parameter], cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices only; a parameter's attribute `rate`, where it has one,
    scales its learning rate."""
    groups: dict[tuple, list] = {}
    for p in params:
        groups.setdefault((p.ndim < 2, getattr(p, "rate", 1.0)), []).append(p)
    settings = [
        {"params": ps, "weight_decay": 0.0 if vector else cfg.weight_decay, "rate": rate}
        for (vector, rate), ps in sorted(groups.items())
    ]
    return torch.optim.AdamW(settings, lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)


def set_rate(opt: torch.optim.Optimizer, lr: float) -> None:
    """Let every parameter of make_optimizer's learn at lr, by its own scale."""
    for group in opt.param_groups:
        group["lr"] = lr * group["rate"]


def optimizer_settings(cfg: TrainConfig) -> dict:
    """The settings besides a stage's own that a resumed run must share with the unbroken one."""
    return {
        name: getattr(cfg, name)
        for name in ("warmup", "weight_decay", "beta1", "beta2", "grad_clip", "dtype")
    }


@dataclass
class Stage:
    """One training stage: what is trained, on what, how long, and the folder that keeps it."""

    name: str
    model: Transformer
    params: list[torch.nn.Parameter]
    corpus: object
    tokenizer: object
    folder: Path
    steps: int
    batch_size: int
    lr: float
    seed: int
    config: dict  # what checkpoints carry besides tensors
    adapter: AdapterConfig
    kv: KVConfig
    pretraining: bool
    window: int  # tokens in a training sequence
    objective: str = "lm"

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint of this stage holds: the model, or only what was added to the frozen
        one."""
        if self.pretraining:
            return {"model": model_state(self.model)}
        return {"selector" if self.objective == "select" else "adapter": added_state(self.model)}

    def restore(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Put a checkpoint's tensors back into this stage's model."""
        if self.pretraining:
            load_model_state(self.model, saved["model"], "checkpoint")
        else:
            load_added_state(
                self.model, saved["selector" if self.objective == "select" else "adapter"]
            )

    def loss(self, forward, x: Tensor, y: Tensor) -> Tensor:
        """What is minimised over x, y (B, T), a mean over sequences: by objective lm, distill or
        select."""
        if self.objective == "select":
            return self.model.selector.loss(self.model, x)
        return (
            lm_loss(forward(x), y)
            if self.objective == "lm"
            else distillation_loss(self, forward, x)
        )


def micro_batches(x: Tensor, y: Tensor, n: int):
    """x, y (b, T) cut into at most n parts of sizes that differ by at most one; none if b = 0."""
    return (
        zip(x.tensor_split(min(n, len(x))), y.tensor_split(min(n, len(x))), strict=True)
        if len(x)
        else ()
    )


def distillation_loss(stage: Stage, forward, x: Tensor) -> Tensor:
    """Mean KL in nats from the model that reads whole values (no gradient) to itself with routed
    ones, over the tokens of x (B, T)."""
    with torch.no_grad():
        kv_router.set_kept(stage.model, stage.kv.n_groups)
        target = at_least_float32(forward(x)).log_softmax(-1)
        kv_router.set_kept(stage.model, stage.kv.topk_groups)
    got = at_least_float32(forward(x)).log_softmax(-1)
    return F.kl_div(got, target, reduction="none", log_target=True).sum(-1).mean()


def gradients(
    stage: Stage, forward, step: int, cfg: TrainConfig, w: World, stop: bool
) -> tuple[float, float, bool]:
    """Fill .grad with the gradient of the global batch's mean loss; returns (loss, gradient norm
    after the sum, any rank's stop)."""
    m = stage.model
    torch.manual_seed((stage.seed * 1_000_003 + step) * 4099 + w.rank)  # dropout
    x, y = batch(
        stage.corpus.train,
        "train",
        stage.seed,
        step,
        stage.batch_size,
        stage.window,
        w.rank,
        w.size,
    )
    total = torch.zeros(2, dtype=torch.float64)
    for xb, yb in micro_batches(x.to(w.device), y.to(w.device), cfg.accumulation):
        share = len(xb) / stage.batch_size
        with autocast(w.device, cfg.dtype):
            loss = stage.loss(forward, xb, yb)
        whole = (
            loss
            + stage.adapter.balance_weight * lora.balance_loss(m)
            + stage.kv.aux_weight * kv_router.aux_loss(m)
            + mixsga.consistency_loss(m)
        )
        (whole * share).backward()
        total[0] += loss.item() * share
    total[1] = float(stop)
    w.sum(total if w.device.type == "cpu" else (total := total.to(w.device)))
    if w.size > 1:
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in stage.params]
        )
        for p, g in zip(
            stage.params, w.sum(flat).split([p.numel() for p in stage.params]), strict=True
        ):
            p.grad = g.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(stage.params, cfg.grad_clip or math.inf)
    return total[0].item(), norm.item(), bool(total[1])


def validation_loss(stage: Stage, cfg: TrainConfig, w: World) -> float:
    """Mean loss over cfg.eval_sequences validation windows, decode mode, shared out over the
    ranks."""
    x, y = sequential(stage.corpus.val, cfg.eval_sequences, stage.window)
    mine = slice(w.rank, None, w.size)
    n = len(x[mine])
    total = torch.zeros(1, dtype=torch.float64, device=w.device)
    if n and stage.objective == "select":
        with torch.no_grad(), autocast(w.device, cfg.dtype):
            for part in x[mine].split(stage.batch_size):
                total += stage.model.selector.loss(stage.model, part.to(w.device)).double() * len(
                    part
                )
    elif n:
        total += mean_loss(stage.model, x[mine], y[mine], 16, cfg.dtype) * n
    return w.sum(total).item() / len(x)


class Trainer:
    """Runs a stage to its end: steps, checkpoints, logs. `clock` gives seconds."""

    def __init__(self, stage: Stage, cfg: TrainConfig, w: World, clock=time.perf_counter):
        self.s = stage
        self.cfg = cfg
        self.w = w
        self.clock = clock
        self.opt = make_optimizer(stage.params, cfg)
        self.step = 0
        self.best = math.inf
        self.metrics = stage.folder / "metrics.jsonl"
        self.forward = torch.compile(stage.model) if cfg.compile else stage.model

    def resume(self) -> bool:
        """Continue from the stage's newest valid checkpoint, saying what was passed over; False
        where there is none."""
        if self.w.main:
            for line in checkpoint.clean(self.s.folder):
                print(line, file=sys.stderr)
        if self.w.size > 1:
            dist.barrier()
        path, why = checkpoint.newest(self.s.folder)
        if self.w.main:
            for line in why:
                print(line, file=sys.stderr)
        if path is None:
            self.trim_metrics()
            return False
        ckpt = checkpoint.load(path)
        for key in (
            "model",
            "tokenizer",
            "adapter",
            "kv",
            "seed",
            "steps",
            "batch_size",
            "block_size",
            "lr",
            "corpus",
            "objective",
            "kv_from",
            "select",
            "mix",
            "optimizer",
            "data",
            "tokens",
            "weights",
            "base_sha256",
        ):
            check(
                ckpt.config.get(key) == self.s.config.get(key),
                f"{path} was trained with {key}={ckpt.config.get(key)}",
                f"this run says {self.s.config.get(key)}",
                "resume with the same flags",
            )
        self.s.restore(ckpt.tensors)
        self.opt.load_state_dict(ckpt.state["optimizer"])
        self.step = ckpt.step
        self.best = ckpt.state["best"]
        self.trim_metrics()
        if self.w.main:
            print(f"{self.s.name}: resumed from {path}", file=sys.stderr)
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

    def save(self, name: str | None = None) -> None:
        if self.w.main:
            checkpoint.save(
                self.s.folder,
                name or checkpoint.step_name(self.step),
                step=self.step,
                tensors=self.s.tensors(),
                config=self.s.config,
                state={"optimizer": self.opt.state_dict(), "best": self.best},
            )
            checkpoint.prune(self.s.folder, self.cfg.keep_checkpoints)

    def log(self, **entry) -> None:
        if self.w.main:
            checkpoint.append_jsonl(self.metrics, entry)

    def evaluate(self) -> None:
        """Log the validation loss after self.step steps; keep the best weights."""
        # whole values belong to the warm-up, not to a result
        kv_router.set_kept(self.s.model, self.s.kv.topk_groups)
        val = validation_loss(self.s, self.cfg, self.w)
        if not math.isfinite(val):
            raise NonFinite(
                f"{self.s.name}: validation loss {val} after step {self.step - 1}; last good "
                "checkpoint: "
                f"{checkpoint.newest(self.s.folder)[0] or 'none yet'}; try a lower rate"
            )
        peak = (
            torch.cuda.max_memory_allocated(self.w.device) if self.w.device.type == "cuda" else None
        )
        self.log(step=self.step, after=self.step, val_loss=val, peak_memory_bytes=peak)
        if val < self.best:
            self.best = val
            if self.cfg.eval_interval:
                self.save("best")

    def show_sample(self) -> None:
        if self.w.main:
            prompt = self.s.tokenizer.encode("The ")
            n = min(120, self.s.model.cfg.block_size - len(prompt))
            with autocast(self.w.device, self.cfg.dtype):
                rows, _ = generate(
                    self.s.model,
                    [prompt],
                    n,
                    temperature=0.8,
                    seed=self.s.seed,
                    stop=self.s.tokenizer.eot,
                )
            text = self.s.tokenizer.decode(rows[0])
            tqdm.write(
                f"  [{self.s.name}, step {self.step}] The {' '.join(text.split())}", file=sys.stderr
            )

    def run(self) -> None:
        """Train to the last step. Raises SystemExit after a signal (one checkpoint is saved),
        NonFinite before a bad update."""
        cfg = self.cfg
        s = self.s
        s.model.train()
        if self.w.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.w.device)
        tokens = s.batch_size * s.window
        # seconds; a log file needs fewer lines than a screen
        often = 0.5 if sys.stderr.isatty() else 20
        bar = tqdm(
            total=s.steps,
            initial=self.step,
            desc=s.name,
            unit="step",
            disable=not self.w.main,
            mininterval=often,
            miniters=1,
        )
        with checkpoint.GracefulStop() as stop, bar:
            while self.step < s.steps:
                start = self.clock()
                lr = learning_rate(self.step, s.steps, s.lr, cfg.warmup)
                set_rate(self.opt, lr)
                self.opt.zero_grad(set_to_none=True)
                kv_router.set_kept(
                    s.model,
                    s.kv.n_groups if self.step < s.kv.kv_warmup * s.steps else s.kv.topk_groups,
                )
                loss, norm, stopping = gradients(
                    s, self.forward, self.step, cfg, self.w, stop.signal is not None
                )
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    last = checkpoint.newest(s.folder)[0]
                    raise NonFinite(
                        f"{s.name}: step {self.step}: loss {loss}, gradient norm {norm}, learning "
                        f"rate {lr:.3g}; nothing was updated; "
                        f"last good checkpoint: {last or 'none yet'}; try a lower rate or "
                        "--grad_clip"
                    )
                self.opt.step()
                seconds = self.clock() - start
                self.log(
                    step=self.step,
                    loss=loss,
                    lr=lr,
                    grad_norm=norm,
                    tokens_per_s=tokens / max(seconds, 1e-9),
                )
                self.step += 1
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {tokens / max(seconds, 1e-9):,.0f} tokens/s")
                last_step = self.step == s.steps
                if (cfg.eval_interval and self.step % cfg.eval_interval == 0) or last_step:
                    self.evaluate()
                if (cfg.sample_interval and self.step % cfg.sample_interval == 0) or (
                    last_step and s.name == "pretrain"
                ):
                    self.show_sample()
                if last_step or stopping or self.step % cfg.save_interval == 0:
                    self.save()
                # a signal may have come since; and no rank goes on before rank 0 has saved
                if last_step and not stopping:
                    stopping = bool(
                        self.w.sum(
                            torch.tensor([float(stop.signal is not None)], device=self.w.device)
                        ).item()
                    )
                if stopping:
                    if self.w.main:
                        print(
                            f"{s.name}: stopped by a signal, saved step {self.step}; continue "
                            "with the same flags and "
                            f"--resume --out_dir={s.folder.parent}",
                            file=sys.stderr,
                        )
                    raise SystemExit(stop.exit_code or 130)


def share_parameters(model: Transformer, w: World) -> None:
    """Every rank starts from rank 0's weights and value bases."""
    if w.size > 1:
        for t in (*model.parameters(), *model.buffers()):
            dist.broadcast(t.data, 0)


def train(stage: Stage, args, w: World) -> None:
    """Run a stage, or continue it when resuming. Its last checkpoint is on disk when any rank
    returns."""
    if w.main:
        stage.folder.mkdir(parents=True, exist_ok=True)
    with out_of_memory_explained(stage.batch_size, stage.window, args.train.accumulation):
        trainer = Trainer(stage, args.train, w)
        if args.train.resume:
            trainer.resume()
        trainer.run()


@contextmanager
def out_of_memory_explained(batch_size: int | str, context: int, accumulation: int):
    """Turn running out of memory into a ValueError that names what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if (
            isinstance(e, RuntimeError)
            and not isinstance(e, torch.OutOfMemoryError)
            and "allocate" not in str(e)
        ):
            raise
        raise ValueError(
            f"out of memory with batch size {batch_size}, context {context}, accumulation "
            f"{accumulation}: less is needed; "
            "lower the batch size or --block_size, or raise --accumulation"
        ) from None
