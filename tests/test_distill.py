"""Learned value bases: what distillation measures, trains and leaves alone, and that a trained run
is stored and resumed as it was."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import kv_router
import train
from loaders import checkpoint
from loaders.runs import load_run
from runs import (
    adapt_arguments,
    arguments,
    assert_equal,
    before_step,
    copies,
    losses,
    rows_without_time,
    sharpened,
    tensors,
)
from settings.train import DataConfig
from tasks.text import Perplexity
from training import loop as trainer
from training.adapters import adapt_stage, adaptation
from training.base import load_base
from training.distillation import distillation_loss

DISTILL = ["--adapter=none", "--learn_basis", "--objective=distill"]
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def base(base, tmp_path_factory) -> Path:
    """The pretrained stage with random weights so large that its predictions depend on what
    attention reads."""
    return sharpened(base, tmp_path_factory.mktemp("sharp") / "pretrain")


@pytest.fixture
def distill_stage(tmp_path, text, base):
    """distill_stage(*flags): a stage that distils the value basis of the base, and its
    TrainConfig."""

    def make(*flags):
        args = adapt_arguments(tmp_path / "stage", text, base, *DISTILL, *flags)
        w = trainer.World(0, 1, torch.device("cpu"))
        loaded = load_base(args, base, w.device)
        stage = adapt_stage(args, tmp_path / "stage", w, loaded, adaptation(args, name="s"))
        stage.model.train()
        return stage, args.train

    return make


def loss_of(stage, x) -> torch.Tensor:
    return distillation_loss(stage.model, stage.kv, stage.model, x)


def batch_of(stage) -> torch.Tensor:
    return data.batch(stage.corpus.train, "train", 0, 0, 5, stage.window)[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv_tail=0"],
        ["--value_basis=pca", "--n_groups=8", "--topk_groups=1", "--reconstructor=mlp"],
    ],
    ids=["zero", "mlp"],
)
def test_distillation_loss_is_the_divergence_from_the_base(flags, distill_stage, base):
    """The loss is the mean over tokens of sum p (log p - log q) with p the untouched base's
    predictions and q those of routed values, summed here one token at a time in float64."""
    stage, _ = distill_stage(*flags)
    x = batch_of(stage)
    got = loss_of(stage, x).item()
    with torch.no_grad():
        p, q = (m(x).double().softmax(-1) for m in (load_run(base).model, stage.model.eval()))
    terms = [
        sum(float(a * (a.log() - b.log())) for a, b in zip(p[i, t], q[i, t], strict=True))
        for i in range(len(x))
        for t in range(x.size(1))
    ]
    assert got == pytest.approx(sum(terms) / len(terms), rel=1e-3) and got > 1e-4


def test_distillation_loss_is_zero_when_nothing_is_dropped(distill_stage):
    """K = S: exactly zero, whatever the maps have become; every token in the dense tail: zero to
    float64's rounding; else not zero."""
    for flags, most in (([], 0.0), (["--kv_tail=32"], 1e-13), (["--kv_tail=31"], math.inf)):
        stage, _ = distill_stage(*flags)
        if not flags:
            stage.kv = replace(stage.kv, topk_groups=4)
        stage.model.double()
        with torch.no_grad():
            for p in stage.params:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        loss = abs(loss_of(stage, batch_of(stage)).item())
        assert loss <= most and (loss > 1e-9) == (most == math.inf)


