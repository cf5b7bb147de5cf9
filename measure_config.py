"""Settings of the programs that measure: eval.py, sample.py and bench.py. What models, methods and
training are given is in config.py."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from config import (
    BASES,
    GROUPS,
    INT_BITS,
    SIGNALS,
    TOKEN_SIGNALS,
    check,
    check_corpus,
    check_seed,
    comma_list,
    opt,
)

TASKS = (
    "perplexity",
    "continuation",
    "needle",
    "needle_reuse",
    "variable_tracking",
    "multiple_choice",
    "mixsga",
)
SPLITS = ("val", "train", "test", "all")
METHODS = ("dense", "value_groups", "select")


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
    tasks: str = opt("perplexity", f"list of: {', '.join(TASKS)}")
    methods: str = opt(
        "",
        f"list of: {', '.join(METHODS)} (empty: as trained; of a base dense, and what the other "
        "flags ask for)",
    )
    bases: str = opt("", "value bases tried without training, a list (empty: --value_basis)")
    groups: str = opt(
        "", "numbers of value groups S tried without training, a list (empty: --n_groups)"
    )
    budgets: str = opt(
        "",
        "value budgets rho, shares of the groups kept, such as 0.25,0.5,0.75 (empty: as trained, "
        "or --value_keep)",
    )
    token_budgets: str = opt(
        "",
        "select: shares of the tokens kept, a list, each with every value budget (empty: "
        "--token_keep)",
    )
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
        "with every budget "
        "(empty: --key_bits, --value_bits)",
    )
    beside: str = opt("", "folders of earlier results, a list, that bytes.png shows beside these")
    relevances: str = opt("", "select: signals, a list (empty: --relevance)")
    token_relevances: str = opt(
        "", "select: signals that tokens are kept by, a list (empty: --token_relevance)"
    )
    splits: str = opt(
        "",
        "first compressed layers, a list: each compresses the layers from there on (empty: "
        "--kv_layers)",
    )
    dataset: str = opt("", "corpus that is read (empty: the one trained on, or pycode)")
    split: str = opt("val", "part of it: val, train, test (WikiText) or all", SPLITS)
    calibrate: str = opt(
        "",
        "corpus that bases are calibrated on, all of it or WikiText's training split (empty: the "
        "training split of --dataset)",
    )
    calibration: int = opt(32, "sequences that bases are calibrated on")
    sequences: int = opt(192, "sequences, or prompts, of each task")
    block_size: int = opt(
        0,
        "tokens per sequence, an answer included (0: what it was trained with, or 2048 for a "
        "pretrained model)",
    )
    query: int = opt(
        16, "continuation and prompts: tokens at the end of the context that are never compressed"
    )
    continuation: int = opt(128, "continuation: tokens after those, whose loss is measured")
    distractors: int = opt(
        0, "needle, needle_reuse (at least 1): other named numbers in the text, at most 31"
    )
    chains: int = opt(1, "variable_tracking: chains of assignments in the text")
    hops: int = opt(4, "variable_tracking: assignments of a chain after its first")
    questions: str = opt("", "multiple_choice: a CSV file of MMLU's format, or a folder of them")
    shots: int = opt(5, "multiple_choice: worked examples before each question")
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
    steps: int = opt(60, "mixsga: steps that every row trains on for")
    lr: float = opt(1e-3, "mixsga: peak learning rate of those steps")
    seeds: int = opt(1, "mixsga: seeds of those steps")
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
    batch_size: int = opt(16, "sequences at a time")
    seed: int = opt(0, "seed of windows, calibration batches and random bases")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", ("auto", "float32", "bfloat16"))

    def __post_init__(self):
        for name, allowed in (
            ("tasks", TASKS),
            ("methods", METHODS),
            ("bases", BASES),
            ("groups", tuple(map(str, GROUPS))),
            ("relevances", SIGNALS),
            ("token_relevances", TOKEN_SIGNALS),
        ):
            bad = [t for t in comma_list(getattr(self, name)) if t not in allowed]
            check(
                not bad,
                f"{name}={getattr(self, name)!r}",
                f"a list of {', '.join(allowed)}",
                "separate by commas",
            )
        check(
            bool(comma_list(self.tasks)),
            f"tasks={self.tasks!r}",
            f"a list of {', '.join(TASKS)}",
            "name one at least",
        )
        bits = [(t.split(":") * 2)[:2] + t.split(":")[2:] for t in comma_list(self.kv_bits)]
        ok = all(
            len(b) == 2 and b[0] in map(str, INT_BITS) and b[1] in (*map(str, INT_BITS), "0")
            for b in bits
        )
        check(
            ok,
            f"kv_bits={self.kv_bits!r}",
            f"bits are {', '.join(map(str, INT_BITS))}, of keys and values with a colon between, "
            "0 for values "
            "that are routed",
            "give for example 8,4,4:2",
        )
        for name in ("budgets", "token_budgets", "kv_budgets", "kv_byte_budgets", "h2o"):
            for share in comma_list(getattr(self, name)):
                try:
                    ok = 0 < Fraction(share) <= 1
                except (ValueError, ZeroDivisionError):
                    ok = False
                check(
                    ok,
                    f"{name}={getattr(self, name)!r}",
                    "every budget is a share kept, in (0, 1]",
                    "give for example 0.25,0.5,0.75",
                )
        check(
            all(s.isdigit() for s in comma_list(self.splits)),
            f"splits={self.splits!r}",
            "a list of layers",
            "give for example 0,22",
        )
        for name, least in (
            ("sequences", 1),
            ("calibration", 1),
            ("batch_size", 1),
            ("query", 0),
            ("continuation", 2),
        ):
            check(
                getattr(self, name) >= least,
                f"{name}={getattr(self, name)}",
                f"at least {least}",
                f"give --{name}={least} or more",
            )
        for name, least, most in (
            ("distractors", 0, 31),
            ("chains", 1, 100),
            ("hops", 1, 100),
            ("shots", 0, 100),
        ):
            check(
                least <= getattr(self, name) <= most,
                f"{name}={getattr(self, name)}",
                f"{least} to {most}",
                "give a number in that range",
            )
        check(
            self.distractors or "needle_reuse" not in comma_list(self.tasks),
            "needle_reuse without distractors",
            "a second question needs an answer",
            "give --distractors=3",
        )
        check(
            bool(self.questions) or "multiple_choice" not in comma_list(self.tasks),
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
            "mixsga" not in comma_list(self.tasks) or comma_list(self.tasks) == ["mixsga"],
            f"tasks={self.tasks!r}",
            "mixsga trains its rows",
            "give it alone",
        )
        check(self.steps >= 1, f"steps={self.steps}", "at least 1", "give for example --steps=60")
        check(
            1 <= self.seeds <= 10**6,
            f"seeds={self.seeds}",
            "1 to a million",
            "give for example --seeds=2",
        )
        check(self.lr > 0, f"lr={self.lr}", "must be positive", "give for example 0.001")
        check(
            bool(comma_list(self.mixes)),
            f"mixes={self.mixes!r}",
            "one entry at least",
            "give for example 3:1:6",
        )
        check(
            self.block_size >= 0 and self.seed >= 0,
            f"block_size={self.block_size}, seed={self.seed}",
            "at least 0",
            "give 0 or more",
        )
        check_seed(self.seed)
        for name, allowed in (("dtype", ("auto", "float32", "bfloat16")), ("split", SPLITS)):
            check(
                getattr(self, name) in allowed,
                f"{name}={getattr(self, name)!r}",
                f"one of {', '.join(allowed)}",
                "choose one",
            )
        for name in ("dataset", "calibrate"):
            if getattr(self, name):
                check_corpus(getattr(self, name), name)


@dataclass(frozen=True)
class SampleConfig:
    """What sample.py writes."""

    out_dir: str = opt("", "run, stage or checkpoint folder to sample from")
    prompt: str = opt("The ", "text to continue")
    max_new_tokens: int = opt(200, "tokens to generate")
    num_samples: int = opt(1, "continuations, each from its own random stream")
    temperature: float = opt(0.8, "0 is greedy")
    top_k: int = opt(0, "draw from the k likeliest tokens (0: all)")
    top_p: float = opt(1.0, "draw from the smallest set of tokens with this mass")
    seed: int = opt(0, "seed of the draws")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", ("auto", "float32", "bfloat16"))
    prefill_tokens: int = opt(0, "tokens of the prompts processed at a time (0: all)")
    compile: bool = opt(
        False,
        "on a GPU: torch.compile what lies between two attentions (the first tokens then take "
        "half a minute)",
    )

    def __post_init__(self):
        check(
            self.prefill_tokens >= 0,
            f"prefill_tokens={self.prefill_tokens}",
            "at least 0",
            "give --prefill_tokens=0 for all at once",
        )
        for name in ("max_new_tokens", "num_samples"):
            check(
                getattr(self, name) >= 1,
                f"{name}={getattr(self, name)}",
                "at least 1",
                f"give --{name}=1 or more",
            )
        for name in ("temperature", "top_k", "seed"):
            check(
                getattr(self, name) >= 0,
                f"{name}={getattr(self, name)}",
                "at least 0",
                f"give --{name}=0 or more",
            )
        check_seed(self.seed)
        check(0 < self.top_p <= 1, f"top_p={self.top_p}", "lies in (0, 1]", "give for example 0.9")
        check(
            self.dtype in ("auto", "float32", "bfloat16"),
            f"dtype={self.dtype!r}",
            "one of auto, float32, bfloat16",
            "choose one",
        )


BENCHES = ("train", "adapter", "select", "decode", "memory", "generate")


@dataclass(frozen=True)
class BenchConfig:
    """What bench.py measures."""

    what: str = opt(
        "train",
        "train: a training step against a plain loop; adapter: routed LoRA against LoRA; select: "
        "choosing against prefill; "
        "decode, memory: attention over and bytes of one layer's cache; generate: tokens per "
        "second",
        BENCHES,
    )
    out_dir: str = opt(
        "",
        "select, generate: a run of train.py (or --init_from=PATH; else a model of random weights)",
    )
    steps: int = opt(30, "timed steps of each side, interleaved")
    batch_size: int = opt(8, "sequences in a step")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt("auto", "compute type", ("auto", "float32", "bfloat16"))
    cases: str = opt(
        "4:0.5,16:0.5,4:0.25,16:0.5:0.5,16:0.5:0.25",
        "decode, memory: what is kept, a list of S:share of groups:share of tokens:bits "
        "of keys:of values (0: levels)",
    )
    memory_gb: float = opt(1.0, "memory: the memory that sequences are put into, in GiB")
    new_tokens: int = opt(256, "generate: tokens after prompts of block_size less these")
    prefill_tokens: int = opt(0, "generate: tokens of the prompts processed at a time (0: all)")
    compile: bool = opt(False, "generate: torch.compile what lies between two attentions")

    def __post_init__(self):
        for name, allowed in (("what", BENCHES), ("dtype", ("auto", "float32", "bfloat16"))):
            check(
                getattr(self, name) in allowed,
                f"{name}={getattr(self, name)!r}",
                f"one of {', '.join(allowed)}",
                "choose one",
            )
        check(
            self.what in ("select", "generate") or not self.out_dir,
            f"out_dir={self.out_dir} with {self.what}",
            "only select and generate measure a run",
            "leave it out",
        )
        check(
            self.memory_gb > 0 and self.prefill_tokens >= 0,
            f"memory_gb={self.memory_gb}, prefill_tokens={self.prefill_tokens}",
            "more than 0, and at least 0",
            "give for example --memory_gb=8",
        )
        for name in ("steps", "batch_size", "new_tokens"):
            check(
                getattr(self, name) >= 1,
                f"{name}={getattr(self, name)}",
                "at least 1",
                f"give --{name}=1 or more",
            )
