"""Promises 2, 3, 5, 7, 8, 12, 19 and 20, and the whole pipeline: what a run of train.py does, and what it leaves behind."""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import config
import data
import eval as evaluation
import kv_router
import lora
import sample
import train
from model import Transformer, lm_loss
from pretrained import load_run

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--n_layer=2", "--n_embd=32", "--n_head=4", "--n_kv_head=2", "--head_dim=16", "--n_inner=48", "--block_size=32", "--device=cpu",
        "--eval_sequences=6"]
ROUTED = ["--adapter=routed", "--lora_dropout=0.1", "--accumulation=2", "--kv=value_groups", "--value_router=linear",
          "--reconstructor=pairwise"]
WARM = ["--adapter=moe_lora", "--reconstructor=mlp", "--kv_warmup=0.8"]
CONTEXT = 128  # long enough for what is stored once per sequence not to count
ALL = ["--pretrain_steps=12", "--adapt_steps=4", "--seeds=2", "--max_minutes=99", f"--block_size={CONTEXT}"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
ROW = {"task", "method", "adapter", "basis", "n_groups", "prefill", "relevance", "value_keep", "token_keep", "kv_kept_layers",
       "kv_kept_model", "cache_bytes", "dense_bytes", "metric", "value", "dense_value", "n", "seed", "seconds"}
SIGNALS = {"SIGINT": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread: tiny models are faster so, also where other work wants the cores, and subprocesses compute the same numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Token files go to the test's folder, never to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A corpus of 12 documents of seeded words: text:PATH."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(60)]
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choices(words, k=150)) + ".\n")
    return f"text:{folder}"


def arguments(*flags):
    return config.parse_args(train.CONFIGS, [*TINY, *map(str, flags)])


def pretrain(out: Path, text: str, *flags) -> Path:
    """Pretrain in this process; returns the stage's folder."""
    train.run(arguments("--stage=pretrain", f"--dataset={text}", f"--out_dir={out}", *flags))
    return out / "pretrain"


def adapt_arguments(out: Path, text: str, base: Path, *flags):
    return arguments("--stage=adapt", f"--dataset={text}", f"--out_dir={out}", f"--init_from={base}", *flags)


@pytest.fixture(scope="module")
def base(tmp_path_factory, text) -> Path:
    """The folder of a pretrained stage."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(folder / "run", text, "--pretrain_steps=20")


@pytest.fixture
def run_stage(text, base):
    """run_stage(kind, out, *flags) runs one stage of 'pretrain' or 'adapt' to its end and returns its folder."""
    def go(kind: str, out: Path, *flags) -> Path:
        if kind == "pretrain":
            return pretrain(out, text, *flags)
        args = adapt_arguments(out, text, base, *flags)
        train.run(args)
        return out / f"{args.adapter.adapter}-s{args.train.seed}"
    return go


@pytest.fixture
def trainers(monkeypatch) -> list:
    """The Trainers made from here on, newest last."""
    made = []

    class Spy(train.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
    monkeypatch.setattr(train, "Trainer", Spy)
    return made


def before_step(monkeypatch, n: int, act) -> None:
    """Call act() just before the gradients of every optimizer step numbered n."""
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, *a: (act() if step == n else None, rate(step, *a))[1])


def losses(stage: Path) -> list[tuple[int, str]]:
    """Every training step logged, with repr(loss)."""
    return [(r["step"], repr(r["loss"])) for r in checkpoint.read_jsonl(stage / "metrics.jsonl") if "loss" in r]


def tensors(path: Path) -> dict:
    """All tensors of a checkpoint, the optimizer's included, by name."""
    c = checkpoint.load(path)
    flat = {f"{stem}.{k}": t for stem, sd in c.tensors.items() for k, t in sd.items()}
    return flat | {f"optimizer.{i}.{k}": t for i, s in c.state["optimizer"]["state"].items() for k, t in s.items()}


def assert_equal(a: dict, b: dict) -> None:
    """Same names, same bits."""
    assert a.keys() == b.keys() and a
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def copies(d: dict) -> dict:
    return {k: t.detach().clone() for k, t in d.items()}


def python(*command, wait: float | None = 120, **kwargs):
    """A Python subprocess in the repository: finished within `wait` seconds, or running where wait is None."""
    settings = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | kwargs
    p = subprocess.Popen([sys.executable, *map(str, command)], **settings)
    if wait is None:
        return p
    try:
        p.out, p.err = p.communicate(timeout=wait)
    finally:
        p.kill()
    return p


def wait_for_steps(stage: Path, p: subprocess.Popen, n: int = 3, limit: float = 90) -> None:
    """Wait until a run has logged n steps; it must be alive then."""
    end, metrics = time.time() + limit, stage / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= n):
        assert p.poll() is None and time.time() < end, p.communicate()
        time.sleep(0.01)


# -- resume, evaluation, signals

