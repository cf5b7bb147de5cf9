"""What eval.py measures: text that is read (perplexity, continuation), and prompts made here whose
answer is known.

Needle in a haystack (ST 4.3): one digit said once in filler text and asked for at the end. Variable
tracking (RULER, arXiv 2404.06654): chains of assignments scattered in order through filler, which
variables hold a value? Multiple choice in MMLU's format (arXiv 2009.03300).

Every task has name, metric, n (what its value is the mean of), stored (at most 4, T): ids whose
cache is measured, query: tokens at the end of a prompt that are never compressed (None: the path's
own tail counts), value(model, batch_size, dtype, whole), whole: what others are compared with, and
kl: how far the last call's predictions were from those, where the task can tell.

In prompts, the last token reads the cache that the others have left (`ThroughCache`): with an exact
prefill the first token generated would otherwise come from whole values, and with it, in many
tokenizers, the whole answer. A prompt is made of the seed and its own index alone; whole sentences
are added until the budget of tokens is reached, and nothing is ever cut.

    python eval.py --init_from=model.gguf --tasks=needle,variable_tracking --block_size=2048 \\
        --sequences=200 --methods=dense,value_groups
"""

from __future__ import annotations

import csv
import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from config import check, comma_list
from data import TokenFile, batch, sequential
from loaders.device import autocast
from loaders.tokenizer import encoded
from measure_config import EvalConfig
from model import KVCache, Transformer, evaluating, generate, lm_loss
from selector import diagnosed

READING = ("perplexity", "continuation")  # the tasks that need a corpus
KL_SEQUENCES = 16  # of a continuation, whose predictions are kept: 25 MB each with 49,152 tokens
LETTERS = "ABCD"
NEEDLE_ROOM = 10  # tokens generated for a needle (ST 4.3)
NAME_ROOM = 7  # and for each variable: five letters, comma and blank, one byte a token at worst
LEAST_FILLER = 2  # sentences, the longest ones, that must fit
PLACES = (
    "Athens",
    "Berlin",
    "Bergen",
    "Boston",
    "Cairo",
    "Delhi",
    "Dublin",
    "Florence",
    "Geneva",
    "Havana",
    "Istanbul",
    "Jakarta",
    "Kyoto",
    "Lagos",
    "Lima",
    "Lisbon",
    "London",
    "Madrid",
    "Manila",
    "Moscow",
    "Nairobi",
    "Oslo",
    "Paris",
    "Prague",
    "Quito",
    "Rome",
    "Seoul",
    "Sydney",
    "Tokyo",
    "Toronto",
    "Vienna",
    "Warsaw",
)
FILLER = (  # plain, without digits, of many lengths: short ones fill the last tokens of a budget
    "It rained.",
    "The dog slept.",
    "Nobody spoke.",
    "The soup was hot.",
    "A door stood open.",
    "The train was late again.",
    "Bread was baking in the oven.",
    "The old clock ticked in the hall.",
    "Two boats lay at the end of the pier.",
    "She watered the plants before breakfast.",
    "The road to the village follows the river.",
    "He forgot his umbrella at the library.",
    "A cat watched the birds from the window.",
    "The market closes when the sun goes down.",
    "Snow had covered the roofs during the night.",
    "They painted the fence green last summer.",
    "The baker gives his old bread to the ducks.",
    "My neighbour plays the cello in the evening.",
    "Wind from the sea makes the curtains move.",
    "The children built a castle out of wet sand.",
    "Someone had left a bicycle against the wall.",
    "The tea grew cold while they talked about the garden.",
    "A letter arrived from her cousin in the mountains.",
    "The shop on the corner sells paper and string.",
    "In autumn the yard is full of yellow leaves.",
    "The teacher wiped the board and opened a window.",
    "Our bus crosses the bridge and then turns left.",
    "The farmer mended the gate before the cows came home.",
    "Apples from that tree are small but very sweet.",
    "The museum keeps its oldest maps in a dark room.",
    "He folded the newspaper and looked out at the harbour.",
    "The lamp in the kitchen has needed repair since spring.",
    "Every Sunday the band plays in the park by the lake.",
    "The tailor measured the coat twice and cut it once.",
    "Her brother collects shells and keeps them in a wooden box.",
    "A long path leads through the wood to the mill.",
    "The ferry carries more bicycles than cars these days.",
    "They sat on the steps and waited for the rain to stop.",
    "The carpenter made a table from the planks of an old ship.",
    "When the lights went out, everyone in the house lit a candle.",
)


