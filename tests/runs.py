"""Runs of train.py on tiny models, in this process and in others, and what they leave behind: for
several test files."""

import inspect
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cli
import train
from loaders import checkpoint
from loaders.runs import find_checkpoint
from training import loop as trainer

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--n_layer=2",
    "--n_embd=32",
    "--n_head=4",
    "--n_kv_head=2",
    "--head_dim=16",
    "--n_inner=48",
    "--block_size=32",
    "--device=cpu",
    "--eval_sequences=6",
]
TABLE = [*TINY, "--test_sequences=24"]  # of all stages


def arguments(*flags):
    """The settings of a tiny model and these flags: of one stage, or without --stage of the
    table."""
    flags = [*map(str, flags)]
    one = any(flag.startswith("--stage=") for flag in flags)
    return cli.parse_args(train.CONFIGS, [*(TINY if one else TABLE), *flags])


def pretrain(out: Path, text: str, *flags) -> Path:
    """Pretrain in this process; returns the stage's folder."""
    train.run(arguments("--stage=pretrain", f"--dataset={text}", f"--out_dir={out}", *flags))
    return out / "pretrain"


def sharpened(stage: Path, folder: Path, scale: float = 1.0) -> Path:
    """Save in folder what the stage is, with random weights so large that its predictions depend on
    what attention reads; returns the folder."""
    g = torch.Generator().manual_seed(0)
    c = checkpoint.load(find_checkpoint(stage))
    sharp = {}
    for name, t in sorted(c.tensors["model"].items()):  # a file's order is not always the same
        sharp[name] = t
        if t.ndim == 2:
            sharp[name] = scale * torch.randn(t.shape, generator=g) / t.size(-1) ** 0.5
    about = dict(step=c.step, tensors={"model": sharp}, config=c.config)
    checkpoint.save(folder, checkpoint.step_name(c.step), **about)
    return folder


def sharp_stage(folder: Path, text: str, *flags: str, scale: float = 1.0) -> Path:
    """Pretrain one step, with a cache of texts of its own, and return a sharpened stage of it."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        flags = ("--pretrain_steps=1", "--eval_sequences=1", *flags)
        stage = pretrain(folder / "run", text, *flags)
    return sharpened(stage, folder / "pretrain", scale)


def adapt_arguments(out: Path, text: str, base: Path, *flags):
    return arguments(
        "--stage=adapt", f"--dataset={text}", f"--out_dir={out}", f"--init_from={base}", *flags
    )


def call(module, *flags) -> None:
    """The module's main with these flags, in this process."""
    call_main(module, cli.parse_args(module.CONFIGS, ["--device=cpu", *map(str, flags)]))


def call_main(module, args) -> None:
    """The module's main, which takes its settings or reads them from ARGS."""
    if inspect.signature(module.main).parameters:
        module.main(args)
        return
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "ARGS", args, raising=False)
        module.main()


def before_step(monkeypatch, n: int, act) -> None:
    """Call act() just before the gradients of every optimizer step numbered n."""
    rate = trainer.learning_rate
    monkeypatch.setattr(
        trainer, "learning_rate", lambda step, *a: (act() if step == n else None, rate(step, *a))[1]
    )


def losses(stage: Path) -> list[tuple[int, str]]:
    """Every training step logged, with repr(loss)."""
    return [
        (r["step"], repr(r["loss"]))
        for r in checkpoint.read_jsonl(stage / "metrics.jsonl")
        if "loss" in r
    ]


def tensors(path: Path) -> dict:
    """All tensors of a checkpoint, the optimizer's included, by name."""
    c = checkpoint.load(path)
    flat = {f"{stem}.{k}": t for stem, sd in c.tensors.items() for k, t in sd.items()}
    return flat | {
        f"optimizer.{i}.{k}": t
        for i, s in c.state["optimizer"]["state"].items()
        for k, t in s.items()
    }


def assert_equal(a: dict, b: dict) -> None:
    """Same names, same bits."""
    assert a.keys() == b.keys() and a
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def copies(d: dict) -> dict:
    return {k: t.detach().clone() for k, t in d.items()}


def python(*command, wait: float | None = 120, **kwargs):
    """A Python subprocess in the repository: finished within `wait` seconds, or running where wait
    is None."""
    settings = {
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    } | kwargs
    p = subprocess.Popen([sys.executable, *map(str, command)], **settings)
    if wait is None:
        return p
    try:
        p.out, p.err = p.communicate(timeout=wait)
    finally:
        p.kill()
    return p


def wait_for_steps(stage: Path, p: subprocess.Popen, n: int = 3, limit: float = 300) -> None:
    """Wait until a run has logged n steps; it must be alive then."""
    end = time.time() + limit
    metrics = stage / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= n):
        assert p.poll() is None and time.time() < end, p.communicate()
        time.sleep(0.01)


def rows_without_time(run: Path) -> list[dict]:
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")}
        for r in json.loads((run / "results.json").read_text())
    ]