@pytest.mark.parametrize("kind, flags", [("pretrain", ["--accumulation=3"]), ("adapt", ROUTED), ("adapt", WARM)],
                         ids=["pretrain", "adapt-routed", "adapt-moe_lora"])
def test_resume_bitwise(kind, flags, tmp_path, run_stage, monkeypatch):
    """30 steps unbroken, and 20 steps, SIGTERM, a start with --resume: every loss and final tensor, moments included, are the same bits."""
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
    values = [[(r["after"], r["val_loss"]) for r in checkpoint.read_jsonl(s / "metrics.jsonl") if "val_loss" in r] for s in (whole, broken)]
    assert values[0] == values[1] and [a for a, _ in values[0]] == [6, 12, 18, 24, 30]
    assert checkpoint.load(whole / "best").step == checkpoint.load(broken / "best").step


@pytest.mark.parametrize("kind, flags", [("pretrain", []), ("adapt", ROUTED)], ids=["pretrain", "adapt"])
def test_evaluation_and_sampling_never_change_training(kind, flags, tmp_path, run_stage):
    """Losses and final tensors are the same bits whatever eval_interval, sample_interval and save_interval are."""
    variants = [("0", "0", "200"), ("1", "0", "4"), ("7", "3", "200"), ("0", "1", "1")]
    runs = [run_stage(kind, tmp_path / "-".join(v), *flags, f"--{kind}_steps=15",
                      *(f"--{n}_interval={i}" for n, i in zip(("eval", "sample", "save"), v, strict=True))) for v in variants]
    for r in runs[1:]:
        assert losses(r) == losses(runs[0])
        assert_equal(tensors(r / "step-00000015"), tensors(runs[0] / "step-00000015"))


def test_resume_newest_valid_says_why(tmp_path, text, run_stage, capsys):
    """--resume takes the newest whole checkpoint, names each one passed over and why, and ends where the unbroken run ended."""
    flags = ["--pretrain_steps=12", "--save_interval=4", "--keep_checkpoints=3"]
    stage = run_stage("pretrain", tmp_path / "run", *flags)
    end, trace = tensors(stage / "step-00000012"), losses(stage)
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
    for name, why in (("step-00000012", "model.safetensors is damaged"), ("step-00000099", "empty folder"),
                      ("step-foreign", "its name is not"), (".tmp-step-00000016-77-0123abcd", "deleted")):
        assert any(name in line and why in line for line in lines), (name, lines)
    assert any(line.endswith("resumed from " + str(stage / "step-00000008")) for line in lines)
    assert losses(stage) == trace
    assert_equal(tensors(stage / "step-00000012"), end)


def test_resume_without_usable_checkpoint_starts_anew(tmp_path, run_stage, capsys):
    """A stage killed before its first checkpoint, or with none left whole, starts at step 0 again; no step is logged twice."""
    stage = run_stage("pretrain", tmp_path / "run", "--pretrain_steps=5", "--eval_interval=2")
    trace = losses(stage)
    (stage / "step-00000005" / "manifest.json").write_text("{")
    run_stage("pretrain", tmp_path / "run", "--pretrain_steps=5", "--eval_interval=2", "--resume")
    assert "passed over, manifest.json" in capsys.readouterr().err
    assert losses(stage) == trace and len(checkpoint.read_jsonl(stage / "metrics.jsonl")) == 5 + 3


def test_resume_remembers_the_best(tmp_path, run_stage, monkeypatch, trainers):
    """After a resume the best weights are still the best: later, worse ones do not take their place."""
    monkeypatch.setattr(train, "validation_loss", lambda *a: 1.0 + trainers[-1].step)
    flags = ["--pretrain_steps=8", "--eval_interval=2"]
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        before_step(m, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_stage("pretrain", tmp_path / "run", *flags)
    stage = run_stage("pretrain", tmp_path / "run", *flags, "--resume")
    assert checkpoint.load(stage / "best").step == 2 and checkpoint.load(stage / "step-00000008").state["best"] == 3.0
    assert train.find_checkpoint(stage) == stage / "best"


def test_resume_refuses_other_flags(tmp_path, run_stage):
    """A checkpoint of another model, rate or length is not continued as if it were this run's."""
    run_stage("pretrain", tmp_path / "run", "--pretrain_steps=3")
    for flag, what in (("--pretrain_lr=0.1", "lr=0.003"), ("--pretrain_steps=9", "steps=3"), ("--seed=4", "seed=0"),
                       ("--n_inner=40", "model=")):
        with pytest.raises(ValueError, match=f"was trained with {what}.*same flags"):
            run_stage("pretrain", tmp_path / "run", "--pretrain_steps=3", flag, "--resume")


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_saves_once_and_resume_continues(name, tmp_path, text, run_stage):
    """SIGINT or SIGTERM to a real process: one checkpoint, at a step boundary, exit 130 or 143, no traceback; --resume goes on."""
    number, code = SIGNALS[name]
    flags = [f"--dataset={text}", f"--out_dir={tmp_path / 'run'}", "--pretrain_steps=700", "--pretrain_batch_size=2"]
    p = python("train.py", *TINY, "--stage=pretrain", *flags, wait=None)
    stage = tmp_path / "run" / "pretrain"
    wait_for_steps(stage, p)
    p.send_signal(number)
    _, err = p.communicate(timeout=60)
    assert p.returncode == code, err
    assert "Traceback" not in err and "stopped by a signal" in err and f"--resume --out_dir={tmp_path / 'run'}" in err
    saved = [q.name for q in stage.iterdir() if q.is_dir()]
    assert len(saved) == 1 and checkpoint.verify(stage / saved[0]) is None
    assert checkpoint.load(stage / saved[0]).step == len(losses(stage)) < 700
    run_stage("pretrain", tmp_path / "run", *flags, "--resume")
    assert [s for s, _ in losses(stage)] == list(range(700))
    assert checkpoint.newest(stage)[0].name == "step-00000700"


def test_signal_in_last_step_ends_the_pipeline(tmp_path, text, monkeypatch):
    """A signal that comes while the last step of pretraining is evaluated is not lost: the step is saved and adaptation does not begin."""
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        train.run(arguments(f"--dataset={text}", f"--adapt_dataset={text}", f"--out_dir={tmp_path / 'run'}", "--pretrain_steps=3"))
    assert stopped.value.code == 130
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "pretrain"]
    assert checkpoint.newest(tmp_path / "run" / "pretrain")[0].name == "step-00000003"


