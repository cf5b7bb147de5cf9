"""What eval.py measures: the continuation task against a plain oracle, bytes counted by hand,
sweeps, and settings tried without training."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, coordinates, error_line, grouped_model, routed_value, tiny_model, tokens

import eval as evaluation
import kv_router
from config import KVConfig, SelectConfig
from data import content_hash, documents, prepare_splits
from loaders.runs import load_run
from measure_config import EvalConfig
from report.against_bytes import bytes_figure, points_of
from report.figures import pyplot, report_figure
from report.plan import Asked
from report.rows import RowAbout, measure_row, sweep
from report.tables import mean_over_texts, result_table
from runs import call, pretrain
from settings.adapters import AdapterConfig
from settings.train import DataConfig
from tasks import text as tasks

pytestmark = pytest.mark.usefixtures("own_cache")
# every router, scope, tail and kind of basis; the tail is the task's, whatever the model was
# trained with
SETTINGS = {
    "default": dict(value_basis="output", value_router="norm", mask_scope="head", kv_tail=4),
    "static-pca": dict(
        n_groups=8,
        topk_groups=3,
        value_basis="pca",
        value_router="static",
    ),
    "mlp-one-layer": dict(
        reconstructor="mlp", value_router="norm", kv_layers="1", kv_tail=9, kv_tail_block=5
    ),
    "learned": dict(
        topk_groups=1,
        value_basis="output",
        value_router="norm",
        mask_scope="head",
        learn_basis=True,
    ),
    "learned-unfolded": dict(
        n_groups=2, topk_groups=1, value_basis="random", learn_basis=True, fold=False
    ),
}
COUNTS = 8 * 4 * 2  # bytes of a dense cache's lengths: four sequences, two layers
SHAPES = [(5, 9), (0, 7), (16, 2)]  # (query, last)


class ContextOracle(torch.nn.Module):
    """One layer's attention in full float64 matrices: tokens from `late` on read routed values of
    all tokens but the newest `window`, their own included."""

    def __init__(self, path: kv_router.ValueGroupPath, window: int, late: int):
        super().__init__()
        self.path = path
        self.window = window
        self.late = late

    def forward(self, x, q, k, v, cache=None, pad=None):
        p = self.path
        n = q.size(1) // k.size(1)
        T = q.size(2)
        z = coordinates(p, v)
        read = v.clone()
        for b in range(v.size(0)):
            for t in range(T - self.window):
                scores = p.scores(x[b : b + 1, t : t + 1], z[b : b + 1, :, t : t + 1])[0, :, 0]
                kept = [
                    sorted(range(p.S), key=lambda g, s=s: (-float(s[g]), g))[: p.k] for s in scores
                ]
                one = routed_value(p, z[b, :, t], kept * (p.Hkv // len(kept)))
                read[b, :, t] = (
                    one if p.folded else torch.stack([one[h] @ p.dec[h] for h in range(p.Hkv)])
                )
        k, v, read = (t.repeat_interleave(n, 1) for t in (k, v, read))
        scores = q @ k.mT / math.sqrt(p.D)
        weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        place = torch.arange(T)
        routed = (place[:, None] >= self.late) & (place < place[:, None] + 1 - self.window)
        return (weights * ~routed) @ v + (weights * routed) @ read


def oracle(model, x: torch.Tensor, query: int, last: int) -> float:
    """Mean loss of the continuation's tokens but the first, one logarithm at a time."""
    late = x.size(1) - last
    for name, path in kv_router.paths(model).items():
        model.get_submodule(name.rsplit(".", 1)[0]).kv_path = ContextOracle(path, query, late)
    with torch.no_grad():
        probs = model(x).softmax(-1)
    terms = [
        -math.log(probs[b, t, x[b, t + 1]])
        for b in range(len(x))
        for t in range(late, x.size(1) - 1)
    ]
    assert len(terms) == len(x) * (last - 1)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("query, last", SHAPES)
