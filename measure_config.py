"""Settings of the programs that measure: eval.py, sample.py and bench.py. What models, methods and
storage are given is in config.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

from config import BASES, GROUPS, INT_BITS, SIGNALS, TOKEN_SIGNALS, KVConfig, SelectConfig
from settings.fields import DTYPES, MAX_SEED, check, check_fields, comma_list, opt
from settings.train import check_corpora

TASKS = (
    "perplexity",
    "continuation",
    "needle",
    "needle_reuse",
    "copy",
    "variable_tracking",
    "multiple_choice",
    "mixsga",
)
SPLITS = ("val", "train", "test", "all")
RIVALS = ("quest", "kivi")  # as published, each with a path of its own
METHODS = ("dense", "value_groups", "select", *RIVALS)
QUESTIONS = ("seen", "unseen")
ANSWERS = ("digit", "number", "name")


@dataclass(frozen=True)
class EvalConfig:
    """What eval.py measures."""

    out_dir: str = opt(
        "",
        "run, stage or checkpoint folder to evaluate (or --init_from=PATH for a pretrained model)",
    )
    results: str = opt(
        "",
        "folder for results.json and report.png (empty: the stage's folder, or a fresh one under "
        "out/)",
    )
    tasks: str = opt("perplexity", f"list of: {', '.join(TASKS)}", each_of=TASKS)
    methods: str = opt(
        "",
        f"list of: {', '.join(METHODS)} (empty: as trained; of a base dense, and what the other "
        "flags ask for)",
        each_of=METHODS,
    )
    bases: str = opt(
        "", "value bases tried without training, a list (empty: --value_basis)", each_of=BASES
    )
    groups: str = opt(
        "",
        "numbers of value groups S tried without training, a list (empty: --n_groups)",
        each_of=tuple(map(str, GROUPS)),
    )
    budgets: str = opt(
        "",
        "value budgets rho, shares of the groups kept, such as 0.25,0.5,0.75 (empty: as trained, "
        "or --value_keep)",
    )
    token_budgets: str = opt(
        "",
        "select: shares of the tokens kept, a list, each with every value budget (empty: "
        "--token_keep); quest: shares of the tokens that a step reads",
    )
    quest_whole: int = opt(2, "quest: first layers that read everything", least=0)
    kv_budgets: str = opt(
        "", "select: shares of keys and values kept under one budget, a list (empty: --kv_keep)"
    )
    kv_byte_budgets: str = opt(
        "",
        "select: bytes held of a prompt as shares of 16 bits a number, a list: bits are routed, "
        "too (empty: --kv_bytes)",
    )
    kv_bits: str = opt(
        "",
        "bits of keys and values, a list such as 8,4,4:2 (keys:values, 4:0 routed ones), each "
        "with every budget (empty: --key_bits, --value_bits; kivi: 4,2)",
    )
    beside: str = opt("", "folders of earlier results, a list, that bytes.png shows beside these")
    relevances: str = opt("", "select: signals, a list (empty: --relevance)", each_of=SIGNALS)
    token_relevances: str = opt(
        "",
        "select: signals that tokens are kept by, a list (empty: --token_relevance)",
        each_of=TOKEN_SIGNALS,
    )
    splits: str = opt(
        "",
        "first compressed layers, a list: each compresses the layers from there on (empty: "
        "--kv_layers)",
    )
    dataset: str = opt(
        "",
        "corpus that is read, or a list, measured one by one (empty: what it was trained on, or "
        "pycode)",
    )
    split: str = opt(
        "val",
        "part of each: val, train, all or test (WikiText's; all of a text that was not trained on)",
        SPLITS,
    )
    calibrate: str = opt(
        "",
        "corpus that bases are calibrated on, or a list of them, mixed, all of it or WikiText's "
        "training split (empty: the training split of --dataset)",
    )
    calibration: int = opt(32, "sequences that bases are calibrated on", least=1)
    sequences: int = opt(192, "sequences, or prompts, of each task", least=1)
    block_size: int = opt(
        0,
        "tokens per sequence, an answer included (0: what it was trained with, or 2048 for a "
        "pretrained model)",
        least=0,
    )
    query: int = opt(
        16,
        "continuation and prompts: tokens at the end of the context that are never compressed",
        least=0,
    )
    continuation: int = opt(
        128, "continuation: tokens after those, whose loss is measured", least=2
    )
    distractors: int = opt(
        0,
        "needle, needle_reuse (at least 1): other named numbers in the text, at most 31",
        least=0,
        most=31,
    )
    question: str = opt(
        "seen",
        "needle, copy: whether the context is compressed with the question behind it (seen), or "
        "before it is known (unseen)",
        QUESTIONS,
    )
    needles: int = opt(
        1,
        "needle: named facts that are asked for, each in its own turn; with --distractors at most "
        "32 (of digits 9) in a text",
        least=1,
        most=32,
    )
    answer: str = opt(
        "digit", "needle: what is asked for: digit, number (of five digits) or name", ANSWERS
    )
    chains: int = opt(1, "variable_tracking: chains of assignments in the text", least=1, most=100)
    hops: int = opt(
        4, "variable_tracking: assignments of a chain after its first", least=1, most=100
    )
    questions: str = opt("", "multiple_choice: a CSV file of MMLU's format, or a folder of them")
    shots: int = opt(5, "multiple_choice: worked examples before each question", least=0, most=100)
    shots_from: str = opt(
        "",
        "multiple_choice: file or folder of the examples (empty: the first rows of the file "
        "itself, then not asked)",
    )
    mixes: str = opt(
        "3:1:6,1:1:8",
        "mixsga: experts' shares, a list; SIZES@RATIOS for sizes other than 1, 2, 4, 8; +K: K "
        "value groups kept, too",
    )
    steps: int = opt(60, "mixsga: steps that every row trains on for", least=1)
    lr: float = opt(1e-3, "mixsga: peak learning rate of those steps", above=0)
    seeds: int = opt(1, "mixsga: seeds of those steps", least=1, most=10**6)
    h2o: str = opt(
        "0.8,0.6,0.4,0.2",
        "mixsga: shares of the tokens held under H2O's eviction, a list, for the first of --mixes "
        "and its baselines",
    )
    ablations: bool = opt(
        True,
        "mixsga: for the first of --mixes, rows without what this project adds, with a random "
        "router, and others",
    )
    json: bool = opt(
        False, "print the rows as JSON on stdout, as is done where that is no terminal"
    )
    batch_size: int = opt(16, "sequences at a time", least=1)
    seed: int = opt(
        0, "seed of windows, calibration batches and random bases", least=0, most=MAX_SEED
    )
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", DTYPES)

    def __post_init__(self):
        check_fields(self)
        check(
            bool(comma_list(self.tasks)),
            f"tasks={self.tasks!r}",
            f"a list of {', '.join(TASKS)}",
            "name one at least",
        )
        check_bits(self.kv_bits)
        for name in ("budgets", "token_budgets", "kv_budgets", "kv_byte_budgets", "h2o"):
            check_shares(name, getattr(self, name))
        check(
            all(s.isdigit() for s in comma_list(self.splits)),
            f"splits={self.splits!r}",
            "a list of layers",
            "give for example 0,22",
        )
        check(
            bool(comma_list(self.mixes)),
            f"mixes={self.mixes!r}",
            "one entry at least",
            "give for example 3:1:6",
        )
        for name in ("dataset", "calibrate"):
            if getattr(self, name):
                check_corpora(getattr(self, name), name)
        self.check_tasks()

    def asks_facts(self) -> bool:
        """Whether the needle is more than one digit that is asked for behind the text."""
        return (self.question, self.needles, self.answer) != ("seen", 1, "digit")

    def check_tasks(self) -> None:
        """Raise ValueError where a task lacks what it needs, or does not go with another."""
        tasks = comma_list(self.tasks)
        check(
            self.distractors or "needle_reuse" not in tasks,
            "needle_reuse without distractors",
            "a second question needs an answer",
            "give --distractors=3",
        )
        check(
            "needle" in tasks or (self.needles == 1 and self.answer == "digit"),
            f"needles={self.needles}, answer={self.answer} with tasks={self.tasks}",
            "they are the needle's",
            "give --tasks=needle, or leave them out",
        )
        check(
            self.question == "seen" or bool({"needle", "copy"} & {*tasks}),
            f"question={self.question} with tasks={self.tasks}",
            "it is asked by needle and copy",
            "give one of them, or leave it out",
        )
        most = 9 if self.answer == "digit" else 32
        check(
            not self.asks_facts() or self.needles + self.distractors <= most,
            f"needles={self.needles} and distractors={self.distractors} with answer={self.answer}",
            f"at most {most} together have names and values of their own",
            "give fewer, or --answer=number",
        )
        check(
            bool(self.questions) or "multiple_choice" not in tasks,
            "multiple_choice without questions",
            "a file of them is needed",
            "give --questions=PATH, MMLU's CSV file or a folder of them",
        )
        check(
            bool(self.questions) or not self.shots_from,
            f"shots_from={self.shots_from!r} without questions",
            "nothing is asked",
            "give --questions=PATH",
        )
        check(
            "mixsga" not in tasks or tasks == ["mixsga"],
            f"tasks={self.tasks!r}",
            "mixsga trains its rows",
            "give it alone",
        )


def check_bits(text: str) -> None:
    """Raise ValueError unless every entry of --kv_bits is bits of keys and values, such as 8, 4:2
    or 4:0."""
    of_keys = tuple(map(str, INT_BITS))
    of_values = (*of_keys, "0")
    ok = True
    for entry in comma_list(text):
        parts = entry.split(":")
        ok = ok and len(parts) <= 2 and parts[0] in of_keys and parts[-1] in of_values
    check(
        ok,
        f"kv_bits={text!r}",
        f"bits are {', '.join(of_keys)}, of keys and values with a colon between, 0 for values "
        "that are routed",
        "give for example 8,4,4:2",
    )


def check_shares(name: str, text: str) -> None:
    """Raise ValueError unless every entry of a comma-separated flag is a share in (0, 1]."""
    for share in comma_list(text):
        try:
            ok = 0 < Fraction(share) <= 1
        except (ValueError, ZeroDivisionError):
            ok = False
        check(
            ok,
            f"{name}={text!r}",
            "every budget is a share kept, in (0, 1]",
            "give for example 0.25,0.5,0.75",
        )


KV_FLAGS = {f.name for f in fields(KVConfig)}
SELECT_FLAGS = {f.name for f in fields(SelectConfig)}
# what only training reads, or what leaves a part that has to be trained
TRAINED_FLAGS = {
    "learn_basis",
    "reconstructor",
    "recon_hidden",
    "aux_weight",
    "lm_to_router",
    "kv_warmup",
    "predictors",
    "readers",
    "recall",
    "shortest",
    "predictor_loss",
}
# what value groups read and a selection does not
GROUPS_FLAGS = {"topk_groups", "value_router", "kv_tail_block"}


def storage_flags(given: set[str]) -> set[str]:
    """Return the flags given that say how keys and values are stored."""
    return given & (KV_FLAGS | SELECT_FLAGS)


def check_storage_flags(given: set[str], kv: str) -> None:
    """Raise ValueError for a flag of those given that storing by `kv` does not read."""
    unread = given & TRAINED_FLAGS
    if kv != "select":
        unread |= given & SELECT_FLAGS
    if kv == "select":
        unread |= given & GROUPS_FLAGS
    if kv == "dense":
        unread |= given & (KV_FLAGS - {"kv"})
    check(
        not unread,
        f"--{min(unread, default='')} with kv={kv}",
        "it is not read",
        "leave it out, or choose another --kv",
    )


@dataclass(frozen=True)
class SampleConfig:
    """What sample.py writes."""

    out_dir: str = opt("", "run, stage or checkpoint folder to sample from")
    prompt: str = opt("The ", "text to continue; with --chat the first message (empty: ask)")
    prompt_file: str = opt("", "file of UTF-8 text, instead of --prompt")
    chat: bool = opt(False, "talk with a model that was trained to, by its own chat template")
    max_new_tokens: int = opt(200, "tokens to generate, at most; with --chat in an answer", least=1)
    num_samples: int = opt(1, "continuations, each from its own random stream", least=1)
    temperature: float = opt(0.8, "0 is greedy", least=0)
    top_k: int = opt(0, "draw from the k likeliest tokens (0: all)", least=0)
    top_p: float = opt(1.0, "draw from the smallest set of tokens with this mass", above=0, most=1)
    seed: int = opt(0, "seed of the draws", least=0, most=MAX_SEED)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", DTYPES)
    calibrate: str = opt(
        "pydocs,dialogue",
        "corpus, or a list of them, mixed, that a base's --kv is calibrated on",
    )
    calibration: int = opt(4, "sequences of at most 512 tokens for that", least=1)
    data_dir: str = opt("", "where their token files are kept; empty: the user's cache folder")
    prefill_tokens: int = opt(0, "tokens of the prompts processed at a time (0: all)", least=0)
    compile: bool = opt(
        False,
        "on a GPU: torch.compile what lies between two attentions (the first tokens then take "
        "half a minute)",
    )

    def __post_init__(self):
        check_fields(self)
        check_corpora(self.calibrate, "calibrate")
        check(
            self.num_samples == 1 or not self.chat,
            f"num_samples={self.num_samples} with chat",
            "a conversation has one answer a turn",
            "leave one of them out",
        )


BENCHES = ("train", "adapter", "select", "decode", "memory", "generate")


@dataclass(frozen=True)
class BenchConfig:
    """What bench.py measures."""

    what: str = opt(
        "train",
        "train: a training step against a plain loop; adapter: routed LoRA against LoRA; select: "
        "choosing against prefill; decode, memory: attention over and bytes of one layer's cache; "
        "generate: tokens per second",
        BENCHES,
    )
    out_dir: str = opt(
        "",
        "select, generate: a run of train.py (or --init_from=PATH; else a model of random weights)",
    )
    results: str = opt("", "folder that results.json is left in, too (empty: none)")
    steps: int = opt(30, "timed steps of each side, interleaved", least=1)
    batch_size: int = opt(8, "sequences in a step", least=1)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", DTYPES)
    cases: str = opt(
        "4:0.5,16:0.5,4:0.25,16:0.5:0.5,16:0.5:0.25",
        "decode, memory: what is kept, a list of S:share of groups:share of tokens:bits "
        "of keys:of values (0: levels)",
    )
    memory_gb: float = opt(1.0, "memory: the memory that sequences are put into, in GiB", above=0)
    new_tokens: int = opt(256, "generate: tokens after prompts of block_size less these", least=1)
    prefill_tokens: int = opt(
        0, "generate: tokens of the prompts processed at a time (0: all)", least=0
    )
    compile: bool = opt(False, "generate: torch.compile what lies between two attentions")

    def __post_init__(self):
        check_fields(self)
        check(
            self.what in ("select", "generate") or not self.out_dir,
            f"out_dir={self.out_dir} with {self.what}",
            "only select and generate measure a run",
            "leave it out",
        )