# -- what must never reach weights or checkpoints

def inject(monkeypatch, how: str, at: int, trainers: list) -> None:
    """Make the training loss, its gradient or its labels bad in step `at`."""
    def now():
        return trainers[-1].step == at
    if how in ("nan", "inf"):
        monkeypatch.setattr(train, "lm_loss", lambda *a: lm_loss(*a) * (float(how) if now() else 1.0))
    elif how == "masked":
        def masked(*a, **k):
            x, y = data.batch(*a, **k)
            return x, y.fill_(-100) if a[3] == at and a[1] == "train" else y
        monkeypatch.setattr(train, "batch", masked)
    else:
        before_step(monkeypatch, 0, lambda: trainers[-1].s.params[-1].register_hook(lambda g: g * math.inf if now() else g))


@pytest.mark.parametrize("kind, how", [("pretrain", "nan"), ("pretrain", "inf"), ("pretrain", "gradient"), ("pretrain", "masked"),
                                       ("adapt", "nan"), ("adapt", "gradient")])
def test_non_finite_never_reaches_weights(kind, how, tmp_path, run_stage, monkeypatch, capsys, trainers):
    """NaN or inf in loss or gradient, or labels all masked: exit 3 naming step, rate, norm and last good checkpoint; nothing changed."""
    inject(monkeypatch, how, 7, trainers)
    before = {}

    def remember():
        t = trainers[-1]
        files = {p: p.read_bytes() for p in t.s.folder.rglob("*") if p.is_file()}
        before.update(weights=copies(t.s.model.state_dict()), best=t.best, files=files,
                      moments=copies({f"{i}.{k}": v for i, s in t.opt.state_dict()["state"].items() for k, v in s.items()}))
    before_step(monkeypatch, 7, remember)
    with pytest.raises(SystemExit) as e:
        flags = [*(ROUTED if kind == "adapt" else []), f"--{kind}_steps=20", "--save_interval=5", "--eval_interval=3"]
        run_stage(kind, tmp_path / "run", *flags)
    t = trainers[-1]
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 3
    assert re.search(r"step 7: loss \S+, gradient norm \S+, learning rate \d", message), message
    assert str(t.s.folder / "step-00000005") in message
    assert math.isfinite(t.best) and t.best == before["best"] and t.step == 7
    assert_equal(t.s.model.state_dict(), before["weights"])
    assert_equal({f"{i}.{k}": v for i, s in t.opt.state_dict()["state"].items() for k, v in s.items()}, before["moments"])
    assert {p: p.read_bytes() for p in t.s.folder.rglob("*") if p.is_file()} == before["files"]
    for name in ("step-00000005", "best"):
        assert all(v.isfinite().all() for v in tensors(t.s.folder / name).values())