def test_distillation_reaches_the_maps_only(distill_stage):
    """Trained are enc and dec of every layer and nothing else; each gets a gradient, a base weight
    none, and the teacher passes none: it equals that of the divergence from predictions computed
    beforehand."""
    stage, cfg = distill_stage("--kv_tail=0")
    names = {p: n for n, p in stage.model.named_parameters()}
    assert sorted(names[p] for p in stage.params) == [
        f"layers.{i}.self_attn.kv_path.{m}" for i in (0, 1) for m in ("dec", "enc")
    ]
    trainer.gradients(stage, stage.model, 0, cfg, trainer.World(0, 1, torch.device("cpu")), False)
    assert {p for p in names if p.grad is not None} == set(stage.params) and all(
        p.grad.abs().max() > 0 for p in stage.params
    )
    x = batch_of(stage)
    got = torch.autograd.grad(loss_of(stage, x), stage.params)
    kv_router.set_kept(stage.model, stage.kv.n_groups)
    p = stage.model(x).detach().softmax(-1)
    kv_router.set_kept(stage.model, stage.kv.topk_groups)
    want = torch.autograd.grad(
        (p * (p.log() - stage.model(x).log_softmax(-1))).sum(-1).mean(), stage.params
    )
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_distillation_lowers_its_loss_and_leaves_the_base(tmp_path, base, run_stage, trainers):
    """Thirty steps lower the divergence by a fifth at least, on text not trained on too; every
    weight of the base keeps its bits, in memory and on disk; with everything kept the trained run
    is the base."""
    on_disk = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    stage = run_stage(
        "adapt",
        tmp_path / "run",
        *DISTILL,
        "--adapt_steps=30",
        "--adapt_lr=0.01",
        "--topk_groups=1",
        "--weight_decay=0.1",
    )
    trace = [float(v) for _, v in losses(stage)]
    assert sum(trace[-5:]) < 0.8 * sum(trace[:5])
    s = trainers[-1].s
    x = data.sequential(s.corpus.val, 6, 32)[0]
    fresh = load_run(base).model
    mine = s.model.state_dict()
    assert_equal(
        {k: t for k, t in mine.items() if ".kv_path." not in k}, copies(fresh.state_dict())
    )
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == on_disk
    with torch.no_grad():
        s.model.eval()
        after = loss_of(s, x).item()
        run = load_run(stage)
        kv_router.set_kept(run.model, 4)
        assert (run.model(x) - fresh(x)).abs().max() < 1e-4
        kv_router.set_kept(s.model, 4)
        assert torch.equal(s.model(x), fresh(x))
        kv_router.attach(
            fresh,
            s.kv,
            [data.batch(s.corpus.train, "calibrate", 0, i, 16, 32)[0] for i in range(2)],
            0,
        )
        s.model = fresh
        before = loss_of(s, x).item()
    assert after < 0.9 * before


