"""Train: pretrain a small transformer, adapt it with LoRA, MoE-LoRA or routed subspace LoRA over routed values, print the table.

Without flags, on any machine: `pretrain` on pydocs (the reference text inside CPython), then `adapt` on pycode (the standard
library's source) once per row and seed, then decode-mode perplexity and measured cache bytes, results.json and report.png.

Adaptation (arXiv 2604.21335, 3.1): the base is frozen; L = L_LM + 0.01 * load balance + 0.1 * L_aux. Baselines get at least as
many trainable parameters as the sub-token row (--preset=paper: the paper's ranks instead).

What is random is a pure function of (seed, step, rank): batches, and the dropout stream, which is seeded anew at every step. So
evaluation and sampling cannot change training, and a resumed run needs no stored generator state to repeat itself bit for bit.
Gradients are summed over micro-steps and ranks with the weight each sequence has in the global batch, by one all-reduce after the
backward pass: any split of a batch, uneven or empty shares too, means the same step.

    python train.py
    python train.py --stage=adapt --init_from=out/RUN/pretrain --adapter=routed --kv=value_groups --reconstructor=pairwise
    torchrun --nproc_per_node=2 train.py --stage=pretrain
"""
from __future__ import annotations

import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from config import AdapterConfig, DataConfig, KVConfig, ModelConfig, TrainConfig, check, exit_on_bad_input, parse_args, to_dict

CONFIGS = {"train": TrainConfig, "model": ModelConfig, "adapter": AdapterConfig, "kv": KVConfig, "data": DataConfig}
if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__.splitlines()[0])

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import checkpoint
import eval as evaluation
import kv_router
import lora
from data import batch, check_length, get_tokenizer, prepare, sequential
from model import Transformer, generate, lm_loss
from pretrained import added_state, autocast, find_checkpoint, load_added_state, load_model_state, load_run, model_state, pick_device


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
    """This process's World: torchrun's variables decide; the process group lives inside the `with`."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
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
    """Rate of optimizer step `step` (0-based) of `steps`: linear over the first warmup share, then a cosine to zero at the end."""
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(params: list[torch.nn.Parameter], cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices only."""
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)


def optimizer_settings(cfg: TrainConfig) -> dict:
    """The settings besides a stage's own that a resumed run must share with the unbroken one."""
    return {name: getattr(cfg, name) for name in ("warmup", "weight_decay", "beta1", "beta2", "grad_clip", "dtype")}


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

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint of this stage holds: the model, or only what was added to the frozen one."""
        if self.pretraining:
            return {"model": model_state(self.model)}
        return {"adapter": added_state(self.model)}

    def restore(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Put a checkpoint's tensors back into this stage's model."""
        if self.pretraining:
            load_model_state(self.model, saved["model"], "checkpoint")
        else:
            load_added_state(self.model, saved["adapter"])


def micro_batches(x: Tensor, y: Tensor, n: int):
    """x, y (b, T) cut into at most n parts of sizes that differ by at most one; none if b = 0."""
    return zip(x.tensor_split(min(n, len(x))), y.tensor_split(min(n, len(x))), strict=True) if len(x) else ()


def gradients(stage: Stage, forward, step: int, cfg: TrainConfig, w: World, stop: bool) -> tuple[float, float, bool]:
    """Fill .grad with the gradient of the global batch's mean loss; returns (LM loss, gradient norm after the sum, any rank's stop)."""
    m = stage.model
    torch.manual_seed((stage.seed * 1_000_003 + step) * 4099 + w.rank)  # dropout
    x, y = batch(stage.corpus.train, "train", stage.seed, step, stage.batch_size, m.cfg.block_size, w.rank, w.size)
    total = torch.zeros(2, dtype=torch.float64)
    for xb, yb in micro_batches(x.to(w.device), y.to(w.device), cfg.accumulation):
        share = len(xb) / stage.batch_size
        with autocast(w.device, cfg.dtype):
            loss = lm_loss(forward(xb), yb)
        whole = loss + stage.adapter.balance_weight * lora.balance_loss(m) + stage.kv.aux_weight * kv_router.aux_loss(m)
        (whole * share).backward()
        total[0] += loss.item() * share
    total[1] = float(stop)
    w.sum(total if w.device.type == "cpu" else (total := total.to(w.device)))
    if w.size > 1:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in stage.params])
        for p, g in zip(stage.params, w.sum(flat).split([p.numel() for p in stage.params]), strict=True):
            p.grad = g.view_as(p)
    norm = torch.nn.utils.clip_grad_norm_(stage.params, cfg.grad_clip or math.inf)
    return total[0].item(), norm.item(), bool(total[1])


