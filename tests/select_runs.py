"""Runs of train.py --stage=select on a model whose predictions depend on what attention reads, and
the rows that eval.py measures of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import kv_router
import train
from config import SelectConfig
from runs import arguments, call, copies, sharp_stage
from training import loop as trainer

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
    flags = ["--block_size=480", "--pretrain_batch_size=1"]
    return sharp_stage(tmp_path_factory.mktemp("sharp"), text, *flags, scale=1.5)


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
    s.keeps_choice = True
    with torch.no_grad(), kv_router.storing(model, kv_tail=kv_tail):
        cache = model.new_cache(*x.shape)
        model.prefill(x[:, :n], cache)
        logits = model.prefill(x[:, n:], cache, last_only=False)
    s.keeps_choice = False
    return logits, s.chosen, cache


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