def test_non_finite_validation_is_not_the_best(tmp_path, run_stage, monkeypatch, capsys):
    """A validation loss that is no number ends the run with exit 3 before anything is saved as best."""
    monkeypatch.setattr(evaluation, "mean_loss", lambda *a: math.nan)
    with pytest.raises(SystemExit) as e:
        run_stage("pretrain", tmp_path / "run", "--pretrain_steps=4", "--eval_interval=2")
    assert e.value.code == 3 and "validation loss nan after step 1" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "pretrain").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("kind", ["pretrain", "adapt"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")],
                         ids=["cuda", "python", "cpu"])
def test_out_of_memory_names_sizes(kind, error, tmp_path, run_stage, monkeypatch):
    """Out of memory becomes one ValueError with batch size, context and accumulation as this stage has them."""
    forward = Transformer.forward

    def boom(self, *a, **k):
        if self.training and torch.is_grad_enabled():
            raise error
        return forward(self, *a, **k)
    monkeypatch.setattr(Transformer, "forward", boom)
    with pytest.raises(ValueError, match=r"out of memory with batch size 5, context 24, accumulation 3: .*lower the batch size"):
        run_stage(kind, tmp_path / "run", f"--{kind}_batch_size=5", "--accumulation=3", "--block_size=24")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_is_not_guessed(tmp_path, run_stage, monkeypatch):
    """Any other RuntimeError stays what it is."""
    monkeypatch.setattr(train, "lm_loss", lambda *a: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run_stage("pretrain", tmp_path / "run")


# -- the global batch

@pytest.fixture
def stage_of(tmp_path, text, base):
    """stage_of(*flags): an adapt stage whose lora_B and MLP reconstructor are not zero (zeros would hide every error), without dropout."""
    def make(*flags):
        args = adapt_arguments(tmp_path / "stage", text, base, "--lora_dropout=0", "--grad_clip=0", "--adapt_batch_size=11", *flags)
        w = train.World(0, 1, torch.device("cpu"))
        folder, found = tmp_path / "stage", train.find_checkpoint(base)
        stage = train.adapt_stage(args, data.get_tokenizer("byte"), folder, w, found, args.adapter, args.kv, 0, "s")
        torch.manual_seed(1)
        for name, p in lora.adapter_state(stage.model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        for name, p in stage.model.named_parameters():
            if name.endswith("reconstructor.down.weight"):
                torch.nn.init.normal_(p, std=0.1)  # zero at the start, too
        stage.model.train()
        return stage, args.train
    return make


def gradient(stage, cfg, accumulation: int, w) -> tuple[float, dict]:
    """Loss and gradients of step 3, by parameter."""
    for p in stage.params:
        p.grad = None
    loss, norm, _ = train.gradients(stage, stage.model, 3, train.replace(cfg, accumulation=accumulation), w, False)
    assert norm > 0
    names = {p: n for n, p in stage.model.named_parameters()}
    return loss, {names[p]: p.grad.clone() for p in stage.params}


def assert_close(a: dict, b: dict, tol: float) -> None:
    """Per parameter, the difference is at most tol of the gradient's size."""
    far = {k: ((a[k] - b[k]).norm() / b[k].norm()).item() for k in b}
    assert all(b[k].norm() > 0 for k in b) and max(far.values()) < tol, far


@pytest.mark.parametrize("flags", [["--adapter=routed", "--reconstructor=pairwise"],
                                   ["--adapter=moe_lora", "--reconstructor=mlp", "--lm_to_router"]],
                         ids=["routed", "moe_lora"])
def test_accumulation_means_the_same_batch(flags, stage_of):
    """1, 2, 3, 8, 11 and 40 micro-steps of 11 sequences give the gradients of one pass, auxiliary losses included."""
    stage, cfg = stage_of("--kv=value_groups", "--value_router=linear", *flags)
    one = train.World(0, 1, torch.device("cpu"))
    loss, want = gradient(stage, cfg, 1, one)
    for n in (2, 3, 8, 11, 40):
        other, got = gradient(stage, cfg, n, one)
        assert other == pytest.approx(loss, rel=1e-6)
        assert_close(got, want, 2e-5)


@pytest.mark.parametrize("ranks", [2, 3, 14])
def test_ranks_mean_the_same_batch(ranks, stage_of):
    """The shares of 2, 3 and 14 ranks (11 sequences: uneven, and 3 of 14 shares empty) add up to the gradients of one process."""
    stage, cfg = stage_of("--kv=value_groups", "--value_router=linear", "--reconstructor=pairwise")

    class Alone(train.World):
        def sum(self, t):
            return t
    loss, want = gradient(stage, cfg, 1, train.World(0, 1, torch.device("cpu")))
    parts = []
    for rank in range(ranks):
        for p in stage.params:
            p.grad = None
        w = Alone(rank, ranks, torch.device("cpu"))
        share = train.gradients(stage, stage.model, 3, train.replace(cfg, accumulation=2), w, False)[0]
        parts.append((share, [p.grad.clone() for p in stage.params]))
    names = {p: n for n, p in stage.model.named_parameters()}
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    assert_close({names[p]: sum(part[1][i] for part in parts) for i, p in enumerate(stage.params)}, want, 2e-5)


def rows_without_time(run: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in json.loads((run / "results.json").read_text())]


def test_two_processes_equal_one(tmp_path, text):
    """The whole pipeline on 2 gloo processes ends as on one: 3 sequences pretrain (uneven), 1 sequence adapts (one rank is empty).
    Adaptation is compared from the same base: where eigenvalues nearly coincide, a basis is no continuous function of the weights."""
    flags = [f"--dataset={text}", f"--adapt_dataset={text}", "--pretrain_steps=8", "--adapt_steps=6", "--pretrain_batch_size=3",
             "--adapt_batch_size=1", "--seeds=1", "--lora_dropout=0"]
    p = python(*TWO_PROCESSES, *TINY, *flags, f"--out_dir={tmp_path / 'two'}", wait=100)
    assert p.returncode == 0, p.err
    pretrain(tmp_path / "alone", text, *flags)
    shutil.copytree(tmp_path / "two" / "pretrain", tmp_path / "one" / "pretrain")
    train.run(arguments(*flags, f"--out_dir={tmp_path / 'one'}", "--resume"))
    for stage in ("pretrain", "lora-s0", "moe_lora-s0", "routed-s0"):
        pair = ("alone" if stage == "pretrain" else "one", "two")
        one, two = (losses(tmp_path / n / stage) for n in pair)
        assert [s for s, _ in one] == [s for s, _ in two]
        assert [float(v) for _, v in two] == pytest.approx([float(v) for _, v in one], rel=1e-4), stage
        one, two = (tensors(train.find_checkpoint(tmp_path / n / stage)) for n in pair)
        assert one.keys() == two.keys()
        for k in one:
            if not k.startswith("optimizer"):
                assert torch.allclose(one[k].double(), two[k].double(), rtol=1e-3, atol=2e-4), (stage, k, (one[k] - two[k]).abs().max())
    for a, b in zip(rows_without_time(tmp_path / "one"), rows_without_time(tmp_path / "two"), strict=True):
        assert a["value"] == pytest.approx(b.pop("value"), rel=1e-3) and a["dense_value"] == pytest.approx(b.pop("dense_value"), rel=1e-3)
        assert a | b == a


def test_dying_rank_ends_the_job(tmp_path, text):
    """SIGKILL one of two ranks in the middle of training: the job ends by itself within 60 s, with an error."""
    p = python(*TWO_PROCESSES, *TINY, "--stage=pretrain", f"--dataset={text}",
               f"--out_dir={tmp_path / 'run'}", "--pretrain_steps=1000000", wait=None)
    try:
        wait_for_steps(tmp_path / "run" / "pretrain", p)
        ranks = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[1]) == p.pid:
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (stat.parent / "environ").read_bytes())
                    ranks[int(rank[1])] = int(stat.parent.name)
            except (OSError, TypeError):
                continue
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[1], signal.SIGKILL)
        start = time.time()
        _, err = p.communicate(timeout=60)
        assert p.returncode != 0 and time.time() - start < 60, err
        for _ in range(100):
            if not Path(f"/proc/{ranks[0]}").exists():
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{ranks[0]}").exists()  # the survivor went with it
    finally:
        p.kill()


