"""Zero-shot items as data sets ship them, and log-likelihoods of their answers against a loop."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, grouped_model, tiny_model

from loaders.tokenizer import ByteTokenizer
from measure_config import EvalConfig
from tasks.items import Item, Option, item_files, read_items
from tasks.make import make_tasks
from tasks.zero_shot import Request, accuracies, request, score_requests, zero_shot
from tasks.zero_shot import Scored as S

# By format: a line, its context, question and answers, and which is right.
LINES = {
    "hellaswag": (
        {
            "activity_label": "Tea",
            "ctx_a": "A man boils water. [header] He waits.",
            "ctx_b": "the man",
            "endings": ["pours it [title] slowly.", "flies."],
            "label": "0",
        },
        "Tea: A man boils water. He waits.",
        " The man",
        ["pours it.  slowly.".replace("  ", " "), "flies."],
        0,
    ),
    "piqa": (
        {"goal": "Open a jar.", "sol1": "Twist.", "sol2": "Sing.", "label": 1},
        "",
        "Question: Open a jar.\nAnswer:",
        ["Twist.", "Sing."],
        1,
    ),
    "arc": (
        {
            "id": "x",
            "question": {
                "stem": "It rains. What falls?",
                "choices": [{"text": "water", "label": "A"}, {"text": "sand", "label": "B"}],
            },
            "answerKey": "B",
        },
        "Question: It rains.",
        " What falls?\nAnswer:",
        ["water", "sand"],
        1,
    ),
    "columns": (
        {
            "question_stem": "Predators eat",
            "choices": {"text": ["grass", "mice"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        "",
        "Predators eat",
        ["grass", "mice"],
        1,
    ),
    "boolq": (
        {"passage": "Ice is cold.", "question": "is ice cold", "answer": True, "title": "Ice"},
        "Ice is cold.",
        "\nQuestion: is ice cold?\nAnswer:",
        ["no", "yes"],
        1,
    ),
    "copa": (
        {
            "premise": "It rained.",
            "choice1": "He sang.",
            "choice2": "The road got wet.",
            "question": "effect",
            "label": 1,
        },
        "",
        "It rained therefore",
        ["he sang.", "the road got wet."],
        1,
    ),
    "piqa_plain": (
        {"question": "Open a jar.", "choices": ["Twist.", "Sing."], "answer": 0},
        "",
        "Question: Open a jar.\nAnswer:",
        ["Twist.", "Sing."],
        0,
    ),
    "lambada": ({"text": "He sat. Then he stood up "}, "He sat.", " Then he stood", ["up"], 0),
}


def write(folder: Path, name: str, *rows: dict) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", LINES)
def test_items_are_asked_as_the_harness_does(name, tmp_path):
    """A line of every data set gives the harness's prompt, answers and right one; the context is
    the part of the prompt before its last sentence."""
    row, context, question, answers, right = LINES[name]
    (item,) = read_items(write(tmp_path, name, row))
    assert item.right == right and [o.answer for o in item.options] == answers
    for option in item.options:
        assert (option.context, option.question) == (context, question)


@pytest.mark.parametrize("plain", [False, True])
def test_winogrande_scores_what_follows_the_blank(plain, tmp_path):
    """The fillers are parts of the prompts, and the answer is the same for both."""
    row = {"sentence": "Ann thanked Bea as _ had helped.", "option1": "Ann", "option2": "Bea"}
    row["answer"] = "2"
    if plain:
        row = {"question": row["sentence"], "choices": ["Ann", "Bea"], "answer": 1}
    (item,) = read_items(write(tmp_path, "w", row))
    asked = [(o.context + o.question, o.answer) for o in item.options]
    ends = "had helped."
    assert asked == [("Ann thanked Bea as Ann", ends), ("Ann thanked Bea as Bea", ends)]
    assert item.right == 1


@pytest.mark.parametrize(
    "line",
    [
        '{"goal": "x"}',
        "[1]",
        "{",
        '{"question": "x", "choices": ["a", "b"], "answer": 2}',
        '{"goal": "a", "sol1": "b", "sol2": "c", "label": null}',
        '{"question": "x", "choices": ["a", ""], "answer": 0}',
    ],
)
def test_wrong_items_are_named_by_their_line(line, tmp_path):
    """What is no item is refused with file and line."""
    path = tmp_path / "f.jsonl"
    path.write_text('\n{"text": "two words"}\n' + line)
    with pytest.raises(ValueError, match=r"f\.jsonl, line 3"):
        read_items(path)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("answer", "1", "a whole number is needed"),
        ("answer", 1.0, "a whole number is needed"),
        ("answer", True, "a whole number is needed"),
        ("choices", "xy", "a list of texts is needed"),
        ("choices", ["x", 1], "a list of texts is needed"),
    ],
)
def test_a_plain_field_of_another_type_is_said(field, value, what, tmp_path):
    """The plain form's answer is a whole number and its choices a list of texts: another names the
    line, the field and what came."""
    row = {"question": "Which?", "choices": ["x", "y"], "answer": 1} | {field: value}
    path = write(tmp_path, "f", row)
    shown = re.escape(f"f.jsonl, line 1, {field}={json.dumps(value)}: {what}")
    with pytest.raises(ValueError, match=shown):
        read_items(path)


def test_requests_are_parted_where_the_prompt_ends():
    """Context, question and answer in bytes: seen compresses all but the last token of the
    question, unseen the context; blanks go to the answer; something is always compressed."""
    tok = ByteTokenizer()
    option = Option("One.", " Two", "three")
    seen = request(tok, option, "seen")
    assert [tok.decode(part) for part in seen] == ["One. Tw", "o", " three"]
    unseen = request(tok, option, "unseen")
    assert [tok.decode(part) for part in unseen] == ["One.", " Two", " three"]
    apart = request(tok, Option("", "Two ", "three"), "unseen")
    assert [tok.decode(part) for part in apart] == ["T", "wo", " three"]
    for question in ("seen", "unseen"):  # nothing is left to read what one token says
        short = request(tok, Option("", "T", "three"), question)
        assert [tok.decode(part) for part in short] == ["T", "", " three"]


def by_loop(model, r: Request) -> S:
    """A request alone, token by token: the prompt through the cache, then each token that follows,
    a row and a logit at a time."""
    cache = model.new_cache(1, 99)
    row = model.prefill(torch.tensor([r.prompt]), cache)[0, -1].tolist()
    loglik = 0.0
    greedy = True
    follow = r.given + r.answer
    for t, token in enumerate(follow):
        if t > 0:
            row = model.decode(torch.tensor([[follow[t - 1]]]), cache)[0, -1].tolist()
        if t < len(r.given):
            continue
        most = max(row)
        loglik += row[token] - most - math.log(sum(math.exp(x - most) for x in row))
        greedy = greedy and row.index(most) == token
    return S(loglik, greedy)


def requests_of(seed: int = 0) -> list[Request]:
    """Requests of odd lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(0, TINY.vocab_size, (n,), generator=generator).tolist()

    sizes = ((9, 1, 5), (1, 3, 1), (23, 2, 7), (1, 0, 3))
    return [Request(ids(a), ids(b), ids(c)) for a, b, c in sizes]


