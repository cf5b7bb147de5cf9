"""Captured steps of several processes: losses, norms, weights and moments are those of one process,
and of several kernel by kernel; a rank that is told to stop, a bad step, a step that cannot be
captured. Here steps run without their graph over gloo; tests marked gpu replay NCCL's."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from test_captured import Questions, assert_same_run, tiny_step
from test_ranks import TWO_PROCESSES, assert_alike

import train
from loaders.checkpoint import newest
from runs import TINY, arguments, assert_equal, losses, python, tensors
from training import base as stage_base
from training import loop as trainer
from training.captured import LATE, CapturedStep
from training.world import CannotCapture, World

pytestmark = pytest.mark.usefixtures("own_cache")

# Runs train.py with each list of flags in turn, in one job. A list's first word says how: eager,
# captured, and for what comes to rank 1 at step 5: stop (SIGTERM) or bad (a loss that is NaN).
# After each the weights of both ranks are the same.
RUN_ALL = """
import json, math, os, signal, sys
sys.path[:0] = ["tests", "."]
from contextlib import nullcontext
import torch
import train
from runs import arguments
from training import loop, stage
made = []
class Spy(loop.Trainer):
    def __init__(self, *args):
        super().__init__(*args)
        made.append(self)
loop.Trainer = Spy
with train.world("cpu") as w:
    train.world = lambda _: nullcontext(w)
    rate = loop.learning_rate
    loss = stage.lm_loss
    for how, *flags in json.loads(sys.argv[1]):
        loop.why_not_captured = lambda *a: "a test" if how == "eager" else ""
        at = [0]
        def watched(step, *a):
            at[0] = step
            if how == "stop" and step == 5 and w.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return rate(step, *a)
        def spoiled(*a):
            bad = how == "bad" and at[0] == 5 and w.rank == 1
            return loss(*a) * (math.nan if bad else 1.0)
        loop.learning_rate = watched
        stage.lm_loss = spoiled
        try:
            train.run(arguments(*flags))
        except SystemExit as e:
            os.write(2, f"rank {w.rank}, {how}: exit {e.code}\\n".encode())
        totals = [None, None]
        mine = [p.double().abs().sum().item() for p in made[-1].s.params]
        torch.distributed.all_gather_object(totals, mine)
        assert totals[0] == totals[1], how
"""


def run_all(folder: Path, work: list[list]) -> str:
    """Do the work in 2 processes; return what they say on stderr."""
    script = folder / "all.py"
    script.write_text(RUN_ALL)
    p = python(*TWO_PROCESSES, script, json.dumps([[*map(str, flags)] for flags in work]), wait=400)
    assert p.returncode == 0, p.err
    return p.err


def pretrain_flags(text: str, *flags: str) -> list[str]:
    sizes = ["--pretrain_steps=20", "--pretrain_batch_size=5", "--accumulation=2"]
    return ["--stage=pretrain", f"--dataset={text}", *sizes, *flags]


def test_captured_ranks_mean_the_same_steps(tmp_path, text):
    """2 ranks pretrain 5 sequences a step (uneven, in 2 micro-steps), adapt 1 (one rank is empty)
    while a router warms up (there a phase has no gradients for some): as captured steps, resumed
    ones too, losses, norms, weights, moments and step counters are those of one process to 1e-4,
    and those of 2 ranks kernel by kernel to 1e-6."""
    first = pretrain_flags(text, "--save_interval=10", "--eval_interval=10")
    base = f"--init_from={tmp_path / 'one' / 'pretrain'}"
    warm = ["--adapter=moe_lora", "--reconstructor=mlp", "--kv_warmup=0.4", "--lora_dropout=0"]
    sizes = ["--adapt_steps=10", "--adapt_batch_size=1"]
    adapt = ["--stage=adapt", base, f"--dataset={text}", *sizes, *warm]
    train.run(arguments(*first, f"--out_dir={tmp_path / 'one'}"))
    train.run(arguments(*adapt, f"--out_dir={tmp_path / 'adapted'}"))
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "one", half)
    shutil.rmtree(half / "pretrain" / "step-00000020")
    shutil.rmtree(half / "pretrain" / "best")
    work = [
        ["captured", *first, f"--out_dir={tmp_path / 'one-2'}"],
        ["eager", *first, f"--out_dir={tmp_path / 'one-eager'}"],
        ["captured", *first, "--resume", f"--out_dir={half}"],
        ["captured", *adapt, f"--out_dir={tmp_path / 'adapted-2'}"],
        ["eager", *adapt, f"--out_dir={tmp_path / 'adapted-eager'}"],
    ]
    run_all(tmp_path, work)
    pairs = [("one", "one-2"), ("one", "half"), ("adapted", "adapted-2")]
    for one, two in pairs:
        assert_alike(*(folder_of(tmp_path / name) for name in (one, two)))
    for kind in ("one", "adapted"):
        captured, eager = (folder_of(tmp_path / f"{kind}-{how}") for how in ("2", "eager"))
        got, want = ([float(loss) for _, loss in losses(f)] for f in (captured, eager))
        assert got == pytest.approx(want, rel=1e-6), kind
        got, want = (tensors(newest(folder)[0]) for folder in (captured, eager))
        counters = [name for name in want if name.endswith("step")]
        assert counters and got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in counters)


def folder_of(run: Path) -> Path:
    """The folder of a run's one stage."""
    (metrics,) = run.glob("*/metrics.jsonl")
    return metrics.parent


