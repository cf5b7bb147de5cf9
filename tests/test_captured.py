"""Captured steps (training/captured.py) train as steps run kernel by kernel do: losses, weights and
moments, accumulation, phases, resume, what is not finite. Here the step runs without its graph;
tests marked gpu replay the graph."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from helpers import HostReads, Questions

import data
import kv_router
import train
from loaders import checkpoint
from runs import adapt_arguments, arguments, assert_equal, before_step, copies, losses, tensors
from settings.train import TrainConfig
from storage import cpu_gates, layout
from training import loop as trainer
from training.captured import LATE, CapturedStep
from training.loss import lm_loss
from training.optimizer import make_optimizer

pytestmark = pytest.mark.usefixtures("own_cache")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MAPS = ["--adapter=none", "--learn_basis", "--value_router=norm", "--value_basis=output"]
KINDS = {  # flags by kind of step; the first word is the stage
    "pretrain": ["pretrain", "--accumulation=3", "--grad_clip=0"],
    "lora": ["adapt", "--adapter=lora", "--lora_dropout=0.2"],
    "moe_lora, warming up": [
        "adapt",
        "--adapter=moe_lora",
        "--reconstructor=mlp",
        "--kv_warmup=0.4",
    ],
    "routed": ["adapt", "--adapter=routed", "--kv=dense"],
    "routed over value groups": [
        "adapt",
        "--adapter=routed",
        "--accumulation=2",
        "--value_router=linear",
        "--lm_to_router",
        "--kv_tail=3",
        "--reconstructor=mlp",
    ],
    "maps": ["adapt", *MAPS, "--objective=lm"],
    "maps, distilled": ["adapt", *MAPS, "--objective=distill", "--topk_groups=1", "--kv_tail=0"],
    "integers": ["adapt", *MAPS, "--key_bits=4", "--value_bits=4", "--key_block=16"],
    "experts": ["continue", "--group_sizes=1,2", "--expert_ratios=1:3", "--kv_tail=5"],
}


def steps_flag(kind: str, n: int) -> str:
    return f"--{'pretrain' if kind == 'pretrain' else 'adapt'}_steps={n}"


def run(kind: str, out, text: str, base, *flags):
    """Train one stage of KINDS; its folder."""
    stage, *own = KINDS[kind]
    size = steps_flag(kind, 8).replace("steps", "batch_size")
    flags = [steps_flag(kind, 20), size, *own, *flags]
    if stage == "adapt":
        args = adapt_arguments(out, text, base, *flags)
    else:
        given = [f"--dataset={text}", f"--out_dir={out}", *flags]
        if stage == "continue":
            given.append(f"--init_from={base}")
        args = arguments(f"--stage={stage}", *given)
    train.run(args)
    (folder,) = (p for p in out.iterdir() if p.is_dir())
    return folder


@pytest.fixture
def captured(monkeypatch):
    """captured(yes): from here on steps are captured ones, or not; on a CPU without a graph."""

    def switch(yes: bool) -> None:
        monkeypatch.setattr(trainer, "why_not_captured", lambda *a: "" if yes else "a test")

    return switch


def close(a: dict, b: dict, tolerance: float) -> list[str]:
    """The names of tensors that differ by more than a share of their largest number."""
    assert a.keys() == b.keys() and a
    far = []
    for name, want in b.items():
        gap = (a[name].double() - want.double()).abs().max()
        if gap > tolerance * want.double().abs().max():
            far.append(f"{name}: {gap}")
    return far


def assert_same_run(got, want, steps: int, tolerance: float) -> None:
    """Two folders hold the same losses, weights, moments and step counters."""
    a = [float(loss) for _, loss in losses(got)]
    b = [float(loss) for _, loss in losses(want)]
    assert len(a) == len(b) == steps
    # a distillation's losses begin at 1e-6, and their noise is that of float32
    assert a == pytest.approx(b, rel=tolerance, abs=5e-8)
    name = checkpoint.step_name(steps)
    assert close(tensors(got / name), tensors(want / name), 100 * tolerance) == []


# -- the step without its graph


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_train_as_plain_ones(kind, tmp_path, text, base, captured):
    """20 steps of every kind, evaluated in between: the same losses in the same order, weights,
    moments and step counters, to what rates in float32 differ by."""
    captured(False)
    want = run(kind, tmp_path / "plain", text, base)
    captured(True)
    got = run(kind, tmp_path / "captured", text, base, "--eval_interval=7")
    assert_same_run(got, want, 20, 1e-5)
    log = checkpoint.read_jsonl(got / "metrics.jsonl")
    assert [r.get("after", r["step"]) for r in log if "val_loss" in r] == [7, 14, 20]
    assert [r["step"] for r in log] == sorted(r["step"] for r in log)
    assert all(0 < r["tokens_per_s"] < math.inf for r in log if "loss" in r)
    groups = checkpoint.load(got / "step-00000020").state["optimizer"]["param_groups"]
    assert all(type(g["lr"]) is float and not g["capturable"] for g in groups)


def test_captured_steps_resume_bitwise(tmp_path, text, base, captured, monkeypatch):
    """A run of captured steps that is stopped in the middle and resumed ends in the same bits as
    one that was not; resumed kernel by kernel it ends in nearly the same."""
    kind = "moe_lora, warming up"
    captured(True)
    whole = run(kind, tmp_path / "whole", text, base)
    for name, yes in (("broken", True), ("mixed", False)):
        captured(True)
        with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
            before_step(m, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
            run(kind, tmp_path / name, text, base)
        assert stopped.value.code == 143
        captured(yes)
        broken = run(kind, tmp_path / name, text, base, "--resume")
        if yes:
            assert losses(broken) == losses(whole)
            assert_equal(tensors(broken / "step-00000020"), tensors(whole / "step-00000020"))
        else:
            assert_same_run(broken, whole, 20, 1e-5)


def spoil(monkeypatch, how: str, at: int, trainers: list) -> None:
    """Make the loss, the gradient or the labels of one step bad."""
    if how == "labels":

        def masked(*a):
            x, y = data.batch(*a)
            return x, y.fill_(-100) if a[1] == "train" and a[3] == at else y

        monkeypatch.setattr(trainer, "batch", masked)
    elif how == "loss":

        def bad_loss(*a):
            return lm_loss(*a) * (math.nan if trainers[-1].step == at else 1.0)

        monkeypatch.setattr("training.stage.lm_loss", bad_loss)
    else:

        def hook(g):
            return g * (math.inf if trainers[-1].step == at else 1.0)

        def add_hook():
            trainers[-1].s.params[-1].register_hook(hook)

        before_step(monkeypatch, 0, add_hook)


def assert_stopped_by_step_5(run_it, monkeypatch, capsys, trainers) -> None:
    """Run with step 5 bad, the first after a checkpoint: exit 3 names it once LATE steps have
    begun; weights, moments and step counters are those before it, and so is what lies on disk."""
    before = {}

    def state() -> dict:
        t = trainers[-1]
        moments = t.opt.state_dict()["state"]
        flat = {f"{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
        return copies(t.s.model.state_dict() | flat)

    before_step(monkeypatch, 5, lambda: before.update(state()))
    with pytest.raises(SystemExit) as e:
        run_it("--save_interval=5", "--eval_interval=5")
    t = trainers[-1]
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 3
    assert re.search(r"step 5: loss \S+, gradient norm \S+, learning rate \d", message), message
    assert "nothing was updated" in message and str(t.s.folder / "step-00000005") in message
    assert t.step == 5 + LATE
    assert_equal(state(), before)
    assert [step for step, _ in losses(t.s.folder)] == list(range(5))
    saved = {p.name for p in t.s.folder.iterdir() if p.is_dir()}
    assert saved == {"step-00000005", "best"}
    assert all(v.isfinite().all() for v in tensors(t.s.folder / "step-00000005").values())


@pytest.mark.parametrize(
    "kind, how", [("pretrain", "loss"), ("pretrain", "labels"), ("routed", "gradient")]
)
def test_bad_step_changes_nothing(
    kind, how, tmp_path, text, base, captured, monkeypatch, capsys, trainers
):
    """A step that is not finite is reported some steps late, and neither it nor those begun since
    have changed anything."""
    captured(True)
    spoil(monkeypatch, how, 5, trainers)
    assert_stopped_by_step_5(
        lambda *flags: run(kind, tmp_path / "run", text, base, *flags),
        monkeypatch,
        capsys,
        trainers,
    )


def tiny_step(spoiled: tuple[int, ...] = ()) -> tuple[CapturedStep, torch.nn.Parameter]:
    """A step that pulls a matrix towards the mean of x; batches of these numbers are NaN."""
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(3, 2))
    opt = make_optimizer([w], TrainConfig())

    def gradients(x, y, stop):
        wanted = x.float().mean()
        loss = (w - wanted).square().sum() * torch.where((y == 1).any(), math.nan, 1.0)
        loss.backward()
        return torch.stack((loss.detach(), w.grad.norm(), stop)).double()

    return CapturedStep(gradients, opt, (2, 5), torch.device("cpu")), w


def test_a_bad_step_ends_all_updates():
    """After a NaN nothing changes any more, though later steps are finite; results come in order,
    each once, with its own rate and whether it was told to stop, and are due as soon as LATE steps are under way."""
    step, w = tiny_step()
    start = w.detach().clone()
    seen = []
    kept = {}
    for i in range(9):
        if step.is_full:
            seen.append(step.take())
        x = torch.full((2, 5), i)
        y = torch.full_like(x, int(i == 3))
        step.begin(x, y, step=i, lr=0.1 * (i + 1), seed=i, stop=i in (1, 8))
        kept[i] = w.detach().clone()
        assert len(step.under_way) == min(i + 1, LATE)
    while step.under_way:
        seen.append(step.take())
    assert [r.step for r in seen] == list(range(9))
    assert [r.stop for r in seen] == [i in (1, 8) for i in range(9)]
    assert [r.lr for r in seen] == pytest.approx([0.1 * (i + 1) for i in range(9)])
    assert [math.isfinite(r.loss) for r in seen] == [i != 3 for i in range(9)]
    assert seen[0].loss == pytest.approx(start.square().sum().item())
    assert all(not torch.equal(kept[i], kept[i - 1]) for i in (1, 2))
    assert all(torch.equal(kept[i], kept[2]) for i in range(3, 9))
    (state,) = step.opt.state.values()
    assert state["step"] == 3


@pytest.mark.parametrize("x, y", [((1, 5), (2, 5)), ((2, 5), (2, 1)), ((2, 4), (2, 4))])
def test_a_batch_of_another_shape_is_refused(x, y):
    """One line, before anything is begun: rows are not repeated to fill a batch."""
    step, _ = tiny_step()
    x = torch.zeros(x, dtype=torch.int64)
    y = torch.zeros(y, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"all steps are of \(2, 5\)"):
        step.begin(x, y, step=0, lr=0.1, seed=0)
    assert len(step.free) == LATE and not step.under_way


def test_each_phase_is_prepared_once(tmp_path, text, base, captured, monkeypatch):
    """Of 20 steps 8 read whole values: the step is prepared before the first and before step 8."""
    prepare = CapturedStep.prepare
    begun = []

    def counted(self):
        begun.append(self.opt.state_dict()["state"][0]["step"].item() if begun else 0)
        prepare(self)

    monkeypatch.setattr(CapturedStep, "prepare", counted)
    captured(True)
    run("moe_lora, warming up", tmp_path / "run", text, base)
    assert begun == [0, 8]


def test_a_new_phase_changes_nothing_by_itself():
    """Preparing a phase runs steps, and leaves weights, moments, counters and what is known of bad
    steps as they were."""
    step, w = tiny_step()
    x = torch.ones(2, 5, dtype=torch.int64)
    step.begin(x, 0 * x, step=0, lr=0.1, seed=0, phase="a")
    (state,) = step.opt.state.values()
    for bad in (0.0, 1.0):
        step.bad.fill_(bad)
        before = copies(state | {"w": w})
        step.prepare()
        assert_equal(copies(state | {"w": w}), before)
        assert step.bad == bad


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_asks_the_device_nothing(kind, tmp_path, text, base, captured, monkeypatch):
    """No operator between the first micro-batch and the last moment has a result whose size or
    value the host must know: what capturing a graph would fail by. Of three steps the last one
    reads no whole values where two warm up."""
    questions = Questions()
    reads = HostReads()
    once = CapturedStep.once

    def watched(self):
        with questions, reads:
            once(self)

    monkeypatch.setattr(CapturedStep, "once", watched)
    for room, name in (
        (layout, "is_read_here"),
        (kv_router, "is_banded"),
        (cpu_gates, "is_gated_here"),
    ):
        monkeypatch.setattr(room, name, lambda x: False)  # what a CPU alone does
    captured(True)
    run(kind, tmp_path / "run", text, base, steps_flag(kind, 3))
    assert questions.asked == reads.asked == []


def test_why_steps_are_not_captured(stage_of):
    """Captured are steps on a GPU, of several processes, too, unless a flag says no or the host has
    a part in the loss or in the weights; why not is said in words."""
    stage, cfg = stage_of()
    cuda = torch.device("cuda")
    why = trainer.why_not_captured
    assert why(stage, cfg, trainer.World(0, 1, cuda)) == ""
    assert "no GPU" in why(stage, cfg, trainer.World(0, 1, torch.device("cpu")))
    assert why(stage, cfg, trainer.World(1, 2, cuda)) == ""
    assert "no GPU" in why(stage, cfg, trainer.World(1, 2, torch.device("cpu")))
    assert "sharded" in why(stage, replace(cfg, shard=True), trainer.World(1, 2, cuda))
    off = adapt_arguments("x", "text:x", "y", "--capture=false").train
    assert "--capture=false" in why(stage, off, trainer.World(0, 1, cuda))
    stage.kv = replace(stage.kv, kv="select")
    assert "host" in why(stage, cfg, trainer.World(0, 1, cuda))


# -- the graph


def gpu_case(function):
    """Mark a test as one for a GPU."""
    for mark in on_gpu:
        function = mark(function)
    return function


@gpu_case
@pytest.mark.parametrize("kind", KINDS)
def test_graph_trains_as_kernels_do(kind, tmp_path, text, base):
    """40 steps of every kind in float32: the same losses, weights and moments, dropout and a
    change of phase included."""
    flags = ["--device=cuda", "--dtype=float32", steps_flag(kind, 40)]
    want = run(kind, tmp_path / "plain", text, base, *flags, "--capture=false")
    got = run(kind, tmp_path / "graph", text, base, *flags)
    assert_same_run(got, want, 40, 1e-3)


@gpu_case
def test_graph_in_bfloat16_trains_as_kernels_do(tmp_path, text, base):
    """40 steps under autocast: losses within 1 % of those kernel by kernel."""
    flags = ["--device=cuda", "--dtype=bfloat16", "--adapt_steps=40"]
    kind = "routed over value groups"
    want = run(kind, tmp_path / "plain", text, base, *flags, "--capture=false")
    got = run(kind, tmp_path / "graph", text, base, *flags)
    pairs = zip(losses(got), losses(want), strict=True)
    assert max(abs(float(a) / float(b) - 1) for (_, a), (_, b) in pairs) < 0.01


@gpu_case
def test_bad_labels_stop_a_graph(tmp_path, text, base, monkeypatch, capsys, trainers):
    """Labels that are all left out make a replay's loss NaN: nothing has changed when it is
    reported."""
    spoil(monkeypatch, "labels", 5, trainers)
    assert_stopped_by_step_5(
        lambda *flags: run(
            "lora", tmp_path / "run", text, base, "--device=cuda", "--dtype=float32", *flags
        ),
        monkeypatch,
        capsys,
        trainers,
    )


@gpu_case
def test_graph_resumes_bitwise(tmp_path, text, base, monkeypatch):
    """Stopped in the middle and resumed, replays end in the bits of an unbroken run, dropout
    included."""
    flags = ["--device=cuda", "--dtype=float32"]
    whole = run("lora", tmp_path / "whole", text, base, *flags)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        before_step(m, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run("lora", tmp_path / "broken", text, base, *flags)
    broken = run("lora", tmp_path / "broken", text, base, *flags, "--resume")
    assert losses(broken) == losses(whole)
    assert_equal(tensors(broken / "step-00000020"), tensors(whole / "step-00000020"))


@gpu_case
def test_replays_never_wait_for_the_device(tmp_path, text, base, monkeypatch):
    """From the second step on nothing that a step does, its log included, synchronises, but for
    the event of a step LATE before it, whose wait this does not see."""
    one_step = trainer.Trainer.one_step

    def watched(self, stop):
        torch.cuda.set_sync_debug_mode("error" if self.step else "default")
        try:
            return one_step(self, stop)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "one_step", watched)
    flags = ["--device=cuda", "--adapt_steps=12"]
    folder = run("routed over value groups", tmp_path / "run", text, base, *flags)
    assert len(losses(folder)) == 12


@gpu_case
def test_first_step_comes_soon(monkeypatch):
    """LoRA on SmolLM2-135M's shape, 8 x 512 tokens: three replays have run within 10 seconds."""
    from benchmarks.step import CASES, stage_of
    from config import ModelConfig

    shape = ModelConfig(
        vocab_size=49152,
        block_size=512,
        n_layer=30,
        n_embd=576,
        n_head=9,
        n_kv_head=3,
        head_dim=64,
        n_inner=1536,
    )
    cuda = torch.device("cuda")
    stage = stage_of(CASES["LoRA"], shape, batch_size=8, steps=3, device=cuda)
    start = time.perf_counter()
    trainer.Trainer(stage, TrainConfig(stage="adapt"), trainer.World(0, 1, cuda)).run()
    assert time.perf_counter() - start < 10
