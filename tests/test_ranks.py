"""Sums of gradients over ranks while the backward pass runs, weights shared out over ranks, and
what happens where a rank is lost."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from benchmarks import ranks as comparison
from loaders.checkpoint import GracefulStop, read_jsonl
from loaders.runs import find_checkpoint
from report import page
from report.made import code_version, read_record
from runs import arguments, call, python, tensors
from training import world as ranks

pytestmark = pytest.mark.usefixtures("own_cache")
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Recorded(ranks.World):
    """A rank that sums nothing, and remembers what it would have summed, in order."""

    def __init__(self, rank: int, sent: list):
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "sent", sent)

    def sum(self, t):
        self.sent.append(t)
        return t

    def start_sum(self, t):
        self.sent.append(t)
        return self

    def wait(self):
        pass


def test_gradients_leave_in_one_order_whatever_a_rank_lacks(monkeypatch):
    """Of 7 parameters in buckets of about two, rank 0 lacks one, rank 1 lacks two, both lack the
    last: both ranks send buckets of the same sizes in the same order, which add up to the
    gradients of one backward pass; what neither has is None
    in the end."""
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 100)
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3 + i, 5, generator=g)) for i in range(7)]
    used = ([0, 1, 2, 4, 5], [1, 3, 5, 2])

    def loss(names):
        return sum(params[i].pow(2).sum() * (i + 1) for i in names)

    want = torch.autograd.grad(loss(used[0]) + loss(used[1]), params, allow_unused=True)
    sent = [[], []]
    numbers = []
    for rank in (0, 1):
        for p in params:
            p.grad = None
        sums = ranks.GradientSums(params, Recorded(rank, sent[rank]))
        sums.start()
        loss(used[rank]).backward()
        numbers.append(torch.cat([torch.tensor([2.0], dtype=torch.float64), sums.has()]))
        sums.finish(numbers[-1])
    assert [t.shape for t in sent[0]] == [t.shape for t in sent[1]]
    assert len(sent[0]) == len(sums.buckets) + 1 and len(sums.buckets) > 3
    counts = (numbers[0] + numbers[1]).tolist()
    assert counts == [4.0, 1, 2, 2, 1, 1, 2, 0]
    for bucket, mine, other in zip(sums.buckets, *sent, strict=False):
        parts = (mine + other).split([p.numel() for p in bucket])
        for p, part in zip(bucket, parts, strict=True):
            i = next(i for i, q in enumerate(params) if q is p)
            expected = torch.zeros_like(p) if want[i] is None else want[i]
            assert torch.equal(part.view_as(p), expected), i
    sums.drop(counts[1:])
    assert [p.grad is None for p in params] == [False] * 6 + [True]


def test_first_bucket_leaves_before_the_last_gradient_is_there(monkeypatch):
    """A chain of 4 matrices: when the gradient of the first one is computed, which comes last, the
    buckets of the others are on their way."""
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 1)
    params = [torch.nn.Parameter(torch.eye(3) * 2) for _ in range(4)]
    sent = []
    seen = []
    params[0].register_hook(lambda _: seen.append(len(sent)))
    sums = ranks.GradientSums(params, Recorded(0, sent))
    sums.start()
    x = torch.ones(3)
    for p in params:
        x = p @ x
    x.sum().backward()
    assert seen == [3] and len(sent) == 4
    sums.finish(torch.ones(1, dtype=torch.float64))
    (params[0] @ x.detach()).sum().backward()
    assert len(sent) == 5  # and the numbers; a later pass sends nothing


# -- a rank that leaves

TWO_ENDS = """
import os, socket, sys, time
from training import world as ranks
ranks.NOTICE_SECONDS = 0.1
ends = socket.socketpair()
rank = int(not os.fork())  # the child is rank 1
ends[1 - rank].close()
ranks.Peers._host = ranks.Peers._join = lambda self: [ends[rank]]
peers = ranks.Peers(rank, 2)
if rank == 0:
    time.sleep(60 if sys.argv[1] == "killed" else 1)
elif sys.argv[1] == "killed":
    os._exit(1)
