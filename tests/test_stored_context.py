"""Adapters trained on continuations of a stored context: what the loss is, what it trains and
leaves alone, that a run is stored and resumed as it was, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, tiny_model, tokens

import data
import eval as evaluation
import lora
import train
from config import KVConfig, SelectConfig
from loaders import checkpoint
from loaders.runs import attach_storage, find_checkpoint, load_run
from runs import (
    adapt_arguments,
    arguments,
    assert_equal,
    before_step,
    call,
    copies,
    losses,
    pretrain,
    sharp_stage,
    tensors,
)
from settings.adapters import AdapterConfig
from storage.cache import NewTokens
from training import distillation
from training import loop as trainer
from training.adapters import adapt_stage, adaptation
from training.base import load_base
from training.distillation import by_budget, continuation_loss, of_one_budget

pytestmark = pytest.mark.usefixtures("own_cache")
WINDOW = 96
CONTEXT = 72
BUDGETS = "0.3,0.2"
STORED = [
    "--kv=select",
    "--adapter=lora",
    "--lora_targets=q,o",
    "--r=2",
    "--objective=distill",
    f"--kv_byte_budgets={BUDGETS}",
    f"--block_size={WINDOW}",
    "--adapt_batch_size=4",
    "--eval_sequences=4",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, text) -> Path:
    """A pretrained stage with random weights so large that its predictions depend on what
    attention reads."""
    return sharp_stage(tmp_path_factory.mktemp("sharp"), text, f"--block_size={WINDOW}")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, text, base) -> Path:
    """A run of --stage=select on the base."""
    folder = tmp_path_factory.mktemp("chosen")
    flags = ["--recall=0", "--readers=7", "--kv_tail=3", "--observers=5", "--kv_sinks=2"]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        flags = [*flags, f"--block_size={WINDOW}"]
        steps = ["--select_steps=2", "--select_batch_size=2", "--eval_sequences=2", "--n_groups=4"]
        places = [f"--dataset={text}", f"--out_dir={folder / 'run'}", f"--init_from={base}"]
        train.run(arguments("--stage=select", *places, *flags, *steps))
    return folder / "run"


@pytest.fixture
def stored_stage(tmp_path, text, base, chosen):
    """stored_stage(*flags): a stage that adapts the base to what the selection stores, and its
    TrainConfig."""

    def make(*flags):
        flags = [*STORED, f"--kv_from={chosen}", *flags]
        args = adapt_arguments(tmp_path / "stage", text, base, *flags)
        w = trainer.World(0, 1, torch.device("cpu"))
        stage = adapt_stage(
            args, tmp_path / "stage", w, load_base(args, base, w.device), adaptation(args)
        )
        stage.model.train()
        return stage, args.train

    return make


def batch_of(stage, n: int = 5, step: int = 0) -> torch.Tensor:
    return data.batch(stage.corpus.train, "train", 0, step, n, stage.window)[0]


def shaken(stage):
    """The stage with adapters that do something, in float64."""
    stage.model.double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in stage.params:
            p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return stage


def loss_of(stage, x) -> torch.Tensor:
    total = 0.0
    for windows, _, budget in of_one_budget([(x, x)], stage.byte_budgets):
        loss = continuation_loss(stage.model, windows, budget, stage.n_context)
        total = total + loss * (len(windows) / len(x))
    return total


@pytest.mark.parametrize("targets", ["q,o", "q,k,v,o,gate,up,down"])
def test_loss_is_the_divergence_of_tokens_read_one_by_one(targets, stored_stage, base):
    """The loss is the mean over a continuation's tokens of sum p (log p - log q), p the untouched
    base's predictions and q those of the adapted model that decodes token by token after each
    window's context was packed at its own budget, summed in float64."""
    stage, _ = stored_stage("--lora_dropout=0", f"--lora_targets={targets}")
    model = shaken(stage).model
    x = batch_of(stage)
    assert stage.n_context == CONTEXT and stage.window == WINDOW
    got = loss_of(stage, x).item()
    teacher = load_run(base).model.double()
    terms = []
    drawn = {}
    for budget, windows in by_budget(x, stage.byte_budgets).items():
        model.selector.set(replace(model.selector.cfg, kv_bytes=budget))
        drawn[budget] = len(windows)
        for row in windows.split(1):
            with torch.no_grad():
                p = teacher(row)[0].softmax(-1)
                cache = model.eval().new_cache(1, WINDOW)
                model.prefill(row[:, :CONTEXT], cache)
                for t in range(CONTEXT, WINDOW):
                    q = model.decode(row[:, t : t + 1], cache)[0, -1].log_softmax(-1)
                    terms.append(float((p[t] * (p[t].log() - q)).sum()))
    assert len(drawn) == 2 and sum(drawn.values()) == len(x)
    assert got == pytest.approx(sum(terms) / len(terms), rel=1e-9) and got > 1e-3


