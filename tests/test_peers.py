"""The peers that comparisons of speed stand beside, run as they are, in a process of their own."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import error_line

from benchmarks import common
from benchmarks import step as comparison
from config import ModelConfig

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "peers.py"
TINY = dict(vocab_size=64, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_kv_head=2, head_dim=8)


def run(folder: Path, **cases: list[list]) -> subprocess.CompletedProcess:
    """The peers on a CPU, as a process of its own in some folder."""
    asked = TINY | dict(block_size=24, device="cpu", dtype="bfloat16") | cases
    command = [sys.executable, "-P", str(PROGRAM), json.dumps(asked)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_steps_of_peft_train_every_parameter_of_its_lora(tmp_path):
    """Eager steps on a CPU: one row, of as many tokens a second as its milliseconds say. After one
    step, where LoRA's A has a gradient of zeros still, it refuses."""
    job = run(tmp_path, lora=[[2, 16, 4, False]])
    assert job.returncode == 0, job.stderr
    (row,) = map(json.loads, job.stdout.splitlines())
    assert (row["impl"], row["batch_size"], row["n_tokens"]) == ("PEFT, eager", 2, 16)
    assert abs(row["tokens_per_s"] * row["ms"] / 1e3 - 2 * 16) < 0.5
    job = run(tmp_path, lora=[[2, 16, 1, False]])
    assert job.returncode != 0
    assert "lora_A" in job.stderr and "no gradient after 1 steps" in job.stderr


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_generation_of_transformers_is_timed_token_by_token(tmp_path):
    """A row for each case: one token of every sequence takes its milliseconds, and the prompt is
    no part of them."""
    job = run(tmp_path, generate=[[1, 12, 8], [3, 16, 8]])
    assert job.returncode == 0, job.stderr
    rows = [json.loads(line) for line in job.stdout.splitlines()]
    assert [(r["batch_size"], r["n_tokens"]) for r in rows] == [(1, 12), (3, 16)]
    for row in rows:
        assert row["impl"] == "transformers generate" and row["prefill_s"] > 0
        assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(row["batch_size"], rel=0.01)


def test_peers_that_cannot_be_measured_are_refused_before_anything_is(monkeypatch):
    """Settings that PEFT's step does not have, cases without LoRA, and packages that are not here:
    one line each."""
    line = error_line(comparison.StepConfig, peers=True, accumulation=2)
    assert "peers take whole steps" in line
    cfg = comparison.StepConfig(peers=True)
    here = {}
    monkeypatch.setattr(comparison, "find_spec", here.get)
    for package, why in (("peft", "needs peft and transf"), ("transformers", "needs transf")):
        assert why in error_line(comparison.check_peers, cfg, ["LoRA"])
        here[package] = "found"
    comparison.check_peers(cfg, ["LoRA"])
    assert "add LoRA" in error_line(comparison.check_peers, cfg, ["pretraining"])


def test_peers_are_measured_on_the_device_that_is_asked_for(monkeypatch):
    """The process is told --device, and its lines of JSON are the rows."""
    asked = {}

    def run(command, **settings):
        asked.update(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stderr="", stdout='a warning\n{"name": "LoRA"}\n')

    monkeypatch.setattr(common.subprocess, "run", run)
    rows = comparison.peer_rows(comparison.StepConfig(device="cpu", steps=5), ModelConfig())
    assert rows == [{"name": "LoRA"}]
    assert asked["device"] == "cpu" and asked["dtype"] == "bfloat16"
    assert asked["lora"] == [[8, 256, 5, False], [8, 256, 5, True]]