peers.say_goodbye()
peers.leave()
"""


@pytest.mark.parametrize("how, code", [("done", 0), ("killed", ranks.PEER_GONE)])
def test_rank_that_is_done_leaves_the_others_at_work(how, code):
    """Rank 1 ends at once, rank 0 works ten times as long as it has to end by itself, or more: it
    comes to its end where rank 1 had come to its own, and ends with PEER_GONE where rank 1 was
    killed; no thread of either ends by an error."""
    p = python("-c", TWO_ENDS, how)
    assert p.returncode == code, p.err
    assert ("another process of this job is gone" in p.err) == (how == "killed")
    assert "Exception in thread" not in p.err


TOLD_TO_END = """
import os, signal, threading
from datetime import timedelta
from torch.distributed import TCPStore
from training.world import ended_by_sigterm
store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
with ended_by_sigterm():
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    store.wait(["never"], timedelta(seconds=600))
"""


def test_rank_that_is_told_to_end_says_so():
    """SIGTERM before the first step, while a rank waits for the others where no handler of Python's
    runs, ends it long before it has waited enough, with one line that names rank and signal, and
    exit code 143."""
    p = python("-c", TOLD_TO_END, env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    assert (p.returncode, p.err) == (143, "rank 1 of 2: ended by SIGTERM\n")


@pytest.mark.parametrize(
    "rank, name, said",
    [
        ("1", "SIGTERM", "rank 1: SIGTERM, stopping after this step"),
        ("1", "SIGINT", ""),
        ("0", "SIGINT", "rank 0: SIGINT, stopping after this step"),
        (None, "SIGTERM", "stopping after this step"),
    ],
)
def test_rank_names_itself_and_the_signal_in_a_step(rank, name, said, monkeypatch, capfd):
    """A rank that is to end after its step says so by its number; Ctrl-C, which a terminal sends
    to all ranks, is answered by the first one alone; a process of no job has no number. The
    answer to SIGTERM is that of the step, not that of the job around it."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with ranks.ended_by_sigterm(), GracefulStop() as stop:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.05)
    assert stop.signal == getattr(signal, name)
    assert capfd.readouterr().err.split("\n") == (["", said, ""] if said else [""])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


# -- weights shared out


RUN_ALL = """
import json, sys
sys.path[:0] = ["tests", "."]
from contextlib import nullcontext
import train
from runs import arguments
def main():
    with train.world("cpu") as w:
        train.world = lambda _: nullcontext(w)
        for flags in json.loads(sys.argv[1]):
            train.run(arguments(*flags))
train.exit_after(main)
"""


def test_sharded_ranks_mean_the_same_steps(tmp_path, text):
    """2 gloo ranks with --shard pretrain 40 steps (5 sequences, uneven, in 2 micro-steps), the
    last 20 of them resumed from one process's checkpoint; continue with mixSGA; adapt over value
    groups: losses, gradient norms and checkpoints are those of one process to 1e-4, and one
    process goes on from what the ranks saved."""
    first = ["--stage=pretrain", f"--dataset={text}", "--pretrain_steps=40"]
    first += ["--pretrain_batch_size=5", "--accumulation=2", "--save_interval=20"]
    base = f"--init_from={tmp_path / 'one' / 'pretrain'}"
    later = [base, f"--dataset={text}", "--adapt_steps=8", "--adapt_batch_size=5"]
    mix = ["--stage=continue", *later, "--group_sizes=1,2", "--expert_ratios=1:1"]
    routed = [
        "--stage=adapt",
        *later,
        "--adapter=routed",
        "--lora_dropout=0",
        "--reconstructor=mlp",
    ]
    train.run(arguments(*first, f"--out_dir={tmp_path / 'one'}"))
    for name, flags in (("mix", mix), ("routed", routed)):
        train.run(arguments(*flags, f"--out_dir={tmp_path / name}"))
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "one", half)
    shutil.rmtree(half / "pretrain" / "step-00000040")
    work = [
        [*first, "--shard", f"--out_dir={tmp_path / 'one-2'}"],
        [*first, "--shard", "--resume", f"--out_dir={half}"],
        [*mix, "--shard", f"--out_dir={tmp_path / 'mix-2'}"],
        [*routed, "--shard", f"--out_dir={tmp_path / 'routed-2'}"],
    ]
    (tmp_path / "all.py").write_text(RUN_ALL)
    p = python(*TWO_PROCESSES, tmp_path / "all.py", json.dumps(work))
    assert p.returncode == 0, p.err
    pairs = [("one", "one-2"), ("one", "half"), ("mix", "mix-2"), ("routed", "routed-2")]
    for one, two in pairs:
        assert_alike(*(next((tmp_path / n).glob("*/metrics.jsonl")).parent for n in (one, two)))
    shutil.rmtree(tmp_path / "one-2" / "pretrain" / "step-00000040")
    train.run(arguments(*first, "--shard=0", "--resume", f"--out_dir={tmp_path / 'one-2'}"))
    assert_alike(tmp_path / "one" / "pretrain", tmp_path / "one-2" / "pretrain")


def assert_alike(one: Path, two: Path) -> None:
    """Losses to 1e-4, gradient norms to 1e-3, weights and moments nearly so."""
    a, b = (read_jsonl(folder / "metrics.jsonl") for folder in (one, two))
    for name, rel in (("step", 0), ("loss", 1e-4), ("val_loss", 1e-4), ("grad_norm", 1e-3)):
        want = [row[name] for row in a if name in row]
        assert [row[name] for row in b if name in row] == pytest.approx(want, rel=rel), name
    a, b = tensors(find_checkpoint(one)), tensors(find_checkpoint(two))
    assert a.keys() == b.keys()
    for k, t in a.items():
        assert type(b[k]) is torch.Tensor
        assert torch.allclose(t.double(), b[k].double(), rtol=1e-2, atol=2e-4), (two, k)