# ----------------------------------------------------------------------------- text that is read


def mean_loss(
    model: Transformer, x: Tensor, y: Tensor, batch_size: int, dtype: str = "float32"
) -> float:
    """Mean next-token loss in nats over x, y (n, T) int64, decode mode, batch_size rows at a
    time."""
    device = model.norm.weight.device
    total = 0.0
    with evaluating(model):
        for i in range(0, len(x), batch_size):
            xb = x[i : i + batch_size].to(device)
            yb = y[i : i + batch_size].to(device)
            with autocast(device, dtype):
                total += lm_loss(model(xb), yb).item() * len(xb)
    return total / len(x)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss over x, y (n, T) int64, decode mode."""

    x: Tensor
    y: Tensor
    name = "perplexity"
    metric = "perplexity"
    query = None
    kl = None

    @property
    def n(self) -> int:
        return self.x.numel()

    @property
    def stored(self) -> Tensor:
        """Sequences whose cache is measured."""
        return self.x[:4]

    def value(self, model: Transformer, batch_size: int, dtype: str, whole: bool = False) -> float:
        return math.exp(mean_loss(model, self.x, self.y, batch_size, dtype))


@dataclass(frozen=True)
class Continuation:
    """Mean loss in nats of the text that follows a compressed context, through the packed cache.

    x (n, T) int64: T - query - last tokens of context, processed exactly and then compressed;
    `query` tokens that stay whole; `last` tokens that read both and whose loss it is (the first of
    them is predicted by nobody). The paths' tail must be `query`. seen: what whole values predicted
    of the first KL_SEQUENCES, log-probabilities, and kl. A loss has the chance of which token came
    in it, a divergence has not: it tells settings apart whose losses differ by less than chance."""

    x: Tensor
    query: int
    last: int
    seen: dict = field(default_factory=dict, compare=False, repr=False)
    name = "continuation"
    metric = "loss"

    @property
    def n(self) -> int:
        return len(self.x) * (self.last - 1)

    @property
    def stored(self) -> Tensor:
        return self.x[:4, : -self.last]

    @property
    def kl(self) -> float | None:
        """Mean KL divergence in nats of the last call's predictions from those of whole values,
        where those came before."""
        return self.seen.get("kl")

    def value(self, model: Transformer, batch_size: int, dtype: str, whole: bool = False) -> float:
        device = model.norm.weight.device
        total = 0.0
        known = [] if whole else self.seen.get("whole")
        apart = []
        with evaluating(model), autocast(device, dtype):
            for i in range(0, len(self.x), batch_size):
                x = self.x[i : i + batch_size].to(device)
                cache = model.new_cache(*x.shape)
                with diagnosed(model, x, x.size(1) - self.last):
                    model(x[:, : -self.last], cache, last_only=True)
                logits = model(x[:, -self.last :], cache)[:, :-1]
                total += lm_loss(logits, x[:, 1 - self.last :]).item() * len(x)
                for j in range(i, min(i + len(x), KL_SEQUENCES) if known is not None else 0):
                    log_p = logits[j - i].float().log_softmax(-1)
                    if whole:
                        known.append(log_p.cpu())
                    else:
                        was = known[j].to(device)
                        apart.append((was.exp() * (was - log_p)).sum(-1).mean().item())
        self.seen.update({"whole": known, "kl": mean(apart) if apart else None})
        return total / len(self.x)


# -------------------- prompts with a known answer


class ThroughCache:
    """A model for `generate` that processes all of a prompt but its last tokens, and lets those
    read what is kept of the others."""

    def __init__(self, model: Transformer, last: int = 1):
        self.model = model
        self.last = last

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def __call__(self, idx: Tensor, cache: KVCache, last_only: bool = True) -> Tensor:
        """Logits (B, 1, vocab) of the newest token; idx (B, T) int64."""
        if idx.size(1) > self.last:
            idx, new = idx[:, : -self.last], idx[:, -self.last :]
            with diagnosed(self.model, idx, idx.size(1), cache.pad):
                self.model(idx, cache, last_only=True)
            idx = new
        return self.model(idx, cache, last_only=True)


@dataclass(frozen=True)
class Prompts:
    """n prompts of token ids, of any lengths, with one answer each; value is the mean score. The
    paths' tail must be `query`.

    A task is a subclass with scores(model, prompts, answers) -> list[float]: of a batch, each in
    [0, 1]."""

    prompts: list[list[int]]
    answers: list
    query: int
    tokenizer: object
    kl = None

    @property
    def n(self) -> int:
        return len(self.prompts)

    @property
    def stored(self) -> Tensor:
        """The first four prompts, cut at the front to the shortest of them."""
        first = self.prompts[:4]
        return torch.tensor([p[-min(map(len, first)) :] for p in first])

    def value(self, model: Transformer, batch_size: int, dtype: str, whole: bool = False) -> float:
        device = model.norm.weight.device
        out = []
        with evaluating(model), autocast(device, dtype):
            for i in range(0, self.n, batch_size):
                out += self.scores(
                    model, self.prompts[i : i + batch_size], self.answers[i : i + batch_size]
                )
        return mean(out)


@dataclass(frozen=True)
class Generated(Prompts):
    """Prompts continued greedily by `room` tokens through the packed cache; `score(text, answer)`
    is of the text up to the end token."""

    room: int

    def scores(
        self, model: Transformer, prompts: list[list[int]], answers: list, last: int = 1
    ) -> list[float]:
        rows, _ = generate(ThroughCache(model, last), prompts, self.room, stop=self.tokenizer.eot)
        return [
            self.score(decoded(self.tokenizer, r), a) for r, a in zip(rows, answers, strict=True)
        ]


class Needle(Generated):
    """Share of prompts whose digit (answer: int, 1..9) is the first digit generated."""

    name = "needle"
    metric = "accuracy"

    @staticmethod
    def score(text: str, answer: int) -> float:
        found = re.search("[0-9]", text)
        return float(found is not None and found[0] == str(answer))


@dataclass(frozen=True)
class NeedleReuse(Needle):
    """Needle of a second question: the cache is compressed for the first, which stands before it;
    seconds: its length in each prompt."""

    seconds: list[int]
    name = "needle_reuse"

    @property
    def stored(self) -> Tensor:
        """What is compressed, up to the second question."""
        return Needle(
            [p[:-m] for p, m in zip(self.prompts[:4], self.seconds, strict=False)],
            [],
            self.query,
            self.tokenizer,
            self.room,
        ).stored

    def value(self, model: Transformer, batch_size: int, dtype: str, whole: bool = False) -> float:
        total = 0.0
        device = model.norm.weight.device
        with evaluating(model), autocast(device, dtype):
            # a batch has one length: all that is compressed ends in the same column
            for m in sorted(set(self.seconds)):
                rows = [i for i, s in enumerate(self.seconds) if s == m]
                for j in range(0, len(rows), batch_size):
                    prompts, answers = zip(
                        *((self.prompts[i], self.answers[i]) for i in rows[j : j + batch_size]),
                        strict=True,
                    )
                    total += sum(self.scores(model, list(prompts), list(answers), m))
        return total / self.n


class VariableTracking(Generated):
    """Mean share of the variables (answer: their names) that occur in the generated text."""

    name = "variable_tracking"
    metric = "recall"

    @staticmethod
    def score(text: str, answer: list[str]) -> float:
        return sum(name in text for name in answer) / len(answer)


class MultipleChoice(Prompts):
    """Share of prompts whose right letter has the largest logit of the four (answer: 0..3 and the
    letters' ids); of equals the first counts."""

    name = "multiple_choice"
    metric = "accuracy"

    def scores(self, model: Transformer, prompts: list[list[int]], answers: list) -> list[float]:
        T = max(map(len, prompts))
        device = model.norm.weight.device
        pad = torch.tensor([T - len(p) for p in prompts], device=device)
        idx = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=device)  # (B, T)
        # (B, vocab)
        logits = ThroughCache(model)(
            idx, model.new_cache(len(prompts), T, pad if pad.any() else None)
        )[:, -1]
        return [
            float(logits[i, torch.tensor(letters, device=device)].argmax() == right)
            for i, (right, letters) in enumerate(answers)
        ]


