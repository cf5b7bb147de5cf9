"""train.py --stage=select: predictors trained, stored and resumed, and what it refuses."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from helpers import error_line, tokens
from select_runs import (  # noqa: F401 (fixtures)
    ALL,
    READERS,
    W,
    base,
    select,
    select_arguments,
    selected,
    through_cache,
    weights,
)

import data
import kv_router
import selector
from config import KVConfig, SelectConfig
from loaders import checkpoint
from loaders.runs import find_checkpoint, load_run, split_added
from runs import assert_equal, before_step, copies, losses, pretrain, tensors
from selection.calibration import calibrate
from selection.predictors import QueryPredictor
from selection.training import fit_statistics, predictor_loss
from settings.fields import to_dict
from training import loop as trainer
from training.base import load_base
from training.predictors import check_shortest, check_window, select_stage

pytestmark = pytest.mark.usefixtures("own_cache")


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


@pytest.mark.parametrize(
    "flags, says, advice",
    [
        ([f"--readers={32 - W}"], "some context must be left, so 33 are n", "fewer --readers"),
        (["--recall=0.5", "--observers=3"], "a question needs 74", "--recall=0"),
    ],
)
def test_a_window_too_short_for_its_readers(flags, says, advice, tmp_path, text, base, capsys):
    """Readers and query region that leave no context, and questions that do not fit, are refused in
    one line before anything is read or calibrated, and nothing stays behind. A larger window is
    advised where the model has room for it."""
    line = error_line(select, tmp_path / "no", text, base, "--block_size=32", *flags)
    assert says in line and line.endswith(f"; give {advice}, or a larger --block_size")
    assert "calibrating" not in capsys.readouterr().err and not (tmp_path / "no").exists()
    kv = KVConfig(kv="select", kv_tail=16)
    for cfg in (SelectConfig(), SelectConfig(readers=9)):
        line = error_line(check_window, kv, replace(cfg, observers=60), 128, 128)
        assert "--block_size" not in line
    check_window(kv, SelectConfig(readers=111), 128, 128)