def test_rows_of_ranks_are_a_table_of_the_page(tmp_path, capsys):
    """Every row lies with its record in a folder of its name, where the page finds it: speeds, and
    beside an earlier row the ratio of times and what losses or tokens differ by; layers on two
    devices that are one give all tokens and logits of the whole model."""
    sizes = ("--n_layer=1", "--n_embd=16", "--n_head=1", "--n_kv_head=1", "--head_dim=16")
    flags = (*sizes, "--vocab_size=64", "--block_size=16", f"--results={tmp_path}")
    trained = (*flags, "--steps=3", "--batch_size=2")
    asked = (*flags, "--what=generate", "--devices=cpu", "--new_tokens=4", "--batch_size=3")
    call(comparison, *trained, "--name=one")
    call(comparison, *trained, "--name=two", "--same_as=one")
    call(comparison, *asked, "--name=whole")
    call(comparison, *asked, "--devices=cpu,cpu", "--name=split", "--same_as=whole")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    mark = page.Mark("t", "runs/two_gpus.sh", [tmp_path], {})
    paths = page.results_of(mark)
    assert [path.parent.name for path in paths] == ["one", "split", "two", "whole"]
    assert all(read_record(path)["code"] == code_version() for path in paths)
    one, split, two, whole = page.lines_of(paths, mark)
    assert (one["run"], one["task"], one["row"]) == ("one", "train", "kernel by kernel")
    assert one["shape"] == "B2 T16 L1 d16 H1/1 D16" and one["peer"] == one["of the peer"] == ""
    assert (two["peer"], two["losses differ by at most"]) == ("one", "0.0e+00")
    ratio = printed[0]["tokens_per_s"] / printed[1]["tokens_per_s"]
    assert float(two["of the peer"]) == pytest.approx(ratio, abs=1e-3) and float(one["ms"]) > 0
    assert (split["row"], split["peer"], split["agreement"]) == ("cpu,cpu", "whole", "100.0%")
    assert split["logits differ by, std"] == "0.0e+00"
    assert float(whole["tokens/s"].replace(",", "")) > 0


def test_rows_that_differ_say_by_how_much():
    """Relative to the earlier row's loss, the greatest of all steps; of tokens the share that is
    the same, of logits the greatest difference over their standard deviation. By hand."""
    one = dict(tokens_per_s=10, losses=[2.0, 4.0], tokens=[1, 2, 3, 4], logits=[1.0, 3.0, 5.0])
    losses = comparison.compared(dict(tokens_per_s=40, losses=[2.0, 3.0]), one)
    assert losses == dict(ratio=0.25, largest_difference=0.25)
    row = dict(tokens_per_s=5, tokens=[1, 2, 3, 0], logits=[1.0, 2.0, 5.5])
    assert comparison.compared(row, one) == dict(ratio=2.0, agreement=0.75, logits_difference=0.5)


A_JOB = """
import os, subprocess, sys
other = subprocess.Popen(
    [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
    env=os.environ | {"RANK": "1"},
    stdout=subprocess.PIPE,
)
other.stdout.readline()  # it has begun: /proc has its environment
print("lost: 2 processes, DDP, " + sys.argv[1], file=sys.stderr)
print("lost: 0 of 9 steps, 00:00 gone, ? to go", file=sys.stderr)
print("lost: 3 of 9 steps, 00:01 gone, 00:02 to go", file=sys.stderr, flush=True)
print(other.wait(), "rank 0 of 2: another process of this job is gone", file=sys.stderr)
sys.exit(1)
"""


@pytest.mark.parametrize("how", ["CUDA graph", "kernel by kernel"])
def test_row_of_a_lost_rank_says_how_its_steps_ran(how, tmp_path, capsys, monkeypatch):
    """The last rank of a job is killed once steps lie behind it; whether they were replayed graphs
    the row has from the job, which is asked for them as by --capture, and not from the flag."""
    asked = []

    def job(cfg, flags):
        asked.extend(flags)
        return [sys.executable, "-c", A_JOB, how]

    monkeypatch.setattr(comparison, "torchrun", job)
    flags = ("--what=lost", "--name=lost", "--ranks=2", "--capture", f"--results={tmp_path}")
    monkeypatch.setattr(sys, "argv", ["ranks", *flags])
    call(comparison, *flags)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "--capture" in asked and asked.count("--what=train") == 1
    assert (row["task"], row["impl"]) == ("lost", f"2 processes, DDP, {how}")
    assert row["exit"] == 1 and row["said"].startswith("-9 rank 0 of 2") and "captured" not in row
