"""train.py --stage=select and what is measured with it: predictors trained, stored and resumed;
rows, pictures and prompts of selection."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, error_line, randomise, tiny_model, tokens
from test_tasks import read, tokenizer

import bench
import data
import eval as evaluation
import kv_router
import sample
import selector
import train
from config import KVConfig, ModelConfig, SelectConfig
from loaders import checkpoint
from loaders.device import autocast
from loaders.runs import find_checkpoint, load_run, split_added
from measure_config import BenchConfig
from model import Transformer
from report.figures import groups_figure
from report.tables import reuse_note
from runs import arguments, assert_equal, before_step, call, copies, losses, pretrain, tensors
from selection.calibration import calibrate
from selection.predictors import QueryPredictor
from selection.training import fit_statistics, predictor_loss
from settings.base import BaseConfig
from settings.fields import to_dict
from settings.train import DataConfig
from storage.layout import cdiv
from tasks import prompts as tasks
from tasks.text import Continuation
from training import loop as trainer
from training.base import load_base
from training.predictors import check_shortest, select_stage

pytestmark = pytest.mark.usefixtures("own_cache")
ALL = "predictor,expected_attention,predictor_query"
W = 5
READERS = 7
SETTING = [
    "--recall=0",  # windows of 32 tokens are too short to be repeated
    f"--readers={READERS}",
    f"--kv_tail={W}",
    "--select_steps=9",
    "--select_batch_size=3",
    "--sinks=2",
    "--past=9",
    "--ahead=5",
]
NEEDLES = [
    "--tasks=needle",
    "--distractors=2",
    "--block_size=453",
    "--sequences=3",
    "--calibration=2",
    "--batch_size=2",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, text) -> Path:
    """A stage with a context of 480 and random weights so large that its predictions depend on what
    attention reads."""
    folder = tmp_path_factory.mktemp("sharp")
    g = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        stage = pretrain(
            folder / "run",
            text,
            "--block_size=480",
            "--pretrain_steps=1",
            "--pretrain_batch_size=1",
            "--eval_sequences=1",
        )
    c = checkpoint.load(find_checkpoint(stage))
    old = sorted(c.tensors["model"].items())  # a file's order is not the same every time
    sharp = {
        k: 1.5 * torch.randn(t.shape, generator=g) / t.size(-1) ** 0.5 if t.ndim == 2 else t
        for k, t in old
    }
    checkpoint.save(
        folder / "pretrain",
        checkpoint.step_name(c.step),
        step=c.step,
        tensors={"model": sharp},
        config=c.config,
    )
    return folder / "pretrain"


def select_arguments(out: Path, text: str, base: Path, *flags):
    return arguments(
        "--stage=select",
        f"--dataset={text}",
        f"--out_dir={out}",
        f"--init_from={base}",
        *SETTING,
        *flags,
    )


def select(out: Path, text: str, base: Path, *flags) -> Path:
    """Run the select stage; its folder."""
    train.run(select_arguments(out, text, base, *flags))
    return out / "select-s0"


def weights(model) -> dict:
    """The state of a model without what selection added."""
    return {
        k: t
        for k, t in model.state_dict().items()
        if not k.startswith("selector.") and ".kv_path." not in k
    }


@pytest.fixture(scope="module")
def selected(tmp_path_factory, text, base):
    """A run of the stage with every predictor: its folder, the Trainer, its model's weights and
    predictors at the start."""
    folder = tmp_path_factory.mktemp("selected")
    made = []

    class Spy(trainer.Trainer):
        def __init__(self, stage, *args):
            super().__init__(stage, *args)
            made.append(
                (
                    self,
                    copies(weights(stage.model)),
                    copies(stage.model.selector.predictors.state_dict()),
                )
            )

    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        m.setattr(trainer, "Trainer", Spy)
        m.setattr(train, "train", trainer.train)
        stage = select(
            folder / "run",
            text,
            base,
            f"--predictors={ALL}",
            "--select_steps=25",
            "--token_keep=0.6",
            "--value_keep=0.45",
            "--relevance=predictor_query",
        )
    ((spy, weights_before, predictors_before),) = made
    return SimpleNamespace(
        folder=stage, trainer=spy, stage=spy.s, weights=weights_before, predictors=predictors_before
    )


def through_cache(model, x, n: int, cfg: SelectConfig | None = None, kv_tail: int = W):
    """(logits of x[:, n:], choice of the prompt x[:, :n], cache), by cfg."""
    s = model.selector
    s.set(cfg or s.cfg)
    s.record = True
    with torch.no_grad(), kv_router.storing(model, kv_tail=kv_tail):
        cache = model.new_cache(*x.shape)
        model.prefill(x[:, :n], cache)
        logits = model.prefill(x[:, n:], cache, last_only=False)
    s.record = False
    return logits, s.chosen, cache


# ----------------------------------------------------------------------------- the stage


def test_what_a_run_writes(selected, base, text):
    """Predictors lie in selector.safetensors apart from adapters; the config says how they choose,
    what was trained and on which base; there is a line of metrics for every step, and one
    validation loss, which is the sum of the predictors' losses on the held-out text."""
    path = find_checkpoint(selected.folder)
    assert (
        path.name == "step-00000025"
        and (path / "selector.safetensors").is_file()
        and not (path / "adapter.safetensors").exists()
    )
    c = checkpoint.load(path)
    s = selected.stage
    assert (
        c.config["stage"] == c.config["objective"] == "select"
        and c.config["kv"]["kv"] == "select"
        and c.config["kv"]["kv_tail"] == W
    )
    want = SelectConfig(
        relevance="predictor_query",
        predictors=ALL,
        token_keep=0.6,
        value_keep=0.45,
        readers=READERS,
        recall=0.0,
        sinks=2,
        past=9,
        ahead=5,
    )
    assert c.config["select"] == to_dict(want) == to_dict(load_run(path).select)
    assert c.config["trainable_parameters"] == sum(
        p.numel() for p in s.model.selector.predictors.parameters()
    )
    assert c.config["base_sha256"] == load_run(base).base_sha256 and set(c.tensors) == {"selector"}
    groups, chosen, adapters = split_added(c.tensors["selector"])
    assert not adapters and {k.split(".")[2] for k in chosen if "predictors" in k} == set(
        ALL.split(",")
    )
    assert {k.rsplit(".", 1)[1] for k in groups} == {"basis_fwd", "basis_bwd"} and {
        "selector.gain",
        "selector.feeling",
    } < set(chosen)
    log = checkpoint.read_jsonl(selected.folder / "metrics.jsonl")
    assert [r["step"] for r in log if "loss" in r] == list(range(25)) and all(
        r["tokens_per_s"] > 0 for r in log if "loss" in r
    )
    (val,) = (r["val_loss"] for r in log if "val_loss" in r)
    x, _ = data.sequential(s.corpus.val, 6, 32)
    with torch.no_grad():
        total = sum(predictor_loss(s.model, row[None]).item() for row in x)
    assert val == pytest.approx(total / 6, rel=1e-5)


