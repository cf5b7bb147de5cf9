"""eval.py on each task: rows, tables and refusals; SmolLM2 on a needle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from answering import corpus, questions, rows_of
from foreign import needs_smol, smol
from helpers import error_line

import eval as evaluation
from loaders.runs import load_run
from loaders.tokenizer import ByteTokenizer
from measure_config import EvalConfig
from report import texts
from report.plan import Asked
from report.tables import result_table
from runs import call, pretrain, python
from tasks.prompts import needle, variable_tracking
from tasks.recall import needles

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory, text) -> Path:
    """A pretrained stage with a context of 800 bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(
            folder / "run",
            text,
            "--block_size=800",
            "--pretrain_steps=2",
            "--pretrain_batch_size=2",
            "--eval_sequences=1",
        )


def test_eval_of_every_task(byte_model, text, tmp_path):
    """The program as a user runs it: all five tasks, dense and compressed; rows, and a table for
    each task under its own metric."""
    csv = questions(tmp_path / "q", x_test=rows_of("tea", 8))
    names = {
        "perplexity": "perplexity",
        "continuation": "loss",
        "needle": "accuracy",
        "variable_tracking": "recall",
        "multiple_choice": "accuracy",
    }
    p = python(
        "eval.py",
        f"--init_from={byte_model}",
        f"--dataset={text}",
        f"--tasks={','.join(names)}",
        "--methods=dense,value_groups",
        "--sequences=3",
        "--calibration=2",
        "--batch_size=2",
        "--hops=1",
        "--distractors=2",
        f"--questions={csv}",
        "--shots=2",
        f"--results={tmp_path / 'r'}",
        "--device=cpu",
        "--continuation=8",
    )
    assert p.returncode == 0, p.err
    rows = json.loads(p.out.splitlines()[-1])
    assert [(r["task"], r["metric"], r["method"]) for r in rows] == [
        (t, m, k) for k in ("dense", "value_groups") for t, m in names.items()
    ]
    for r in rows:
        assert (
            r["n"]
            == (3 if r["task"] in ("needle", "variable_tracking", "multiple_choice") else r["n"])
            and r["seconds"] >= 0
        )
        assert r["prefill"] == (
            "routed" if (r["task"], r["method"]) == ("perplexity", "value_groups") else "exact"
        )
        assert r["metric"] not in ("accuracy", "recall") or (
            0 <= r["value"] <= 1 and 0 <= r["dense_value"] <= 1
        )
    about = (ByteTokenizer(), 800, 3, 0, 16)
    for r, task in zip(
        rows[7:9], (needle(*about, 2), variable_tracking(*about, 1, 1)), strict=True
    ):
        T = task.stored.size(1)
        assert (
            r["kv_kept_layers"] == pytest.approx((1 + ((T - 16) / 2 + 16) / T) / 2)
            and r["cache_bytes"] < r["dense_bytes"]
        )
        assert r["dense_bytes"] == 3 * T * 2 * 4 * 2 * 16 * 2
    said, table = re.split(r"\n(?=\w+\nrow +trainable)", p.err, maxsplit=1)
    assert "val: 1 sequences, all there are, not 3\n" in said  # of perplexity
    blocks = table.split("\n\n")
    assert len(blocks) == 5
    for b, (t, m) in zip(blocks, names.items(), strict=True):
        assert b.startswith(f"{t}\nrow ") and m in b.splitlines()[1].split()
    assert all(len(b.splitlines()) - 2 - 2 * (b is blocks[-1]) in (1, 2) for b in blocks)


def test_tasks_that_make_their_text_read_no_corpus(byte_model, text, tmp_path, monkeypatch):
    """Dense or trained models need no corpus for them; untrained value groups are calibrated on the
    training split, or on --calibrate."""
    asked = []
    prepare = texts.prepare_splits

    def noted(corpus, data, tok, splits):
        asked.append((corpus, *splits))
        return prepare(corpus, data, tok, splits)

    monkeypatch.setattr(texts, "prepare_splits", noted)

    def rows(**cfg):
        asked.clear()
        cfg = (
            dict(
                tasks="needle",
                sequences=2,
                calibration=2,
                device="cpu",
                block_size=250,
                dataset="text:gone",
            )
            | cfg
        )
        return evaluation.evaluate(load_run(byte_model), Asked(eval=EvalConfig(**cfg)))

    assert rows()[0][0]["task"] == "needle" and asked == []
    got, shown = rows(methods="value_groups", dataset=text, split="all")
    assert asked == [(text, "train")] and shown.masks.shape[1] == needle(
        ByteTokenizer(), 250, 2, 0, 16
    ).stored.size(1)
    rows(methods="value_groups", dataset="", calibrate=text)
    assert asked == [(text, "all")]
    rows(tasks="needle,perplexity", dataset=text)
    assert asked == [(text, "val")]
    for key, value in (("seed", 1), ("query", 30), ("distractors", 1)):
        other = rows(methods="value_groups", dataset=text, **{"block_size": 350, key: value})[0][0]
        assert (
            other["kv_kept_layers"] > got[0]["kv_kept_layers"]
            if key == "query"
            else other["n"] == 2
        )


