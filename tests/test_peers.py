"""The peers that comparisons of speed stand beside, run as they are, in a process of their own."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import error_line

from benchmarks import step as comparison
from config import ModelConfig

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "peft_step.py"
TINY = dict(vocab_size=64, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_kv_head=2, head_dim=8)


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_steps_of_peft_train_every_parameter_of_its_lora(tmp_path):
    """Eager steps on a CPU: one row, of as many tokens a second as its milliseconds say. After one
    step, where LoRA's A has a gradient of zeros still, it refuses."""

    def run(steps: int) -> subprocess.CompletedProcess:
        sizes = dict(block_size=16, batch_size=2, steps=steps)
        asked = TINY | sizes | dict(device="cpu", dtype="bfloat16", compiled=[False])
        command = [sys.executable, "-P", str(PROGRAM), json.dumps(asked)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    job = run(4)
    assert job.returncode == 0, job.stderr
    (row,) = map(json.loads, job.stdout.splitlines())
    assert row["impl"] == "PEFT, eager"
    assert abs(row["tokens_per_s"] * row["ms"] / 1e3 - 2 * 16) < 0.5
    job = run(1)
    assert job.returncode != 0
    assert "lora_A" in job.stderr and "no gradient after 1 steps" in job.stderr


def test_peers_that_cannot_be_measured_are_refused_before_anything_is(monkeypatch):
    """Settings that PEFT's step does not have, cases without LoRA, and packages that are not here:
    one line each."""
    for flags in (dict(accumulation=2), dict(compile=True)):
        assert "peers take whole steps" in error_line(comparison.StepConfig, peers=True, **flags)
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

    monkeypatch.setattr(comparison.subprocess, "run", run)
    rows = comparison.peer_rows(comparison.StepConfig(device="cpu", steps=5), ModelConfig())
    assert rows == [{"name": "LoRA"}]
    assert (asked["device"], asked["steps"], asked["compiled"]) == ("cpu", 5, [False, True])
