"""Needles and variable tracking: prompts read back as text, scores from models that answer right,
wrong or not at all, and answers read from a compressed cache."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from answering import Reader, check_filler, interpret, read, solve, tokenizer
from helpers import TINY, error_line, grouped_model, tiny_model, tokens
from test_eval import ContextOracle

import kv_router
from loaders.tokenizer import ByteTokenizer
from tasks.choices import multiple_choice
from tasks.common import Generated, ThroughCache, decoded
from tasks.prompts import FILLER, PLACES, Needle, VariableTracking, needle, variable_tracking

pytestmark = pytest.mark.usefixtures("own_cache")


def test_filler_is_plain():
    """About forty different sentences, without digits, capitals inside, or words of the questions;
    places are as many as --distractors needs."""
    assert len(set(FILLER)) == len(FILLER) == 40 and len(set(PLACES)) == 32
    for s in FILLER:
        assert re.fullmatch(r"[A-Z][A-Za-z, ]+\.", s) and not re.search(
            r"number|magic|lucky|VAR|[A-Z]{2}", s
        )
    assert all(re.fullmatch("[A-Z][a-z]+", p) for p in PLACES)


# ----------------------------------------------------------------------------- needle


@pytest.mark.parametrize("length", [230, 331, 1200])
@pytest.mark.parametrize("kind", ["byte", "bpe", "pairs"])
def test_needle_is_said_once_and_asked_last(kind, length):
    """The needle stands once in whole filler sentences, the question ends the prompt, no other
    digit is in it, and the prompt has 90 to 100 % of the tokens that the answer leaves."""
    task = needle(tokenizer(kind), length, 30, 3, 16)
    question = "\n\nWhat is the magic number? The magic number is"
    assert (task.n, task.room, task.query, task.metric, task.name) == (
        30,
        10,
        16,
        "accuracy",
        "needle",
    )
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        said = f"The magic number is {answer}."
        assert (
            1 <= answer <= 9
            and text.count(said) == 1
            and text.endswith(question)
            and re.findall("[0-9]", text) == [str(answer)]
        )
        check_filler(text[: -len(question)].replace(said, ""))
        assert 0.9 * (length - 10) <= len(task.prompts[i]) <= length - 10
    assert len({tuple(p) for p in task.prompts}) == 30


class Dear(ByteTokenizer):
    """Sentences cost more together than alone: three tokens more at every boundary."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace(". ", ".    "))


def test_budget_holds_where_sentences_cost_more_together():
    """Sentences are taken out again until the prompt fits, whole ones, and hardly more than
    needed."""
    task = needle(Dear(), 1500, 20, 0, 16)
    for i, answer in enumerate(task.answers):
        assert 0.9 * 1490 <= len(task.prompts[i]) <= 1490
        context = read(task, i).split("\n\n")[0]
        check_filler(context.replace(f"The magic number is {answer}.", ""))


def test_needle_answers_and_places_are_uniform():
    """Over 900 examples every digit comes about as often, and the needle about as often in every
    quarter of the text; the digit says nothing about the place."""
    task = needle(ByteTokenizer(), 400, 900, 0, 16)
    place = [int(4 * read(task, i).index("The magic number is") / 330) for i in range(900)]
    assert set(Counter(task.answers)) == {*range(1, 10)} and all(
        70 <= c <= 130 for c in Counter(task.answers).values()
    )
    assert all(170 <= Counter(place)[q] <= 280 for q in range(4))
    assert all(
        Counter(p for p, a in zip(place, task.answers, strict=True) if a > 4)[q] > 80
        for q in range(4)
    )
    last = [re.findall(r"[A-Z][^.]*\.", read(task, i).split("\n\n")[0])[-1] for i in range(900)]
    # the short sentences that fill the budget up stand anywhere
    assert sum(len(s) < 20 for s in last) < 450


@pytest.mark.parametrize("distractors", [1, 3, 12, 31])
def test_distractors_are_other_numbers(distractors):
    """Every place is named once with its number, none of the others has the answer, the one asked
    for is anywhere among them, and the question names it."""
    task = needle(tokenizer("bpe"), 2600, 40, 1, 16, distractors)
    ranks = []
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        context, question = text.split("\n\n")
        facts = re.findall(r"The lucky number of (\w+) is (\d)\.", context)
        asked = re.fullmatch(
            r"What is the lucky number of (\w+)\? The lucky number of (\w+) is", question
        )
        assert (
            asked[1] == asked[2]
            and len(facts) == len(dict(facts)) == distractors + 1
            and "magic" not in text
        )
        assert (
            dict(facts)[asked[1]] == str(answer)
            and [d for _, d in facts].count(str(answer)) == 1
            and "0" not in dict(facts).values()
        )
        check_filler(re.sub(r"The lucky number of \w+ is \d\.", "", context))
        ranks.append([p for p, _ in facts].index(asked[1]))
    assert len(set(ranks)) > min(distractors, 5)