def validation_loss(stage: Stage, cfg: TrainConfig, w: World) -> float:
    """Mean loss over cfg.eval_sequences validation windows, decode mode, shared out over the ranks."""
    x, y = sequential(stage.corpus.val, cfg.eval_sequences, stage.model.cfg.block_size)
    mine = slice(w.rank, None, w.size)
    n = len(x[mine])
    total = torch.zeros(1, dtype=torch.float64, device=w.device)
    if n:
        total += evaluation.mean_loss(stage.model, x[mine], y[mine], 16, cfg.dtype) * n
    return w.sum(total).item() / len(x)


class Trainer:
    """Runs a stage to its end: steps, checkpoints, logs. `clock` gives seconds."""

    def __init__(self, stage: Stage, cfg: TrainConfig, w: World, clock=time.perf_counter):
        self.s, self.cfg, self.w, self.clock = stage, cfg, w, clock
        self.opt = make_optimizer(stage.params, cfg)
        self.step, self.best = 0, math.inf
        self.metrics = stage.folder / "metrics.jsonl"
        self.forward = torch.compile(stage.model) if cfg.compile else stage.model

    def resume(self) -> bool:
        """Continue from the stage's newest valid checkpoint, saying what was passed over; False where there is none."""
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
        for key in ("model", "tokenizer", "adapter", "kv", "seed", "steps", "batch_size", "lr", "corpus", "optimizer"):
            check(ckpt.config[key] == self.s.config[key], f"{path} was trained with {key}={ckpt.config[key]}",
                  f"this run says {self.s.config[key]}", "resume with the same flags")
        self.s.restore(ckpt.tensors)
        self.opt.load_state_dict(ckpt.state["optimizer"])
        self.step, self.best = ckpt.step, ckpt.state["best"]
        self.trim_metrics()
        if self.w.main:
            print(f"{self.s.name}: resumed from {path}", file=sys.stderr)
        return True

    def trim_metrics(self) -> None:
        """Take out of metrics.jsonl the steps that will be done again."""
        if self.w.main and self.metrics.is_file():
            kept = [r for r in checkpoint.read_jsonl(self.metrics) if r["step"] < self.step or 0 < r.get("after", 0) == self.step]
            checkpoint.write_jsonl(self.metrics, kept)

    def save(self, name: str | None = None) -> None:
        if self.w.main:
            checkpoint.save(self.s.folder, name or checkpoint.step_name(self.step), step=self.step, tensors=self.s.tensors(),
                            config=self.s.config, state={"optimizer": self.opt.state_dict(), "best": self.best})
            checkpoint.prune(self.s.folder, self.cfg.keep_checkpoints)

    def log(self, **entry) -> None:
        if self.w.main:
            checkpoint.append_jsonl(self.metrics, entry)

    def evaluate(self) -> None:
        """Log the validation loss after self.step steps; keep the best weights."""
        kv_router.set_kept(self.s.model, self.s.kv.topk_groups)  # whole values belong to the warm-up, not to a result
        val = validation_loss(self.s, self.cfg, self.w)
        if not math.isfinite(val):
            raise NonFinite(f"{self.s.name}: validation loss {val} after step {self.step - 1}; last good checkpoint: "
                            f"{checkpoint.newest(self.s.folder)[0] or 'none yet'}; try a lower rate")
        self.log(step=self.step, after=self.step, val_loss=val)
        if val < self.best:
            self.best = val
            if self.cfg.eval_interval:
                self.save("best")

    def show_sample(self) -> None:
        if self.w.main:
            prompt = self.s.tokenizer.encode("The ")
            n = min(120, self.s.model.cfg.block_size - len(prompt))
            text = self.s.tokenizer.decode(generate(self.s.model, [prompt], n, temperature=0.8, seed=self.s.seed, stop=self.s.tokenizer.eot)[0][0])
            tqdm.write(f"  [{self.s.name}, step {self.step}] The {' '.join(text.split())}", file=sys.stderr)

    def run(self) -> None:
        """Train to the last step. Raises SystemExit after a signal (one checkpoint is saved), NonFinite before a bad update."""
        cfg, s = self.cfg, self.s
        s.model.train()
        tokens = s.batch_size * s.model.cfg.block_size
        often = 0.5 if sys.stderr.isatty() else 20  # seconds; a log file needs fewer lines than a screen
        bar = tqdm(total=s.steps, initial=self.step, desc=s.name, unit="step", disable=not self.w.main, mininterval=often, miniters=1)
        with checkpoint.GracefulStop() as stop, bar:
            while self.step < s.steps:
                start = self.clock()
                lr = learning_rate(self.step, s.steps, s.lr, cfg.warmup)
                for group in self.opt.param_groups:
                    group["lr"] = lr
                self.opt.zero_grad(set_to_none=True)
                kv_router.set_kept(s.model, s.kv.n_groups if self.step < s.kv.kv_warmup * s.steps else s.kv.topk_groups)
                loss, norm, stopping = gradients(s, self.forward, self.step, cfg, self.w, stop.signal is not None)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    last = checkpoint.newest(s.folder)[0]
                    raise NonFinite(f"{s.name}: step {self.step}: loss {loss}, gradient norm {norm}, learning rate {lr:.3g}; nothing was updated; "
                                    f"last good checkpoint: {last or 'none yet'}; try a lower rate or --grad_clip")
                self.opt.step()
                seconds = self.clock() - start
                self.log(step=self.step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=tokens / max(seconds, 1e-9))
                self.step += 1
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {tokens / max(seconds, 1e-9):,.0f} tokens/s")
                last_step = self.step == s.steps
                if (cfg.eval_interval and self.step % cfg.eval_interval == 0) or last_step:
                    self.evaluate()
                if (cfg.sample_interval and self.step % cfg.sample_interval == 0) or (last_step and s.pretraining):
                    self.show_sample()
                if last_step or stopping or self.step % cfg.save_interval == 0:
                    self.save()
                if last_step and not stopping:  # a signal may have come since; and no rank goes on before rank 0 has saved
                    stopping = bool(self.w.sum(torch.tensor([float(stop.signal is not None)], device=self.w.device)).item())
                if stopping:
                    if self.w.main:
                        print(f"{s.name}: stopped by a signal, saved step {self.step}; continue with the same flags and "
                              f"--resume --out_dir={s.folder.parent}", file=sys.stderr)
                    raise SystemExit(stop.exit_code or 130)