# -- adaptation

KINDS = {"routed-output-pairwise": ["--adapter=routed", "--value_basis=output", "--reconstructor=pairwise"],
         "lora-norm-pca": ["--adapter=lora", "--value_router=norm", "--value_basis=pca"],
         "moe_lora-dense": ["--adapter=moe_lora", "--kv=dense", "--lora_targets=q,v,gate,down"],
         "none-mlp": ["--adapter=none", "--reconstructor=mlp", "--lm_to_router"],
         "routed-linear-head": ["--adapter=routed", "--reconstructor=linear", "--mask_scope=head", "--kv_layers=1"]}


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_saves_only_what_was_added(kind, tmp_path, base, run_stage, trainers):
    """Training leaves every base weight's bits alone, in memory and on disk; the checkpoint holds adapter and KV tensors only, and
    load_run rebuilds the trained model from it and the base, folded basis included, with bitwise equal logits."""
    on_disk = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    before = {}
    first = train.make_optimizer

    def remember(params, cfg):
        model = remember.model
        before.update(copies(model.state_dict()))
        return first(params, cfg)
    attach = lora.attach
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lora, "attach", lambda model, cfg: setattr(remember, "model", attach(model, cfg)) or model)
        m.setattr(train, "make_optimizer", remember)
        stage = run_stage("adapt", tmp_path / "run", *KINDS[kind], "--adapt_steps=6", "--weight_decay=0.1")
    s = trainers[-1].s
    added = set(lora.adapter_state(s.model)) | set(kv_router.state(s.model))
    changed = {k for k, t in s.model.state_dict().items() if not torch.equal(t, before[k])}
    assert changed and changed <= added
    assert {id(p) for p in s.params} == {id(p) for n, p in s.model.named_parameters() if n in added}
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == on_disk
    saved = checkpoint.load(stage / "step-00000006").tensors
    assert set(saved) == {"adapter"} and set(saved["adapter"]) == added
    assert all(re.search(r"\.kv_path\.|lora_[AB]$|\.gate\.linear\.|lora_router\.linear\.", k) for k in added)
    run = load_run(stage)
    kv_router.fold(s.model)
    x = torch.randint(257, (3, 31), generator=torch.Generator().manual_seed(0))
    s.model.eval()
    with torch.no_grad():
        assert torch.equal(run.model(x), s.model(x))
        assert not torch.allclose(run.model(x), load_run(base).model(x), atol=1e-4)
    assert run.base.resolve() == train.find_checkpoint(base).resolve()