@torch.no_grad()
@pytest.mark.parametrize("stored", ["dense", "value groups"])
def test_loglikelihoods_equal_a_loop_in_any_batch(stored):
    """Prompts, questions and answers of any lengths in one batch: the sums equal those of every
    request alone, read token by token from what is kept; and greedy is what is generated."""
    model = tiny_model() if stored == "dense" else grouped_model(kv_tail=3, prefill="exact")
    requests = requests_of()
    first = requests[2]
    cache = model.new_cache(1, 99)
    model.prefill(torch.tensor([first.prompt]), cache)
    logits = [model.decode(torch.tensor([[t]]), cache)[0, -1] for t in first.given]
    best = int(logits[-1].argmax())
    requests.append(Request(first.prompt, first.given, [best]))
    for found, r in zip(score_requests(model, requests), requests, strict=True):
        wanted = by_loop(model, r)
        assert found.loglik == pytest.approx(wanted.loglik, abs=1e-9)
        assert found.greedy == wanted.greedy
    assert score_requests(model, requests[-1:])[0].greedy


@torch.no_grad()
def test_dense_loglikelihoods_equal_one_forward():
    """Whole values: the sums are those of log-softmax over the whole text at once."""
    model = tiny_model()
    for r, found in zip(requests_of(3), score_requests(model, requests_of(3)), strict=True):
        ids = torch.tensor([[*r.prompt, *r.given, *r.answer]])
        logp = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert found.loglik == pytest.approx(logp[-len(r.answer) :].sum().item(), abs=1e-9)


