"""What adaptation trains and saves, the numbers it prints, and the whole pipeline with eval.py and
sample.py on what it left."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
import config
import data
import eval as evaluation
import kv_router
import lora
import sample
import train
from loaders import checkpoint
from loaders.runs import find_checkpoint, load_run
from loaders.tokenizer import get_tokenizer
from model import Transformer
from report.figures import SWEEP, draw_metric, pyplot
from report.made import read_record
from runs import TABLE, arguments, call, copies, python, rows_without_time
from settings.adapters import AdapterConfig
from settings.train import TrainConfig
from training import adapters
from training import loop as trainer
from training.adapters import finding, matched_rank
from training.base import pretrain_stage
from training.loss import lm_loss

COUNTS = 8 * 4 * 2  # bytes of a dense cache's lengths: four sequences, two layers
CONTEXT = 128  # long enough for what is stored once per sequence not to count
ALL = [
    "--pretrain_steps=12",
    "--adapt_steps=4",
    "--seeds=2",
    "--max_minutes=99",
    f"--block_size={CONTEXT}",
]
ROW = {
    "task",
    "method",
    "adapter",
    "basis",
    "n_groups",
    "prefill",
    "relevance",
    "value_keep",
    "token_keep",
    "kv_kept_layers",
    "kv_kept_model",
    "cache_bytes",
    "dense_bytes",
    "of_dense",
    "metric",
    "value",
    "dense_value",
    "n",
    "seed",
    "seconds",
}
pytestmark = pytest.mark.usefixtures("own_cache")


# -- adaptation

KINDS = {
    "routed-output-mlp": [
        "--adapter=routed",
        "--value_basis=output",
        "--reconstructor=mlp",
    ],
    "lora-norm-pca": [
        "--adapter=lora",
        "--kv=value_groups",
        "--value_router=norm",
        "--value_basis=pca",
    ],
    "moe_lora-dense": ["--adapter=moe_lora", "--kv=dense", "--lora_targets=q,v,gate,down"],
    "none-mlp": ["--adapter=none", "--reconstructor=mlp", "--lm_to_router"],
    "routed-zero-head": [
        "--adapter=routed",
        "--reconstructor=zero",
        "--mask_scope=head",
        "--kv_layers=1",
    ],
    "routed-learned": ["--adapter=routed", "--learn_basis"],
    "none-distilled": ["--adapter=none", "--learn_basis", "--objective=distill", "--kv_tail=0"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_saves_only_what_was_added(kind, tmp_path, base, run_stage, trainers):
    """Training leaves every base weight's bits alone, in memory and on disk; the checkpoint holds
    adapter and KV tensors only, and load_run rebuilds the trained model from it and the base,
    folded basis included, with bitwise equal logits."""
    on_disk = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    before = {}
    first = trainer.make_optimizer

    def remember(params, cfg):
        model = remember.model
        before.update(copies(model.state_dict()))
        return first(params, cfg)

    attach = lora.attach
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            lora,
            "attach",
            lambda model, cfg: setattr(remember, "model", attach(model, cfg)) or model,
        )
        m.setattr(trainer, "make_optimizer", remember)
        stage = run_stage(
            "adapt", tmp_path / "run", *KINDS[kind], "--adapt_steps=6", "--weight_decay=0.1"
        )
    s = trainers[-1].s
    added = set(lora.adapter_state(s.model)) | set(kv_router.state(s.model))
    saved_as = {"enc": "basis_fwd", "dec": "basis_bwd"}  # the maps of the value basis, in the file
    on_file = lambda k: ".".join(
        (*k.split(".")[:-1], saved_as.get(k.split(".")[-1], k.split(".")[-1]))
    )
    changed = {k for k, t in s.model.state_dict().items() if not torch.equal(t, before[k])}
    assert changed and {on_file(k) for k in changed} <= added
    assert {id(p) for p in s.params} == {
        id(p) for n, p in s.model.named_parameters() if on_file(n) in added
    }
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == on_disk
    saved = checkpoint.load(stage / "step-00000006").tensors
    assert (
        set(saved) == {"adapter"}
        and set(saved["adapter"]) == added
        and not any(k.endswith((".enc", ".dec")) for k in added)
    )
    assert all(
        re.search(r"\.kv_path\.|lora_[AB]$|\.gate\.linear\.|lora_router\.linear\.", k)
        for k in added
    )
    run = load_run(stage)
    kv_router.fold(s.model)
    x = torch.randint(257, (3, 31), generator=torch.Generator().manual_seed(0))
    s.model.eval()
    with torch.no_grad():
        assert torch.equal(run.model(x), s.model(x))
        assert not torch.allclose(run.model(x), load_run(base).model(x), atol=1e-4)
    assert Path(run.base).resolve() == find_checkpoint(base).resolve()


def reached(stage, loss) -> set[str]:
    """Names of the stage's parameters with a gradient other than zero."""
    for p in stage.params:
        p.grad = None
    loss.backward()
    names = {p: n for n, p in stage.model.named_parameters()}
    return {names[p] for p in stage.params if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("reconstructor", ("zero", "mlp"))
@pytest.mark.parametrize("through", [False, True], ids=["apart", "lm_to_router"])
def test_losses_train_what_they_should(reconstructor, through, stage_of):
    """L_aux trains value routers and reconstructors only, the balance loss adapter gates only, and
    the language-model loss adapters only, unless lm_to_router lets it reach value routers and
    reconstructors too."""
    stage, _ = stage_of(
        "--kv=value_groups",
        "--value_router=linear",
        f"--reconstructor={reconstructor}",
        f"--lm_to_router={through}",
    )
    x, y = data.batch(stage.corpus.train, "train", 0, 0, 5, 32)
    kv = {n for n in kv_router.state(stage.model) if ".basis_" not in n}
    adapters = set(lora.adapter_state(stage.model))
    lm = reached(stage, lm_loss(stage.model(x), y))
    assert lm == (adapters | kv if through else adapters)
    stage.model(x)
    assert reached(stage, stage.model.kv_losses()["aux"]) == kv
    stage.model(x)
    balance = reached(stage, lora.balance_loss(stage.model))
    allowed = adapters | kv if through else adapters  # through: by way of what earlier layers wrote
    assert {n for n in adapters if ".gate." in n} <= balance <= allowed


def test_learning_rate_schedule():
    """Linear over the warm-up, the peak after it, a cosine down to just above zero; no warm-up and
    all warm-up are fine."""
    rates = [trainer.learning_rate(i, 50, 0.2, 0.1) for i in range(50)]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2]) and rates[5] == 0.2
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[5:])) and rates[-1] < 0.001
    assert rates[5 + 22] + rates[5 + 23] == pytest.approx(0.2, rel=1e-2)  # half way, half the rate
    assert trainer.learning_rate(0, 50, 0.2, 0.0) == 0.2
    assert [trainer.learning_rate(i, 4, 1.0, 1.0) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert trainer.learning_rate(0, 1, 0.2, 0.1) == 0.2


@pytest.mark.parametrize("adapter", ["lora", "moe_lora"])
def test_matched_rank_is_the_smallest_that_suffices(adapter):
    """The rank has at least the target's trainable parameters, one rank less has fewer, alpha / r
    is kept; counted on real modules."""
    model_cfg = config.ModelConfig(
        vocab_size=31,
        n_layer=2,
        n_embd=24,
        n_head=4,
        n_kv_head=2,
        head_dim=8,
        n_inner=40,
        block_size=16,
    )
    cfg = AdapterConfig(adapter=adapter, r=8, alpha=12.0)

    def count(r):
        return lora.count_trainable(lora.attach(Transformer(model_cfg), replace(cfg, r=r)))

    for target in (1, count(1), count(1) + 1, count(5), count(5) - 1, count(5) + 1, 7777):
        got = matched_rank(model_cfg, cfg, target)
        assert count(got.r) >= target and (got.r == 1 or count(got.r - 1) < target)
        assert got.alpha / got.r == 1.5


def test_adapt_uses_a_shorter_context_and_the_bases_shape(
    tmp_path, text, base, run_stage, trainers
):
    """--block_size below the base's is what adaptation trains with, and the model keeps its own
    context; a shape or tokenizer the base has not is refused, not ignored."""
    args = ["--stage=adapt", f"--init_from={base}", f"--dataset={text}", "--adapt_steps=2"]
    for flags, context in (([], 32), (["--block_size=9"], 9)):
        train.run(
            cli.parse_args(train.CONFIGS, [*args, *flags, f"--out_dir={tmp_path / str(context)}"])
        )
        stage = trainers[-1].s
        loaded = load_run(tmp_path / str(context))
        assert stage.window == stage.config["block_size"] == loaded.config["block_size"] == context
        assert stage.model.cfg.block_size == loaded.model.cfg.block_size == 32
    for flag, why in (
        ("--n_layer=3", "the base has 2"),
        ("--block_size=33", "the base knows 32"),
        ("--n_groups=16", None),
    ):
        if why:
            with pytest.raises(ValueError, match=why):
                train.run(
                    cli.parse_args(train.CONFIGS, [*args, flag, f"--out_dir={tmp_path / 'no'}"])
                )
            assert not (tmp_path / "no").exists()


# -- printed numbers


def test_tokens_per_second_by_a_fake_clock(tmp_path, text):
    """4 sequences of 32 tokens in a quarter of a second are 512 tokens/s, and a clock that stands
    still divides by no zero."""
    args = arguments(
        "--stage=pretrain",
        f"--dataset={text}",
        "--pretrain_steps=3",
        "--pretrain_batch_size=4",
        "--accumulation=2",
    )
    w = trainer.World(0, 1, torch.device("cpu"))
    for name, clock in (("runs", itertools.count(5, 0.25).__next__), ("stands", lambda: 1.0)):
        stage = pretrain_stage(args, get_tokenizer("byte"), tmp_path / name, w)
        stage.folder.mkdir(parents=True)
        trainer.Trainer(stage, args.train, w, clock=clock).run()
        speeds = [
            r["tokens_per_s"]
            for r in checkpoint.read_jsonl(stage.folder / "metrics.jsonl")
            if "loss" in r
        ]
        assert len(speeds) == 3 and all(math.isfinite(s) for s in speeds)
        assert name == "stands" or speeds == [512.0] * 3


def test_metrics_lines_are_json(base):
    """Every line of metrics.jsonl is one JSON object with finite numbers; every step has loss,
    rate, norm and speed."""
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(20)) and rows[-1].keys() == {
        "step",
        "after",
        "val_loss",
        "peak_memory_bytes",
    }
    assert all(r.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_s"} for r in steps)
    assert rows[-1].pop("peak_memory_bytes") is None  # there is no such number on a CPU
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
import cli, train
from training import loop as trainer
calls, rate = [], trainer.learning_rate
def learning_rate(*a):
    calls.append(a)
    if len(calls) == 12 + 4 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(*a)
trainer.learning_rate = learning_rate
train.run(cli.parse_args(train.CONFIGS, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run folder, what it printed) of `train.py` with nothing but small sizes given, and the
    network blocked."""
    folder = tmp_path_factory.mktemp("whole")
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    p = python("-c", WITHOUT_NETWORK, *TABLE, *ALL, f"--out_dir={folder / 'run'}", env=env)
    assert p.returncode == 0, p.err
    return folder / "run", p.out


def test_pipeline_needs_no_network_and_leaves_rows(whole):
    """stage=all with socket.connect blocked: 7 rows with every key of design.md and a sweep, a
    valid picture, bytes that are measured, and a table with one line per method."""
    run, out = whole
    rows = json.loads((run / "results.json").read_text())
    record = read_record(run / "results.json")
    assert record["seeds"] == [0, 1] and f"--out_dir={run.name}" in record["argv"]
    assert [t["corpus"] for t in record["texts"]] == ["pycode", "pydocs"]
    assert all(r.keys() >= ROW for r in rows)
    main = [r for r in rows if "sweep" not in r["name"]]
    assert [(r["name"], r["seed"]) for r in main] == [("base", 0)] + [
        (n, s) for s in (0, 1) for n in ("LoRA", "MoE-LoRA", "sub-token")
    ]
    assert {r["value_keep"] for r in rows if "sweep" in r["name"]} == {0.25, 0.75, 1.0}
    trainable = {r["name"]: r["trainable_parameters"] for r in main}
    assert (
        trainable["base"] == 0
        and min(trainable["LoRA"], trainable["MoE-LoRA"]) >= trainable["sub-token"] > 0
    )
    for r in main:
        # K and V, float32, 4 sequences, 2 heads of 16, 2 layers
        dense = 2 * 4 * (4 * CONTEXT) * 2 * 16 * 2
        assert (
            r["dense_bytes"] == dense
            and math.isfinite(r["value"])
            and 1 < r["value"] < 400
            and r["metric"] == "perplexity"
        )
        if r["name"] == "sub-token":
            assert (
                0.75 <= r["kv_kept_model"] <= r["cache_bytes"] / dense < 0.77
                and r["method"] == "value_groups"
            )
        else:
            assert (
                r["cache_bytes"] - COUNTS == dense == r["dense_bytes"]
                and r["value"] == r["dense_value"]
                and r["kv_kept_model"] == 1.0
            )
    png = (run / "report.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND" and len(png) > 10_000
    assert f"Storing {main[-1]['of_dense']:.1%} of the bytes, sub-token's perplexity is " in out
    table = [
        line for line in out.splitlines() if re.match(r"(base|LoRA|MoE-LoRA|sub-token)\b", line)
    ]
    assert [line.split()[0] for line in table] == ["base", "LoRA", "MoE-LoRA", "sub-token"]
    for line in table:
        mine = [r["value"] for r in main if r["name"] == line.split()[0]]
        assert f"{sum(mine) / len(mine):.4f}" in line
        # every trained row ends in seeds, tokens per second and peak memory, which a CPU does not
        # tell
        assert re.search(
            rf" {len(mine)}$" if line.startswith("base") else rf" {len(mine)} +[\d,]+ +n/a$",
            line.rstrip(),
        ), line
    assert checkpoint.load(find_checkpoint(run / "pretrain")).config["corpus"] == "pydocs"
    assert checkpoint.load(find_checkpoint(run / "routed-s1")).config["corpus"] == "pycode"


def test_pipeline_resumed_after_a_kill_ends_the_same(whole, tmp_path):
    """SIGKILL in the third step of MoE-LoRA, then --resume: the same rows, number for number, as
    the unbroken run."""
    flags = [*TABLE, *ALL, "--save_interval=2", f"--out_dir={tmp_path / 'run'}"]
    shutil.copytree(whole[0].parent / "cache", tmp_path / "cache")  # the same text, prepared once
    p = python("-c", KILLED, *flags)
    assert p.returncode == -signal.SIGKILL, p.err
    assert (tmp_path / "run/moe_lora-s0/step-00000002").is_dir() and not (
        tmp_path / "run/routed-s0"
    ).exists()
    train.run(cli.parse_args(train.CONFIGS, [*flags, "--resume"]))
    assert rows_without_time(tmp_path / "run") == rows_without_time(whole[0])


@pytest.fixture
def copy_of(whole, tmp_path):
    """A copy of the whole run, token files included."""
    shutil.copytree(whole[0], tmp_path / "copy")
    shutil.copytree(whole[0].parent / "cache", tmp_path / "cache")
    return tmp_path / "copy"


@pytest.mark.parametrize("seeds", [1, 3])
def test_report_draws_means_and_joins_the_sweep(seeds):
    """The third panel names its axes once, has for every row the mean over seeds with a bar of one
    standard deviation (none for one seed, which is called so), and joins the sweep with the row it
    belongs to, of the same seed."""

    def row(name: str, seed: int, kept: float, value: float) -> dict:
        about = dict(task="perplexity", metric="perplexity", method="dense")
        trained = 0 if name == "base" else 7
        about |= dict(name=name, seed=seed, trainable_parameters=trained)
        return about | dict(kv_kept_model=kept, value=value)

    values = [6.5, 6.75, 7.3][:seeds]
    rows = [row("base", 0, 1.0, 9.25), *(row("LoRA", i, 1.0, v) for i, v in enumerate(values))]
    rows += [row("sub-token", i, 0.75, v + 1) for i, v in enumerate(values)]
    rows += [row(f"sub-token{SWEEP}", 0, kept, value) for kept, value in ((1.0, 7.0), (0.5, 9.0))]
    ax = pyplot().figure().subplots()
    draw_metric(ax, rows)
    said = "one seed" if seeds == 1 else "mean of 3 seeds, bars: standard deviation"
    assert ax.get_ylabel() == "perplexity" and ax.get_title().splitlines()[1] == said
    assert "9.25" in ax.get_title()
    for name, bars in zip(("LoRA", "sub-token"), ax.containers, strict=True):
        mine = [r["value"] for r in rows if r["name"] == name]
        assert bars.get_label() == name
        assert bars.lines[0].get_ydata() == pytest.approx([statistics.mean(mine)])
        if seeds > 1:
            low, high = bars.lines[2][0].get_segments()[0][:, 1]
            assert high - low == pytest.approx(2 * statistics.stdev(mine))
    assert all(bars.has_yerr == (seeds > 1) for bars in ax.containers)
    (sweep,) = [line for line in ax.lines if "sweep" in line.get_label()]
    assert [*zip(*sweep.get_data(), strict=True)] == [(50, 9.0), (75, 7.5), (100, 7.0)]
    pyplot().close("all")


def test_eval_says_what_it_measures(copy_of, capsys, monkeypatch):
    """In a terminal a bar on stderr counts every row, and stdout stays empty unless --json asks for
    the rows; in a pipe they come anyway, and the bar does not. Each row is named as it begins; the
    one with all groups is called whole in the table."""
    flags = [
        f"--out_dir={copy_of}",
        "--budgets=0.25",
        "--sequences=2",
        "--methods=dense,value_groups",
    ]
    for terminal, asked, printed in ((True, [], 0), (True, ["--json"], 1), (False, [], 1)):
        with monkeypatch.context() as m:
            m.setattr(sys.stdout, "isatty", lambda t=terminal: t)
            m.setattr(sys.stderr, "isatty", lambda t=terminal: t)
            call(evaluation, *flags, *asked)
        io = capsys.readouterr()
        assert len(io.out.splitlines()) == printed, (terminal, asked)
        assert ("2/2" in io.err) == terminal, io.err
        for line in ("row 1 of 2: 4 of 4 value groups, ", "row 2 of 2: 1 of 4 value groups, "):
            assert f"{line}perplexity" in io.err
        assert re.search(r"\nwhole \w+ S=4 K=4 .*\nvalue_groups \w+ S=4 K=1 ", io.err)


def test_eval_rows_of_a_run(whole, copy_of, capsys):
    """eval.py on a run: a row per budget and one with everything kept, the last line of stdout is
    those rows as JSON, they go to the stage's folder beside the run's own, and the trained budget
    has the very value that train.py reported."""
    before = (copy_of / "results.json").read_bytes()
    call(
        evaluation,
        f"--out_dir={copy_of}",
        "--methods=dense,value_groups",
        "--budgets=0.25,0.5,0.75",
        "--sequences=24",
    )
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])
    assert (
        rows == json.loads((copy_of / "routed-s0" / "results.json").read_text())
        and (copy_of / "results.json").read_bytes() == before
    )
    assert [r["value_keep"] for r in rows] == [1.0, 0.25, 0.5, 0.75] and all(
        r.keys() >= ROW and r["adapter"] == "routed" for r in rows
    )
    assert rows[0]["value"] == rows[0]["dense_value"]
    held = [r["cache_bytes"] for r in rows]
    assert held[0] > held[3] > held[2] > held[1]
    mine = next(
        r
        for r in json.loads((whole[0] / "results.json").read_text())
        if r["name"] == "sub-token" and r["seed"] == 0
    )
    assert {k: rows[2][k] for k in ROW - {"seconds"}} == {k: mine[k] for k in ROW - {"seconds"}}
    assert (copy_of / "routed-s0" / "report.png").is_file()


def test_eval_training_free_on_a_base(copy_of, capsys):
    """eval.py compresses a pretrained stage without any training; everything kept is the dense
    model, and less kept holds fewer bytes."""
    call(
        evaluation,
        f"--out_dir={copy_of / 'pretrain'}",
        "--methods=dense,value_groups",
        "--budgets=0.5,1",
        "--n_groups=8",
        "--sequences=9",
        "--block_size=31",
        "--batch_size=4",
    )
    dense, half, full = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (dense["method"], half["method"], half["n_groups"], half["adapter"]) == (
        "dense",
        "value_groups",
        8,
        "none",
    )
    assert (
        dense["n"] == 9 * 31
        and dense["cache_bytes"] - COUNTS == dense["dense_bytes"] > half["cache_bytes"]
    )
    assert (
        full["value"] == pytest.approx(dense["value"], rel=1e-5)
        and half["dense_value"] == full["value"]
    )


def test_sample_prints_text_and_bytes(copy_of, capsys):
    """sample.py prints the prompt with its continuation and the bytes the cache held: fewer than
    dense when adapted, as many when not."""
    for folder, less in ((copy_of, True), (copy_of / "pretrain", False)):
        call(
            sample,
            f"--out_dir={folder}",
            "--prompt=def f(",
            "--max_new_tokens=90",
            "--num_samples=2",
            "--top_k=5",
        )
        io = capsys.readouterr()
        assert io.out.count("def f(") >= 2 and io.out.count("-" * 20) >= 2
        said = r"held ([\d,]+) bytes for (\d+) tokens(?: a row)?, ([\d.]+)% of a dense one's"
        held, tokens, share = re.search(said, io.err).groups()
        held = int(held.replace(",", ""))
        dense = 2 * 4 * 2 * int(tokens) * 2 * 16 * 2  # float32
        if less:
            assert 0.7 * dense < held < 0.9 * dense and 70 < float(share) < 90
        else:
            assert held == dense + COUNTS // 2 and 100 <= float(share) < 100.2


def test_sample_is_repeatable(copy_of, capsys):
    """The same seed writes the same text, another seed another, and temperature 0 needs no seed."""
    texts = {}
    for name, flags in {
        "a": ["--seed=1"],
        "b": ["--seed=1"],
        "c": ["--seed=2"],
        "d": ["--temperature=0"],
        "e": ["--temperature=0", "--seed=7"],
    }.items():
        call(sample, f"--out_dir={copy_of}", "--max_new_tokens=25", *flags)
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
    assert (
        "the network was touched" in python("-c", script).err and socket.socket.connect is not None
    )


def test_a_verdict_has_a_standard_error_and_needs_two_seeds():
    """The mean over seeds of the ratio to each row that stores everything, and its standard error
    by hand; one seed is called one seed."""
    values = {"LoRA": (10.0, 20.0, 40.0), "MoE-LoRA": (8.0, 16.0, 32.0)}
    values["sub-token"] = (9.0, 21.0, 36.0)
    rows = [
        dict(name=name, seed=seed, value=value, cache_bytes=3, dense_bytes=4, of_dense=0.75)
        for name, mine in values.items()
        for seed, value in enumerate(mine)
    ]
    said = finding(rows, 3)
    # -10, +5, -10 %: mean -5 %, deviation 8.66 %, over the root of three 5 %
    assert "75.0% of the bytes" in said and "-5.00% +- 5.00% against LoRA" in said
    assert "over 3 seeds" in said
    one = [r for r in rows if r["seed"] == 0]
    assert finding(one, 1).endswith("which row is better; give --seeds=3 or more.")
    assert finding(one, 3).endswith("give --seeds=3 or more, and a larger --max_minutes.")


@pytest.mark.parametrize("seconds, begun", [(70, [5]), (0, [5, 6])])
def test_a_seed_begins_only_where_the_longest_fits(seconds, begun, monkeypatch, capsys):
    """Seeds of 50 seconds in 2 minutes, 10 of which have gone by: the second one begins unless the
    first, trained before, is known to have taken longer; the third does not. By hand."""
    now = [10.0]
    monkeypatch.setattr(adapters, "time", SimpleNamespace(time=lambda: now[0]))
    cfg = TrainConfig(seed=5, seeds=4, max_minutes=2)
    seen = []
    for seed in adapters.seeds_in_time(cfg, trainer.World(0, 1, torch.device("cpu")), 0, seconds):
        seen.append(seed)
        now[0] += 50
    assert seen == begun
    assert f"{len(begun)} of 4 seeds: another would pass" in capsys.readouterr().err