def reached(stage, loss) -> set[str]:
    """Names of the stage's parameters with a gradient other than zero."""
    for p in stage.params:
        p.grad = None
    loss.backward()
    names = {p: n for n, p in stage.model.named_parameters()}
    return {names[p] for p in stage.params if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("reconstructor", config.RECONSTRUCTORS)
@pytest.mark.parametrize("through", [False, True], ids=["apart", "lm_to_router"])
def test_losses_train_what_they_should(reconstructor, through, stage_of):
    """L_aux trains value routers and reconstructors only, the balance loss adapter gates only, and the language-model loss adapters
    only, unless lm_to_router lets it reach value routers and reconstructors too."""
    stage, _ = stage_of("--kv=value_groups", "--value_router=linear", f"--reconstructor={reconstructor}", f"--lm_to_router={through}")
    x, y = data.batch(stage.corpus.train, "train", 0, 0, 5, 32)
    kv = {n for n in kv_router.state(stage.model) if ".basis_" not in n}
    adapters = set(lora.adapter_state(stage.model))
    lm = reached(stage, lm_loss(stage.model(x), y))
    assert lm == (adapters | kv if through else adapters)
    stage.model(x)
    assert reached(stage, kv_router.aux_loss(stage.model)) == kv
    stage.model(x)
    balance = reached(stage, lora.balance_loss(stage.model))
    allowed = adapters | kv if through else adapters  # through: by way of what earlier layers wrote
    assert {n for n in adapters if ".gate." in n} <= balance <= allowed


def test_learning_rate_schedule():
    """Linear over the warm-up, the peak after it, a cosine down to just above zero; no warm-up and all warm-up are fine."""
    rates = [train.learning_rate(i, 50, 0.2, 0.1) for i in range(50)]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2]) and rates[5] == 0.2
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[5:])) and rates[-1] < 0.001
    assert rates[5 + 22] + rates[5 + 23] == pytest.approx(0.2, rel=1e-2)  # half way, half the rate
    assert train.learning_rate(0, 50, 0.2, 0.0) == 0.2
    assert [train.learning_rate(i, 4, 1.0, 1.0) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert train.learning_rate(0, 1, 0.2, 0.1) == 0.2


@pytest.mark.parametrize("adapter", ["lora", "moe_lora"])
def test_matched_rank_is_the_smallest_that_suffices(adapter):
    """The rank has at least the target's trainable parameters, one rank less has fewer, alpha / r is kept; counted on real modules."""
    model_cfg = config.ModelConfig(vocab_size=31, n_layer=2, n_embd=24, n_head=4, n_kv_head=2, head_dim=8, n_inner=40, block_size=16)
    cfg = config.AdapterConfig(adapter=adapter, r=8, alpha=12.0)

    def count(r):
        return lora.count_trainable(lora.attach(Transformer(model_cfg), train.replace(cfg, r=r)))
    for target in (1, count(1), count(1) + 1, count(5), count(5) - 1, count(5) + 1, 7777):
        got = train.matched_rank(model_cfg, cfg, target)
        assert count(got.r) >= target and (got.r == 1 or count(got.r - 1) < target)
        assert got.alpha / got.r == 1.5


def test_adapt_uses_a_shorter_context_and_the_bases_shape(tmp_path, text, base, run_stage, trainers):
    """--block_size below the base's is what adaptation trains with; a shape or tokenizer the base has not is refused, not ignored."""
    args = ["--stage=adapt", f"--init_from={base}", f"--dataset={text}", "--adapt_steps=2"]
    for flags, context in (([], 32), (["--block_size=9"], 9)):
        train.run(config.parse_args(train.CONFIGS, [*args, *flags, f"--out_dir={tmp_path / str(context)}"]))
        assert trainers[-1].s.model.cfg.block_size == context
        assert load_run(tmp_path / str(context)).model.cfg.block_size == context
    for flag, why in (("--n_layer=3", "the base has 2"), ("--block_size=33", "the base knows 32"), ("--n_groups=16", None)):
        if why:
            with pytest.raises(ValueError, match=why):
                train.run(config.parse_args(train.CONFIGS, [*args, flag, f"--out_dir={tmp_path / 'no'}"]))
            assert not (tmp_path / "no").exists()


# -- printed numbers

def test_tokens_per_second_by_a_fake_clock(tmp_path, text):
    """4 sequences of 32 tokens in a quarter of a second are 512 tokens/s, and a clock that stands still divides by no zero."""
    args = arguments("--stage=pretrain", f"--dataset={text}", "--pretrain_steps=3", "--pretrain_batch_size=4", "--accumulation=2")
    w = train.World(0, 1, torch.device("cpu"))
    for name, clock in (("runs", itertools.count(5, 0.25).__next__), ("stands", lambda: 1.0)):
        stage = train.pretrain_stage(args, data.get_tokenizer("byte"), tmp_path / name, w)
        stage.folder.mkdir(parents=True)
        train.Trainer(stage, args.train, w, clock=clock).run()
        speeds = [r["tokens_per_s"] for r in checkpoint.read_jsonl(stage.folder / "metrics.jsonl") if "loss" in r]
        assert len(speeds) == 3 and all(math.isfinite(s) for s in speeds)
        assert name == "stands" or speeds == [512.0] * 3


def test_metrics_lines_are_json(base):
    """Every line of metrics.jsonl is one JSON object with finite numbers; every step has loss, rate, norm and speed."""
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(20)) and rows[-1].keys() == {"step", "after", "val_loss"}
    assert all(r.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_s"} for r in steps)
    assert all(math.isfinite(v) for r in rows for v in r.values())


# -- the whole pipeline

WITHOUT_NETWORK = """
import runpy, socket, sys
def blocked(*a, **k):
    raise AssertionError("the network was touched")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = blocked
sys.argv = ["train.py", *sys.argv[1:]]
sys.path.insert(0, "")
runpy.run_path("train.py", run_name="__main__")
"""
KILLED = """
import os, signal, sys
sys.path.insert(0, "")
import config, train
calls, rate = [], train.learning_rate
def learning_rate(*a):
    calls.append(a)
    if len(calls) == 12 + 4 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(*a)
train.learning_rate = learning_rate
train.run(config.parse_args(train.CONFIGS, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run folder, what it printed) of `train.py` with nothing but small sizes given, and the network blocked."""
    folder = tmp_path_factory.mktemp("whole")
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    p = python("-c", WITHOUT_NETWORK, *TINY, *ALL, f"--out_dir={folder / 'run'}", env=env)
    assert p.returncode == 0, p.err
    return folder / "run", p.out


def test_pipeline_needs_no_network_and_leaves_rows(whole):
    """stage=all with socket.connect blocked: 7 rows with every key of design.md and a sweep, a valid picture, bytes that are measured,
    and a table with one line per method."""
    run, out = whole
    rows = json.loads((run / "results.json").read_text())
    assert all(r.keys() >= ROW for r in rows)
    main = [r for r in rows if "sweep" not in r["name"]]
    assert [(r["name"], r["seed"]) for r in main] == [("base", 0)] + [(n, s) for s in (0, 1) for n in ("LoRA", "MoE-LoRA", "sub-token")]
    assert {r["value_keep"] for r in rows if "sweep" in r["name"]} == {0.25, 0.75, 1.0}
    trainable = {r["name"]: r["trainable_parameters"] for r in main}
    assert trainable["base"] == 0 and min(trainable["LoRA"], trainable["MoE-LoRA"]) >= trainable["sub-token"] > 0
    for r in main:
        dense = 2 * 4 * (4 * CONTEXT) * 2 * 16 * 2  # K and V, float32, 4 sequences, 2 heads of 16, 2 layers
        assert r["dense_bytes"] == dense and math.isfinite(r["value"]) and 1 < r["value"] < 400 and r["metric"] == "perplexity"
        if r["name"] == "sub-token":
            assert 0.75 <= r["kv_kept_model"] <= r["cache_bytes"] / dense < 0.77 and r["method"] == "value_groups"
        else:
            assert r["cache_bytes"] == dense == r["dense_bytes"] and r["value"] == r["dense_value"] and r["kv_kept_model"] == 1.0
    png = (run / "report.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND" and len(png) > 10_000
    table = [line for line in out.splitlines() if re.match(r"(base|LoRA|MoE-LoRA|sub-token)\b", line)]
    assert [line.split()[0] for line in table] == ["base", "LoRA", "MoE-LoRA", "sub-token"]
    for line in table:
        mine = [r["value"] for r in main if r["name"] == line.split()[0]]
        assert f"{sum(mine) / len(mine):.4f}" in line and line.split()[-1] == str(len(mine))
    assert checkpoint.load(train.find_checkpoint(run / "pretrain")).config["corpus"] == "pydocs"
    assert checkpoint.load(train.find_checkpoint(run / "routed-s1")).config["corpus"] == "pycode"


def test_pipeline_resumed_after_a_kill_ends_the_same(whole, tmp_path):
    """SIGKILL in the third step of MoE-LoRA, then --resume: the same rows, number for number, as the unbroken run."""
    flags = [*TINY, *ALL, "--save_interval=2", f"--out_dir={tmp_path / 'run'}"]
    p = python("-c", KILLED, *flags)
    assert p.returncode == -signal.SIGKILL, p.err
    assert (tmp_path / "run/moe_lora-s0/step-00000002").is_dir() and not (tmp_path / "run/routed-s0").exists()
    train.run(config.parse_args(train.CONFIGS, [*flags, "--resume"]))
    assert rows_without_time(tmp_path / "run") == rows_without_time(whole[0])


def call(module, configs: dict, *flags) -> None:
    """The module's main() with these flags, in this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "ARGS", config.parse_args(configs, list(map(str, flags))), raising=False)
        module.main()


EVAL = {"eval": config.EvalConfig, "kv": config.KVConfig, "data": config.DataConfig}


@pytest.fixture
def copy_of(whole, tmp_path):
    """A copy of the whole run, token files included."""
    shutil.copytree(whole[0], tmp_path / "copy")
    shutil.copytree(whole[0].parent / "cache", tmp_path / "cache")
    return tmp_path / "copy"


def test_eval_rows_of_a_run(whole, copy_of, capsys):
    """eval.py on a run: a row per budget and one with everything kept, the last line of stdout is those rows as JSON, and the trained
    budget has the very value that train.py reported."""
    call(evaluation, EVAL, f"--out_dir={copy_of}", "--methods=dense,value_groups", "--budgets=0.25,0.5,0.75")
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])
    assert rows == json.loads((copy_of / "results.json").read_text())
    assert [r["value_keep"] for r in rows] == [1.0, 0.25, 0.5, 0.75] and all(r.keys() >= ROW and r["adapter"] == "routed" for r in rows)
    assert rows[0]["value"] == rows[0]["dense_value"]
    held = [r["cache_bytes"] for r in rows]
    assert held[0] > held[3] > held[2] > held[1]
    mine = next(r for r in json.loads((whole[0] / "results.json").read_text()) if r["name"] == "sub-token" and r["seed"] == 0)
    assert {k: rows[2][k] for k in ROW - {"seconds"}} == {k: mine[k] for k in ROW - {"seconds"}}
    assert (copy_of / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_eval_training_free_on_a_base(copy_of, capsys):
    """eval.py compresses a pretrained stage without any training; everything kept is the dense model, and less kept holds fewer bytes."""
    call(evaluation, EVAL, f"--out_dir={copy_of / 'pretrain'}", "--methods=dense,value_groups", "--budgets=0.5,1", "--n_groups=8",
         "--reconstructor=pairwise", "--sequences=9", "--block_size=31", "--batch_size=4")
    dense, half, full = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (dense["method"], half["method"], half["n_groups"], half["adapter"]) == ("dense", "value_groups", 8, "none")
    assert dense["n"] == 9 * 31 and dense["cache_bytes"] == dense["dense_bytes"] > half["cache_bytes"]
    assert full["value"] == pytest.approx(dense["value"], rel=1e-5) and half["dense_value"] == full["value"]


def test_sample_prints_text_and_bytes(copy_of, capsys):
    """sample.py prints the prompt with its continuation and the bytes the cache held: fewer than dense when adapted, as many when not."""
    for folder, less in ((copy_of, True), (copy_of / "pretrain", False)):
        call(sample, {"sample": config.SampleConfig}, f"--out_dir={folder}", "--prompt=def f(", "--max_new_tokens=90", "--num_samples=2",
             "--top_k=5")
        io = capsys.readouterr()
        assert io.out.count("def f(") >= 2 and io.out.count("-" * 20) >= 2
        held, tokens, dense = (int(n.replace(",", "")) for n in re.search(
            r"held ([\d,]+) bytes for (\d+) tokens a row, [\d.]+% of a dense one's ([\d,]+)", io.err).groups())
        assert dense == 2 * 4 * 2 * tokens * 2 * 16 * 2
        assert 0.7 * dense < held < 0.9 * dense if less else held == dense


def test_sample_is_repeatable(copy_of, capsys):
    """The same seed writes the same text, another seed another, and temperature 0 needs no seed."""
    texts = {}
    for name, flags in {"a": ["--seed=1"], "b": ["--seed=1"], "c": ["--seed=2"], "d": ["--temperature=0"],
                        "e": ["--temperature=0", "--seed=7"]}.items():
        call(sample, {"sample": config.SampleConfig}, f"--out_dir={copy_of}", "--max_new_tokens=25", *flags)
        texts[name] = capsys.readouterr().out
    assert texts["a"] == texts["b"] != texts["c"] and texts["d"] == texts["e"] != texts["a"]


def test_out_dir_fresh_each_time(tmp_path, text, monkeypatch):
    """Without --out_dir two runs, begun in the same second, go to two fresh folders under out/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *a: "20260101-000000")
    for _ in range(2):
        train.run(arguments("--stage=pretrain", f"--dataset={text}", "--pretrain_steps=1"))
    runs = sorted((tmp_path / "out").iterdir())
    assert [r.name for r in runs] == ["20260101-000000", "20260101-000000-1"]
    for r in runs:
        assert checkpoint.newest(r / "pretrain")[0].name == "step-00000001"
        assert json.loads((r / "config.json").read_text())["train"]["pretrain_steps"] == 1


def test_network_guard_works():
    """The guard that blocks the network in the pipeline test does block it."""
    script = WITHOUT_NETWORK.split("sys.argv =")[0] + "socket.create_connection(('127.0.0.1', 9))"
    assert "the network was touched" in python("-c", script).err and socket.socket.connect is not None
