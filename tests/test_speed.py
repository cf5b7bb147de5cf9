"""Limits by bytes and FLOPs, and the sweep that stands beside them: benchmarks/limits.py, speed.py,
speed.png."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import error_line
from torch.utils.flop_counter import FlopCounterMode

import lora
import runs
from benchmarks import parts, speed
from benchmarks.common import random_model
from benchmarks.generate import store_by
from benchmarks.limits import (
    Machine,
    Work,
    attention_work,
    decode_work,
    limits,
    lora_work,
    machine_of,
    matrix_weights,
)
from config import ModelConfig
from model import Transformer
from report.figures import speed_figure
from settings.adapters import AdapterConfig

SMALL = ModelConfig(
    vocab_size=10,
    block_size=32,
    n_layer=3,
    n_embd=4,
    n_head=2,
    n_kv_head=1,
    head_dim=2,
    n_inner=6,
)
TINY = ModelConfig(
    vocab_size=101,
    block_size=24,
    n_layer=2,
    n_embd=64,
    n_head=4,
    n_kv_head=2,
    head_dim=32,
    n_inner=96,
)


def test_decode_work_is_what_was_counted_by_hand():
    """Of three blocks of width 4: q and o 16 weights each, k and v 8, the MLP 3 x 24; the head 40;
    attention loops over layers, sequences, query heads and tokens."""
    assert matrix_weights(SMALL) == 3 * (16 + 16 + 8 + 8 + 72) + 40 == 400
    B = 5
    T = 7
    numbers = 2 * 3 * B * T * 1 * 2  # keys and values, layers, sequences, tokens, KV heads, D
    flops = 2 * B * 400
    for _layer in range(3):
        for _sequence in range(B):
            for _head in range(2):
                for _token in range(T):
                    flops += 2 * 2 + 2 * 2  # q . k, and p v
    work = decode_work(SMALL, B, 2 * numbers, itemsize=2)
    assert work == Work(2 * 400 + 2 * numbers, flops)
    assert attention_work(SMALL, 2 * numbers, itemsize=2).flops == flops - 2 * B * 400


def counted(shape: ModelConfig, batch_size: int, n_tokens: int, rank: int) -> int:
    """FLOPs of the matrix products of a LoRA step, attention left out, as PyTorch counts them."""
    torch.manual_seed(0)
    model = Transformer(shape)
    lora.attach(model, AdapterConfig(adapter="lora", r=rank))
    idx = torch.randint(0, shape.vocab_size, (batch_size, n_tokens))
    with FlopCounterMode(display=False) as counter:
        model(idx).float().logsumexp(-1).mean().backward()
    by_op = counter.get_flop_counts()["Global"]
    products = ("mm", "addmm", "bmm")
    return sum(n for op, n in by_op.items() if str(op).split(".")[1] in products)


def test_lora_work_is_what_a_step_multiplies():
    """The products of a real step, as PyTorch counts them, extrapolated to rank 0, and attention by
    a loop over the pairs that a causal mask leaves."""
    B = 2
    T = 5
    products = 2 * counted(SMALL, B, T, rank=1) - counted(SMALL, B, T, rank=2)
    attention = 0
    for _layer in range(3):
        for _sequence in range(B):
            for _head in range(2):
                for query in range(T):
                    for _key in range(query + 1):
                        attention += 6 * 2 * 2
    work = lora_work(SMALL, B, T, itemsize=2)
    assert work.flops == products + attention
    first_qkv = 4 * (4 + 2 + 2)
    assert work.bytes == 2 * (2 * 400 - first_qkv + 4 * B * T * 4 * 3)


def test_limits_are_rates_of_the_scarcer():
    """Tokens over seconds, by each; a machine's own rates are positive."""
    got = limits(Work(bytes=400, flops=90), 4, Machine(bytes_per_s=1000.0, flops_per_s=300.0))
    assert got == {"limit_by_bytes": 10.0, "limit_by_flops": 13.3}
    assert min(machine_of(torch.device("cpu"), torch.float32)) > 1e7


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """A sweep of few points on a CPU."""
    cfg = speed.SpeedConfig(
        batches="1,2",
        contexts="40,70",
        attention_batch=2,
        train_batches="1,3",
        new_tokens=16,
        steps=4,
        most_seconds=3600,
        memory_gb=2 * 2 * 40 * 1024 / 2**30,
        device="cpu",
    )
    return speed.measured(speed.sweep_of(cfg, TINY, time.time()))


def test_no_measured_rate_passes_its_limit(rows):
    """Every row, of every task, stays below both limits, and says how far."""
    assert {r["task"] for r in rows} == {"decode", "training", "attention"}
    for r in rows:
        bound = min(r["limit_by_bytes"], r["limit_by_flops"])
        assert 0 < r["tokens_per_s"] < bound, r
        assert r["of_limit"] == pytest.approx(r["tokens_per_s"] / bound, abs=1e-4)


def test_sweep_has_the_points_that_fit_and_compares_them(rows):
    """A token of TINY holds 2 x 2 x 2 x 32 float32, 1 KiB: two sequences of 70 tokens do not fit
    twice into the memory of twice 80. Every storage is there at the others, with its ratio to
    dense; of training to LoRA."""
    decoded = [r for r in rows if r["task"] == "decode"]
    assert [r["impl"] for r in decoded] == [*speed.STORAGES] * 3
    assert [r["shape"] for r in decoded[::3]] == ["B1 T40", "B1 T70", "B2 T40"]
    assert all(r["peer"] == "dense" for r in decoded)
    assert all(r["ratio"] == 1 for r in decoded if r["impl"] == "dense")
    trained = [r for r in rows if r["task"] == "training"]
    assert [(r["impl"], r["batch_size"]) for r in trained] == [
        (name, b) for b in (1, 3) for name in speed.TRAINED
    ]
    assert all(r["peer"] == "LoRA" for r in trained)
    assert {r["impl"] for r in rows if r["task"] == "attention"} >= {"ours, dense", speed.FASTEST}