def test_gradients_are_those_of_finite_differences(stored_stage, monkeypatch):
    """Two elements of every adapter: while the context stays as it was stored once, the gradient
    is the central difference of the loss to 1e-5 of the largest."""
    stage, _ = stored_stage("--lora_dropout=0", "--lora_targets=q,k,v,o", "--kv_byte_budgets=0.3")
    model = shaken(stage).model
    x = batch_of(stage, 2)
    grads = torch.autograd.grad(loss_of(stage, x), stage.params)
    model.selector.set(replace(model.selector.cfg, kv_bytes=0.3))
    with torch.no_grad():
        stored = model.eval().new_cache(*x.shape)
        model.prefill(x[:, :CONTEXT], stored)
    as_stored = stored.snapshot()
    read = model.prefill

    def read_on(idx, cache, **flags):
        if idx.size(1) == CONTEXT:
            return None
        stored.restore(as_stored)
        return read(idx, stored, **flags)

    monkeypatch.setattr(model, "prefill", read_on)
    largest = max(g.abs().max() for g in grads)
    g = torch.Generator().manual_seed(0)
    for p, grad in zip(stage.params, grads, strict=True):
        for at in torch.randint(p.numel(), (2,), generator=g).tolist():
            sides = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    p.view(-1)[at] += step
                    sides.append(loss_of(stage, x).item())
                    p.view(-1)[at] -= step
            want = (sides[0] - sides[1]) / 2e-5
            assert abs(grad.view(-1)[at] - want) < 1e-5 * largest
    assert all(grad.abs().max() > 0 for grad in grads)


def test_keeping_everything_is_no_loss_and_no_gradient(stored_stage):
    """Fresh adapters and a context that is kept whole: the divergence and its gradient are zero to
    float64's rounding; at a budget they are not."""
    stage, _ = stored_stage("--lora_dropout=0")
    model = stage.model.double()
    x = batch_of(stage)
    rule = model.selector.cfg
    for budgets, cfg in (([0.0], rule.everything()), ([0.3], rule)):
        model.selector.set(cfg)
        stage.byte_budgets = budgets
        loss = loss_of(stage, x)
        grads = torch.autograd.grad(loss, stage.params)
        largest = max(g.abs().max().item() for g in grads)
        assert (abs(loss.item()) < 1e-12) == (largest < 1e-9) == (budgets == [0.0])