def decoded(tokenizer, ids: list[int]) -> str:
    """Text of generated ids up to the first that the tokenizer does not have: a model's table may
    be longer than its vocabulary."""
    for end in range(len(ids), 0, -1):
        try:
            return tokenizer.decode(ids[:end])
        except ValueError:
            continue
    return ""


# -------------------- needle and variable tracking


def weave(filler: list[str], facts: Sequence[str], depths: Sequence[float]) -> str:
    """One text: the facts in their order between the sentences, at depths in [0, 1), ascending (0:
    before the first sentence)."""
    lines = list(filler)
    # from the back, so that places stay what they were
    for fact, depth in reversed(list(zip(facts, depths, strict=True))):
        lines.insert(int(depth * (len(filler) + 1)), fact)
    return " ".join(lines)


def haystack(
    tokenizer,
    rng: random.Random,
    before: str,
    facts: Sequence[str],
    depths: Sequence[float],
    after: str,
    budget: int,
) -> list[int]:
    """Ids of before + filler with the facts in it + after: at most budget tokens, and where
    sentences cost together what they cost alone less than the shortest of them below it. depths:
    ascending, one for each fact. ValueError where no haystack fits."""
    cost = {s: len(tokenizer.encode(" " + s)) for s in FILLER}  # to one token what it adds
    filler = []
    full = False
    while True:
        ids = encoded(tokenizer, before + weave(filler, facts, depths) + after)
        room = budget - len(ids)
        held = len(filler)
        check(
            filler or room >= LEAST_FILLER * max(cost.values()),
            f"{budget} tokens for a prompt",
            f"{len(ids)} for facts and question, and {LEAST_FILLER} sentences of filler, must fit",
            "give a larger --block_size, or fewer --distractors, --chains or --hops",
        )
        if room < 0:  # sentences may cost more together than alone
            filler.pop(rng.randrange(held))
            full = True
            continue
        while not full and (fits := [s for s in FILLER if cost[s] <= room]):
            drawn = rng.choice(FILLER)
            filler.append(drawn if drawn in fits else rng.choice(fits))
            room -= cost[filler[-1]]
        if len(filler) == held:
            return ids
        rng.shuffle(filler)  # the short ones of a round's end go anywhere