def test_eval_of_recall(byte_model, tmp_path):
    """eval.py's rows of facts and passages, dense and compressed: their names say what is asked,
    copying alone names its text, and n counts the questions."""
    (tmp_path / "days.txt").write_text("\n".join(corpus(ByteTokenizer())[1]))
    text = f"text:{tmp_path / 'days.txt'}"
    asked = dict(question="unseen", needles=2, answer="number", distractors=1)
    common = dict(sequences=2, calibration=2, device="cpu", block_size=450, dataset=text)
    cfg = EvalConfig(tasks="needle,copy", methods="dense,value_groups", **asked, **common)
    rows, _ = evaluation.evaluate(load_run(byte_model), Asked(eval=cfg))
    names = ["needle_unseen_number_x2", "copy_unseen"]
    assert [(r["task"], r["n"], r["method"]) for r in rows] == [
        (name, n, method)
        for method in ("dense", "value_groups")
        for name, n in zip(names, (4, 2), strict=True)
    ]
    assert [("text" in r, r["prefill"]) for r in rows] == [(False, "exact"), (True, "exact")] * 2
    assert all(0 <= r["value"] <= 1 and r["metric"] == "accuracy" for r in rows)
    made = needles(ByteTokenizer(), 450, 2, 0, 16, 1, "unseen", 2, "number")
    dense = 2 * made.stored.size(1) * 2 * 16 * 2
    assert rows[0]["dense_bytes"] % dense == 0 and rows[2]["cache_bytes"] < rows[2]["dense_bytes"]


@pytest.mark.parametrize(
    "flags, why",
    [
        (dict(tasks="perplexity", needles=2), "give --tasks=needle"),
        (dict(tasks="copy", answer="name"), "give --tasks=needle"),
        (dict(tasks="variable_tracking", question="unseen"), "asked by needle, copy and zero_shot"),
        (dict(tasks="needle", needles=7, distractors=3), "at most 9"),
        (dict(tasks="needle", needles=30, distractors=3, answer="name"), "at most 32"),
        (dict(tasks="needle", needles=33), "needles=33"),
        (dict(tasks="needle", question="later"), "question='later'"),
    ],
)
def test_recall_flags_are_refused(flags, why):
    """Flags of a task that is not asked for, and more facts than there are names or values."""
    assert why in error_line(EvalConfig, **flags)


def test_table_names_each_metric():
    """Rows of one task make one table, with its metric at the head of the column; rows of several
    one table each."""
    row = dict(
        method="dense",
        basis="native",
        n_groups=1,
        value_keep=1.0,
        token_keep=1.0,
        trainable_parameters=0,
        kv_kept_layers=1,
        kv_kept_model=1,
        cache_bytes=8,
        dense_bytes=8,
        value=0.5,
        dense_value=0.5,
    )
    a = row | dict(task="needle", metric="accuracy")
    b = row | dict(task="variable_tracking", metric="recall")
    both = result_table([a, b, a | dict(value=0.7)]).split("\n\n")
    assert both == [
        "needle\n" + result_table([a, a | dict(value=0.7)]),
        "variable_tracking\n" + result_table([b]),
    ]
    assert (
        "accuracy" in both[0]
        and "recall" not in both[0]
        and result_table([b]).startswith("row ")
        and "0.6000 +- 0.1414" in both[0]
    )


def test_wrong_questions_are_refused_before_anything_is_measured(byte_model, tmp_path, monkeypatch):
    """A bad file, and a context too short for a prompt, end eval.py with one line and no row."""
    monkeypatch.setattr(evaluation, "whole_rows", lambda *a, **k: pytest.fail("measured"))
    flags = [f"--init_from={byte_model}", "--sequences=2", f"--results={tmp_path / 'r'}"]
    (tmp_path / "bad.csv").write_text("a,b\n")
    for more, why in (
        (["--tasks=needle,multiple_choice", f"--questions={tmp_path / 'bad.csv'}"], "line 1"),
        (["--tasks=needle", "--block_size=60"], "larger --block_size"),
        (
            ["--tasks=variable_tracking", "--chains=30"],
            "fewer --needles, --distractors, --chains or --hops",
        ),
    ):
        assert why in error_line(call, evaluation, *flags, *more)
    assert not (tmp_path / "r").exists()


@needs_smol
def test_smollm2_finds_the_needle():
    """The real SmolLM2-135M with whole values, 140 tokens: the prompt is one that a base model
    answers; one digit in nine is chance."""
    run = smol()
    task = needle(run.tokenizer, 140, 5, 0, 16)
    assert task.value(run.model, 5, "float32") >= 0.8