def share_parameters(model: Transformer, w: World) -> None:
    """Every rank starts from rank 0's weights and value bases."""
    if w.size > 1:
        for t in (*model.parameters(), *model.buffers()):
            dist.broadcast(t.data, 0)


def matched_rank(model_cfg: ModelConfig, cfg: AdapterConfig, target: int) -> AdapterConfig:
    """cfg with the smallest rank whose trainable parameters are at least `target`, alpha / r kept. Counted on meta tensors."""
    def count(r: int) -> int:
        with torch.device("meta"):
            return lora.count_trainable(lora.attach(Transformer(model_cfg), replace(cfg, r=r)))
    one, two = count(1), count(2)
    r = max(1, -(-(target - (2 * one - two)) // (two - one)))
    return replace(cfg, r=r, alpha=cfg.alpha / cfg.r * r)


def corpus_of(args, stage: str, tokenizer, block_size: int):
    """The corpus of `stage`, both splits long enough for the context. Everything about it is checked here, before step 0."""
    corpus = prepare(args.train.corpus(stage), args.data, tokenizer)
    for tokens in (corpus.train, corpus.val):
        check_length(tokens, block_size)
    return corpus


def pretrain_stage(args, tokenizer, run_dir: Path, w: World) -> Stage:
    cfg: TrainConfig = args.train
    model_cfg = replace(args.model, vocab_size=tokenizer.vocab_size)
    corpus = corpus_of(args, "pretrain", tokenizer, model_cfg.block_size)
    torch.manual_seed(cfg.seed)
    model = Transformer(model_cfg).to(w.device)
    share_parameters(model, w)
    adapter, kv = AdapterConfig(adapter="none"), KVConfig(kv="dense")
    config = {"stage": "pretrain", "model": to_dict(model_cfg), "tokenizer": tokenizer.name, "adapter": to_dict(adapter), "kv": to_dict(kv),
              "seed": cfg.seed, "steps": cfg.pretrain_steps, "batch_size": cfg.pretrain_batch_size, "lr": cfg.pretrain_lr,
              "corpus": cfg.corpus("pretrain"), "optimizer": optimizer_settings(cfg),
              "trainable_parameters": sum(p.numel() for p in model.parameters())}
    return Stage("pretrain", model, list(model.parameters()), corpus, tokenizer, run_dir / "pretrain", cfg.pretrain_steps, cfg.pretrain_batch_size,
                 cfg.pretrain_lr, cfg.seed, config, adapter, kv, True)


def adapt_stage(args, run_dir: Path, w: World, base: Path, adapter: AdapterConfig, kv: KVConfig, seed: int, name: str) -> Stage:
    """Load the frozen base and its tokenizer, calibrate value groups, attach adapters."""
    cfg: TrainConfig = args.train
    loaded = load_run(base, w.device)
    check(loaded.base == loaded.path, f"init_from={base}", "a base model is adapted, not an adapter", "give a pretrain stage's folder")
    model, tokenizer = loaded.model, loaded.tokenizer
    for f in (f for f in to_dict(model.cfg) if f in args.given and f != "block_size"):
        came, has = getattr(args.model, f), getattr(model.cfg, f)
        check(came == has, f"{f}={came}", f"the base has {has}", f"leave --{f} out")
    check("tokenizer" not in args.given or args.data.tokenizer == tokenizer.name, f"tokenizer={args.data.tokenizer!r}",
          f"the base was trained with {tokenizer.name!r}", "leave --tokenizer out")
    if "block_size" in args.given or cfg.preset == "paper":
        check(args.model.block_size <= model.cfg.block_size, f"block_size={args.model.block_size}", f"the base knows {model.cfg.block_size} tokens",
              f"give --block_size={model.cfg.block_size} or less")
        model.cfg = replace(model.cfg, block_size=args.model.block_size)  # a shorter context; positions are the same
    corpus = corpus_of(args, "adapt", tokenizer, model.cfg.block_size)
    torch.manual_seed(seed)
    calibration = [batch(corpus.train, "calibrate", seed, i, 16, model.cfg.block_size)[0].to(w.device) for i in range(2)]
    kv_router.attach(model, kv, calibration, seed)
    lora.attach(model, adapter)
    share_parameters(model, w)
    params = [p for p in model.parameters() if p.requires_grad] + kv_router.trainable(model)
    params = list(dict.fromkeys(params))
    check(bool(params), f"adapter={adapter.adapter} with kv={kv.kv}, value_router={kv.value_router}", "nothing is left to train",
          "choose another adapter")
    folder = run_dir / name
    config = {"stage": "adapt", "model": to_dict(model.cfg), "tokenizer": tokenizer.name, "adapter": to_dict(adapter), "kv": to_dict(kv),
              "seed": seed, "steps": cfg.adapt_steps, "batch_size": cfg.adapt_batch_size, "lr": cfg.adapt_lr, "corpus": cfg.corpus("adapt"),
              "optimizer": optimizer_settings(cfg),
              "trainable_parameters": lora.count_trainable(model),
              "base": os.path.relpath(loaded.path.resolve(), (folder / "x").resolve()), "base_sha256": checkpoint.tensor_hash(loaded.path)}
    return Stage(name, model, params, corpus, tokenizer, folder, cfg.adapt_steps, cfg.adapt_batch_size, cfg.adapt_lr, seed, config,
                 adapter, kv, False)


def train(stage: Stage, args, w: World) -> None:
    """Run a stage, or continue it when resuming. Its last checkpoint is on disk when any rank returns."""
    if w.main:
        stage.folder.mkdir(parents=True, exist_ok=True)
    with out_of_memory_explained(stage.batch_size, stage.model.cfg.block_size, args.train.accumulation):
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
        if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError) and "allocate" not in str(e):
            raise
        raise ValueError(f"out of memory with batch size {batch_size}, context {context}, accumulation {accumulation}: less is needed; "
                         "lower the batch size or --block_size, or raise --accumulation") from None


def rows_of_table(args, model_cfg: ModelConfig) -> list[tuple[str, AdapterConfig, KVConfig]]:
    """Name, adapter and storage of each adapted row: LoRA, MoE-LoRA, sub-token."""
    a, kv, dense = replace(args.adapter, adapter="routed"), args.kv, KVConfig(kv="dense")
    if args.train.preset == "paper":  # its ranks; it does not give LoRA's, which here is one MoE branch's
        baselines = {kind: replace(a, adapter=kind, r=8, alpha=16.0) for kind in ("lora", "moe_lora")}
    else:  # the same scale of the whole update, as config.py sets it
        baselines = {kind: replace(a, adapter=kind, r=0, alpha=0.0) for kind in ("lora", "moe_lora")}
    if args.train.preset != "paper":
        with torch.device("meta"):
            meta = lora.attach(Transformer(model_cfg), a)
            added = [kv_router.ValueGroupPath(model_cfg, kv) for _ in kv.layers(model_cfg.n_layer)] if kv.kv == "value_groups" else []
        target = lora.count_trainable(meta) + sum(p.numel() for path in added for p in path.parameters())
        baselines = {k: matched_rank(model_cfg, b, target) for k, b in baselines.items()}
    return [("LoRA", baselines["lora"], dense), ("MoE-LoRA", baselines["moe_lora"], dense), ("sub-token", a, kv)]


def finding(results: list[dict]) -> str:
    """The paper's question about its table 1, answered from the rows: is the sub-token row at or below LoRA?"""
    value = {name: mean(r["value"] for r in results if r["name"] == name) for name in ("LoRA", "MoE-LoRA", "sub-token")}
    kept = next(r["cache_bytes"] / r["dense_bytes"] for r in results if r["name"] == "sub-token")
    against = " and ".join(f"{value['sub-token'] / value[n] - 1:+.2%} against {n}" for n in ("LoRA", "MoE-LoRA"))
    return f"Storing {kept:.1%} of the bytes, sub-token's perplexity is {against}, which store everything."


def run_all(args, tokenizer, run_dir: Path, w: World) -> None:
    """Pretrain, adapt every row with every seed that time allows, evaluate, write results.json and report.png, print the table."""
    begin, cfg = time.time(), args.train
    corpus = corpus_of(args, "adapt", tokenizer, args.model.block_size)  # before pretraining: what is wrong with it is said now
    stage = pretrain_stage(args, tokenizer, run_dir, w)
    train(stage, args, w)
    base = find_checkpoint(stage.folder)
    x, y = sequential(corpus.val, 192, stage.model.cfg.block_size)
    about = dict(dtype=cfg.dtype)
    results = [{"name": "base"} | evaluation.row(stage.model, x, y, adapter=stage.adapter, kv=stage.kv, seed=cfg.seed, params=0, **about)]
    table_rows = rows_of_table(args, stage.model.cfg)
    curves, sweeps, masks, seconds = {"pretrain": stage.folder}, [], None, 0.0
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        late = torch.tensor([float(seed > cfg.seed and time.time() - begin + seconds > 60 * cfg.max_minutes)], device=w.device)
        if w.sum(late).item():
            print(f"{seed - cfg.seed} of {cfg.seeds} seeds: another would pass --max_minutes={cfg.max_minutes}", file=sys.stderr)
            break
        start = time.time()
        for name, adapter, kv in table_rows:
            stage = adapt_stage(args, run_dir, w, base, adapter, kv, seed, f"{adapter.adapter}-s{seed}")
            train(stage, args, w)
            best = load_run(stage.folder, w.device).model  # what a user would load: the best checkpoint, bases folded
            how = dict(adapter=adapter, kv=kv, seed=seed, params=stage.config["trainable_parameters"], **about)
            paths = kv_router.paths(best)
            got = evaluation.sweep(best, x, y, [kv.topk_groups], **how) if paths else [evaluation.row(best, x, y, **how)]
            results += [{"name": name} | r for r in got]
            if seed == cfg.seed:
                curves[name] = stage.folder
                if paths:
                    ks = [k for k in range(1, kv.n_groups + 1) if k != kv.topk_groups and (kv.reconstructor != "linear" or k == kv.n_groups)]
                    sweeps = [{"name": "sub-token, other K (sweep)"} | r for r in evaluation.sweep(best, x, y, ks, **how)]
                    masks = evaluation.kept_groups(best, x[:1])
        seconds = time.time() - start
    if w.main:
        checkpoint.write_json(run_dir / "results.json", results + sweeps)
        evaluation.report(run_dir, results + sweeps, {n: checkpoint.read_jsonl(f / "metrics.jsonl") for n, f in curves.items()}, masks)
        print(f"\n{evaluation.table(results)}\n\n{finding(results)}\n{cfg.corpus('adapt')} validation, {x.numel():,} tokens; decode mode; cache of "
              f"4 sequences of {x.size(1)} tokens; {run_dir}/results.json, {run_dir}/report.png; {time.time() - begin:.0f} s")


def open_run_dir(cfg: TrainConfig, w: World) -> tuple[Path, list[Path]]:
    """The run's folder, a fresh one under out/ or the named one, which must be empty unless --resume; and the folders made for it,
    innermost first."""
    def make(path: Path, exist_ok: bool) -> list[Path]:
        made = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=exist_ok)
        return made

    if not cfg.out_dir:
        stamp, n, made = time.strftime("%Y%m%d-%H%M%S"), 0, []
        names = [None]
        while w.main and names == [None]:
            path = Path("out") / (stamp + (f"-{n}" if n else ""))
            try:
                made = make(path, exist_ok=False)
                names = [str(path)]
            except FileExistsError:
                n += 1
        if w.size > 1:
            dist.broadcast_object_list(names, 0)
        return Path(names[0]), made
    path = Path(cfg.out_dir)
    check(not path.exists() or path.is_dir(), f"out_dir={path}", "is a file", "name a folder")
    full = path.is_dir() and any(path.iterdir())
    if cfg.resume:
        any_checkpoint = (path.is_dir() and any(path.glob("*/step-*"))) or any(path.glob("*/.*-step-*"))
        check(any_checkpoint, f"resume from {path}", "there is no checkpoint in it", "leave --resume out to start anew")
        return path, []
    check(not full, f"out_dir={path}", "is not empty", "give --resume to continue it, or another folder")
    if w.size > 1:
        dist.barrier()  # every rank has looked before rank 0 writes
    return path, make(path, exist_ok=True) if w.main else []