def test_accuracies_by_hand():
    """Sums, sums over characters and over bytes choose differently; of equals the first counts; an
    item with one answer is right where it is greedy."""

    def item(right, *answers):
        return Item([Option("", "q", a) for a in answers], right)

    items = [item(1, "ab", "abcd"), item(0, "éé", "abc"), item(0, "x", "y"), item(0, "z")]
    scored = [
        [S(-3.0, False), S(-4.0, False)],  # sum: 0, per character -1.5 and -1: 1
        [S(-4.2, False), S(-6.0, False)],  # characters: -2.1 and -2: 1; bytes: -1.05 and -2: 0
        [S(-1.0, False), S(-1.0, False)],
        [S(-9.0, True)],
    ]
    got = accuracies(items, scored)
    assert got["accuracies"] == {"total": 0.75, "characters": 0.75, "bytes": 1.0}
    assert got["right_nats"] == pytest.approx((4 + 4.2 + 1 + 9) / 4)


def test_value_is_the_same_for_any_batch_size(tmp_path):
    """Items are scored in order of their lengths, and put back into their own."""
    rows = [
        {
            "question": f"Is {'very ' * (i % 3)}{i} odd?",
            "choices": ["yes", "no", "so"],
            "answer": i % 3,
        }
        for i in range(7)
    ]
    path = write(tmp_path, "plain", *rows)
    model = tiny_model(cfg=replace(TINY, vocab_size=257))
    values = []
    for batch_size in (1, 4, 99):
        task = zero_shot(ByteTokenizer(), 150, 7, 0, 3, str(path), "seen")
        values.append((task.value(model, batch_size, "float32"), task.also["right_nats"]))
    assert values[0] == pytest.approx(values[1]) and values[0] == pytest.approx(values[2])
    loop = [[by_loop(model, r) for r in of_item] for of_item in task.requests]
    with torch.no_grad():
        assert values[0][1] == pytest.approx(accuracies(task.items, loop)["right_nats"])
    with pytest.raises(ValueError, match="an item of"):
        zero_shot(ByteTokenizer(), 20, 7, 0, 3, str(path), "seen")


def test_files_of_one_name_are_refused(tmp_path):
    """Two files of one stem, or one named as another task, would share a name and so a dense value:
    refused before they are read. Other files are tasks of their own."""
    one = tmp_path / "easy/test.jsonl"
    other = tmp_path / "challenge/test.jsonl"
    for items, tasks, what in (
        (f"{one},{other}", "zero_shot", f"{one} and {other} would both be the task 'test'"),
        ("copy.jsonl", "copy,zero_shot", "the task copy and copy.jsonl would both be"),
    ):
        cfg = EvalConfig(tasks=tasks, items=items)
        with pytest.raises(ValueError, match=re.escape(what)):
            item_files(cfg)
    cfg = EvalConfig(tasks="zero_shot,needle", items=f"{one}, zero_shot.jsonl")
    assert item_files(cfg) == [str(one), "zero_shot.jsonl"]
    with pytest.raises(ValueError, match="both be the task"):
        cfg = EvalConfig(tasks="zero_shot", items=f"{one},{other}")
        make_tasks(cfg, SimpleNamespace(tokenizer=ByteTokenizer()), 99, [])