def needle(
    tokenizer, length: int, n: int, seed: int, query: int, distractors: int = 0, reuse: bool = False
) -> Needle:
    """n needles in contexts of `length` tokens, the room for the answer included; distractors:
    other named numbers, none of them the answer. reuse: after the first question and its answer,
    another number is asked for, and that is the answer."""
    prompts = []
    answers = []
    seconds = []
    for i in range(n):
        rng = random.Random(f"needle {seed} {i} {distractors}")
        numbers = [rng.randint(1, 9)]
        others = [d for d in range(1, 10) if d != numbers[0]]
        names = rng.sample(PLACES, distractors + 1) if distractors else []
        numbers += [rng.choice(others) for _ in names[1:]]
        facts = [
            f"The lucky number of {p} is {d}." for p, d in zip(names, numbers, strict=False)
        ] or [f"The magic number is {numbers[0]}."]
        if names:
            rng.shuffle(facts)
        asked = [
            f"\n\nWhat is the {what}? The {what} is"
            for what in ([f"lucky number of {p}" for p in names[:2]] or ["magic number"])
        ]
        second = tokenizer.encode(f" {numbers[0]}.{asked[1]}") if reuse else []
        depths = sorted(rng.random() for _ in facts)
        prompts.append(
            haystack(
                tokenizer, rng, "", facts, depths, asked[0], length - NEEDLE_ROOM - len(second)
            )
            + second
        )
        answers.append(numbers[1 if reuse else 0])
        seconds.append(len(second))
    if reuse:
        return NeedleReuse(prompts, answers, query, tokenizer, NEEDLE_ROOM, seconds)
    return Needle(prompts, answers, query, tokenizer, NEEDLE_ROOM)


