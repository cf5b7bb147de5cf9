"""Selection in prompts and pictures: the figure of groups, needles asked for twice, bench.py and
sample.py, and the choice on a GPU."""

from __future__ import annotations

import hashlib
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from answering import read, tokenizer
from helpers import TINY, randomise, tiny_model, tokens
from select_runs import NEEDLES, base, measure, selected, through_cache  # noqa: F401 (fixtures)

import bench
import kv_router
import sample
import selector
from config import KVConfig, SelectConfig
from loaders.device import autocast
from loaders.runs import load_run
from model import Transformer
from report.figures import groups_figure
from report.tables import reuse_note
from runs import call
from selection.training import fit_statistics
from storage.layout import cdiv
from tasks import prompts as tasks

pytestmark = pytest.mark.usefixtures("own_cache")


# ----------------------------------------------------------------------------- the groups figure


@pytest.mark.parametrize("n_context", [7, 131])
def test_groups_figure_shows_the_choice(n_context, tmp_path, monkeypatch, pictures):
    """Bars are the shares of tokens that keep 0 to S groups and sum to 1; the line is the mean kept
    at each rank by relevance, in bins."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    g = torch.Generator().manual_seed(1)
    S = 4
    keep = torch.rand(2, 1, 3, n_context, generator=g) < 0.7
    mask = (torch.rand(2, 1, 3, n_context, S, generator=g) < 0.5) & keep[..., None]
    score = torch.rand(2, 1, 3, n_context, generator=g).masked_fill(
        torch.arange(n_context) < 2, math.inf
    )
    made = []
    subplots = plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *a, **k: made.append(subplots(*a, **k)) or made[-1])
    groups_figure(tmp_path, selector.Selection(keep, mask, score), "by hand")
    fig, (left, right) = made[0]
    counts = [
        int(mask[i, 0, h, t].sum()) for i in range(2) for h in range(3) for t in range(n_context)
    ]
    assert [b.get_height() for b in left.patches] == pytest.approx(
        [counts.count(n) / len(counts) for n in range(S + 1)]
    )
    assert sum(b.get_height() for b in left.patches) == pytest.approx(1)
    rank = [
        [
            int(mask[i, 0, h, t].sum())
            for t in sorted(range(n_context), key=lambda t, i=i, h=h: -float(score[i, 0, h, t]))
        ]
        for i in range(2)
        for h in range(3)
    ]
    rank = [sum(r[j] for r in rank) / 6 for j in range(n_context)]
    width = max(1, n_context // 64)
    y = list(right.lines[0].get_ydata())
    # the two sinks tie: either may be first
    tied = [t for t in range(len(y)) if (t + 1) * width > 2]
    assert len(y) == n_context // width
    assert [y[t] for t in tied] == pytest.approx(
        [sum(rank[t * width : (t + 1) * width]) / width for t in tied]
    )
    assert (
        sum(y[:2]) * width <= 2 * S * width
        and (tmp_path / "groups.png").stat().st_size > 5000
        and fig.get_suptitle() == "by hand"
    )


# ----------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("distractors", [1, 4])
def test_reuse_asks_a_second_question(kind, distractors, length=613):
    """After the first question stands its answer, then the second question; the answer is the
    second place's number, which is not the first's; the second part is what `seconds` counts; all
    fit the budget, the seed alone decides, and the needle task's first answer stays."""
    tok = tokenizer(kind)
    task, again, other = (
        tasks.needle(tok, length, 25, seed, 16, distractors, reuse=True) for seed in (5, 5, 6)
    )
    assert (task.name, task.metric, task.n, task.query) == ("needle_reuse", "accuracy", 25, 16)
    assert (
        task.prompts == again.prompts
        and task.answers == again.answers
        and task.seconds == again.seconds
        and task.prompts != other.prompts
    )
    first = tasks.needle(tok, length, 25, 5, 16, distractors)
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        said = dict(re.findall(r"The lucky number of (\w+) is (\d)\.", text.split("\n\n")[0]))
        hay, one, two = text.split("\n\n")
        a, b = (
            re.fullmatch(
                r"What is the lucky number of (\w+)\? The lucky number of \1 is(?: (\d)\.)?", q
            )
            for q in (one, two)
        )
        assert (
            len(said) == distractors + 1
            and len(re.findall(r"\d", hay)) == distractors + 1
            and a[1] != b[1]
        )
        assert (
            a[2] == said[a[1]] == str(first.answers[i])
            and b[2] is None
            and str(answer) == said[b[1]] != a[2]
        )
        assert (
            task.seconds[i] == len(tok.encode(f" {a[2]}.\n\n{two}"))
            and 0.9 * (length - 10) < len(task.prompts[i]) <= length - 10
        )
        before = read(
            SimpleNamespace(prompts=[task.prompts[i][: -task.seconds[i]]], tokenizer=tok), 0
        )
        assert before == text[: text.rindex(f" {a[2]}.\n\n")] and before.endswith(
            f"The lucky number of {a[1]} is"
        )
    assert len(set(task.answers)) > 3 and len(set(task.seconds)) > 1