def test_in_bfloat16_loss_and_gradients_are_near_those_of_float32(stored_stage):
    """Under autocast a context is stored and read as a GPU trains: every gradient points where that
    of float32 does."""
    stage, _ = stored_stage()
    shaken(stage).model.float()
    x = batch_of(stage)
    found = []
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = loss_of(stage, x)
        found.append((loss.item(), torch.autograd.grad(loss, stage.params)))
    (wide, grads), (narrow, narrow_grads) = found
    assert narrow == pytest.approx(wide, rel=0.1)
    for a, b in zip(grads, narrow_grads, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.9


def test_adapters_alone_are_trained_and_the_teacher_has_none(stored_stage, base):
    """Trained are the adapters, each gets a gradient and nothing else does; what the loss is
    measured against is bit for bit what the base says, however far the adapters are; after it, and
    after a failure inside, they are on again."""
    stage, cfg = stored_stage()
    names = {p: name for name, p in stage.model.named_parameters()}
    assert all(names[p].rsplit(".", 1)[1] in ("lora_A", "lora_B") for p in stage.params)
    w = trainer.World(0, 1, torch.device("cpu"))
    with torch.no_grad():
        for p in stage.params:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    trainer.gradients(stage, stage.model, 0, cfg, w, False)
    assert {p for p in names if p.grad is not None} == set(stage.params)
    assert all(p.grad.abs().max() > 0 for p in stage.params)
    x = batch_of(stage)
    with torch.no_grad():
        adapted = stage.model.eval()(x)
        with lora.switched_off(stage.model):
            assert torch.equal(stage.model(x), load_run(base).model(x))
        assert torch.equal(stage.model(x), adapted)
    with pytest.raises(RuntimeError, match="inside"), lora.switched_off(stage.model):
        raise RuntimeError("inside")
    assert torch.equal(stage.model(x), adapted)


@pytest.mark.parametrize("kind", ["routed", "moe_lora"])
def test_switched_off_adapters_are_the_base(kind):
    """Routed and MoE adapters, too, leave the base's logits bit for bit, and stay off where one
    `with` ends inside another."""
    model = tiny_model()
    x = tokens(2, 11)
    want = model(x)
    lora.attach(model, AdapterConfig(adapter=kind, lora_dropout=0.0))
    with torch.no_grad():
        for name, p in lora.adapter_state(model).items():
            p.add_(0.1 if name.endswith("lora_B") else 0.0)
    adapted = model(x)
    assert not torch.equal(adapted, want)
    with lora.switched_off(model):
        with lora.switched_off(model):
            assert torch.equal(model(x), want)
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("adapter", ["lora", "routed", "moe_lora"])
def test_any_split_means_the_same_batch(adapter, stored_stage):
    """Micro-steps of any number give the gradients of one pass over 7 windows: the budget that a
    window draws is its own, and routers are balanced over all windows, whatever they draw."""
    flags = ["--adapt_batch_size=7", "--grad_clip=0", "--lora_dropout=0", f"--adapter={adapter}"]
    if adapter != "lora":
        flags.append("--balance_weight=1")
    stage, cfg = stored_stage(*flags)
    stage.model.double()
    assert len(by_budget(batch_of(stage, 7, 3), stage.byte_budgets)) == 2
    w = trainer.World(0, 1, torch.device("cpu"))
    found = []
    for n in (1, 3, 40):
        for p in stage.params:
            p.grad = None
        trainer.gradients(stage, stage.model, 3, replace(cfg, accumulation=n), w, False)
        found.append([p.grad.clone() for p in stage.params])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert (a - b).norm() <= 1e-9 * b.norm()


def test_a_window_draws_its_budget_once(stored_stage, monkeypatch):
    """A training step draws one budget for each of its windows, validation one for each of its
    own, and what is stored has it."""
    stage, cfg = stored_stage()
    drawn = []

    def counted(x, budgets):
        drawn.append(len(x))
        return by_budget(x, budgets)

    monkeypatch.setattr(distillation, "by_budget", counted)
    w = trainer.World(0, 1, torch.device("cpu"))
    trainer.gradients(stage, stage.model, 0, cfg, w, False)
    assert sum(drawn) == stage.batch_size
    drawn.clear()
    trainer.validation_loss(stage, replace(cfg, eval_sequences=5), w)
    assert sum(drawn) == 5
    assert stage.model.selector.cfg.kv_bytes in stage.byte_budgets


def test_a_share_too_small_for_what_stays_whole_is_said(tmp_path, text, base, chosen, capsys):
    """Before the first step of an adaptation, and of predictors whose selection will store so, one
    line says of which shares whole tokens take more than half, by hand: of 72 tokens, 5 are more
    than half of a 9th and less than half of a 5th. Without a share of bytes nothing is said."""
    flags = [*STORED, f"--kv_from={chosen}", "--adapt_steps=1", "--kv_byte_budgets=0.2,0.11,0.0001"]
    train.run(adapt_arguments(tmp_path / "adapt", text, base, *flags))
    said = [line for line in capsys.readouterr().err.splitlines() if "stay whole" in line]
    assert [line.split("where ")[1].split(" of the")[0] for line in said] == ["0.01%", "11%"]
    assert all(f"is 6.9% of a context of {CONTEXT} tokens" in line for line in said)
    flags = ["--recall=0", "--readers=7", "--kv_tail=3", "--observers=5", "--kv_sinks=2"]
    flags += ["--select_steps=1", "--select_batch_size=2", "--eval_sequences=2", "--n_groups=4"]
    flags += [f"--block_size={WINDOW}", f"--dataset={text}", f"--init_from={base}"]
    for share, n_lines in ((0.0, 0), (0.0001, 1), (0.2, 0)):
        out = f"--out_dir={tmp_path / str(share)}"
        train.run(arguments("--stage=select", *flags, out, f"--kv_bytes={share}"))
        assert capsys.readouterr().err.count("5 tokens stay whole") == n_lines


def test_training_lowers_the_loss_and_leaves_the_base(tmp_path, text, base, chosen, trainers):
    """Forty steps lower the divergence on text not trained on; every weight of the base keeps its
    bits; what load_run and eval.py make of the run is what was trained."""
    on_disk = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    flags = [*STORED, f"--kv_from={chosen}", "--adapt_steps=40", "--adapt_lr=0.003"]
    out = tmp_path / "run"
    train.run(adapt_arguments(out, text, base, *flags, "--eval_interval=1000"))
    stage = trainers[-1].s
    model = stage.model.eval()
    x = data.sequential(stage.corpus.val, 4, WINDOW)[0]
    with torch.no_grad():
        after = loss_of(stage, x).item()
        trained = copies(lora.adapter_state(model))
        for name, p in lora.adapter_state(model).items():
            p.mul_(0.0 if name.endswith("lora_B") else 1.0)
        before = loss_of(stage, x).item()
    assert after < 0.95 * before
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == on_disk
    lora.load_adapter_state(model, trained)
    run = load_run(out)
    assert run.kv == stage.kv and run.select.kv_bytes == 0.3
    model.selector.set(run.select)
    logits = []
    for m in (model, run.model):
        cache = m.new_cache(2, WINDOW)
        with torch.no_grad():
            m.prefill(x[:2, :CONTEXT], cache)
            logits.append(m.prefill(x[:2, CONTEXT:], cache, last_only=False))
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()
    measured = ["--tasks=continuation", f"--dataset={text}", "--sequences=2", "--continuation=16"]
    measured += ["--methods=dense,select", "--kv_byte_budgets=0.3"]
    call(evaluation, f"--out_dir={out}", *measured, f"--results={tmp_path / 'rows'}")
    rows = json.loads((tmp_path / "rows" / "results.json").read_text())
    dense = ["--methods=dense", *measured[:4], f"--results={tmp_path / 'base'}"]
    call(evaluation, f"--init_from={base}", "--split=val", *dense)
    (untouched,) = json.loads((tmp_path / "base" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "select"]
    for row in rows:  # a trained adapter is measured against its teacher, also with all kept
        assert row["adapter"] == "lora" and row["kl"] > 1e-6
        assert row["dense_value"] == pytest.approx(untouched["value"], rel=1e-5)


def test_resumes_bitwise(tmp_path, text, base, chosen, monkeypatch, capsys):
    """12 steps, SIGTERM and --resume end with the losses and tensors of 20 unbroken steps; other
    budgets or another context are not continued."""
    flags = [*STORED, f"--kv_from={chosen}", "--adapt_steps=20", "--eval_interval=6"]

    def run(out, *more) -> Path:
        train.run(adapt_arguments(tmp_path / out, text, base, *flags, *more))
        return tmp_path / out / "lora-s0"

    whole = run("whole")
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        before_step(m, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run("broken")
    broken = tmp_path / "broken" / "lora-s0"
    assert checkpoint.newest(broken)[0].name == "step-00000012"
    run("broken", "--resume")
    assert losses(broken) == losses(whole) and len(losses(whole)) == 20
    assert_equal(tensors(broken / "step-00000020"), tensors(whole / "step-00000020"))
    for other in ("--kv_byte_budgets=0.3", "--context=0.7"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run("broken", "--resume", other)
        assert f"{other[2:]} with resume" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(stored_stage, tmp_path, text, base, chosen):
    """A storage that is not the run's, a run without a selection, another base, and a window
    without room for a context: one line each, of what came, what is allowed and what to do."""
    with pytest.raises(ValueError, match=r"n_groups=8 with kv_from=.*trained with 4; leave"):
        stored_stage("--n_groups=8")
    with pytest.raises(ValueError, match=r"context=0\.05 of 96 tokens: .* a context of 4"):
        stored_stage("--context=0.05")
    with pytest.raises(ValueError, match="it trained no selection; give a select stage's folder"):
        stored_stage(f"--kv_from={base}")
    other = tmp_path / "other"
    pretrain(other, text, f"--block_size={WINDOW}", "--pretrain_steps=1", "--seed=5")
    args = adapt_arguments(tmp_path / "x", text, other, *STORED, f"--kv_from={chosen}")
    w = trainer.World(0, 1, torch.device("cpu"))
    run = load_base(args, other, w.device)
    with pytest.raises(ValueError, match="it was trained on another base"):
        adapt_stage(args, tmp_path / "x", w, run, adaptation(args))


def changed(run: Path, folder: Path, **settings: dict) -> Path:
    """A copy of a run, whose checkpoint has other settings: by group, by name."""
    c = checkpoint.load(find_checkpoint(run))
    config = dict(c.config)
    for group, values in settings.items():
        config[group] = {**config[group], **values}
    about = dict(step=c.step, tensors=c.tensors, config=config)
    checkpoint.save(folder, checkpoint.step_name(c.step), **about)
    return folder


@pytest.mark.parametrize("own", [{"kv_keep": 0.4}, {"token_keep": 0.5, "fixed_k": True}])
def test_the_budget_is_in_bytes_whatever_the_runs_own_was(own, stored_stage, chosen, tmp_path):
    """A run that had a budget of numbers is trained on as one that had none: the same loss."""
    stage, _ = stored_stage("--lora_dropout=0")
    other = changed(chosen, tmp_path / "numbers", select=own)
    again, _ = stored_stage("--lora_dropout=0", f"--kv_from={other}")
    x = batch_of(stage)
    assert torch.equal(loss_of(stage, x), loss_of(again, x))


@pytest.mark.parametrize(
    "kv", [{"mask_scope": "shared"}, {"mask_scope": "shared", "prefill": "routed"}]
)
def test_storage_without_a_budget_of_bytes_is_refused(kv, stored_stage, chosen, tmp_path):
    """One line that says which run is needed, before there is a folder of this one."""
    other = changed(chosen, tmp_path / "shared", kv=kv)
    with pytest.raises(ValueError, match=r"by layer or head; give a run of --stage=select"):
        stored_stage(f"--kv_from={other}")
    assert not (tmp_path / "stage").exists()


def test_maps_are_trained_where_they_read_what_is_stored(tmp_path, text, base, chosen, trainers):
    """--learn_basis without adapters: trained is each layer's map out of the basis alone, by the
    gradient that the loss has at one of its elements; a trained run, folded, reads as it did in
    training, and of a whole cache what the base reads."""
    flags = ["--adapter=none", "--learn_basis"]
    plain = [flag for flag in STORED if not flag.startswith(("--adapter=", "--lora", "--r="))]
    out = tmp_path / "run"
    steps = ["--adapt_steps=20", "--adapt_lr=0.003"]
    places = [out, text, base, f"--kv_from={chosen}"]
    train.run(adapt_arguments(*places, *plain, *flags, *steps))
    stage = trainers[-1].s
    model = stage.model.eval()
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in stage.params] == [
        f"layers.{i}.self_attn.kv_path.dec" for i in range(model.cfg.n_layer)
    ]
    x = data.sequential(stage.corpus.val, 4, WINDOW)[0]
    run = load_run(out)
    assert run.kv == stage.kv and run.kv.learn_basis
    model.selector.set(run.select)
    logits = []
    for m in (model, run.model):
        cache = m.new_cache(2, WINDOW)
        with torch.no_grad():
            m.prefill(x[:2, :CONTEXT], cache)
            logits.append(m.prefill(x[:2, CONTEXT:], cache, last_only=False))
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()
    with torch.no_grad():
        whole = load_run(base).model(x)
        assert torch.equal(model(x), whole)
        assert (run.model(x) - whole).abs().max() < 1e-4 * whole.abs().max()
    model.double()
    grads = torch.autograd.grad(loss_of(stage, x), stage.params)
    for p, grad in zip(stage.params, grads, strict=True):
        at = int(grad.abs().argmax())
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p.view(-1)[at] += step
                sides.append(loss_of(stage, x).item())
                p.view(-1)[at] -= step
        assert grad.view(-1)[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4)


@contextmanager
def with_gradient(model):
    """Keys and values that want a gradient, inside the `with`."""
    model.requires_grad_(True)
    with torch.enable_grad():
        yield
    model.requires_grad_(False)


@pytest.mark.parametrize("pad", [None, [3, 0]])
def test_what_passes_a_gradient_is_read_and_stored_as_without(pad):
    """A piece of 5 tokens after a prompt, padded or not, then one more: logits and lengths are the
    same whether keys and values pass a gradient or not."""
    model = tiny_model().double()
    kv = KVConfig(kv="select", n_groups=4, kv_tail=2, mask_scope="head")
    attach_storage(model, kv, SelectConfig(kv_keep=0.4), [tokens(2, 30)])
    n_pad = None if pad is None else torch.tensor(pad)
    found = []
    for wants in (False, True):
        cache = model.new_cache(2, 30)
        with torch.no_grad():
            model.prefill(tokens(2, 17), cache)
        with with_gradient(model) if wants else torch.no_grad():
            piece = model.prefill(tokens(2, 5, seed=1), cache, n_pad, last_only=False)
            one = model.decode(tokens(2, 1, seed=2), cache)
        assert piece.requires_grad == one.requires_grad == wants
        own = piece[0, 3:] if pad else piece[0]
        found.append((own.detach(), piece[1].detach(), one.detach(), cache.lengths))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_tokens_with_a_gradient_are_shown_as_they_are_stored():
    """The window that tokens pass a gradient through is the one that is stored."""
    model = tiny_model()
    attach_storage(model, KVConfig(kv="select", kv_tail=2), SelectConfig(), [tokens(2, 30)])
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        model.prefill(tokens(2, 17), cache)
    layer = cache.layers[0]
    k, v = torch.randn(2, 2, TINY.n_kv_head, 4, TINY.head_dim, requires_grad=True).unbind(0)
    new = NewTokens(k, v, torch.tensor([1, 0]))
    shown = layer.with_gradient(new).window
    layer.append(new)
    window = layer.view().window
    assert shown.k.requires_grad and not window.k.requires_grad
    assert torch.equal(shown.count, window.count)
    for b, n in enumerate(window.count.tolist()):
        assert torch.equal(shown.k[b, :, :n], window.k[b, :, :n])
        assert torch.equal(shown.v[b, :, :n], window.v[b, :, :n])