def test_training_lowers_the_loss_and_leaves_the_base(selected, base):
    """The loss of the last steps is below that of the first, every predictor has changed, its
    buffers have not; every weight of the base keeps its bits in memory, and is the base's on
    disk."""
    trace = [float(v) for _, v in losses(selected.folder)]
    assert sum(trace[-5:]) < 0.95 * sum(trace[:5]), trace
    now = selected.stage.model.selector.predictors.state_dict()
    same = {k for k in now if torch.equal(now[k], selected.predictors[k])}
    assert same == {f"{n}.{b}" for n in ALL.split(",") for b in ("mean", "std")}
    assert_equal(weights(selected.stage.model), selected.weights)
    assert_equal(
        selected.weights,
        {k: t for k, t in load_run(base).model.state_dict().items() if k in selected.weights},
    )


@pytest.mark.parametrize("relevance", [*ALL.split(","), "future"])
def test_load_run_chooses_as_the_stage(relevance, selected):
    """A loaded run has the trained predictors bit for bit, and keeps the same tokens and groups of
    a prompt with the same logits after it as the model in memory, whose bases are not folded; all
    in float64."""
    run = load_run(selected.folder)
    live = load_run(selected.folder)
    live.model = selected.stage.model.eval()
    assert_equal(run.model.selector.state_dict(), live.model.selector.state_dict())
    assert run.kv == selected.stage.kv and run.model.layers[0].self_attn.kv_path.folded
    cfg = (
        replace(run.select, token_relevance=relevance)
        if relevance == "expected_attention"
        else replace(run.select, relevance=relevance)
    )
    x = tokens(3, 67, seed=3, vocab=257)
    before = live.model.selector.cfg
    try:
        got, want = (through_cache(m.double(), x, 58, cfg) for m in (run.model, live.model))
    finally:
        live.model.float()
        live.model.selector.set(before)
    assert torch.equal(got[1].keep, want[1].keep) and torch.equal(got[1].mask, want[1].mask)
    # folding rounded float32 weights
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)
    assert 0.2 < got[1].mask.float().mean() < 0.3 and got[2].nbytes() < run.model.dense_bytes(
        x.numel(), got[2]
    )


def test_predictors_learn_at_their_own_rates(tmp_path, text, base, trainers):
    """The paper's predictors learn at a tenth of --select_lr, ours at the whole of it: in the
    optimizer's groups, and in how far AdamW's first step moves what was zero."""
    select(
        tmp_path / "run",
        text,
        base,
        f"--predictors={ALL}",
        "--select_steps=1",
        "--select_lr=0.004",
        "--warmup=0",
        "--grad_clip=0",
    )
    t = trainers[-1]
    rate = {p: g["rate"] for g in t.opt.param_groups for p in g["params"]}
    assert all(g["lr"] == pytest.approx(0.004 * g["rate"]) for g in t.opt.param_groups)
    for name, module in t.s.model.selector.predictors.items():
        slow = 1.0 if name == "predictor_query" else 0.1
        assert {rate[p] for p in module.parameters()} == {slow}
        moved = (
            module.linear - torch.eye(QueryPredictor.FEATURES)[1, :, None]
            if name == "predictor_query"
            else module.down_bias
        )
        assert moved.abs().max().item() == pytest.approx(slow * 0.004, rel=0.02), name
    assert (
        len(rate) == len(t.s.params) == sum(1 for _ in t.s.model.selector.predictors.parameters())
    )


@pytest.mark.parametrize(
    "flags, want",
    [
        ([], ["predictor_query"]),
        (["--relevance=predictor"], ["predictor"]),
        (["--token_relevance=expected_attention"], ["expected_attention"]),
        (
            ["--relevance=predictor", "--token_relevance=predictor_query"],
            ["predictor", "predictor_query"],
        ),
        (
            ["--relevance=predictor", "--predictors=predictor_query,predictor"],
            ["predictor_query", "predictor"],
        ),
    ],
)
def test_which_predictors_are_trained(flags, want, tmp_path, text, base):
    """Those of --predictors, else those named as a signal, else predictor_query; the tail is 16
    tokens unless a flag says otherwise."""
    args = select_arguments(tmp_path / "run", text, base, *flags)
    args.given.discard("kv_tail")
    args.model = replace(args.model, block_size=45)
    w = trainer.World(0, 1, torch.device("cpu"))
    stage = select_stage(args, tmp_path / "run", w, load_base(args, base, w.device))
    assert (
        list(stage.model.selector.predictors) == want
        and stage.config["select"]["predictors"].split(",") == want
    )
    assert stage.kv.kv_tail == 4 and not any(
        p.requires_grad for n, p in stage.model.named_parameters() if not n.startswith("selector.")
    )