def test_needle_is_what_it_was():
    """Without a second question prompts and answers are, byte for byte, those made before there was
    one."""
    made = [
        tasks.needle(tokenizer("byte"), 513, 5, seed, 16, d) for seed in (0, 1, 17) for d in (0, 3)
    ]
    text = json.dumps([[t.prompts, t.answers] for t in made])
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "f55a934362dbf0a66c0f5dc3e426ed1312a666fba5411c0e616c4ee0dd2746f4"
    )
    assert all(type(t) is tasks.Needle for t in made)


def test_reuse_compresses_for_the_first_question(selected, monkeypatch):
    """Prompts of one second question's length go together, every prompt once; the first call ends
    with the first question, whose tail alone stays whole, the second call is the first answer and
    the second question, unpadded; dense, the generated text is that of the same prompts asked
    directly."""
    run = load_run(selected.folder)
    task = tasks.needle(run.tokenizer, 453, 9, 2, 16, 3, reuse=True)
    calls = []
    chosen = []
    prefill = Transformer.prefill
    choose = run.model.selector.choose

    def recorded_prefill(m, idx, *args, **kwargs):
        calls.append(idx.clone())
        return prefill(m, idx, *args, **kwargs)

    def recorded_choice(prompt):
        chosen.append((prompt.T, prompt.n_context, prompt.pad))
        return choose(prompt)

    monkeypatch.setattr(Transformer, "prefill", recorded_prefill)
    monkeypatch.setattr(run.model.selector, "choose", recorded_choice)
    with kv_router.storing(run.model, kv_tail=16):
        task.value(run.model, 2, "float32")
    batches = sum(cdiv(task.seconds.count(m), 2) for m in set(task.seconds))
    assert len(set(task.seconds)) > 1 and len(calls) == 2 * len(chosen) == 2 * batches
    asked = []
    for first, second, (T, n_context, pad) in zip(calls[::2], calls[1::2], chosen, strict=True):
        assert (T, n_context) == (first.size(1), first.size(1) - 16)
        for b, (one, two) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            one = one[0 if pad is None else int(pad[b]) :]
            place = re.search(r"number of (\w+) is$", bytes(one).decode())
            assert place and re.fullmatch(
                r" \d\.\n\nWhat is the lucky number of (\w+)\? The lucky number of \1 is",
                bytes(two).decode(),
            )
            asked.append(one + two)
    assert sorted(asked) == sorted(task.prompts)
    monkeypatch.undo()
    heard = []
    score = tasks.Needle.score
    monkeypatch.setattr(
        tasks.Needle,
        "score",
        staticmethod(lambda text, answer: (heard.append((text, answer)), score(text, answer))[1]),
    )
    dense = load_run(run.base).model
    got = [
        task.value(dense, 4, "float32"),
        tasks.Needle(task.prompts, task.answers, 16, run.tokenizer, task.room).value(
            dense, 4, "float32"
        ),
    ]
    assert (
        got[0] == got[1]
        and len(heard) == 18
        and sorted(heard[:9]) == sorted(heard[9:])
        and len({t for t, _ in heard}) > 3
    )


def test_eval_says_what_a_second_question_gets(base, measure):
    """eval.py prints the value of both questions for every way to choose, though the two tasks'
    prompts differ in length."""
    rows = measure(
        f"--init_from={base}",
        *NEEDLES,
        "--tasks=needle,needle_reuse",
        "--kv_budgets=0.31,0.17",
        "--relevances=observed",
        "--query=8",
    )
    assert [(r["task"], r["method"]) for r in rows] == [
        ("needle", "dense"),
        ("needle_reuse", "dense"),
    ] + [("needle", "select")] * 2 + [("needle_reuse", "select")] * 2
    for i, budget in enumerate(("0.31", "0.17")):
        line = (
            f"observed kv={budget} hedge=0.75: first question {rows[2 + i]['value']:.3f}, second "
            f"{rows[4 + i]['value']:.3f}"
        )
        assert line in measure.err.splitlines()
    rows = [{**r, "value": v} for r, v in zip(rows, (1, 1, 0.75, 0.5, 0.25, 0.125), strict=True)]
    note = reuse_note(rows)
    assert (
        "kv=0.31 hedge=0.75: first question 0.750, second 0.250" in note
        and "kv=0.17 hedge=0.75: first question 0.500, second 0.125" in note
    )
    assert reuse_note(rows[:4]) == reuse_note(rows[:2]) == ""