def test_captured_ranks_stop_together_and_resume_bitwise(tmp_path, text):
    """SIGTERM to rank 1 before step 5: both ranks end after one and the same step, LATE + 1 later
    at most; what they saved, resumed, ends in the bits of an unbroken run of theirs."""
    flags = pretrain_flags(text)
    broken = f"--out_dir={tmp_path / 'broken'}"
    work = [
        ["captured", *flags, f"--out_dir={tmp_path / 'whole'}"],
        ["stop", *flags, broken],
        ["captured", *flags, "--resume", broken],
    ]
    said = run_all(tmp_path, work)
    assert sorted(re.findall(r"rank \d, stop: exit \d+", said)) == [
        "rank 0, stop: exit 130",
        "rank 1, stop: exit 143",
    ]
    (saved,) = re.findall(r"saved step (\d+); continue with --resume", said)
    assert 5 < int(saved) <= 5 + 1 + LATE
    assert "broken/pretrain/step-" + saved.zfill(8) in said  # resumed from
    whole, broken = (tmp_path / name / "pretrain" for name in ("whole", "broken"))
    assert losses(broken) == losses(whole) and len(losses(whole)) == 20
    assert_equal(tensors(broken / "step-00000020"), tensors(whole / "step-00000020"))


def test_bad_step_of_one_rank_changes_nothing_on_any(tmp_path, text):
    """A loss of rank 1 that is NaN at step 5: both ranks name that step and end by exit code 3; the
    checkpoint before it is the newest, and finite."""
    flags = pretrain_flags(text, "--save_interval=5", f"--out_dir={tmp_path / 'run'}")
    said = run_all(tmp_path, [["bad", *flags]])
    assert said.count("step 5: loss nan, gradient norm nan") == 2
    assert said.count("bad: exit 3") == 2
    folder = tmp_path / "run" / "pretrain"
    path, _ = newest(folder)
    assert path.name == "step-00000005" and len(losses(folder)) == 5
    assert all(t.isfinite().all() for t in tensors(path).values())


CANNOT_CAPTURE = """
import sys
sys.path[:0] = ["tests", "."]
import train
from runs import arguments
from training import captured, loop, world
loop.why_not_captured = lambda *a: ""
warm_up = captured.CapturedStep.warm_up
def fail(self):
    warm_up(self)
    if world.dist.get_rank() == 0:
        raise world.CannotCapture("the step cannot be captured; --capture=false runs it")
captured.CapturedStep.warm_up = fail
train.run(arguments(*sys.argv[1:]))
"""