def take_back(run_dir: Path, made: list[Path]) -> None:
    """After bad input: remove what this start created, unless a stage has written something by then."""
    if not any(run_dir.glob("*/*")):
        (run_dir / "config.json").unlink(missing_ok=True)
        for folder in [*(p for p in run_dir.iterdir() if p.is_dir()), *made]:
            with suppress(OSError):
                folder.rmdir()


def run(args) -> None:
    cfg: TrainConfig = args.train
    if cfg.stage == "adapt":
        check(cfg.init_from != "scratch", "stage=adapt with init_from=scratch", "a pretrained base is adapted", "give --init_from=out/RUN/pretrain")
    with world(cfg.device) as w:
        tokenizer = get_tokenizer(args.data.tokenizer)
        if args.kv.kv == "value_groups" and cfg.stage == "all":
            args.kv.check_model(args.model)
        run_dir, made = open_run_dir(cfg, w)
        if w.main and not cfg.resume:
            checkpoint.write_json(run_dir / "config.json", {n: to_dict(getattr(args, n)) for n in CONFIGS})
        try:
            sizes = f"{cfg.pretrain_batch_size} (pretrain) / {cfg.adapt_batch_size} (adapt)"
            with out_of_memory_explained(sizes, args.model.block_size, cfg.accumulation):
                if cfg.stage == "all":
                    run_all(args, tokenizer, run_dir, w)
                elif cfg.stage == "pretrain":
                    train(pretrain_stage(args, tokenizer, run_dir, w), args, w)
                else:
                    stage = adapt_stage(args, run_dir, w, find_checkpoint(cfg.init_from), args.adapter, args.kv, cfg.seed,
                                        f"{args.adapter.adapter}-s{cfg.seed}")
                    train(stage, args, w)
        except NonFinite as e:
            print(f"train.py: {e}", file=sys.stderr)
            raise SystemExit(3) from None
        except ValueError:
            if w.main and not cfg.resume:
                take_back(run_dir, made)
            raise


if __name__ == "__main__":
    exit_on_bad_input(lambda: run(ARGS))