def test_nothing_begins_when_time_is_over(capsys):
    """A sweep whose time is over measures nothing and says what it left out."""
    cfg = speed.SpeedConfig(batches="1", contexts="40", train_batches="1", device="cpu")
    began = time.time() - cfg.most_seconds - 1
    assert speed.measured(speed.sweep_of(cfg, TINY, began)) == []
    said = capsys.readouterr().err
    assert "decoding, B1 T40" in said and "training, LoRA, B1" in said and "attention" in said


def test_a_sweep_without_a_row_is_refused(tmp_path):
    """Where nothing was measured, one line says so, and no empty results are left."""
    line = error_line(runs.call, speed, "--most_seconds=1e-9", f"--results={tmp_path}/rows")
    assert "nothing was measured" in line and not (tmp_path / "rows").exists()


def test_what_fails_is_left_out(monkeypatch, capsys):
    """A part that fails says why, and the rows of the others are there."""

    def peers(*_, **__):
        raise ValueError("peers: out of memory")

    monkeypatch.setattr(speed, "rows_of_peers", peers)
    cfg = speed.SpeedConfig(
        batches="1",
        contexts="40",
        train_batches="1",
        most_seconds=3600,
        steps=4,
        new_tokens=16,
        device="cpu",
        peers=True,
    )
    rows = speed.measured(speed.sweep_of(cfg, TINY, time.time()))
    assert {r["task"] for r in rows} == {"decode", "training", "attention"}
    assert "left out, other_rows: peers: out of memory" in capsys.readouterr().err


def made_up() -> list[dict]:
    """Rows of all tasks, as a sweep has them."""
    rows = []
    for task, impl in (("decode", "dense"), ("decode", "levels"), ("attention", "packed")):
        for batch_size in (1, 8):
            for n_tokens in (2048, 8120):
                rate = 1e5 * batch_size / n_tokens
                rows.append(
                    {
                        "task": task,
                        "impl": impl,
                        "batch_size": batch_size,
                        "n_tokens": n_tokens,
                        "tokens_per_s": rate,
                        "limit_by_bytes": 2 * rate,
                        "limit_by_flops": 9 * rate,
                    }
                )
    return [*rows, rows[0] | {"task": "training", "impl": "LoRA", "n_tokens": 512}]


def test_picture_has_a_panel_for_each_batch_and_task(tmp_path, monkeypatch):
    """Titles, and every series above itself its own limit, dashed, and over all the one by FLOPs,
    dotted."""
    from report import figures

    panels = []
    draw = figures.draw_speed

    def seen(ax, **panel) -> None:
        draw(ax, **panel)
        panels.append(ax)

    monkeypatch.setattr(figures, "draw_speed", seen)
    speed_figure(tmp_path, made_up())
    assert (tmp_path / "speed.png").is_file()
    assert [ax.get_title() for ax in panels] == [
        "Decoding, batch 1",
        "Decoding, batch 8",
        "Training, sequences of 512 tokens",
        "Attention alone, all layers, batch 1",
    ]
    for ax in panels:
        lines = [line for line in ax.get_lines() if len(line.get_xdata())]
        measured = [line for line in lines if line.get_linestyle() == "-"]
        bounds = [line for line in lines if line.get_linestyle() == "--"]
        (flops,) = [line for line in lines if line.get_linestyle() == ":"]
        assert len(measured) == len(bounds) >= 1
        for line, bound in zip(measured, bounds, strict=True):
            assert (bound.get_ydata() > line.get_ydata()).all()
        assert min(flops.get_ydata()) > 0


def test_wrong_lists_get_one_line():
    """What came and what is allowed."""
    for name in ("batches", "contexts", "train_batches"):
        for text in ("1,x", "0", "-3", "1.5"):
            assert "whole numbers" in error_line(speed.SpeedConfig, **{name: text})


def test_parts_of_a_prefill_are_all_of_it(monkeypatch):
    """Every part that a selecting prefill passes has a time, no time between two readings of the
    clock belongs to none, the whole is timed without parts, and nothing stays in the functions'
    places. By a clock that goes on by one when it is read."""
    readings = []
    marked = parts.Clock.milliseconds

    def milliseconds(self):
        readings.append(len(self.marks))
        return marked(self)

    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(parts.Clock, "milliseconds", milliseconds)
    monkeypatch.setattr(parts, "time", clock)
    models = {}
    for name, (kv, select) in speed.STORAGES.items():
        model = random_model(replace(TINY, block_size=99), torch.device("cpu"), "float32")
        models[name] = model if kv.kv == "dense" else store_by(model, kv, select)
    before = {name: vars(place)[own] for name, (place, own) in parts.PARTS.items()}
    idx = torch.randint(0, TINY.vocab_size, (3, 90))
    rows = parts.prefill_parts(models, idx, 95, at_once=100)
    assert before == {name: vars(place)[own] for name, (place, own) in parts.PARTS.items()}
    for name in models:
        took = {r["impl"].split(": ", 1)[1]: r["ms"] for r in rows if r["impl"].startswith(name)}
        assert took.pop(parts.ALL) == 1000  # two readings, none between them
        in_parts = readings[2 * [*models].index(name)]
        assert sum(took.values()) == 1000 * (in_parts - 1) and min(took.values()) > 0
    # on a CPU keys are rounded elsewhere, and a dense path attends in another place
    assert {*parts.PARTS} - took.keys() == {"rounding for queries"}