def test_preset_paper_selects_as_the_paper_does(tmp_path, text, base):
    """One mask for all layers in the native basis, a routed prefill, the paper's predictor and
    rule; a flag still wins."""
    args = select_arguments(
        tmp_path / "run", text, base, "--preset=paper", "--block_size=45", "--sinks=3"
    )
    w = trainer.World(0, 1, torch.device("cpu"))
    stage = select_stage(args, tmp_path / "run", w, load_base(args, base, w.device))
    kv = stage.kv
    select = stage.model.selector.cfg
    assert (kv.kv, kv.mask_scope, kv.value_basis, kv.prefill, kv.reconstructor) == (
        "select",
        "shared",
        "native",
        "routed",
        "zero",
    )
    assert (select.relevance, select.predictors, select.hedge, select.sinks) == (
        "predictor",
        "predictor",
        1.0,
        3,
    )


def test_resume_is_bitwise(tmp_path, text, base, monkeypatch, capsys):
    """Stopped by SIGTERM after 5 of 9 steps and resumed: the losses, validation losses and final
    tensors, the optimizer's included, of the unbroken run. Another predictor, rule of choosing,
    storage or rate is refused in one line that names it."""
    flags = ["--predictors=predictor,predictor_query", "--accumulation=2", "--eval_interval=3"]
    whole = select(tmp_path / "whole", text, base, *flags)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        before_step(m, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        select(tmp_path / "broken", text, base, *flags)
    broken = tmp_path / "broken" / whole.name
    assert checkpoint.newest(broken)[0].name == "step-00000005"
    for other in (
        "--predictors=predictor_query",
        "--hedge=0.25",
        "--n_groups=8",
        "--select_lr=0.02",
        "--select_batch_size=4",
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            select(tmp_path / "broken", text, base, *flags, other, "--resume")
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{other[2:]} with resume" in said
    select(tmp_path / "broken", text, base, *flags, "--resume")
    assert losses(broken) == losses(whole) and len(losses(whole)) == 9
    vals = [
        [
            (r["step"], repr(r["val_loss"]))
            for r in checkpoint.read_jsonl(f / "metrics.jsonl")
            if "val_loss" in r
        ]
        for f in (broken, whole)
    ]
    assert vals[0] == vals[1] and [s for s, _ in vals[0]] == [3, 6, 9]
    assert_equal(tensors(broken / "step-00000009"), tensors(whole / "step-00000009"))


def test_evaluation_does_not_change_training(tmp_path, text, base):
    """Validation after every step, after 7, or at the end alone, with samples in between: the same
    losses and final tensors."""
    stages = [
        select(tmp_path / str(n), text, base, f"--eval_interval={n}", f"--sample_interval={s}")
        for n, s in ((1, 0), (7, 4), (0, 0))
    ]
    for other in stages[1:]:
        assert losses(other) == losses(stages[0])
        assert_equal(tensors(other / "step-00000009"), tensors(stages[0] / "step-00000009"))
    assert (
        len({v for _, v in losses(stages[0])}) == 9
        and (stages[1] / "best").is_dir()
        and not (stages[2] / "best").exists()
    )


def test_selection_in_a_distilled_basis(tmp_path, text, base, run_stage, trainers):
    """--kv_from: the maps are those the other run ended with, layer weights are measured in them,
    the run's file is named in the checkpoint; keeping everything is the base, keeping less is not;
    stored and loaded, folded, it chooses and predicts as it did. Other groups, another basis or
    another base are refused."""
    first = run_stage(
        "adapt",
        tmp_path / "first",
        "--adapter=none",
        "--learn_basis",
        "--objective=distill",
        "--adapt_steps=7",
        "--adapt_lr=0.02",
    )
    ended = copies(kv_router.state(trainers[-1].s.model))
    flags = ["--learn_basis", f"--kv_from={first}", "--select_steps=3"]
    folder = select(tmp_path / "run", text, base, *flags)
    s = trainers[-1].s
    run = load_run(folder)
    dense = load_run(base).model
    x = tokens(3, 67, seed=6, vocab=257)
    assert_equal(copies(kv_router.state(s.model)), ended)
    assert (
        ended["layers.0.self_attn.kv_path.basis_fwd"]
        @ ended["layers.0.self_attn.kv_path.basis_bwd"]
        - torch.eye(16)
    ).abs().max() > 1e-3
    assert s.config["kv_from"] == checkpoint.tensor_hash(
        find_checkpoint(first), "adapter.safetensors"
    )
    measured = copies(s.model.selector.state_dict())
    pristine = selector.attach(load_run(base).model, s.kv, s.model.selector.cfg)
    kv_router.load_state(pristine, ended)
    batches = [data.batch(s.corpus.train, "calibrate", 0, i, 4, 32)[0] for i in range(6)]
    calibrate(pristine.selector, pristine, batches)
    fit_statistics(pristine, batches)
    found = []
    for state in (measured, pristine.selector.state_dict()):
        names = {k for k in state if not k.startswith("predictors.") or k.endswith(("mean", "std"))}
        found.append({k: state[k] for k in names})
    assert_equal(*found)
    assert {"output_gain", "layer_sensitivity", "rms"} < set(found[0])
    assert_equal(run.model.selector.state_dict(), measured)
    with torch.no_grad():
        want = dense(x)[:, 58:]
    for m in (s.model.eval(), run.model):
        assert (
            through_cache(m, x, 58, replace(run.select, kv_keep=1.0))[0] - want
        ).abs().max() < 1e-4 * want.abs().max()
    less = replace(run.select, kv_keep=0.3, relevance="predictor_query")
    got, live = (through_cache(m.double(), x, 58, less) for m in (run.model, s.model))
    assert (
        torch.equal(got[1].mask, live[1].mask)
        and (got[0] - live[0]).abs().max() < 1e-4 < (got[0] - want).abs().max()
    )
    for other, why in (
        (["--n_groups=8"], "other --kv settings"),
        (["--value_basis=pca"], "other --kv settings"),
        (["--learn_basis=false"], "other --kv settings"),
        (["--kv_layers=1"], "other --kv settings"),
    ):
        assert why in error_line(select, tmp_path / "no", text, base, *flags, *other)
    # no run of value groups
    assert "kv_from=" in error_line(
        select, tmp_path / "no", text, base, *flags, f"--kv_from={folder}"
    )
    stranger = pretrain(tmp_path / "x", text, "--pretrain_steps=1", "--seed=5")
    assert "another base" in error_line(select, tmp_path / "no", text, stranger, *flags)
    assert not (tmp_path / "no").exists()


def test_an_adapter_is_no_base(tmp_path, text, base, run_stage):
    """Predictors are trained on a base: an adapter's run is refused."""
    adapted = run_stage("adapt", tmp_path / "a", "--adapt_steps=1", "--adapter=lora", "--kv=dense")
    assert (
        "a base model is adapted" in error_line(select, tmp_path / "no", text, adapted)
        and not (tmp_path / "no").exists()
    )


def test_parts_of_windows_too_short_are_refused_before_training():
    """The least --shortest that the message names is enough for every kind of window, and one less
    is not."""
    kv = KVConfig(kv="select", kv_tail=16)
    for cfg, needed in (
        (SelectConfig(shortest=64, observers=40), 145),
        (SelectConfig(shortest=64, observers=60, readers=20), 184),
        (SelectConfig(shortest=64, recall=0.0), 145),
    ):
        assert f"give --shortest={needed} or more" in error_line(check_shortest, kv, cfg, 256)
        assert error_line(check_shortest, kv, replace(cfg, shortest=needed - 1), 2 * needed - 2)
        check_shortest(kv, replace(cfg, shortest=needed), 2 * needed)
    check_shortest(kv, SelectConfig(shortest=64), 100)  # is never cut


def test_a_window_too_short_for_its_readers(tmp_path, text, base):
    """Readers and query region that leave no context are refused in one line before a step is done,
    and nothing stays behind."""
    line = error_line(select, tmp_path / "no", text, base, f"--readers={32 - W}")
    assert (
        "some context must be left" in line
        and "--readers" in line
        and not (tmp_path / "no").exists()
    )


# ----------------------------------------------------------------------------- rows


@pytest.fixture
def measure(tmp_path, text, capsys):
    """measure(*flags): the rows that eval.py prints, without seconds; the last lines of stderr are
    in measure.err, its folder in .folder."""

    def go(*flags) -> list[dict]:
        capsys.readouterr()
        go.folder = tmp_path / "results"
        call(evaluation, f"--dataset={text}", f"--results={go.folder}", *flags)
        io = capsys.readouterr()
        go.err = io.err
        rows = json.loads(io.out.splitlines()[-1])
        assert rows == json.loads((go.folder / "results.json").read_text())
        return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

    return go


COMMON = [
    "--tasks=continuation",
    "--query=6",
    "--continuation=9",
    "--block_size=61",
    "--sequences=5",
    "--batch_size=2",
]
C = 61 - 9 - 6
LAST = 9  # context and continuation of those rows


def windows(text: str) -> torch.Tensor:
    """What those rows read."""
    return data.batch(
        data.prepare_splits(text, DataConfig(), tokenizer("byte"), ["val"])[0],
        "continuation",
        0,
        0,
        5,
        61,
    )[0]


def kept_by_hand(r: dict, layers: int, masks: int) -> None:
    """Assert a row's shares, from its budget alone: exact shares of C tokens and 4 groups under one
    budget for `masks` masks."""
    budget = dict(re.findall(r"(kv|tokens|groups)=(\S+)", r["relevance"]))
    of_context = (r["kv_kept_layers"] * 52 - (52 - C)) / C  # the query of 52 tokens stays whole
    if "kv" in budget:
        share = Fraction(budget["kv"])
        assert (
            share - Fraction(1, C * masks) <= Fraction(of_context).limit_denominator(10**6) <= share
        ), r
        assert r["token_keep"] * (1 + r["value_keep"]) / 2 == pytest.approx(of_context)
    else:
        kept = math.floor(Fraction(budget["tokens"]) * C * masks)
        pairs = math.floor(Fraction(budget["groups"]) * 4 * kept)
        assert r["token_keep"] == pytest.approx(kept / (C * masks)) and r[
            "value_keep"
        ] == pytest.approx(pairs / (4 * kept))
        assert of_context == pytest.approx((kept + pairs / 4) / (C * masks) / 2)
    assert r["kv_kept_model"] == pytest.approx((layers * r["kv_kept_layers"] + 2 - layers) / 2)


def test_rows_of_a_joint_grid(base, measure, text):
    """Training-free, signals x budgets: one row each in that order, each keeps at most its budget
    and less than one group of it per mask under it; the dense row is the base's own loss; a larger
    budget stores more; every row is that of its own call."""
    flags = [f"--init_from={base}", *COMMON, "--relevances=observed,random", "--bases=pca"]
    rows = measure(*flags, "--methods=dense,select", "--kv_budgets=0.37,0.11,1")
    assert [r["relevance"] for r in rows] == [
        "none",
        *(
            f"{n} kv={b} hedge=0.75" if b < 1 else "none"
            for n in ("observed", "random")
            for b in (0.37, 0.11, 1)
        ),
    ]
    assert [r["method"] for r in rows] == [
        "dense",
        "select",
        "select",
        "dense",
        "select",
        "select",
        "dense",
    ]
    dense = rows[0]
    assert (
        dense["value"]
        == Continuation(windows(text), 6, LAST).value(load_run(base).model, 2, "float32")
        == dense["dense_value"]
    )
    for r in rows[1:]:
        assert r["dense_value"] == dense["value"]
        assert r["dense_bytes"] == 2 * 4 * 4 * 52 * 2 * 16 * 2
        counts = 2 * 4 * 8  # the length of each sequence, in every layer
        assert dense["cache_bytes"] == r["dense_bytes"] + counts
        if r["method"] == "dense":  # everything kept
            assert (
                r["value"] == pytest.approx(dense["value"], abs=1e-6)
                and r["kv_kept_model"] == r["token_keep"] == r["value_keep"] == 1
            )
            continue
        kept_by_hand(r, layers=2, masks=4)
        assert (r["basis"], r["n_groups"], r["prefill"], r["setting"]) == (
            "pca",
            4,
            "exact",
            "pca S=4 mask:head budget:global",
        )
        assert (
            abs(r["value"] - dense["value"]) > 1e-4
            and r["n"] == 5 * (LAST - 1)
            and r["trainable_parameters"] == dense["trainable_parameters"]
        )
    assert rows[1]["cache_bytes"] > rows[2]["cache_bytes"] and rows[1]["value"] != rows[4]["value"]
    for name, i in (("observed", 1), ("random", 4)):
        for j, b in enumerate(("0.37", "0.11")):
            assert measure(
                f"--init_from={base}",
                *COMMON,
                "--bases=pca",
                f"--relevance={name}",
                f"--kv_budgets={b}",
            )[1:] == [rows[i + j]]


def test_pictures_of_a_grid_are_written(base, measure, pictures):
    """Each has something in it, and nothing else lies beside them but the rows and their making."""
    measure(f"--init_from={base}", *COMMON, "--methods=dense,select", "--kv_budgets=0.37,0.11")
    sizes = {p.name: p.stat().st_size for p in measure.folder.iterdir()}
    assert set(sizes) == {"results.json", "made.json", "report.png", "groups.png", "bytes.png"}
    assert min(sizes[n] for n in sizes if n.endswith("png")) > 5000


def test_rows_of_two_shares(base, measure):
    """Token signals x token budgets x value budgets, for each first compressed layer: floors of the
    shares, exactly, also of both; a layer left whole counts 1 in the whole model; a routed prefill
    says so; tokens all kept do not name who would keep them."""
    rows = measure(
        f"--init_from={base}",
        *COMMON,
        "--methods=select",
        "--relevances=uniform",
        "--token_relevances=snapkv,h2o",
        "--token_budgets=0.71,1",
        "--budgets=0.3,0.55",
        "--splits=0,1",
        "--allocation=layer",
    )
    texts = [
        f"{by}uniform tokens={t} groups={g} hedge=0.75"
        for by in ("snapkv/", "h2o/")
        for t in (0.71, 1)
        for g in (0.3, 0.55)
        if t < 1 or by == "snapkv/"
    ]
    texts = [t.replace("snapkv/", "") if "tokens=1 " in t else t for t in texts]
    assert [r["relevance"] for r in rows] == texts * 2
    for i, r in enumerate(rows):
        late = i >= len(texts)
        kept_by_hand(r, layers=1 if late else 2, masks=2)  # the heads of a layer share a budget
        assert r["setting"] == f"output S=4 mask:head budget:layer layers from:{int(late)}"
    routed = measure(
        f"--init_from={base}",
        *COMMON,
        "--methods=select",
        "--kv_budgets=0.4",
        "--prefill=routed",
        "--mask_scope=shared",
    )
    assert [(r["prefill"], r["setting"]) for r in routed] == [
        ("routed", "output S=4 mask:shared budget:global routed")
    ]
    kept_by_hand(routed[0], layers=2, masks=1)


def test_a_budget_too_small_for_a_token(base, measure):
    """Where not one token can be afforded nothing of the context is stored, the row says 0, and of
    the whole only the query is kept."""
    (row,) = measure(f"--init_from={base}", *COMMON, "--methods=select", "--kv_budgets=0.0001")
    assert (row["token_keep"], row["value_keep"]) == (0, 0)
    assert row["kv_kept_layers"] == pytest.approx((52 - C) / 52)
    assert row["cache_bytes"] < 0.25 * row["dense_bytes"]


def test_a_row_equals_its_oracle(selected, measure, text):
    """A trained run: loss and bytes of a row are those computed here, one logarithm at a time, from
    one uncached pass over the whole text that reads the context as the recorded choice kept it, and
    from a cache filled here; all predictors can choose, and each differently."""
    flags = [f"--out_dir={selected.folder}", *COMMON]
    rows = measure(
        *flags,
        "--methods=dense,select",
        f"--relevances={ALL.replace('expected_attention,', '')}",
        "--token_relevances=expected_attention",
        "--token_budgets=0.5",
        "--budgets=0.4",
    )
    assert [(r["method"], r["relevance"]) for r in rows] == [
        ("dense", "none"),
        *(
            ("select", f"expected_attention/{n} tokens=0.5 groups=0.4{hedge}")
            for n, hedge in (("predictor", ""), ("predictor_query", " hedge=0.75"))
        ),
    ]
    run = load_run(selected.folder)
    x = windows(text)
    model = run.model
    for r, name in zip(rows, ("all", "predictor", "predictor_query"), strict=True):
        cfg = (
            replace(run.select, kv_keep=1.0, relevance="uniform")
            if name == "all"
            else replace(
                run.select,
                relevance=name,
                token_relevance="expected_attention",
                token_keep=0.5,
                value_keep=0.4,
            )
        )
        _, choice, _ = through_cache(model, x, 52, cfg, kv_tail=6)
        with (
            torch.no_grad(),
            kv_router.storing(model, kv_tail=6),
            selector.masked_replay(model, choice, C),
        ):
            probs = model(x).softmax(-1)
        terms = [-math.log(probs[b, t, x[b, t + 1]]) for b in range(5) for t in range(52, 60)]
        assert r["value"] == pytest.approx(sum(terms) / len(terms), abs=2e-5)
        with torch.no_grad(), kv_router.storing(model, kv_tail=6):
            cache = model.new_cache(4, 52)
            model.prefill(x[:4, :52], cache)
        storages = [
            t.untyped_storage() for layer in cache.layers for t in layer.state_dict().values()
        ]
        assert r["cache_bytes"] == sum({t.data_ptr(): t.nbytes() for t in storages}.values())
        assert (
            r["trainable_parameters"] == run.config["trainable_parameters"]
            and r["dense_value"] == rows[0]["value"]
        )
    assert len({r["value"] for r in rows}) == 3 and {r["dense_bytes"] for r in rows} == {
        2 * 4 * 4 * 52 * 2 * 16 * 2
    }
    assert measure(*flags) == measure(
        *flags,
        "--methods=select",
        "--relevances=predictor_query",
        "--token_budgets=0.6",
        "--budgets=0.45",
    )
    assert rows[0]["value"] == pytest.approx(
        measure(f"--init_from={run.base}", *COMMON)[0]["value"], abs=1e-6
    )


@pytest.mark.parametrize(
    "on, flags, why",
    [
        ("base", ["--methods=select", "--tasks=perplexity"], "--tasks=continuation"),
        ("run", ["--tasks=perplexity,continuation"], "--tasks=continuation"),
        ("base", ["--methods=dense", "--kv_budgets=0.5"], "give --methods=select"),
        ("base", ["--methods=value_groups", "--hedge=1"], "give --methods=select"),
        (
            "base",
            ["--methods=select", "--tasks=continuation,needle", "--block_size=250", "--query=240"],
            "have no context then",
        ),
        (
            "base",
            ["--tasks=continuation", "--token_relevances=h2o,quest"],
            "no token is dropped by it",
        ),
        ("base", ["--tasks=continuation", "--kv_budgets=.5", "--fixed_k"], "chosen together there"),
        (
            "base",
            ["--tasks=continuation", "--kv_keep=.5", "--value_keep=.25"],
            "chosen together there",
        ),
        ("base", ["--methods=value_groups", "--mask_scope=shared"], "give layer or head"),
        ("run", ["--bases=native,pca"], "leave them out"),
        ("run", ["--n_groups=8"], "leave them out"),
        ("run", ["--splits=1"], "leave them out"),
        ("run", ["--methods=value_groups"], "name that, or give its base"),
        ("run", ["--methods=dense,value_groups"], "name that, or give its base"),
        (
            "base",
            ["--relevances=predictor_query", "--kv_budgets=0.5"],
            "train.py --stage=select --predictors=predictor_query",
        ),
        (
            "base",
            ["--relevances=observed,predictor", "--kv_budgets=0.5"],
            "train.py --stage=select --predictors=predictor",
        ),
        (
            "base",
            ["--token_relevances=expected_attention", "--token_budgets=0.5"],
            "train.py --stage=select --predictors=expected_attention",
        ),
        (
            "base",
            ["--predictors=predictor", "--relevances=predictor", "--kv_budgets=0.5"],
            "measuring trains nothing; leave it out, or train with train.py --predictors",
        ),
        ("base", ["--kv_budgets=0.5", "--query=0", "--observers=0"], "--query"),
        ("base", ["--kv_budgets=0.5", "--query=0", "--relevances=oracle"], "--query"),
        ("base", ["--splits=2", "--kv_budgets=0.5"], "layers are 0..1"),
        ("base", ["--kv_budgets=0.5", "--learn_basis"], "train.py --learn_basis"),
        ("base", ["--kv_budgets=0.5", "--prefill=routed"], "--allocation=layer"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_eval_refuses_what_selection_cannot(on, flags, why, base, selected, text, tmp_path):
    """What a base or a trained run cannot be asked: one line that says what to do, and no
    results."""
    where = [f"--init_from={base}"] if on == "base" else [f"--out_dir={selected.folder}"]
    assert why in error_line(
        call,
        evaluation,
        *where,
        f"--dataset={text}",
        *COMMON,
        f"--results={tmp_path / 'r'}",
        *flags,
    )
    assert not (tmp_path / "r").exists()


def test_a_predictor_the_run_does_not_have(tmp_path, text, base):
    """A run that trained one predictor is not asked for another."""
    folder = select(tmp_path / "run", text, base, "--select_steps=1")
    line = error_line(
        call,
        evaluation,
        f"--out_dir={folder}",
        f"--dataset={text}",
        *COMMON,
        "--relevances=predictor",
    )
    assert "it has not been trained" in line and "--predictors=predictor" in line


# ----------------------------------------------------------------------------- the groups figure


@pytest.mark.parametrize("n_context", [7, 131])
def test_groups_figure_shows_the_choice(n_context, tmp_path, monkeypatch, pictures):
    """Bars are the shares of tokens that keep 0 to S groups and sum to 1; the line is the mean kept
    at each rank by relevance, in bins."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    g = torch.Generator().manual_seed(1)
    S = 4
    keep = torch.rand(2, 1, 3, n_context, generator=g) < 0.7
    mask = (torch.rand(2, 1, 3, n_context, S, generator=g) < 0.5) & keep[..., None]
    score = torch.rand(2, 1, 3, n_context, generator=g).masked_fill(
        torch.arange(n_context) < 2, math.inf
    )
    made = []
    subplots = plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *a, **k: made.append(subplots(*a, **k)) or made[-1])
    groups_figure(tmp_path, selector.Selection(keep, mask, score), "by hand")
    fig, (left, right) = made[0]
    counts = [
        int(mask[i, 0, h, t].sum()) for i in range(2) for h in range(3) for t in range(n_context)
    ]
    assert [b.get_height() for b in left.patches] == pytest.approx(
        [counts.count(n) / len(counts) for n in range(S + 1)]
    )
    assert sum(b.get_height() for b in left.patches) == pytest.approx(1)
    rank = [
        [
            int(mask[i, 0, h, t].sum())
            for t in sorted(range(n_context), key=lambda t, i=i, h=h: -float(score[i, 0, h, t]))
        ]
        for i in range(2)
        for h in range(3)
    ]
    rank = [sum(r[j] for r in rank) / 6 for j in range(n_context)]
    width = max(1, n_context // 64)
    y = list(right.lines[0].get_ydata())
    # the two sinks tie: either may be first
    tied = [t for t in range(len(y)) if (t + 1) * width > 2]
    assert len(y) == n_context // width
    assert [y[t] for t in tied] == pytest.approx(
        [sum(rank[t * width : (t + 1) * width]) / width for t in tied]
    )
    assert (
        sum(y[:2]) * width <= 2 * S * width
        and (tmp_path / "groups.png").stat().st_size > 5000
        and fig.get_suptitle() == "by hand"
    )


# ----------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("distractors", [1, 4])
def test_reuse_asks_a_second_question(kind, distractors, length=613):
    """After the first question stands its answer, then the second question; the answer is the
    second place's number, which is not the first's; the second part is what `seconds` counts; all
    fit the budget, the seed alone decides, and the needle task's first answer stays."""
    tok = tokenizer(kind)
    task, again, other = (
        tasks.needle(tok, length, 25, seed, 16, distractors, reuse=True) for seed in (5, 5, 6)
    )
    assert (task.name, task.metric, task.n, task.query) == ("needle_reuse", "accuracy", 25, 16)
    assert (
        task.prompts == again.prompts
        and task.answers == again.answers
        and task.seconds == again.seconds
        and task.prompts != other.prompts
    )
    first = tasks.needle(tok, length, 25, 5, 16, distractors)
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        said = dict(re.findall(r"The lucky number of (\w+) is (\d)\.", text.split("\n\n")[0]))
        hay, one, two = text.split("\n\n")
        a, b = (
            re.fullmatch(
                r"What is the lucky number of (\w+)\? The lucky number of \1 is(?: (\d)\.)?", q
            )
            for q in (one, two)
        )
        assert (
            len(said) == distractors + 1
            and len(re.findall(r"\d", hay)) == distractors + 1
            and a[1] != b[1]
        )
        assert (
            a[2] == said[a[1]] == str(first.answers[i])
            and b[2] is None
            and str(answer) == said[b[1]] != a[2]
        )
        assert (
            task.seconds[i] == len(tok.encode(f" {a[2]}.\n\n{two}"))
            and 0.9 * (length - 10) < len(task.prompts[i]) <= length - 10
        )
        before = read(
            SimpleNamespace(prompts=[task.prompts[i][: -task.seconds[i]]], tokenizer=tok), 0
        )
        assert before == text[: text.rindex(f" {a[2]}.\n\n")] and before.endswith(
            f"The lucky number of {a[1]} is"
        )
    assert len(set(task.answers)) > 3 and len(set(task.seconds)) > 1


def test_needle_is_what_it_was():
    """Without a second question prompts and answers are, byte for byte, those made before there was
    one."""
    made = [
        tasks.needle(tokenizer("byte"), 513, 5, seed, 16, d) for seed in (0, 1, 17) for d in (0, 3)
    ]
    text = json.dumps([[t.prompts, t.answers] for t in made])
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "f55a934362dbf0a66c0f5dc3e426ed1312a666fba5411c0e616c4ee0dd2746f4"
    )
    assert all(type(t) is tasks.Needle for t in made)


def test_reuse_compresses_for_the_first_question(selected, monkeypatch):
    """Prompts of one second question's length go together, every prompt once; the first call ends
    with the first question, whose tail alone stays whole, the second call is the first answer and
    the second question, unpadded; dense, the generated text is that of the same prompts asked
    directly."""
    run = load_run(selected.folder)
    task = tasks.needle(run.tokenizer, 453, 9, 2, 16, 3, reuse=True)
    calls = []
    chosen = []
    prefill = Transformer.prefill
    choose = run.model.selector.choose

    def recorded_prefill(m, idx, *args, **kwargs):
        calls.append(idx.clone())
        return prefill(m, idx, *args, **kwargs)

    def recorded_choice(prompt):
        chosen.append((prompt.T, prompt.n_context, prompt.pad))
        return choose(prompt)

    monkeypatch.setattr(Transformer, "prefill", recorded_prefill)
    monkeypatch.setattr(run.model.selector, "choose", recorded_choice)
    with kv_router.storing(run.model, kv_tail=16):
        task.value(run.model, 2, "float32")
    batches = sum(cdiv(task.seconds.count(m), 2) for m in set(task.seconds))
    assert len(set(task.seconds)) > 1 and len(calls) == 2 * len(chosen) == 2 * batches
    asked = []
    for first, second, (T, n_context, pad) in zip(calls[::2], calls[1::2], chosen, strict=True):
        assert (T, n_context) == (first.size(1), first.size(1) - 16)
        for b, (one, two) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            one = one[0 if pad is None else int(pad[b]) :]
            place = re.search(r"number of (\w+) is$", bytes(one).decode())
            assert place and re.fullmatch(
                r" \d\.\n\nWhat is the lucky number of (\w+)\? The lucky number of \1 is",
                bytes(two).decode(),
            )
            asked.append(one + two)
    assert sorted(asked) == sorted(task.prompts)
    monkeypatch.undo()
    heard = []
    score = tasks.Needle.score
    monkeypatch.setattr(
        tasks.Needle,
        "score",
        staticmethod(lambda text, answer: (heard.append((text, answer)), score(text, answer))[1]),
    )
    dense = load_run(run.base).model
    got = [
        task.value(dense, 4, "float32"),
        tasks.Needle(task.prompts, task.answers, 16, run.tokenizer, task.room).value(
            dense, 4, "float32"
        ),
    ]
    assert (
        got[0] == got[1]
        and len(heard) == 18
        and sorted(heard[:9]) == sorted(heard[9:])
        and len({t for t, _ in heard}) > 3
    )


def test_eval_says_what_a_second_question_gets(base, measure):
    """eval.py prints the value of both questions for every way to choose, though the two tasks'
    prompts differ in length."""
    rows = measure(
        f"--init_from={base}",
        *NEEDLES,
        "--tasks=needle,needle_reuse",
        "--kv_budgets=0.31,0.17",
        "--relevances=observed",
        "--query=8",
    )
    assert [(r["task"], r["method"]) for r in rows] == [
        ("needle", "dense"),
        ("needle_reuse", "dense"),
    ] + [("needle", "select")] * 2 + [("needle_reuse", "select")] * 2
    for i, budget in enumerate(("0.31", "0.17")):
        line = (
            f"observed kv={budget} hedge=0.75: first question {rows[2 + i]['value']:.3f}, second "
            f"{rows[4 + i]['value']:.3f}"
        )
        assert line in measure.err.splitlines()
    rows = [{**r, "value": v} for r, v in zip(rows, (1, 1, 0.75, 0.5, 0.25, 0.125), strict=True)]
    note = reuse_note(rows)
    assert (
        "kv=0.31 hedge=0.75: first question 0.750, second 0.250" in note
        and "kv=0.17 hedge=0.75: first question 0.500, second 0.125" in note
    )
    assert reuse_note(rows[:4]) == reuse_note(rows[:2]) == ""


# ----------------------------------------------------------------------------- programs


@pytest.mark.parametrize("trained", [False, True], ids=["random", "run"])
def test_bench_select(trained, selected, capsys, monkeypatch):
    """Three rows: a dense prefill, one with selection, the choice alone; times and ratios are
    positive, the dense one's is 1."""
    flags = (
        [f"--out_dir={selected.folder}"]
        if trained
        else ["--n_layer=2", "--n_embd=32", "--n_head=4", "--n_kv_head=2", "--head_dim=16"]
    )
    monkeypatch.setattr(
        bench,
        "CONFIGS",
        {"bench": BenchConfig, "model": ModelConfig, "base": BaseConfig},
        raising=False,
    )
    call(bench, "--what=select", "--steps=2", "--batch_size=3", "--block_size=77", *flags)
    io = capsys.readouterr()
    rows = json.loads(io.out)
    rule = (
        "predictor_query tokens=0.6 groups=0.45 hedge=0.75"
        if trained
        else "future kv=0.25 hedge=0.75"
    )
    assert [r["impl"] for r in rows] == [
        "dense",
        f"select: {rule}",
        f"choose: {rule}",
    ] and io.err.count("\n") == 3
    assert rows[0]["ratio"] == 1 and all(
        r["ms"] > 0 and r["ratio"] > 0 and r["tokens_per_s"] > 0 for r in rows
    )
    assert rows[2]["ms"] < rows[1]["ms"] and {r["shape"] for r in rows} == {
        "B3 T77 L2 d32 H4/2 D16"
    }


def test_sample_from_a_select_run(selected, capsys):
    """Text is generated, and the bytes said are fewer than a dense cache's for a prompt much longer
    than the tail, not for a short one."""
    for prompt, less in (("every token counts " * 12, True), ("a", False)):
        call(
            sample,
            f"--out_dir={selected.folder}",
            f"--prompt={prompt}",
            "--max_new_tokens=11",
            "--temperature=0",
        )
        io = capsys.readouterr()
        said = r"(\d+) tokens in .* held ([\d,]+) bytes for (\d+) tokens(?: a row)?, ([\d.]+)% of"
        n, held, length, share = re.search(said, io.err.strip()).groups()
        held = int(held.replace(",", ""))
        dense = 2 * 4 * int(length) * 2 * 16 * 2  # float32
        assert io.out.startswith(prompt) and int(n) <= 11
        # counts have 8 bytes whatever numbers are computed in, so their share is larger in 16 bits
        assert held / dense <= float(share) / 100 < held / dense + 0.2
        assert (held < 0.75 * dense) if less else (held >= dense)


# ----------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("relevance", ["future", "predictor_query", "predictor"])
def test_the_device_chooses_as_the_cpu(relevance, dtype):
    """Of a prompt at least 99 % of the pairs, under bfloat16 autocast too, are kept or dropped as
    on the CPU in float32; in float32 the packed logits equal the masked ones to 1e-3."""
    x = tokens(3, 119, seed=3)
    made = []
    kv = KVConfig(kv="select", kv_tail=9)
    cfg = SelectConfig(relevance=relevance, kv_keep=0.4, readers=20, past=16)
    batches = [tokens(2, 70, seed=1)]
    model = selector.attach(tiny_model(dtype=torch.float32), kv, cfg, batches)
    fit_statistics(model, batches)
    torch.manual_seed(2)
    for p in model.selector.predictors.values():
        randomise(p, 0.1)
    for device in ("cpu", "cuda"):
        model = model.to(device)
        x = x.to(device)
        with autocast(torch.device(device), dtype if device == "cuda" else "float32"):
            made.append(through_cache(model, x, 110, kv_tail=9))
    (_, a, _), (logits, b, _) = made
    same = (a.mask == b.mask.cpu()).float().mean().item()
    assert same >= 0.99, same
    if dtype == "float32":
        with torch.no_grad(), selector.masked_replay(model, b, 101):
            want = model(x)[:, 110:]
        assert (logits - want).abs().max() < 1e-3 * want.abs().max()
    assert TINY.n_layer == 2 and logits.isfinite().all()