def chain_text(names: list[str], value: str) -> list[str]:
    """The assignments of one chain, in order: the first gets the value, every other its
    predecessor."""
    return [
        f"VAR {name} = {f'VAR {names[j - 1]}' if j else value}." for j, name in enumerate(names)
    ]


def variable_tracking(
    tokenizer, length: int, n: int, seed: int, query: int, chains: int = 1, hops: int = 4
) -> VariableTracking:
    """n texts of `length` tokens, the room for the answer included, with `chains` chains of hops +
    1 assignments; one is asked for.

    Before it, as RULER does, one short worked example: a chain as long, with names and a value of
    its own."""
    prompts = []
    answers = []
    room = NAME_ROOM * (hops + 1)

    def ask(value: str) -> str:
        return (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text "
            "above.\n"
            f"Answer: The {hops + 1} variables that are assigned the value {value} are:"
        )

    for i in range(n):
        rng = random.Random(f"variable_tracking {seed} {i} {chains} {hops}")
        names: dict[str, None] = {}  # in the order drawn
        while len(names) < (chains + 1) * (hops + 1):
            names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
        lists = [list(names)[j : j + hops + 1] for j in range(0, len(names), hops + 1)]
        values = [str(v) for v in rng.sample(range(10000, 100000), chains + 1)]
        shown = " ".join(
            s for line in chain_text(lists[0], values[0]) for s in (rng.choice(FILLER), line)
        )
        intro = "Follow the variables through the text.\n\n"
        before = f"{intro}{shown}{ask(values[0])} {', '.join(lists[0])}\n\n{intro}"
        placed = sorted(
            (depth, line)
            for names, value in zip(lists[1:], values[1:], strict=True)
            for depth, line in zip(
                sorted(rng.random() for _ in names), chain_text(names, value), strict=True
            )
        )
        depths, lines = zip(*placed, strict=True)
        prompts.append(
            haystack(tokenizer, rng, before, lines, depths, ask(values[1]), length - room)
        )
        answers.append(lists[1])  # its place in the text is as random as any
    return VariableTracking(prompts, answers, query, tokenizer, room)


# ----------------------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Question:
    """A row of an MMLU file: question, four choices, the answer 0..3, and where it stands."""

    text: str
    choices: tuple[str, ...]
    answer: int
    where: str

    def asked(self) -> str:
        return "\n".join(
            [
                self.text,
                *(f"{letter}. {c}" for letter, c in zip(LETTERS, self.choices, strict=True)),
                "Answer:",
            ]
        )

    def shown(self) -> str:
        return f"{self.asked()} {LETTERS[self.answer]}\n\n"


def read_questions(path: Path) -> list[Question]:
    """The rows of an MMLU file: question, A, B, C, D, answer; no header. ValueError names file and
    line of a bad row."""
    out = []
    line = 1
    do = "give MMLU's CSV: question, A, B, C, D, answer, without a header"
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = csv.reader(f, strict=True)
            for row in rows:
                where = f"{path}, line {line}"
                line = rows.line_num + 1
                if not row:
                    continue
                check(len(row) == 6, where, f"{len(row)} fields where 6 are needed", do)
                check(all(c.strip() for c in row), where, "an empty field", do)
                check(
                    row[5].strip() in tuple(LETTERS),
                    f"{where}: answer {row[5]!r}",
                    "one of A, B, C, D",
                    do,
                )
                out.append(
                    Question(
                        row[0].strip(),
                        tuple(c.strip() for c in row[1:5]),
                        LETTERS.index(row[5].strip()),
                        where,
                    )
                )
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path}, line {line}: {e}; {do}") from None
    check(bool(out), f"{path}", "there is no question in it", do)
    return out


def subject_files(where: str) -> dict[str, Path]:
    """{subject: file} of a CSV file or a folder of them; the subject is the file's name without
    _test, _dev, _val and the like."""
    path = Path(where)
    check(
        path.exists(), where, "no such file or folder", "give MMLU's CSV file or a folder of them"
    )
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    check(
        bool(files),
        where,
        "there is no .csv file in it",
        "give MMLU's CSV file or a folder of them",
    )
    return {re.sub(r"_(test|dev|val|validation|train)$", "", f.stem): f for f in files}