def test_a_distilled_run_folds_and_packs(tmp_path, run_stage, trainers):
    """What load_run puts together from a trained run has the maps folded into its weights: its
    logits are the trained model's to 1e-5, and so are those read from its packed cache, token by
    token."""
    stage = run_stage(
        "adapt",
        tmp_path / "run",
        *DISTILL,
        "--adapt_steps=12",
        "--adapt_lr=0.01",
        "--prefill=routed",
    )
    trained = trainers[-1].s.model.eval()
    run = load_run(stage)
    path = run.model.layers[1].self_attn.kv_path
    assert (
        path.folded
        and (path.enc - torch.eye(path.D)).abs().max() > 1e-3
        and not list(path.parameters())
    )
    x = torch.randint(257, (3, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = trained(x)
        cache = run.model.new_cache(3, 31)
        got = torch.cat([run.model.decode(x[:, t : t + 1], cache) for t in range(31)], 1)
        uncached = run.model(x)
    for logits in (uncached, got):
        assert (logits - want).abs().max() < 1e-5 * want.abs().max()
    assert cache.nbytes() < run.model.dense_bytes(3 * 31, cache)


@pytest.mark.parametrize(
    "flags",
    [[*DISTILL, "--accumulation=2"], ["--adapter=routed", "--learn_basis", "--lora_dropout=0.1"]],
    ids=["distill", "lm-routed"],
)
def test_learned_basis_resumes_bitwise(flags, tmp_path, run_stage, monkeypatch, capsys):
    """20 steps, SIGTERM and --resume end with the losses and final tensors, maps and moments
    included, of 30 unbroken steps; another objective is not continued."""
    flags = [*flags, "--adapt_steps=30", "--eval_interval=6"]
    whole = run_stage("adapt", tmp_path / "whole", *flags)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        before_step(m, 19, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_stage("adapt", tmp_path / "broken", *flags)
    broken = tmp_path / "broken" / whole.name
    assert checkpoint.newest(broken)[0].name == "step-00000020"
    run_stage("adapt", tmp_path / "broken", *flags, "--resume")
    assert losses(broken) == losses(whole) and len(losses(whole)) == 30
    assert_equal(tensors(broken / "step-00000030"), tensors(whole / "step-00000030"))
    if "--objective=distill" in flags:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run_stage("adapt", tmp_path / "broken", *flags, "--objective=lm", "--resume")
        assert "objective=lm with resume" in capsys.readouterr().err


def test_distillation_means_the_same_batch(distill_stage):
    """Any number of micro-steps gives the gradients of one pass over 11 sequences."""
    stage, cfg = distill_stage("--adapt_batch_size=11", "--grad_clip=0")
    w = trainer.World(0, 1, torch.device("cpu"))
    grads = []
    for n in (1, 2, 3, 40):
        for p in stage.params:
            p.grad = None
        trainer.gradients(stage, stage.model, 3, replace(cfg, accumulation=n), w, False)
        grads.append([p.grad.clone() for p in stage.params])
    for other in grads[1:]:
        assert all((a - b).norm() < 2e-4 * b.norm() for a, b in zip(other, grads[0], strict=True))


def test_adaptation_starts_from_trained_value_groups(tmp_path, text, base, run_stage, trainers):
    """--kv_from: step 0 has the maps that the other run ended with, not calibrated ones; its file's
    hash is in the checkpoint, and --resume starts from it again; another base or other settings are
    refused."""
    first = run_stage("adapt", tmp_path / "first", *DISTILL, "--adapt_steps=9", "--adapt_lr=0.01")
    ended = {k: t.clone() for k, t in kv_router.state(trainers[-1].s.model).items()}
    flags = [
        "--adapter=lora",
        "--kv=value_groups",
        "--learn_basis",
        f"--kv_from={first}",
        "--adapt_steps=1",
        "--adapt_lr=1e-12",
        "--weight_decay=0",
    ]
    stage = run_stage("adapt", tmp_path / "second", *flags)
    began = kv_router.state(trainers[-1].s.model)
    assert all((began[k] - ended[k]).abs().max() < 1e-9 for k in ended)
    began_from = checkpoint.tensor_hash(first / "step-00000009", "adapter.safetensors")
    assert checkpoint.load(stage / "step-00000001").config["kv_from"] == began_from
    run_stage("adapt", tmp_path / "second", "--resume")
    assert trainers[-1].s.config["kv_from"] == began_from and trainers[-1].step == 1
    with pytest.raises(ValueError, match="other --kv settings"):
        run_stage("adapt", tmp_path / "no", *flags, "--topk_groups=1")
    other = train.run(
        adapt_arguments(
            tmp_path / "x",
            text,
            base,
            "--stage=pretrain",
            "--init_from=scratch",
            "--pretrain_steps=1",
            "--seed=5",
        )
    )
    assert other is None
    with pytest.raises(ValueError, match="another base"):
        run_stage("adapt", tmp_path / "no", *flags, f"--init_from={tmp_path / 'x' / 'pretrain'}")
    assert not (tmp_path / "no").exists()


def test_table_on_a_given_base(tmp_path, text, base, monkeypatch):
    """stage=all with --init_from=<a pretrain stage's folder>, --test_dataset and --distill_steps:
    nothing is pretrained, the basis is distilled once and every sub-token row starts from it, the
    base is untouched, and all numbers are those of the whole test text."""
    other = tmp_path / "other"
    other.mkdir()
    for i in range(4):
        (other / f"{i}.txt").write_text(f"{'abcd'[i]} quick brown fox {i}. " * 12)
    on_disk = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    began = []
    attach_state = kv_router.load_state
    monkeypatch.setattr(
        kv_router,
        "load_state",
        lambda model, saved: (began.append(copies(saved)), attach_state(model, saved))[1],
    )
    flags = [
        "--stage=all",
        f"--adapt_dataset={text}",
        f"--test_dataset=text:{other}",
        "--test_sequences=999",
        "--adapt_steps=2",
        "--seeds=2",
        "--max_minutes=99",
        "--learn_basis",
        "--distill_steps=3",
        "--distill_lr=0.01",
    ]
    train.run(arguments(*flags, f"--out_dir={tmp_path / 'run'}", f"--init_from={base}"))
    run = tmp_path / "run"
    kinds = ("lora", "moe_lora", "routed")
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == sorted(
        ["distill", *(f"{k}-s{i}" for k in kinds for i in (0, 1))]
    )
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == on_disk
    rows = rows_without_time(run)
    size = sum(len(p.read_bytes()) + 1 for p in other.iterdir())
    assert {r["n"] for r in rows} == {(size - 1) // 32 * 32}
    main = [r for r in rows if "sweep" not in r["name"]]
    assert [r["name"] for r in main] == ["base", *["LoRA", "MoE-LoRA", "sub-token"] * 2] and all(
        math.isfinite(r["value"]) for r in rows
    )
    assert {r["basis"] for r in rows if r["name"].startswith("sub-token")} == {"output+"}
    distilled = checkpoint.load(run / "distill" / "step-00000003")
    assert (
        distilled.config["objective"] == "distill"
        and distilled.config["base_sha256"] == load_run(base).base_sha256
    )
    want = distilled.tensors["adapter"]
    starts = [
        s for s in began if s.keys() == want.keys() and all(torch.equal(s[k], want[k]) for k in s)
    ]
    assert len(starts) == 2
    for i in (0, 1):
        c = checkpoint.load(run / f"routed-s{i}" / "step-00000002").config
        assert c["objective"] == "lm" and c["kv_from"] == checkpoint.tensor_hash(
            run / "distill" / "step-00000003", "adapter.safetensors"
        )
    dense = load_run(base)
    (text_file,) = data.prepare_splits(f"text:{other}", DataConfig(), dense.tokenizer, ["all"])
    value = Perplexity(*data.sequential(text_file, 999, 32)).value(dense.model, 16, "float32")
    assert main[0]["value"] == pytest.approx(value, rel=1e-6)
