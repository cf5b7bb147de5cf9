"""Rows that eval.py measures of selection: grids, shares, budgets counted by hand, each against an
oracle; and what it refuses."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from answering import tokenizer
from helpers import error_line
from select_runs import ALL, base, measure, select, selected, through_cache  # noqa: F401 (fixtures)

import cli
import data
import eval as evaluation
import kv_router
import selector
from loaders.runs import load_run
from report.plan import plan_of
from runs import call
from settings.train import DataConfig
from tasks.text import Continuation

pytestmark = pytest.mark.usefixtures("own_cache")
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
        ("base", ["--kv_budgets=.5", "--fixed_k"], "fixed_k with kv_budgets=0.5: it is not read"),
        ("base", ["--kv_keep=.5", "--value_keep=.25"], "value_keep with kv_keep=0.5: it is not"),
        ("base", ["--kv_bytes=.5", "--token_keep=.25"], "token_keep with kv_bytes=0.5: it is not"),
        ("base", ["--kv_byte_budgets=.5", "--value_keep=.2"], "value_keep with kv_byte_budgets="),
        ("base", ["--kv_byte_budgets=.5,.2", "--sinks=2"], "sinks with kv_byte_budgets=0.2"),
        (
            "base",
            ["--kv_byte_budgets=.5", "--token_relevance=h2o"],
            "token_relevance with kv_byte_budgets=0.5",
        ),
        ("base", ["--token_relevance=h2o"], "give a --token_keep of less than 1"),
        ("base", ["--kv_budgets=.5", "--refit_ridge=.2"], "refit_ridge with refit=False"),
        ("run", ["--refit_ridge=.2"], "refit_ridge with refit=False"),
        ("run", ["--key_rounding=nearest"], "key_rounding with key_bits=16: it is not read then"),
        ("run", ["--kv_bits=16", "--key_block=32"], "key_block with kv_bits=16: it is not read"),
        ("base", ["--kv=value_groups", "--kv_sinks=2"], "give --key_bits=8 --value_bits=8"),
        ("base", ["--kv_budgets=.5", "--kv_sinks=2"], "kv_sinks with key_bits=16: it is not read"),
        ("base", ["--relevances=future,random", "--pool=3"], "pool with relevances="),
        ("base", ["--relevance=observed", "--past=9"], "past with relevance=observed"),
        ("run", ["--relevances=uniform", "--ahead=9"], "ahead with relevances=uniform"),
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


@pytest.mark.parametrize(
    "on, flags",
    [
        ("run", ["--token_keep=.5", "--sinks=2", "--past=9"]),
        ("run", ["--kv_bits=8", "--key_rounding=nearest", "--key_block=32", "--kv_sinks=2"]),
        ("base", ["--kv_bytes=.5", "--key_block=32", "--kv_sinks=2", "--relevance=observed"]),
        ("base", ["--kv_bits=16,4", "--key_block=32", "--kv=value_groups"]),
        ("base", ["--reconstructor=keys", "--kv_sinks=2", "--kv_keep=.5", "--refit"]),
        ("base", ["--refit", "--refit_ridge=.2", "--kv_byte_budgets=.5", "--past=9"]),
        ("base", ["--token_budgets=.5", "--value_keep=.3", "--token_relevance=observed"]),
        ("base", ["--kv_byte_budgets=.5", "--budgets=.3", "--fixed_k", "--sinks=2"]),
        ("base", ["--relevances=random,observed", "--pool=3", "--kv_budgets=.5"]),
        ("base", ["--groups=2,4", "--n_groups=8", "--topk_groups=4", "--kv=value_groups"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_flags_that_a_setting_reads_are_accepted(on, flags, base, selected):
    """What is refused beside some flags is accepted where one of the settings tried reads it."""
    where = [f"--init_from={base}"] if on == "base" else [f"--out_dir={selected.folder}"]
    flags = [*where, "--tasks=continuation", *flags]
    args = cli.parse_args(evaluation.CONFIGS, flags)
    run = load_run(base if on == "base" else selected.folder)
    _, plan = plan_of(run, evaluation.asked_of(run, args))
    assert plan


def test_a_run_that_refits_is_asked_for_another_ridge(selected):
    """What a flag is read with may be the run's own setting, of which no flag speaks."""
    run = load_run(selected.folder)
    run = replace(run, select=replace(run.select, refit=True))
    args = cli.parse_args(evaluation.CONFIGS, ["--out_dir=x", "--refit_ridge=.2"])
    (setting,) = plan_of(run, evaluation.asked_of(run, args))[1]
    assert {(way.refit, way.refit_ridge) for way in setting.tried} == {(True, 0.2)}


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