def letter_ids(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the four letters) of a text that ends in 'Answer:': what 'Answer:
    A' to 'Answer: D' have in common, and the last token of each. ValueError unless those are all
    that differs."""
    ids = [encoded(tokenizer, f"{text} {letter}") for letter in LETTERS]
    check(
        all(i[:-1] == ids[0][:-1] for i in ids) and len({i[-1] for i in ids}) == len(LETTERS),
        f"multiple choice with tokenizer {tokenizer.name}",
        "the answers A, B, C and D must be distinct single tokens",
        "use the other tasks with it",
    )
    return ids[0][:-1], [i[-1] for i in ids]


def multiple_choice(
    tokenizer,
    length: int,
    n: int,
    seed: int,
    query: int,
    questions: str,
    shots: int = 5,
    shots_from: str = "",
) -> MultipleChoice:
    """At most n questions, drawn from all of them by the seed, of at most `length` tokens with
    `shots` worked examples before them.

    Examples are the first rows of the subject's file in shots_from, or of its own file, and then
    they are not asked. As in MMLU's own code, the last examples are left out where a prompt would
    be too long; ValueError where the question alone is."""
    examples = {}
    asked = []
    files = subject_files(questions)
    sources = subject_files(shots_from) if shots_from else files
    # two files belong together, however they are called
    if shots_from and Path(questions).is_file() and Path(shots_from).is_file():
        sources = dict(zip(files, sources.values(), strict=True))
    for subject, file in files.items():
        check(
            subject in sources,
            f"shots_from={shots_from}",
            f"it has no file of {subject}",
            f"examples for {file} are needed",
        )
        rows = read_questions(file)
        shown = read_questions(sources[subject])[:shots]
        check(
            len(shown) == shots,
            f"shots={shots}",
            f"{sources[subject]} has {len(shown)} rows",
            "give a smaller --shots",
        )
        left = rows if shots_from else rows[shots:]
        check(
            bool(left),
            f"{file}",
            f"no question is left after {shots} examples",
            "give --shots_from, or a smaller --shots",
        )
        examples[subject] = shown
        asked += [(subject, q) for q in left]
    random.Random(f"multiple_choice {seed}").shuffle(asked)
    prompts = []
    answers = []
    for subject, q in asked[:n]:
        head = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        for k in range(shots, -1, -1):
            ids, four = letter_ids(
                tokenizer, head + "".join(e.shown() for e in examples[subject][:k]) + q.asked()
            )
            if len(ids) <= length:
                break
        check(
            len(ids) <= length,
            f"{q.where}: a question of {len(ids)} tokens",
            f"a prompt has at most {length}",
            "give a larger --block_size",
        )
        prompts.append(ids)
        answers.append((q.answer, four))
    return MultipleChoice(prompts, answers, query, tokenizer)


Task = Perplexity | Continuation | Needle | VariableTracking | MultipleChoice


def make_tasks(cfg: EvalConfig, tokenizer, T: int, text: TokenFile | None) -> list[Task]:
    """The tasks named by cfg.tasks, in that order, in contexts of T tokens; text: the corpus of
    those in READING."""
    out: list[Task] = []
    common = (tokenizer, T, cfg.sequences, cfg.seed, cfg.query)
    for name in comma_list(cfg.tasks):
        if name == "perplexity":
            out.append(Perplexity(*sequential(text, cfg.sequences, T)))
        elif name == "continuation":
            check(
                cfg.query + cfg.continuation < T,
                f"query={cfg.query}, continuation={cfg.continuation} with {T} tokens",
                "some context must be left",
                "give a larger --block_size",
            )
            out.append(
                Continuation(
                    batch(text, "continuation", cfg.seed, 0, cfg.sequences, T)[0],
                    cfg.query,
                    cfg.continuation,
                )
            )
        elif name in ("needle", "needle_reuse"):
            out.append(needle(*common, cfg.distractors, name == "needle_reuse"))
        elif name == "variable_tracking":
            out.append(variable_tracking(*common, cfg.chains, cfg.hops))
        else:
            out.append(multiple_choice(*common, cfg.questions, cfg.shots, cfg.shots_from))
    return out