# ----------------------------------------------------------------------------- variable tracking


@pytest.mark.parametrize("chains, hops", [(1, 1), (1, 4), (3, 2), (4, 5)])
@pytest.mark.parametrize("kind", ["byte", "bpe", "pairs"])
def test_variable_tracking_is_solved_by_an_interpreter(kind, chains, hops):
    """Run in order, the text gives the answer and nothing else that value; as many chains of that
    length as were asked for; the example's answer is right, and its names and value are its own;
    room for the answer; 90 to 100 % of the tokens."""
    length = 2000
    task = variable_tracking(tokenizer(kind), length, 12, 5, 16, chains, hops)
    assert (task.metric, task.name) == ("recall", "variable_tracking")
    for i, answer in enumerate(task.answers):
        text = read(task, i)
        example, shown, body = re.fullmatch(
            r"(Follow .*?)\nQuestion: .*?\nAnswer: .*? are: ([A-Z, ]+)\n\n(Follow .*)", text, re.S
        ).groups()
        context, value = re.fullmatch(
            r"(.*)\nQuestion: Find all variables that are assigned the value (\d{5}) in the text above.\n"
            rf"Answer: The {hops + 1} variables that are assigned the value \2 are:",
            body,
            re.S,
        ).groups()
        values = interpret(context)
        assert [n for n, v in values.items() if v == value] == answer and len(answer) == hops + 1
        assert sorted(Counter(values.values()).values()) == [hops + 1] * chains
        assert [*interpret(example)] == shown.split(", ") and len(
            set(interpret(example).values())
        ) == 1
        assert not {*interpret(example)} & {*values} and not {*interpret(example).values()} & {
            *values.values()
        }
        check_filler(
            re.sub(
                r"VAR [^.]*\.",
                "",
                context.removeprefix("Follow the variables through the text.\n\n"),
            )
        )
        assert task.room >= len(task.tokenizer.encode(" " + ", ".join(answer)))
        assert 0.9 * (length - task.room) <= len(task.prompts[i]) <= length - task.room


def test_chains_are_scattered_and_any_is_asked_for():
    """The chain that is asked for is now the first, now another, and chains run through each other,
    with filler between assignments."""
    task = variable_tracking(ByteTokenizer(), 2500, 40, 0, 16, 3, 3)
    first = []
    mixed = 0
    apart = 0
    for i, answer in enumerate(task.answers):
        context = read(task, i).split("Follow the variables")[2]
        values = interpret(context)
        first.append(next(iter(values)) == answer[0])
        order = list(values.values())
        mixed += any(
            order[j] != order[j + 1] and order[j] in order[j + 2 :] for j in range(len(order) - 2)
        )
        apart += (
            len(re.findall(r"\. VAR", context)) > 5 and len(re.findall(r"[a-z]\. VAR", context)) > 3
        )
    assert 5 <= sum(first) <= 25 and mixed > 35 and apart > 35


# -------------------- what all prompts have in common