# ----------------------------------------------------------------------------- programs


@pytest.mark.parametrize("trained", [False, True], ids=["random", "run"])
def test_bench_select(trained, selected, capsys):
    """Three rows of one shape: a dense prefill, one with selection, the choice alone; times and
    ratios are positive, the dense one's is 1."""
    flags = (
        [f"--out_dir={selected.folder}"]
        if trained
        else ["--n_layer=2", "--n_embd=32", "--n_head=4", "--n_kv_head=2", "--head_dim=16"]
    )
    call(bench, "--what=select", "--steps=2", "--batch_size=3", "--block_size=77", *flags)
    io = capsys.readouterr()
    rows = json.loads(io.out)
    rule = (
        "predictor_query tokens=0.6 groups=0.45 hedge=0.75"
        if trained
        else "future kv=0.25 hedge=0.75"
    )
    assert [r["impl"] for r in rows] == [
        "dense",
        f"select: {rule}",
        f"choose: {rule}",
    ] and io.err.count("\n") == 3
    assert rows[0]["ratio"] == 1 and all(
        r["ms"] > 0 and r["ratio"] > 0 and r["tokens_per_s"] > 0 for r in rows
    )
    assert {r["shape"] for r in rows} == {"B3 T77 L2 d32 H4/2 D16"}


def test_sample_from_a_select_run(selected, capsys):
    """Text is generated, and the bytes said are fewer than a dense cache's for a prompt much longer
    than the tail, not for a short one."""
    for prompt, less in (("every token counts " * 12, True), ("a", False)):
        call(
            sample,
            f"--out_dir={selected.folder}",
            f"--prompt={prompt}",
            "--max_new_tokens=11",
            "--temperature=0",
        )
        io = capsys.readouterr()
        said = r"(\d+) tokens in .* held ([\d,]+) bytes for (\d+) tokens(?: a row)?, ([\d.]+)% of"
        n, held, length, share = re.search(said, io.err.strip()).groups()
        held = int(held.replace(",", ""))
        dense = 2 * 4 * int(length) * 2 * 16 * 2  # float32
        assert io.out.startswith(prompt) and int(n) <= 11
        # counts have 8 bytes whatever numbers are computed in, so their share is larger in 16 bits
        assert held / dense <= float(share) / 100 < held / dense + 0.2
        assert (held < 0.75 * dense) if less else (held >= dense)


# ----------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("relevance", ["future", "predictor_query", "predictor"])
def test_the_device_chooses_as_the_cpu(relevance, dtype):
    """Of a prompt at least 99 % of the pairs, under bfloat16 autocast too, are kept or dropped as
    on the CPU in float32; in float32 the packed logits equal the masked ones to 1e-3."""
    x = tokens(3, 119, seed=3)
    made = []
    kv = KVConfig(kv="select", kv_tail=9)
    cfg = SelectConfig(relevance=relevance, kv_keep=0.4, readers=20, past=16)
    batches = [tokens(2, 70, seed=1)]
    model = selector.attach(tiny_model(dtype=torch.float32), kv, cfg, batches)
    fit_statistics(model, batches)
    torch.manual_seed(2)
    for p in model.selector.predictors.values():
        randomise(p, 0.1)
    for device in ("cpu", "cuda"):
        model = model.to(device)
        x = x.to(device)
        with autocast(torch.device(device), dtype if device == "cuda" else "float32"):
            made.append(through_cache(model, x, 110, kv_tail=9))
    (_, a, _), (logits, b, _) = made
    same = (a.mask == b.mask.cpu()).float().mean().item()
    assert same >= 0.99, same
    if dtype == "float32":
        with torch.no_grad(), selector.masked_replay(model, b, 101):
            want = model(x)[:, 110:]
        assert (logits - want).abs().max() < 1e-3 * want.abs().max()
    assert TINY.n_layer == 2 and logits.isfinite().all()