def test_a_step_that_one_rank_cannot_capture_ends_all_by_one_line(tmp_path, text):
    """Rank 0 fails while it captures, rank 1 goes on to a sum that does not come: both end within
    the wait, rank 0 by one line that names the way out, without a traceback."""
    (tmp_path / "run.py").write_text(CANNOT_CAPTURE)
    flags = pretrain_flags(text, "--pretrain_steps=100000", f"--out_dir={tmp_path / 'run'}")
    p = python(*TWO_PROCESSES, tmp_path / "run.py", *flags, wait=100)
    assert p.returncode != 0
    said = "rank 0 of 2: the step cannot be captured; --capture=false runs it\n"
    assert p.err.count(said) == 1
    assert f'{tmp_path / "run.py"}", line' not in p.err, p.err


@pytest.mark.parametrize(
    "ranks, error, said, mode",
    [
        (1, RuntimeError("operation not permitted\nmore"), "operation not permitted", "global"),
        (2, torch.OutOfMemoryError("out of memory"), "out of memory", "thread_local"),
    ],
)
def test_what_ends_a_capture_is_said_in_one_line(ranks, error, said, mode, monkeypatch):
    """Its first line and the way out. Of several ranks running out of memory is such an end, too,
    and what other threads ask of their events is none."""
    step, _ = tiny_step()
    step.ranks = ranks
    modes = []

    @contextmanager
    def graph(*_, capture_error_mode, **more):
        modes.append(capture_error_mode)
        yield
        raise error

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    with pytest.raises(CannotCapture) as e:
        step.capture()
    assert str(e.value) == (
        f"the step cannot be captured as a CUDA graph: {said}; train.py --capture=false runs it "
        "kernel by kernel"
    )
    assert modes == [mode] and step.graph is None


class Alone(World):
    """Rank 0 of 2, whose sums are its own numbers."""

    def sum(self, t):
        return t

    def start_sum(self, t):
        return self

    def wait(self):
        pass


def test_a_step_of_several_ranks_asks_the_device_nothing(tmp_path, text, monkeypatch):
    """But in a phase's first step, which warms up and asks which gradients there are: nothing after
    it waits for the device, so it can be captured."""
    questions = Questions()
    asked = []
    once = CapturedStep.once

    def watched(self):
        questions.asked.clear()
        with questions:
            once(self)
        asked.append(list(questions.asked))

    monkeypatch.setattr(CapturedStep, "once", watched)
    monkeypatch.setattr(trainer, "why_not_captured", lambda *a: "")
    monkeypatch.setattr(stage_base, "share_parameters", lambda *a: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    w = Alone(0, 2, torch.device("cpu"))
    monkeypatch.setattr(train, "world", lambda _: nullcontext(w))
    train.run(arguments(*pretrain_flags(text), f"--out_dir={tmp_path / 'run'}"))
    assert len(asked) > 20 and asked[0] and not any(asked[1:])


# -- the graph


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_graphs_of_two_gpus_train_as_one_gpu(tmp_path, text):
    """10 steps in float32 of 5 sequences (uneven, in 2 micro-steps): losses, weights and moments of
    2 GPUs, a graph on each, are those of one, kernel by kernel; so are those of a run that was cut
    after 5 steps and resumed, and one process says in which way the steps ran."""
    there = ["--device=cuda", "--dtype=float32", "--pretrain_steps=10", "--save_interval=5"]
    flags = pretrain_flags(text, *there)
    train.run(arguments(*flags, "--capture=false", f"--out_dir={tmp_path / 'one'}"))
    shutil.copytree(tmp_path / "one", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "pretrain" / "step-00000010")
    for name, more in (("two", []), ("half", ["--resume", "--capture=true"])):
        asked = [*TINY, *flags, f"--out_dir={tmp_path / name}", *more]
        p = python(*TWO_PROCESSES, "train.py", *asked, wait=300)
        assert p.returncode == 0, p.err
        assert p.err.count("a step is a CUDA graph") == 1
        assert_same_run(tmp_path / name / "pretrain", tmp_path / "one" / "pretrain", 10, 1e-3)