def test_continuation_equals_the_oracle(name, query, last):
    """Through the packed cache: the context is read whole while it is processed, is compressed for
    what follows the query and for nothing before, as many newest tokens as the query has stay
    whole, and the loss is that of the last tokens; the same for any batch size."""
    model = grouped_model(prefill="exact", **SETTINGS[name])
    x = tokens(5, 67, seed=3)
    task = tasks.Continuation(x, query, last)
    with kv_router.storing(model, kv_tail=query, kv_tail_block=1):
        got = [task.value(model, n, "float32") for n in (2, 5)]
    want = oracle(model, x, query, last)
    assert got[0] == pytest.approx(want, abs=1e-8) and got[1] == pytest.approx(want, abs=1e-8)
    # it is not the dense model's
    assert abs(want - tasks.Continuation(x, query, last).value(tiny_model(), 5, "float32")) > 1e-3
    assert task.n == 5 * (last - 1)


@pytest.mark.parametrize("bits", [16, 4])
def test_the_share_of_dense_is_that_of_16_bits(bits):
    """Computed in float64, float32 or bfloat16 a cache has the same share of a dense one, that of
    the bytes which the bfloat16 cache holds: integers are not compared with wider numbers."""
    shares = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        setting = dict(value_router="norm", prefill="exact", kv_tail=3)
        ints = dict(key_bits=4, value_bits=4, key_block=16) if bits == 4 else {}
        model = grouped_model(dtype=dtype, **setting, **ints)
        cache = model.new_cache(2, 60)
        with torch.no_grad():
            model.prefill(tokens(2, 60), cache)
        shares.append(model.share_of_dense(2 * 60, cache))
    dense = 2 * 2 * (2 * 60) * TINY.n_kv_head * TINY.head_dim * TINY.n_layer
    assert shares == [cache.nbytes() / dense] * 3
    assert shares[0] < 0.9


