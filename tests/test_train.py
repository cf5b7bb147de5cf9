"""Promises 2, 3, 5, 7, 8, 12, 19 and 20: what a run of train.py does when it is stopped, resumed,
fed bad numbers, or split over ranks."""

import json
import math
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import error_line

import cli
import data
import kv_router
import train
from config import KVConfig
from loaders import checkpoint
from loaders.runs import find_checkpoint
from model import Transformer
from runs import (
    TABLE,
    TINY,
    adapt_arguments,
    arguments,
    assert_equal,
    before_step,
    copies,
    losses,
    pretrain,
    python,
    rows_without_time,
    tensors,
    wait_for_steps,
)
from settings.adapters import AdapterConfig
from settings.train import TrainConfig
from training import adapters
from training import loop as trainer
from training.loss import lm_loss

ROUTED = [
    "--adapter=routed",
    "--lora_dropout=0.1",
    "--accumulation=2",
    "--kv=value_groups",
    "--value_router=linear",
    "--reconstructor=mlp",
]
WARM = ["--adapter=moe_lora", "--reconstructor=mlp", "--kv_warmup=0.8"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
SIGNALS = {"SIGINT": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143)}
pytestmark = pytest.mark.usefixtures("own_cache")


# -- resume, evaluation, signals


@pytest.mark.parametrize(
    "kind, flags",
    [("pretrain", ["--accumulation=3"]), ("adapt", ROUTED), ("adapt", WARM)],
    ids=["pretrain", "adapt-routed", "adapt-moe_lora"],
)
def test_resume_bitwise(kind, flags, tmp_path, run_stage, monkeypatch):
    """30 steps unbroken, and 20 steps, SIGTERM, a start with --resume: every loss and final tensor,
    moments included, are the same bits."""
    flags = [*flags, f"--{kind}_steps=30", "--eval_interval=6"]
    whole = run_stage(kind, tmp_path / "whole", *flags)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
        before_step(m, 19, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_stage(kind, tmp_path / "broken", *flags)
    assert stopped.value.code == 143
    broken = tmp_path / "broken" / whole.name
    assert checkpoint.newest(broken)[0].name == "step-00000020" and len(losses(broken)) == 20
    random.random(), torch.rand(3)  # nothing outside the checkpoint matters
    run_stage(kind, tmp_path / "broken", *flags, "--resume")
    assert losses(broken) == losses(whole) and [s for s, _ in losses(whole)] == list(range(30))
    assert_equal(tensors(broken / "step-00000030"), tensors(whole / "step-00000030"))
    values = [
        [
            (r["after"], r["val_loss"])
            for r in checkpoint.read_jsonl(s / "metrics.jsonl")
            if "val_loss" in r
        ]
        for s in (whole, broken)
    ]
    assert values[0] == values[1] and [a for a, _ in values[0]] == [6, 12, 18, 24, 30]
    assert checkpoint.load(whole / "best").step == checkpoint.load(broken / "best").step


@pytest.mark.parametrize(
    "kind, flags", [("pretrain", []), ("adapt", ROUTED)], ids=["pretrain", "adapt"]
)
def test_evaluation_and_sampling_never_change_training(kind, flags, tmp_path, run_stage):
    """Losses and final tensors are the same bits whatever eval_interval, sample_interval and
    save_interval are."""
    variants = [("0", "0", "200"), ("1", "0", "4"), ("7", "3", "200"), ("0", "1", "1")]
    runs = [
        run_stage(
            kind,
            tmp_path / "-".join(v),
            *flags,
            f"--{kind}_steps=8",
            *(f"--{n}_interval={i}" for n, i in zip(("eval", "sample", "save"), v, strict=True)),
        )
        for v in variants
    ]
    for r in runs[1:]:
        assert losses(r) == losses(runs[0])
        assert_equal(tensors(r / "step-00000008"), tensors(runs[0] / "step-00000008"))


@pytest.mark.parametrize("evals", ["0", "2"])
def test_samples_of_a_warm_up_read_what_is_stored(evals, tmp_path, run_stage, monkeypatch):
    """Text that is shown while steps read whole values is written from K groups, as validation
    losses are, whether one was measured before it or not."""
    read = []
    write = trainer.generate

    def watched(model, *args, **kwargs):
        read.append({(path.k, path.whole) for path in kv_router.paths(model).values()})
        return write(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "generate", watched)
    intervals = [f"--eval_interval={evals}", "--sample_interval=1"]
    run_stage("adapt", tmp_path, *WARM, "--adapt_steps=4", *intervals)
    assert read == [{(2, False)}] * 4


def test_resume_newest_valid_says_why(tmp_path, text, run_stage, capsys):
    """--resume takes the newest whole checkpoint, names each one passed over and why, and ends
    where the unbroken run ended."""
    flags = ["--pretrain_steps=12", "--save_interval=4", "--keep_checkpoints=3"]
    stage = run_stage("pretrain", tmp_path / "run", *flags)
    end = tensors(stage / "step-00000012")
    trace = losses(stage)
    weights = stage / "step-00000012" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 16
    weights.write_bytes(damaged)
    (stage / "step-00000099").mkdir()
    (stage / "step-foreign").mkdir()
    (stage / ".tmp-step-00000016-77-0123abcd").mkdir()
    capsys.readouterr()
    run_stage("pretrain", tmp_path / "run", *flags, "--resume")
    lines = capsys.readouterr().err.splitlines()
    for name, why in (
        ("step-00000012", "model.safetensors is damaged"),
        ("step-00000099", "empty folder"),
        ("step-foreign", "its name is not"),
        (".tmp-step-00000016-77-0123abcd", "deleted"),
    ):
        assert any(name in line and why in line for line in lines), (name, lines)
    assert any(line.endswith("resumed from " + str(stage / "step-00000008")) for line in lines)
    assert losses(stage) == trace
    assert_equal(tensors(stage / "step-00000012"), end)


def test_resume_without_usable_checkpoint_starts_anew(tmp_path, run_stage, capsys):
    """A stage killed before its first checkpoint, or with none left whole, starts at step 0 again;
    no step is logged twice."""
    stage = run_stage("pretrain", tmp_path / "run", "--pretrain_steps=5", "--eval_interval=2")
    trace = losses(stage)
    (stage / "step-00000005" / "manifest.json").write_text("{")
    run_stage("pretrain", tmp_path / "run", "--pretrain_steps=5", "--eval_interval=2", "--resume")
    assert "passed over, manifest.json" in capsys.readouterr().err
    assert losses(stage) == trace and len(checkpoint.read_jsonl(stage / "metrics.jsonl")) == 5 + 3


def test_resume_remembers_the_best(tmp_path, run_stage, monkeypatch, trainers):
    """After a resume the best weights are still the best: later, worse ones do not take their
    place."""
    monkeypatch.setattr(trainer, "validation_loss", lambda *a: 1.0 + trainers[-1].step)
    flags = ["--pretrain_steps=8", "--eval_interval=2"]
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        before_step(m, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_stage("pretrain", tmp_path / "run", *flags)
    stage = run_stage("pretrain", tmp_path / "run", *flags, "--resume")
    assert (
        checkpoint.load(stage / "best").step == 2
        and checkpoint.load(stage / "step-00000008").state["best"] == 3.0
    )
    assert find_checkpoint(stage) == stage / "best"


def resume(folder: Path, *flags) -> None:
    """What `train.py --resume --out_dir=folder` does, in this process."""
    train.run(cli.parse_args(train.CONFIGS, ["--resume", f"--out_dir={folder}", *flags]))


def test_resume_refuses_other_flags(tmp_path, run_stage, capsys):
    """A run is not continued with another rate, seed, shape or corpus, or with fewer steps: the flag
    is named, with what the run has. What changes no step may differ."""
    run = tmp_path / "run"
    stage = run_stage("pretrain", run, "--pretrain_steps=3")
    for flag, has in (
        ("--pretrain_lr=0.1", "has 0.003; leave --pretrain_lr out"),
        ("--pretrain_steps=2", "has 3; leave --pretrain_steps out, or give more"),
        ("--seed=4", "has 0; leave --seed out"),
        ("--n_inner=40", "has 48; leave --n_inner out"),
        ("--stage=all", "has 'pretrain'; leave --stage out"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            resume(run, flag)
        assert f"{flag[2:]} with resume: the run in {run} {has}" in capsys.readouterr().err
    before = losses(stage)
    resume(run, "--save_interval=7", "--seed=0", "--accumulation=2")
    assert losses(stage) == before


def test_resume_needs_only_the_folder(tmp_path, run_stage, monkeypatch):
    """--resume --out_dir=DIR takes every setting from the run: the end is bit for bit that of a run
    never broken."""
    flags = [*ROUTED, "--adapt_steps=8", "--adapt_lr=0.004", "--eval_interval=3"]
    whole = run_stage("adapt", tmp_path / "whole", *flags)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        before_step(m, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_stage("adapt", tmp_path / "broken", *flags)
    resume(tmp_path / "broken")
    broken = tmp_path / "broken" / whole.name
    assert losses(broken) == losses(whole)
    assert_equal(tensors(broken / "step-00000008"), tensors(whole / "step-00000008"))


def test_resume_may_add_steps(tmp_path, run_stage, capsys):
    """A finished run goes on to more steps, the ones done left as they are, at the rate that so
    many steps have; the run remembers how many they are."""
    run = tmp_path / "run"
    stage = run_stage("pretrain", run, "--pretrain_steps=4")
    before = losses(stage)
    resume(run, "--pretrain_steps=6")
    assert "4 steps become 6" in capsys.readouterr().err
    assert losses(stage)[:4] == before and [step for step, _ in losses(stage)] == list(range(6))
    log = [r for r in checkpoint.read_jsonl(stage / "metrics.jsonl") if "loss" in r]
    assert log[4]["lr"] == pytest.approx(trainer.learning_rate(4, 6, 0.003, 0.1))
    resume(run)
    assert "all 6 steps are done" in capsys.readouterr().err and len(losses(stage)) == 6


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_saves_once_and_resume_continues(name, tmp_path, text, run_stage):
    """SIGINT or SIGTERM to a real process: one checkpoint, at a step boundary, exit 130 or 143, no
    traceback; --resume goes on (shown of one: what is saved is the same)."""
    number, code = SIGNALS[name]
    flags = [
        f"--dataset={text}",
        f"--out_dir={tmp_path / 'run'}",
        "--pretrain_steps=250",
        "--pretrain_batch_size=2",
    ]
    p = python("train.py", *TINY, "--stage=pretrain", *flags, wait=None)
    stage = tmp_path / "run" / "pretrain"
    wait_for_steps(stage, p)
    p.send_signal(number)
    _, err = p.communicate(timeout=300)
    assert p.returncode == code, err
    assert (
        "Traceback" not in err
        and "stopped by a signal" in err
        and "stopping after this step\n" in err
        and f"--resume --out_dir={tmp_path / 'run'}" in err
    )
    saved = [q.name for q in stage.iterdir() if q.is_dir()]
    assert len(saved) == 1 and checkpoint.verify(stage / saved[0]) is None
    assert checkpoint.load(stage / saved[0]).step == len(losses(stage)) < 250
    if name == "SIGTERM":
        return
    run_stage("pretrain", tmp_path / "run", *flags, "--resume")
    assert [s for s, _ in losses(stage)] == list(range(250))
    assert checkpoint.newest(stage)[0].name == "step-00000250"


def test_signal_in_last_step_ends_the_pipeline(tmp_path, text, monkeypatch):
    """A signal that comes while the last step of pretraining is evaluated is not lost: the step is
    saved and adaptation does not begin."""
    monkeypatch.setattr(
        trainer.Trainer, "evaluate", lambda self: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(SystemExit) as stopped:
        train.run(
            arguments(
                f"--dataset={text}",
                f"--adapt_dataset={text}",
                f"--out_dir={tmp_path / 'run'}",
                "--pretrain_steps=3",
            )
        )
    assert stopped.value.code == 130
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "pretrain"]
    assert checkpoint.newest(tmp_path / "run" / "pretrain")[0].name == "step-00000003"


# -- what must never reach weights or checkpoints


def inject(monkeypatch, how: str, at: int, trainers: list) -> None:
    """Make the training loss, its gradient or its labels bad in step `at`."""

    def now():
        return trainers[-1].step == at

    if how in ("nan", "inf"):
        monkeypatch.setattr(
            "training.stage.lm_loss", lambda *a: lm_loss(*a) * (float(how) if now() else 1.0)
        )
    elif how == "masked":

        def masked(*a, **k):
            x, y = data.batch(*a, **k)
            return x, y.fill_(-100) if a[3] == at and a[1] == "train" else y

        monkeypatch.setattr(trainer, "batch", masked)
    else:
        before_step(
            monkeypatch,
            0,
            lambda: trainers[-1].s.params[-1].register_hook(lambda g: g * math.inf if now() else g),
        )


@pytest.mark.parametrize(
    "kind, how",
    [
        ("pretrain", "nan"),
        ("pretrain", "inf"),
        ("pretrain", "gradient"),
        ("pretrain", "masked"),
        ("adapt", "nan"),
        ("adapt", "gradient"),
    ],
)
def test_non_finite_never_reaches_weights(
    kind, how, tmp_path, run_stage, monkeypatch, capsys, trainers
):
    """NaN or inf in loss or gradient, or labels all masked: exit 3 naming step, rate, norm and last
    good checkpoint; nothing changed."""
    inject(monkeypatch, how, 7, trainers)
    before = {}

    def remember():
        t = trainers[-1]
        files = {p: p.read_bytes() for p in t.s.folder.rglob("*") if p.is_file()}
        before.update(
            weights=copies(t.s.model.state_dict()),
            best=t.best,
            files=files,
            moments=copies(
                {
                    f"{i}.{k}": v
                    for i, s in t.opt.state_dict()["state"].items()
                    for k, v in s.items()
                }
            ),
        )

    before_step(monkeypatch, 7, remember)
    with pytest.raises(SystemExit) as e:
        flags = [
            *(ROUTED if kind == "adapt" else []),
            f"--{kind}_steps=20",
            "--save_interval=5",
            "--eval_interval=3",
        ]
        run_stage(kind, tmp_path / "run", *flags)
    t = trainers[-1]
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 3
    assert re.search(r"step 7: loss \S+, gradient norm \S+, learning rate \d", message), message
    assert str(t.s.folder / "step-00000005") in message
    assert math.isfinite(t.best) and t.best == before["best"] and t.step == 7
    assert_equal(t.s.model.state_dict(), before["weights"])
    assert_equal(
        {f"{i}.{k}": v for i, s in t.opt.state_dict()["state"].items() for k, v in s.items()},
        before["moments"],
    )
    assert {p: p.read_bytes() for p in t.s.folder.rglob("*") if p.is_file()} == before["files"]
    for name in ("step-00000005", "best"):
        assert all(v.isfinite().all() for v in tensors(t.s.folder / name).values())


def test_non_finite_validation_is_not_the_best(tmp_path, run_stage, monkeypatch, capsys):
    """A validation loss that is no number ends the run with exit 3 before anything is saved as
    best."""
    monkeypatch.setattr(trainer, "mean_loss", lambda *a: math.nan)
    with pytest.raises(SystemExit) as e:
        run_stage("pretrain", tmp_path / "run", "--pretrain_steps=4", "--eval_interval=2")
    assert e.value.code == 3 and "validation loss nan after step 1" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "pretrain").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("kind", ["pretrain", "adapt"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_out_of_memory_names_sizes(kind, error, tmp_path, run_stage, monkeypatch):
    """Out of memory becomes one ValueError with batch size, context and accumulation as this stage
    has them."""
    forward = Transformer.forward

    def boom(self, *a, **k):
        if self.training and torch.is_grad_enabled():
            raise error
        return forward(self, *a, **k)

    monkeypatch.setattr(Transformer, "forward", boom)
    with pytest.raises(
        ValueError,
        match=r"out of memory with batch size 5, context 24, accumulation 3: .*lower the batch size",
    ):
        run_stage(
            kind, tmp_path / "run", f"--{kind}_batch_size=5", "--accumulation=3", "--block_size=24"
        )
    assert not (tmp_path / "run").exists()


def test_out_of_memory_is_not_guessed(tmp_path, run_stage, monkeypatch):
    """Any other RuntimeError stays what it is."""
    monkeypatch.setattr("training.stage.lm_loss", lambda *a: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run_stage("pretrain", tmp_path / "run")


# -- the global batch


def gradient(stage, cfg, accumulation: int, w) -> tuple[float, dict]:
    """Loss and gradients of step 3, by parameter."""
    for p in stage.params:
        p.grad = None
    loss, norm, _ = trainer.gradients(
        stage, stage.model, 3, replace(cfg, accumulation=accumulation), w, False
    )
    assert norm > 0
    names = {p: n for n, p in stage.model.named_parameters()}
    return loss, {names[p]: p.grad.clone() for p in stage.params}


def assert_close(a: dict, b: dict, tol: float) -> None:
    """Per parameter, the difference is at most tol of the gradient's size."""
    far = {k: ((a[k] - b[k]).norm() / b[k].norm()).item() for k in b}
    assert all(b[k].norm() > 0 for k in b) and max(far.values()) < tol, far


@pytest.mark.parametrize(
    "flags",
    [
        ["--adapter=routed", "--reconstructor=mlp"],
        ["--adapter=moe_lora", "--reconstructor=mlp", "--lm_to_router"],
    ],
    ids=["routed", "moe_lora"],
)
def test_accumulation_means_the_same_batch(flags, stage_of):
    """1, 2, 3, 8, 11 and 40 micro-steps of 11 sequences give the gradients of one pass, auxiliary
    losses included."""
    stage, cfg = stage_of("--kv=value_groups", "--value_router=linear", *flags)
    one = trainer.World(0, 1, torch.device("cpu"))
    loss, want = gradient(stage, cfg, 1, one)
    for n in (2, 3, 8, 11, 40):
        other, got = gradient(stage, cfg, n, one)
        assert other == pytest.approx(loss, rel=1e-6)
        assert_close(got, want, 2e-5)


@pytest.mark.parametrize("ranks", [2, 3, 14])
def test_ranks_mean_the_same_batch(ranks, stage_of):
    """The shares of 2, 3 and 14 ranks (11 sequences: uneven, and 3 of 14 shares empty) add up to
    the gradients of one process."""
    stage, cfg = stage_of("--kv=value_groups", "--value_router=linear", "--reconstructor=mlp")

    class Alone(trainer.World):
        def sum(self, t):
            return t

        def start_sum(self, t):
            return SimpleNamespace(wait=lambda: None)

    loss, want = gradient(stage, cfg, 1, trainer.World(0, 1, torch.device("cpu")))
    parts = []
    for rank in range(ranks):
        for p in stage.params:
            p.grad = None
        w = Alone(rank, ranks, torch.device("cpu"))
        share = trainer.gradients(stage, stage.model, 3, replace(cfg, accumulation=2), w, False)[0]
        zero = torch.zeros(())  # an empty share has no gradients
        parts.append((share, [zero if p.grad is None else p.grad.clone() for p in stage.params]))
    names = {p: n for n, p in stage.model.named_parameters()}
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    assert_close(
        {names[p]: sum(part[1][i] for part in parts) for i, p in enumerate(stage.params)},
        want,
        2e-5,
    )


def test_two_processes_equal_one(tmp_path, text):
    """The whole pipeline on 2 gloo processes ends as on one: 3 sequences pretrain (uneven), 1
    sequence adapts (one rank is empty). Adaptation is compared from the same base: where
    eigenvalues nearly coincide, a basis is no continuous function of the weights."""
    first = [f"--dataset={text}", "--pretrain_steps=8", "--pretrain_batch_size=3"]
    flags = [
        *first,
        f"--adapt_dataset={text}",
        "--adapt_steps=6",
        "--adapt_batch_size=1",
        "--seeds=1",
        "--lora_dropout=0",
    ]
    p = python(*TWO_PROCESSES, *TABLE, *flags, f"--out_dir={tmp_path / 'two'}", wait=600)
    assert p.returncode == 0, p.err
    pretrain(tmp_path / "alone", text, *first)
    shutil.copytree(tmp_path / "two" / "pretrain", tmp_path / "one" / "pretrain")
    train.run(arguments(*flags, f"--out_dir={tmp_path / 'one'}", "--resume"))
    for stage in ("pretrain", "lora-s0", "moe_lora-s0", "routed-s0"):
        pair = ("alone" if stage == "pretrain" else "one", "two")
        one, two = (losses(tmp_path / n / stage) for n in pair)
        assert [s for s, _ in one] == [s for s, _ in two]
        assert [float(v) for _, v in two] == pytest.approx([float(v) for _, v in one], rel=1e-4), (
            stage
        )
        one, two = (tensors(find_checkpoint(tmp_path / n / stage)) for n in pair)
        assert one.keys() == two.keys()
        for k in one:
            if not k.startswith("optimizer"):
                assert torch.allclose(one[k].double(), two[k].double(), rtol=1e-3, atol=2e-4), (
                    stage,
                    k,
                    (one[k] - two[k]).abs().max(),
                )
    for a, b in zip(
        rows_without_time(tmp_path / "one"), rows_without_time(tmp_path / "two"), strict=True
    ):
        assert a["value"] == pytest.approx(b.pop("value"), rel=1e-3) and a[
            "dense_value"
        ] == pytest.approx(b.pop("dense_value"), rel=1e-3)
        assert a | b == a


def test_dying_rank_ends_the_job(tmp_path, text):
    """SIGKILL one of two ranks in the middle of training: the job ends by itself, long before a
    collective gives up waiting, and the other rank says why in one line."""
    p = python(
        *TWO_PROCESSES,
        *TINY,
        "--stage=pretrain",
        f"--dataset={text}",
        f"--out_dir={tmp_path / 'run'}",
        "--pretrain_steps=1000000",
        wait=None,
    )
    try:
        wait_for_steps(tmp_path / "run" / "pretrain", p)
        ranks = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[1]) == p.pid:
                    rank = re.search(
                        rb"(?:^|\0)RANK=(\d+)\0", (stat.parent / "environ").read_bytes()
                    )
                    ranks[int(rank[1])] = int(stat.parent.name)
            except (OSError, TypeError):
                continue
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[1], signal.SIGKILL)
        _, err = p.communicate(timeout=300)
        assert p.returncode != 0, err
        said = "rank 0 of 2: another process of this job is gone"
        assert err.count(said) == 1 and "RuntimeError" not in err, err
        for _ in range(600):
            if not Path(f"/proc/{ranks[0]}").exists():
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{ranks[0]}").exists()  # the survivor went with it
    finally:
        p.kill()


# -- what a stage says


def test_stage_says_what_it_does_and_what_came_out(tmp_path, run_stage, capsys):
    """A stage names device, dtype, parameters, text, steps and folder before its first step, and
    its validation loss, folder and next command after its last; the numbers are the run's own."""
    stage = run_stage("adapt", tmp_path / "run", *ROUTED, "--adapt_steps=3")
    lines = capsys.readouterr().err.splitlines()
    saved = checkpoint.load(find_checkpoint(stage))
    trained = saved.config["trainable_parameters"]
    begin = next(i for i, line in enumerate(lines) if "of them trained" in line)
    first = " ".join(lines[begin : begin + 3])
    for part in (f"{trained:,} of them", "float32", "threads", "tokens and", "3 steps of 8"):
        assert part in first, (part, first)
    assert str(stage) in first
    loss = checkpoint.read_jsonl(stage / "metrics.jsonl")[-1]["val_loss"]
    assert any(f"validation loss {loss:.4f} after" in line for line in lines[begin + 3 :])
    assert f"  next: python eval.py --out_dir={stage}" in lines


def test_log_file_gets_few_lines(tmp_path, run_stage, capsys):
    """Where stderr is no terminal, 40 steps leave two lines of progress (the first and the last),
    and no line is written over."""
    run_stage("pretrain", tmp_path / "run", "--pretrain_steps=40")
    said = capsys.readouterr().err
    steps = [line for line in said.splitlines() if line.startswith("pretrain: ") and "gone" in line]
    assert [line.split(",")[0] for line in steps] == [
        "pretrain: 0 of 40 steps",
        "pretrain: 40 of 40 steps",
    ]
    assert "\r" not in said and "tokens/s" in steps[-1]


def test_rows_take_the_rate_of_the_lowest_validation_loss(tmp_path, monkeypatch):
    """Of --adapt_rates each is tried once, as asked but for name and rate; the lowest validation
    loss of a stage's whole log decides, and without rates nothing is trained. What is no list of
    rates is refused."""
    lowest = {0.1: [3.0, 2.5, 9.0], 0.01: [2.75, 2.25], 0.001: [2.5]}
    tried = []

    def trained(args, run_dir, w, where, what):
        tried.append(what)
        if what.lr not in lowest:
            raise trainer.NonFinite("loss nan", "try a lower rate")
        folder = run_dir / what.name
        folder.mkdir()
        log = [{"step": 0, "loss": 0.5}, *({"val_loss": loss} for loss in lowest[what.lr])]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
        return SimpleNamespace(folder=folder)

    monkeypatch.setattr(adapters, "adapted", trained)
    what = adapters.Adaptation(
        name="x",
        adapter=AdapterConfig(adapter="lora"),
        kv=KVConfig(),
        seed=4,
        objective="lm",
        steps=7,
        lr=0.5,
        kv_from="",
    )
    cfg = TrainConfig(adapt_rates="0.1,0.01,0.001")
    asked = SimpleNamespace(train=cfg)
    best = adapters.at_best_rate(asked, tmp_path, None, "base", what)
    assert best == replace(what, lr=0.01)
    assert adapters.named(best, cfg).name == "lora-s4-rate0.01"  # its first seed is trained once
    asked.train = TrainConfig(adapt_rates="0.3,0.1")
    shutil.rmtree(tmp_path / "lora-s4-rate0.1")
    assert adapters.at_best_rate(asked, tmp_path, None, "base", what) == replace(what, lr=0.1)
    asked.train = TrainConfig(adapt_rates="0.3,0.4")
    with pytest.raises(trainer.NonFinite):
        adapters.at_best_rate(asked, tmp_path, None, "base", what)
    del tried[3:]
    names = ["lora-s4-rate0.1", "lora-s4-rate0.01", "lora-s4-rate0.001"]
    assert tried == [replace(what, name=n, lr=r) for n, r in zip(names, cfg.rates, strict=True)]
    asked = SimpleNamespace(train=TrainConfig())
    assert adapters.at_best_rate(asked, tmp_path, None, "base", what) is what and len(tried) == 3
    for text in ("0", "1e-3,fast", "nan", "1e-3,-1"):
        assert "give for example 5e-4" in error_line(TrainConfig, adapt_rates=text)


def test_dense_values_draw_no_text():
    """Over dense values nothing is calibrated or loaded, and there is nothing to name."""
    args = adapt_arguments("x", "text:x", "y", "--adapter=lora", "--kv=dense")
    what = adapters.adaptation(args, kv_from="no/where")
    assert adapters.attach_value_groups(None, what, None, 8, None) == ""


def test_the_first_seed_is_trained_once_at_each_rate(tmp_path, text, base, monkeypatch):
    """A call from the beginning takes a row's first seed at its best rate from the comparison of
    rates: no log has a step twice. Whether another seed has time is asked with half of what two
    rates took."""
    clock = SimpleNamespace(now=100, time=lambda: clock.now)
    at_best_rate = adapters.at_best_rate
    asked = []

    def four_seconds(*given):
        clock.now += 4
        return at_best_rate(*given)

    def seeds_in_time(cfg, w, begin, seconds):
        asked.append((begin, seconds))
        return [cfg.seed]

    monkeypatch.setattr(adapters, "time", clock)
    monkeypatch.setattr(adapters, "at_best_rate", four_seconds)
    monkeypatch.setattr(adapters, "seeds_in_time", seeds_in_time)
    flags = [f"--init_from={base}", f"--adapt_dataset={text}", "--adapt_steps=2", "--seeds=1"]
    flags += ["--adapt_rates=1e-3,1e-4", "--adapt_batch_size=1", "--eval_sequences=1"]
    train.run(arguments(*flags, f"--out_dir={tmp_path / 'run'}"))
    logs = sorted((tmp_path / "run").glob("*/metrics.jsonl"))
    kinds = ("lora", "moe_lora", "routed")
    names = {f"{kind}-s0-rate{rate}" for kind in kinds for rate in ("0.001", "0.0001")}
    assert {log.parent.name for log in logs} == names
    for log in logs:
        assert [r["step"] for r in checkpoint.read_jsonl(log) if "loss" in r] == [0, 1], log
    assert asked == [(100, 3 * 4 / 2)]  # three rows of four seconds at two rates


def test_every_stage_is_compiled(tmp_path, run_stage, monkeypatch):
    """However many stages were compiled before it in one process, and whatever their models: what
    they took of torch's limit of compilations is given back, past which a model runs uncompiled
    with no more than a warning."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    limits = dict(recompile_limit=4, fail_on_recompile_limit_hit=True)
    with torch._dynamo.config.patch(**limits):
        for n_layer in range(1, 6):
            shape = [f"--n_layer={n_layer}", "--pretrain_steps=1"]
            run_stage("pretrain", tmp_path / str(n_layer), *shape, "--compile")