MAKERS = {
    "needle": lambda n, seed, tok=None, T=400: needle(tok or ByteTokenizer(), T, n, seed, 16),
    "distractors": lambda n, seed, tok=None, T=500: needle(
        tok or ByteTokenizer(), T, n, seed, 16, 3
    ),
    "variable_tracking": lambda n, seed, tok=None, T=1100: variable_tracking(
        tok or ByteTokenizer(), T, n, seed, 16, 2, 2
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_prompts_follow_from_seed_and_index(name):
    """The same seed gives the same prompts, however many are made; another seed or index gives
    others."""
    a = MAKERS[name](4, 1)
    b = MAKERS[name](9, 1)
    c = MAKERS[name](9, 2)
    assert a.prompts == b.prompts[:4] and a.answers == b.answers[:4]
    assert len({tuple(p) for p in b.prompts + c.prompts}) == 18 and b.answers != c.answers


@pytest.mark.parametrize(
    "name, short", [("needle", 200), ("distractors", 320), ("variable_tracking", 850)]
)
def test_too_short_is_refused(name, short):
    """A length that would leave no haystack is refused in one line, from that length down to
    nothing; above it every length works."""
    for T in (short, short // 2, 11, 1):
        line = error_line(MAKERS[name], 20, 0, T=T)
        assert "give a larger --block_size" in line and "tokens for a prompt" in line
    for T in range(short + 100, short + 140, 7):
        MAKERS[name](3, 0, T=T)


def test_stored_is_the_end_of_four_prompts():
    """What is measured is one rectangle: the last tokens of the first four prompts, as many as the
    shortest of them has."""
    task = MAKERS["needle"](6, 0)
    short = min(len(p) for p in task.prompts[:4])
    assert (
        task.stored.tolist() == [p[len(p) - short :] for p in task.prompts[:4]]
        and len({len(p) for p in task.prompts[:4]}) > 1
    )
    assert replace(task, prompts=task.prompts[:2]).stored.shape[0] == 2


@pytest.mark.parametrize(
    "text, answer, score",
    [
        (" 7.", 7, 1),
        ("7", 7, 1),
        (" 77", 7, 1),
        (" is not 3 but 7", 7, 0),
        (" seven", 7, 0),
        ("", 7, 0),
        (" 17", 7, 0),
        (" ٧ 7", 7, 1),
    ],
)
def test_needle_score_is_the_first_digit(text, answer, score):
    """The first digit counts, nothing after it, and no digit is wrong."""
    assert Needle.score(text, answer) == score


@pytest.mark.parametrize(
    "text, score",
    [
        (" AAAAA, BBBBB, CCCCC, DDDDD", 1),
        (" DDDDD BBBBB", 0.5),
        (" VAR AAAAA\n\nFollow", 0.25),
        (" aaaaa AAAA", 0),
        ("", 0),
        ("AAAAA AAAAA", 0.25),
    ],
)
def test_variable_tracking_score_is_the_share_named(text, score):
    """Each of the chain's variables counts once, in any order."""
    assert VariableTracking.score(text, ["AAAAA", "BBBBB", "CCCCC", "DDDDD"]) == score


def test_scores_of_a_model_that_answers():
    """A model that solves the text gets 1, one that is wrong or silent 0, half the answer half, and
    one that only looks at the wrong number 0; whatever the batch, padded or not. Nothing after the
    end token counts."""
    for name, make in MAKERS.items():
        task = make(7, 2)
        assert len({len(p) for p in task.prompts}) > 1  # so that batches are padded
        for answer, value in (
            (solve, 1),
            (lambda t: " none", 0),
            (lambda t: "", 0),
            (lambda t: "\0" + solve(t), 0),
        ):
            assert [task.value(Reader(answer), n, "float32") for n in (1, 3, 7, 16)] == [
                value
            ] * 4, name
    task = MAKERS["distractors"](7, 2)
    assert (
        task.value(
            Reader(
                lambda t: next(
                    d for _, d in re.findall(r"of (\w+) is (\d)", t) if d not in solve(t)
                )
            ),
            3,
            "float32",
        )
        == 0
    )
    task = MAKERS["variable_tracking"](7, 2)
    assert task.value(
        Reader(lambda t: ",".join(solve(t).split(",")[:2])), 3, "float32"
    ) == pytest.approx(2 / 3)
    right = iter([1, 0] * 4)
    assert MAKERS["needle"](7, 2).value(
        Reader(lambda t: solve(t) if next(right) else " x"), 1, "float32"
    ) == pytest.approx(4 / 7)


def test_last_token_of_a_prompt_reads_the_cache():
    """A prompt goes in without its last token, then that alone, then one at a time for as many as
    there is room for, one cache a batch."""
    task = MAKERS["needle"](5, 0)
    reader = Reader(lambda t: "x" * 99)
    task.value(reader, 2, "float32")
    assert reader.calls == [
        [max(map(len, task.prompts[i : i + 2])) - 1] + [1] * 10 for i in (0, 2, 4)
    ]


def test_generated_ids_that_the_tokenizer_lacks_end_the_text():
    """A model's table may be longer than the vocabulary: such an id gives no text and no crash."""
    tok = ByteTokenizer()
    assert (
        decoded(tok, [55, 300, 56]) == decoded(tok, [55, 256]) == "7"
        and decoded(tok, [300]) == decoded(tok, []) == ""
    )


class Letters(ByteTokenizer):
    """Ids for a model of TINY.vocab_size: a byte's remainder, all of it different for A, B, C and
    D."""

    def encode(self, text: str) -> list[int]:
        return [b % TINY.vocab_size for b in super().encode(text)]


@pytest.mark.parametrize("query", [0, 9])
def test_answers_are_read_from_the_compressed_cache(query, tmp_path):
    """The logits behind an answer are those of full matrices where the prompt's last token reads
    the routed values of all but the last `query` tokens, in batches with padding; they are not the
    dense model's."""
    (tmp_path / "q.csv").write_text(
        "".join(f"Is {'so ' * (i % 5)}{i} it?,a{i},b,c,d,{'ABCD'[i % 4]}\n" for i in range(24))
    )
    setting = dict(
        prefill="exact",
        value_basis="output",
        value_router="norm",
        mask_scope="head",
        n_groups=8,
        topk_groups=2,
    )
    task = multiple_choice(Letters(), 160, 23, 0, query, str(tmp_path / "q.csv"), shots=1)
    model = grouped_model(**setting)
    oracle = grouped_model(**setting)
    seen = {}
    for i, (p, (_, letters)) in enumerate(zip(task.prompts, task.answers, strict=True)):
        for name, path in kv_router.paths(grouped_model(**setting)).items():
            oracle.get_submodule(name.rsplit(".", 1)[0]).kv_path = ContextOracle(
                path, query, len(p) - 1
            )
        with torch.no_grad():
            seen[i] = (
                oracle(torch.tensor([p]))[0, -1, letters],
                tiny_model()(torch.tensor([p]))[0, -1, letters],
            )
    want = sum(float(seen[i][0].argmax() == task.answers[i][0]) for i in seen) / 23
    with kv_router.storing(model, kv_tail=query, kv_tail_block=1):
        assert [task.value(model, n, "float32") for n in (1, 4, 23)] == [pytest.approx(want)] * 3
        for i in (0, 7, 22):
            p = task.prompts[i]
            (_, letters) = task.answers[i]
            with torch.no_grad():
                cache = model.new_cache(1, len(p))
                got = ThroughCache(model).prefill(torch.tensor([p]), cache)[0, -1, letters]
            assert (
                torch.allclose(got, seen[i][0], atol=1e-8, rtol=0)
                and (got - seen[i][1]).abs().max() > 1e-3
            )


def test_ragged_prompts_whose_last_tokens_read_the_cache():
    """Prompts of several lengths, of which the last three tokens read what is kept of the others:
    the newest token's logits are those of each prompt alone. Only prompts of three tokens or fewer
    read whole values."""
    setting = dict(prefill="exact", value_router="norm", n_groups=8, topk_groups=2, kv_tail=2)
    model = grouped_model(**setting)
    lengths = (12, 9, 3, 2, 1)
    prompts = [tokens(n, seed=n) for n in lengths]
    T = max(lengths)
    idx = torch.stack([F.pad(prompt, (T - len(prompt), 0)) for prompt in prompts])
    n_pad = T - torch.tensor(lengths)
    through = ThroughCache(model, 3)
    with torch.no_grad():
        got = through.prefill(idx, model.new_cache(len(idx), T), n_pad)[:, -1]
        for logits, prompt in zip(got, prompts, strict=True):
            alone = through.prefill(prompt[None], model.new_cache(1, T))[0, -1]
            whole = model.prefill(prompt[None], model.new_cache(1, T))[0, -1]
            assert (logits - alone).abs().max() < 1e-12
            assert ((logits - whole).abs().max() < 1e-12) == (len(prompt) <= 3)


def test_generated_text_is_the_same_in_any_batch():
    """A random model's answers to prompts of several lengths, alone and together, through packed
    caches."""
    model = grouped_model(
        seed=5,
        prefill="exact",
        value_basis="output",
        value_router="norm",
        mask_scope="head",
        kv_tail=5,
    )
    tok = Letters()
    said = []
    prompts = [tok.encode("What is it? It is"[i:]) for i in range(7)]

    class Kept(Generated):
        @staticmethod
        def score(text, answer):
            said.append(text)
            return 1.0

    task = Kept(prompts, [0] * 7, 5, tok, 12)
    for n in (1, 3, 7):
        assert task.value(model, n, "float32") == 1
    assert said[:7] == said[7:14] == said[14:] and len(set(said)) > 3
    assert not model.training