def test_divergence_is_from_what_whole_values_predict(monkeypatch):
    """Token by token over the first KL_SEQUENCES, for any batch size, none before whole values were
    read; rows have it, but the whole one's own."""
    monkeypatch.setattr(tasks, "KL_SEQUENCES", 3)
    setting = dict(prefill="exact", value_router="norm", fold=False)
    model = grouped_model(**setting)
    dense = tiny_model()
    x = tokens(5, 67, seed=3)
    query = 6
    last = 9
    task = tasks.Continuation(x, query, last)
    want = []
    with torch.no_grad(), kv_router.storing(model, kv_tail=query, kv_tail_block=1):
        task.value(model, 2, "float32")
        assert task.kl is None
        task.value(dense, 5, "float32", True)
        assert task.kl is None
        got = []
        for n in (1, 2, 5):
            task.value(model, n, "float32")
            got.append(task.kl)
        for row in x[:3]:
            cache = model.new_cache(1, 67)
            model.prefill(row[None, :-last], cache)
            p = dense(row[None])[0, -last:-1].softmax(-1)
            steps = row[None, -last:-1].split(1, 1)
            q = torch.stack([model.decode(t, cache)[0, -1] for t in steps]).softmax(-1)
            want += [
                sum(a * math.log(a / b) for a, b in zip(s.tolist(), t.tolist(), strict=True))
                for s, t in zip(p, q, strict=True)
            ]
        assert got == [pytest.approx(sum(want) / len(want), rel=1e-4)] * 3 and got[0] > 1e-4
        about = RowAbout(
            adapter=AdapterConfig(adapter="none"),
            kv=KVConfig(prefill="exact"),
            seed=0,
            batch_size=2,
        )
        rows = sweep(model, tasks.Continuation(x, query, last), [1, 2, 4], about)
    assert "kl" not in rows[2] and rows[0]["kl"] > rows[1]["kl"] > 0
    assert (
        "KL" in result_table(rows)
        and f"{rows[1]['kl']:.5f}" in result_table(rows)
        and "KL" not in result_table(rows[2:])
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_dropped_costs_nothing(name):
    """With K = S the unfolded model's perplexity is the dense model's exactly, whatever the maps;
    so is the continuation's loss but for the order of its sums; a sweep reports it as every row's
    dense value and leaves K as it was."""
    setting = {k: v for k, v in SETTINGS[name].items() if k != "fold"}
    model = grouped_model(prefill="exact", fold=False, **setting)
    x = tokens(5, 41, seed=4)
    dense = tiny_model()
    about = RowAbout(
        adapter=AdapterConfig(adapter="none"),
        kv=KVConfig(**{**setting, "prefill": "exact"}),
        seed=0,
        batch_size=2,
    )
    S = setting.get("n_groups", 4)
    K = setting.get("topk_groups", 2)
    for task, tolerance in (
        (tasks.Perplexity(x[:, :-1], x[:, 1:]), 0),
        (tasks.Continuation(x, 6, 9), 1e-10),
    ):
        want = task.value(dense, 2, "float32")
        rows = sweep(model, task, [K, S, 1], about)
        assert [r["value_keep"] for r in rows] == [K / S, 1.0, 1 / S]
        assert (
            all(abs(r["dense_value"] - want) <= tolerance for r in rows)
            and rows[1]["value"] == rows[1]["dense_value"]
        )
        assert abs(rows[0]["value"] - want) > 1e-3 and {
            p.k for p in kv_router.paths(model).values()
        } == {K}
        assert rows[0]["metric"] == task.metric and rows[0]["n"] == task.n
        assert rows[0]["prefill"] == ("exact" if isinstance(task, tasks.Continuation) else "routed")
        assert rows[0]["basis"] == setting.get("value_basis", "output") + (
            "+" if setting.get("learn_basis") else ""
        )


@pytest.mark.parametrize(
    "kv, given, query",
    [
        (KVConfig(kv="select", kv_tail=3), [], 3),
        (KVConfig(kv="value_groups", kv_tail=3), [], 3),
        (KVConfig(kv="select", kv_tail=3), ["query"], EvalConfig.query),
        (KVConfig(kv="dense", kv_tail=3), [], EvalConfig.query),
    ],
)
def test_a_trained_run_is_measured_with_its_own_window(kv, given, query):
    """Unless --query says otherwise, what a prompt leaves whole is what the run was trained to."""
    run = SimpleNamespace(kv=kv, config={}, select=SelectConfig())
    args = SimpleNamespace(
        eval=EvalConfig(), kv=KVConfig(), select=SelectConfig(), data=DataConfig(), given=set(given)
    )
    assert evaluation.asked_of(run, args).eval.query == query


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_continuation_row_counts_context_and_query(scope):
    """A row's bytes are by hand those of a cache that holds the packed context and the whole query
    of the first four sequences, and its dense bytes those of the same tokens; the continuation is
    not in it."""
    setting = dict(prefill="exact", mask_scope=scope, value_router="norm", value_basis="output")
    model = grouped_model(dtype=torch.float32, **setting)
    x = tokens(5, 150)
    query = 11
    last = 16
    task = tasks.Continuation(x, query, last)
    N = 150 - query - last
    B = 4
    D = TINY.head_dim
    Hkv = TINY.n_kv_head
    Hm = Hkv if scope == "head" else 1
    with kv_router.storing(model, kv_tail=query, kv_tail_block=1):
        about = RowAbout(adapter=AdapterConfig(adapter="none"), kv=KVConfig(**setting), seed=0)
        row = measure_row(model, task, about)
    # the last: where segments start
    packed = 4 * B * Hkv * N * (D + D // 2) + B * Hm * N + 8 * B * (2 * Hkv + Hm)
    tail = 2 * 4 * B * Hkv * query * D + B * Hm * query
    assert row["cache_bytes"] == TINY.n_layer * (packed + tail + 2 * 8 * B)
    assert row["dense_bytes"] == 2 * 4 * B * (N + query) * Hkv * D * TINY.n_layer
    assert (
        row["kv_kept_model"]
        == row["kv_kept_layers"]
        == pytest.approx((1 + (N / 2 + query) / (N + query)) / 2)
    )


def test_storing_and_detach_leave_no_trace():
    """Inside `storing` a path stores as told, after it as before, an exception included; a detached
    model is the dense one bit for bit, and a folded one is not taken apart."""
    model = grouped_model(dtype=torch.float32, fold=False, value_basis="output", kv_tail=3)
    cfgs = [p.cfg for p in kv_router.paths(model).values()]
    with pytest.raises(KeyError), kv_router.storing(model, kv_tail=20):
        assert [p.cfg.kv_tail for p in kv_router.paths(model).values()] == [20, 20]
        raise KeyError
    assert [p.cfg for p in kv_router.paths(model).values()] == cfgs
    assert "load the base anew" in error_line(
        kv_router.detach, kv_router.fold(grouped_model(fold=False))
    )
    x = tokens(2, 33)
    dense = tiny_model(dtype=torch.float32)
    assert not torch.equal(model(x), dense(x))
    assert torch.equal(kv_router.detach(model)(x), dense(x)) and not kv_router.paths(model)


# -- programs: what is tried without training


def evaluate(base: Path, text: str, *, kv: dict | None = None, **cfg) -> list[dict]:
    """evaluate() of a fresh copy of the base, by its rows without seconds."""
    cfg = EvalConfig(
        **{
            **dict(
                dataset=text,
                sequences=7,
                batch_size=4,
                calibration=6,
                device="cpu",
                query=3,
                continuation=8,
            ),
            **cfg,
        }
    )
    asked = Asked(eval=cfg, kv=KVConfig(**(kv or {})))
    rows, _ = evaluation.evaluate(load_run(base), asked)
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def test_a_grid_equals_its_cells(base, text):
    """Bases x groups x budgets x tasks in one call give the very rows of one call each: a setting
    leaves nothing behind in the weights. K follows the given share of the groups, and the dense row
    is that of the base."""
    common = dict(tasks="perplexity,continuation")
    rows = evaluate(
        base, text, methods="dense,value_groups", bases="native,pca,output", groups="2,8", **common
    )
    assert [(r["task"], r["basis"], r["n_groups"], r["value_keep"]) for r in rows] == [
        ("perplexity", "native", 1, 1.0),
        ("continuation", "native", 1, 1.0),
        *(
            (t, b, s, 0.5)
            for b in ("native", "pca", "output")
            for s in (2, 8)
            for t in ("perplexity", "continuation")
        ),
    ]
    cells = [
        evaluate(base, text, methods="dense,value_groups", bases=b, groups=str(s), **common)[2:]
        for b in ("native", "pca", "output")
        for s in (2, 8)
    ]
    assert rows[2:] == [r for cell in cells for r in cell]
    assert rows[:2] == evaluate(base, text, **common)
    for r in rows[2:]:
        dense = rows[0 if r["task"] == "perplexity" else 1]
        assert (
            r["dense_value"] == pytest.approx(dense["value"], rel=1e-6)
            and r["value"] != r["dense_value"]
        )
        assert r["cache_bytes"] < r["dense_bytes"] == dense["cache_bytes"] - COUNTS
        # the query of the one, the default of the other
        T, tail = (24, 3) if r["task"] == "continuation" else (32, 4)
        assert r["kv_kept_layers"] == pytest.approx((1 + ((T - tail) / 2 + tail) / T) / 2)
    keeps = [
        r["value_keep"]
        for r in evaluate(base, text, methods="value_groups", groups="4,8", budgets="0.25,1")
    ]
    assert keeps == [0.25, 1.0] * 2
    assert [
        r["value_keep"]
        for r in evaluate(base, text, methods="value_groups", groups="2,8", kv=dict(topk_groups=1))
    ] == [0.5, 0.25]


def write_text(folder: Path, words: str, n: int = 9) -> str:
    """A corpus of n documents: text:PATH."""
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(" ".join(words.split()[i % 3 :] * (30 + i)) + ".\n")
    return f"text:{folder}"


def test_several_texts_equal_one_call_each(base, text, tmp_path, monkeypatch):
    """Two texts in one call give the very rows of two calls, whole values, integers and divergences
    included, each with its text's name, split and hash; what is tried is attached once, not once a
    text; the first text's windows do not stand in for the second's."""
    other = write_text(tmp_path / "other", "KLM NOP a quick brown fox 17 34 jumps")
    third = write_text(tmp_path / "third", "ab cd ef gh")
    attached = []
    attach = kv_router.attach
    counted = lambda *args: (attached.append(args[1]), attach(*args))[1]
    monkeypatch.setattr(kv_router, "attach", counted)
    setting = dict(
        tasks="perplexity,continuation",
        methods="dense,value_groups",
        groups="2,4",
        kv_bits="16,4",
        calibrate=third,
    )
    both = evaluate(base, f"{text},{other}", **setting)
    assert len(attached) == 2
    alone = [evaluate(base, name, **setting) for name in (text, other)]
    assert [r["text"] for r in alone[1]] == [
        {"corpus": "text:other", "split": "val", "sha256": content_hash(other, DataConfig())}
    ] * len(alone[1])
    hashes = [rows[0]["text"]["sha256"] for rows in alone]
    for sha256, rows in zip(hashes, alone, strict=True):
        assert [r for r in both if r["text"]["sha256"] == sha256] == rows
        assert len(rows) == 2 + 2 * 2 * 2
    assert len(both) == 2 * len(alone[0])
    assert [r["text"]["corpus"] for r in both[2:4]] == [
        "text:" + text.rsplit("/")[-1],
        "text:other",
    ]
    assert {r["value_bits"] for r in both if "kl" in r} == {4, 16}


def test_texts_of_a_call_are_read_by_their_own_splits(base, text, tmp_path):
    """--split=test is all of a text without splits of its own, and then bases need a corpus of
    their own; not of what the run was trained on, whose test split does not exist; a list is
    calibrated on its training splits, mixed."""
    other = write_text(tmp_path / "other", "KLM NOP a quick brown fox 17 34 jumps")
    third = write_text(tmp_path / "third", "ab cd ef gh")
    rows = evaluate(base, f"{other},{third}", split="test")
    assert [r["text"]["split"] for r in rows] == ["all", "all"]
    asked = dict(methods="value_groups", split="test")
    assert "--calibrate=CORPUS" in error_line(evaluate, base, f"{other},{third}", **asked)
    assert "it has train, val, all" in error_line(evaluate, base, f"{other},{text}", split="test")
    assert len(evaluate(base, f"{other},{third}", methods="value_groups")) == 2
    for measured, calibrated in ((f"{other},{third}", third), (other, f"{third},{other}")):
        line = error_line(evaluate, base, measured, methods="value_groups", calibrate=calibrated)
        assert "that is the text that is measured" in line


def test_run_of_a_mixture_is_measured_on_each_part(tmp_path, text, monkeypatch, capsys):
    """Without --dataset what a mixture was trained on is measured part by part, in parts that no
    other part trained on, and no part of it stands for a test text."""
    other = write_text(tmp_path / "other", "KLM NOP a quick brown fox 17 34 jumps")
    stage = pretrain(tmp_path / "run", f"{text},{other}", "--pretrain_steps=2")
    call(evaluation, f"--out_dir={stage}", "--sequences=4")
    output = capsys.readouterr()
    rows = json.loads(output.out.splitlines()[-1])
    assert [r["text"]["corpus"] for r in rows] == ["text:" + text.rsplit("/")[-1], "text:other"]
    assert "text:other" in output.err
    for flag in (f"--dataset={other}", f"--calibrate={other}"):
        flags = [f"--out_dir={stage}", flag, "--split=test", "--methods=value_groups"]
        assert "it has train, val, all" in error_line(call, evaluation, *flags)


def some_row(corpus: str, value: float, **changes) -> dict:
    """A row of a continuation on one text, 2.0 with whole values."""
    row = dict(
        task="continuation",
        method="value_groups",
        relevance="",
        setting="native S=4 K=2",
        n_groups=4,
        metric="loss",
        value=value,
        dense_value=2.0,
        kl=value / 100,
        trainable_parameters=0,
        text={"corpus": corpus, "split": "val", "sha256": corpus * 2},
    )
    shares = ("kv_kept_layers", "kv_kept_model", "value_keep", "token_keep", "of_dense")
    return row | dict.fromkeys(shares, 0.5) | dict(cache_bytes=50, dense_bytes=100) | changes


def test_table_of_texts_names_the_mean_and_the_worst():
    """Of three texts every row names its own, and each setting has one line with the mean and the
    worst loss over dense and KL, each worst text named; perplexity is compared by its logarithm; of
    one text there is neither; rows without a text, and a setting told twice, stay apart."""
    rows = [some_row("a", 2.1), some_row("b", 2.4, kl=0.001), some_row("c", 2.25)]
    lines = result_table(rows).splitlines()
    assert [line.split()[4] for line in lines[1:4]] == ["a", "b", "c"]
    assert lines[4] == "Over 3 texts, the mean and the worst:"
    want = ["50.00%", "+0.2500", "+0.4000", "b", "0.01483", "0.02250", "c"]
    assert lines[6].split()[4:] == want and len(lines) == 7
    alone = result_table(rows[:1])
    assert "text" not in alone and "worst" not in alone and len(alone.splitlines()) == 2
    (merged,) = mean_over_texts(rows)
    assert merged["value"] == pytest.approx(2.25) and merged["kl"] == pytest.approx(
        0.01483, abs=1e-5
    )
    ratio = [some_row(name, v, metric="perplexity") for name, v in (("a", 2.0), ("b", 4.0))]
    line = result_table(ratio).splitlines()[-1].split()
    assert line[5:8] == [f"+{math.log(2) / 2:.4f}", f"+{math.log(2):.4f}", "b"]
    scores = [some_row(n, v, metric="accuracy", dense_value=1) for n, v in (("a", 0.4), ("b", 0.9))]
    table = result_table(scores).splitlines()
    assert "below whole" in table[-2]  # more is better: the worst text has the least
    assert table[-1].split()[5:8] == ["+0.3500", "+0.6000", "a"]
    dense = [some_row(name, 2.0, method="dense") for name in "ab"]
    assert "worst" not in result_table(dense)
    no_text = [{k: v for k, v in r.items() if k != "text"} for r in rows]
    assert mean_over_texts(no_text) == no_text and len(mean_over_texts(rows + rows)) == 2


def drawn(monkeypatch, draw, *args) -> list:
    """The axes that a function of report/figures.py draws."""
    made = []
    subplots = pyplot().subplots
    kept = lambda *a, **k: made.append(subplots(*a, **k)) or made[-1]
    monkeypatch.setattr(pyplot(), "subplots", kept)
    draw(*args)
    return made[0][0].axes


def test_report_shows_what_there_is(tmp_path, monkeypatch, pictures):
    """Without curves and masks one panel is left; each text of a setting is a point of its own, in
    one colour; values that differ by a thousandth fill a tenth of their axis. Curves begin at step
    1; of 30 layers ten are named, beside a bar of colours."""
    named = (("a", 2.0, "pca"), ("b", 2.002, "pca"), ("a", 2.001, "native"))
    rows = [some_row(text, value, basis=basis) for text, value, basis in named]
    (ax,) = drawn(monkeypatch, report_figure, tmp_path, rows, {}, None)
    points = [line for line in ax.lines if len(line.get_ydata())]
    assert [(*line.get_ydata(),) for line in points] == [(2.0,), (2.002,), (2.001,)]
    assert points[0].get_color() == points[1].get_color() != points[2].get_color()
    assert points[0].get_marker() == points[2].get_marker() != points[1].get_marker()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["pca, S = 4", "native, S = 4", "a", "b"]
    low, high = ax.get_ylim()
    assert high - low == pytest.approx(0.01 * 2.001, rel=1e-3)
    curves = {"lora-s0": [{"step": i, "loss": float(i)} for i in range(7)]}
    axes = drawn(monkeypatch, report_figure, tmp_path, rows[:1], curves, torch.ones(30, 9, 4))
    assert [ax.get_title() for ax in axes[:2]] == ["Adaptation (one seed)", "Loss against KV kept"]
    assert len(axes) == 4 and axes[3].get_ylabel() == "share of heads that kept it"
    (line,) = axes[0].lines
    assert [*line.get_xdata()] == [1, 2, 3, 4, 5, 6, 7]
    assert [*line.get_ydata()] == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert [text.get_text() for text in axes[2].get_yticklabels()] == [*map(str, range(0, 30, 3))]


def test_bytes_picture_has_room_for_its_points(tmp_path, monkeypatch, pictures):
    """The highest loss lies within the axes, and two points have no envelope; three have."""
    rows = [some_row("a", 2.0 + i / 9, of_dense=1 - i / 4) for i in range(3)]
    for n in (2, 3):
        axes = drawn(monkeypatch, bytes_figure, tmp_path / "bytes.png", points_of(rows[:n]))
        assert axes[0].get_ylim()[1] > 1.2 * (n - 1) / 9
        for ax in axes:  # loss, and KL
            labels = [line.get_label() for line in ax.lines]
            assert ("lower envelope" in labels) == (n == 3)


def test_bases_are_calibrated_apart_from_what_is_measured(base, text, tmp_path, monkeypatch):
    """Calibration windows come from the training split, or from all of --calibrate, and the text
    from --split; all of the same text is refused without another corpus."""
    seen = []
    attach = kv_router.attach
    monkeypatch.setattr(
        kv_router,
        "attach",
        lambda m, cfg, batches, seed: (
            seen.append(torch.cat(batches)),
            attach(m, cfg, batches, seed),
        )[1],
    )
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        (other / f"{i}.txt").write_text("KLMNOP "[i:] * 40)
    run = load_run(base)
    train_text, all_other = (
        bytes(
            prepare_splits(c, DataConfig(), run.tokenizer, [s])[0].ids.clip(max=255).astype("uint8")
        )
        for c, s in ((text, "train"), (f"text:{other}", "all"))
    )
    val = evaluate(base, text, methods="value_groups")
    everything = evaluate(
        base, text, methods="value_groups", split="all", calibrate=f"text:{other}", sequences=999
    )
    for windows, source in zip(seen, (train_text, all_other), strict=True):
        assert windows.shape == (6, 32) and all(
            bytes(w.clip(max=255).to(torch.uint8).tolist()) in source for w in windows
        )
    sizes = {
        s: sum(len(d.encode()) + 1 for d in docs)
        for s, docs in documents(text, DataConfig()).items()
    }
    assert everything[0]["n"] == (sizes["all"] - 1) // 32 * 32 > val[0]["n"] == 7 * 32
    for split in ("all", "train"):
        assert "--calibrate=CORPUS" in error_line(
            evaluate, base, text, methods="value_groups", split=split
        )


def test_eval_of_a_base_named_by_init_from(base, text, tmp_path, monkeypatch, capsys):
    """Without --out_dir a model is named by --init_from and the rows go to --results, or to a fresh
    folder under out/; the model's own folder keeps its files as they were."""
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    flags = [
        f"--init_from={base}",
        f"--dataset={text}",
        "--sequences=3",
        "--tasks=perplexity,continuation",
        "--query=2",
        "--continuation=9",
    ]
    call(evaluation, *flags, "--results=deep/here")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["metric"] for r in rows] == ["perplexity", "loss"] and rows == json.loads(
        Path("deep/here/results.json").read_text()
    )
    assert rows[1]["n"] == 3 * 8
    call(evaluation, *flags)
    assert (
        next(Path("out").iterdir()).name.startswith("eval-")
        and len(list(Path("out").glob("*/report.png"))) == 1
    )
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == before


def test_eval_finds_a_base_that_was_moved(base, text, tmp_path, run_stage, capsys):
    """--init_from beside --out_dir of an adapter says where its base lies now: the same rows as
    before the move; another base is refused."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(base, tmp_path / "base" / "pretrain")
    stage = run_stage(
        "adapt",
        tmp_path / "run",
        "--adapt_steps=2",
        f"--init_from={tmp_path / 'base' / 'pretrain'}",
    )
    evaluated = []
    for flags in ([], [f"--init_from={moved}"]):
        call(
            evaluation, f"--out_dir={stage}", "--sequences=4", f"--results={tmp_path / 'r'}", *flags
        )
        evaluated.append(
            [
                {k: v for k, v in r.items() if k != "seconds"}
                for r in json.loads(capsys.readouterr().out.splitlines()[-1])
            ]
        )
        if not moved.exists():
            shutil.move(tmp_path / "base" / "pretrain", moved)
    assert evaluated[0] == evaluated[1]
    assert "--init_from" in error_line(call, evaluation, f"--out_dir={stage}", "--sequences=4")


def test_window_of_a_run_is_what_it_was_trained_with(base, text, tmp_path, run_stage, capsys):
    """A run adapted on shorter windows than its model's context is measured on those, unless
    --block_size says otherwise."""
    stage = run_stage("adapt", tmp_path / "run", "--adapt_steps=2", "--block_size=12")
    for flags, T in (([], 12), (["--block_size=31"], 31)):
        call(
            evaluation, f"--out_dir={stage}", "--sequences=4", f"--results={tmp_path / 'r'}", *flags
        )
        (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert row["n"] == 4 * T


def test_flags_of_a_selection_choose_what_is_measured(base, text, tmp_path, capsys):
    """Storage flags of a selection alone measure a continuation, dense and compressed; what is
    read, calibrated and measured is said before it begins, and that whole tokens take most of a
    budget where they do. KV kept counts the whole query: by hand from what the context keeps."""
    flags = [f"--init_from={base}", f"--dataset={text}", f"--results={tmp_path}", "--sequences=2"]
    flags += ["--continuation=8", "--kv_bytes=0.9", "--n_groups=2", "--calibration=2"]
    for query in (3, 14):  # and the first token: 4 and 15 of 24
        call(evaluation, *flags, f"--query={query}")
        out, err = capsys.readouterr()
        dense, row = json.loads(out)
        assert (dense["method"], row["method"], row["task"]) == ("dense", "select", "continuation")
        context = row["token_keep"] * (1 + row["value_keep"]) / 2
        kept = (context * (24 - query) + query) / 24
        assert row["kv_kept_layers"] == row["kv_kept_model"] == pytest.approx(kept)
        lines = err.splitlines()
        assert lines[0] == f"loading {base} ..." and lines[1].startswith("calibrating on text:")
        starts = [line.split(" of text:")[0] for line in lines if " of 2: " in line]
        way = "selection, future bytes=0.9 hedge=0.75"
        assert starts == ["row 1 of 2: dense, continuation", f"row 2 of 2: {way}, continuation"]
        said = (
            "that is 62.5% of a context of 24 tokens, where 90% of the bytes are asked for" in err
        )
        assert said == (query == 14) == ("stay whole" in err)


def test_a_text_with_fewer_sequences_says_how_many(base, text, tmp_path, capsys):
    """Where a text has fewer sequences than --sequences one line says how many there are; where it
    has as many, nothing does."""
    flags = (f"--init_from={base}", f"--dataset={text}", f"--results={tmp_path / 'r'}")
    for asked in (1, 9999):
        call(evaluation, *flags, f"--sequences={asked}", "--batch_size=64")
        out, err = capsys.readouterr()
        (row,) = json.loads(out)
        n = row["n"] // 32
        line = f"perplexity of {row['text']['corpus']}, val: {n} sequences, all there are, not 9999"
        assert err.splitlines().count(line) == (asked > 1) and n < 9999


def test_perplexity_is_exp_of_the_mean_loss():
    """By hand on a dense model: exp of the mean of -log p over every position, any batch size."""
    model = tiny_model()
    x = tokens(5, 23)
    with torch.no_grad():
        p = model(x[:, :-1]).softmax(-1)
    want = math.exp(-sum(math.log(p[b, t, x[b, t + 1]]) for b in range(5) for t in range(22)) / 110)
    task = tasks.Perplexity(x[:, :-1], x[:, 1:])
    assert task.value(model, 2, "float32") == pytest.approx(want, rel=1e-9) and task.n == 110
    assert dataclasses.replace(task).stored.shape == (4, 22)
