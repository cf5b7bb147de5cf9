"""Settings of the programs that measure: eval.py, sample.py and bench.py. What models, methods and
storage are given is in config.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction

from config import BASES, GROUPS, INT_BITS, SIGNALS, TOKEN_SIGNALS
from settings import measuring, stages
from settings.beside import check_beside, check_listed, check_storing, together
from settings.fields import DTYPES, MAX_SEED, check, check_fields, comma_list, opt, to_dict
from settings.measuring import BENCHES, TASKS
from settings.storing import (
    GROUP_OF,
    SELECTING,
    check_not_shared,
    check_storage_flags,
    storage_flags,
    wanted_beside,
)
from settings.train import check_corpora

SPLITS = ("val", "train", "test", "all")
CODED = ("routed", "kvtc", "rdkv")  # code a prompt in a share of its bytes
RIVALS = ("quest", "kivi", *CODED)  # each with a path of its own; all but routed as published
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
    tasks: str = opt(
        "perplexity",
        f"list of: {', '.join(TASKS)}; without it continuation where --kv=select, --kv_bytes or "
        "another flag of a selection is given",
        each_of=TASKS,
    )
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
        "bytes that compressed layers hold of a prompt as shares of 16 bits a number, a list "
        "(select: bits are routed, too; empty: --kv_bytes; routed, kvtc, rdkv: of their codes)",
    )
    kv_bits: str = opt(
        "",
        "bits of keys and values, a list such as 8,4,4:2 (keys:values, 4:0 routed ones), each "
        "with every budget; 16 under one of bytes: those it picks (empty: --key_bits, "
        "--value_bits; kivi: 4,2)",
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
    sequences: int = opt(
        192, "sequences, or prompts, of each task, or as many as there are", least=1
    )
    block_size: int = opt(
        0,
        "tokens per sequence, an answer included (0: what it was trained with, or 2048 for a "
        "pretrained model)",
        least=0,
    )
    query: int = opt(
        16,
        "continuation and prompts: tokens at the end of the context that are never compressed "
        "(where this is not given, of a trained run: its own --kv_tail)",
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
        "needle, copy, zero_shot: whether the context is compressed with the question behind it "
        "(seen), or before it is known (unseen)",
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
    items: str = opt(
        "", "zero_shot: JSONL files, a list: HellaSwag, PIQA, ARC and others as they are published"
    )
    answered: str = opt(
        "",
        "mixsga with --dataset=instruct:PATH: JSONL file, whose instructions every row answers",
    )
    answer_tokens: int = opt(64, "instruct: tokens of an answer, at most", least=1)
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
            self.question == "seen" or bool({"needle", "copy", "zero_shot"} & {*tasks}),
            f"question={self.question} with tasks={self.tasks}",
            "it is asked by needle, copy and zero_shot",
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
            bool(self.items) or "zero_shot" not in tasks,
            "zero_shot without items",
            "files of them are needed",
            "give --items=PATH, JSONL of HellaSwag, PIQA, ARC and others",
        )
        instructed = self.dataset.startswith("instruct:")
        check(
            ("instruct" not in tasks or instructed)
            and (not instructed or tasks in (["instruct"], ["mixsga"])),
            f"dataset={self.dataset} with tasks={self.tasks}",
            "the task instruct, alone, reads instruct:PATH, or mixsga does",
            "give --tasks=instruct --dataset=instruct:PATH",
        )
        check(
            not self.answered or instructed,
            f"answered={self.answered} with dataset={self.dataset}",
            "rows that are trained on instructions answer it",
            "give --tasks=mixsga --dataset=instruct:PATH",
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


def with_task(given: Collection[str], cfg: EvalConfig, kv: str) -> EvalConfig:
    """Return what is measured: as asked, but where no task is named and a selection is asked for
    the task continuation, for perplexity has no prompt that could be compressed. kv: --kv, or its
    default."""
    methods = comma_list(cfg.methods)
    by_flags = bool(SELECTING & {*given}) or ("kv" in given and kv == "select")
    selects = "select" in methods or (by_flags and not methods)
    return replace(cfg, tasks="continuation") if selects and "tasks" not in given else cfg


def methods_named(given: Collection[str], cfg: EvalConfig, kv: str) -> list[str]:
    """Return the methods that --methods or, of a base, --kv names; none where neither is given.
    ValueError where both are, and differ. kv: --kv, or its default."""
    methods = comma_list(cfg.methods)
    named = "kv" in given and kv in measuring.STORAGES
    check(
        not (named and methods) or kv in methods,
        f"kv={kv} with methods={cfg.methods}",
        "it is not measured",
        f"leave --kv out, or give --methods={kv}",
    )
    if methods or not named:
        return methods
    return list(dict.fromkeys(["dense", kv]))


def check_eval_flags(
    given: Collection[str],
    cfg: EvalConfig,
    kv: str,
    methods: Collection[str] = (),
    trained: bool = False,
) -> None:
    """Raise ValueError for flags of those given that no task of cfg reads, or none of the methods
    (empty: of those that --methods or --kv names, and without both of any). kv: --kv, or its
    default; trained: the run has its own value groups, and nothing is calibrated."""
    tasks = comma_list(cfg.tasks)
    by_kv = "kv" in given and not comma_list(cfg.methods)
    methods = methods or methods_named(given, cfg, kv)
    training = sorted({*measuring.TRAINED} & {*given})
    check(
        not training,
        ", ".join(training),
        "measuring trains nothing",
        f"leave it out, or train with train.py --{min(training, default='')} and give --out_dir",
    )
    cuts = not trained and (not methods or {*methods} & {*measuring.CALIBRATED})
    calibrated_on = measuring.CORPUS if cuts and "calibrate" not in given else ()
    by_tasks: dict[str, Collection[str]] = {}  # what no task reads, and the tasks that do
    by_methods: dict[str, Collection[str]] = {}
    for name in sorted(given):
        group = GROUP_OF.get(name, "")
        readers = measuring.methods_that_read(group, name)
        by_none = not any(measuring.read_by_task(task, group, name) for task in tasks)
        by_others = name != "kv" and methods and readers is not None
        by_others = by_others and not {*methods} & {*readers}
        # A selection brings its own task, but where tasks are named.
        if by_none and name not in calibrated_on and not (by_others and readers == ("select",)):
            by_tasks[name] = [t for t in TASKS if measuring.read_by_task(t, group, name)]
        elif by_others:
            by_methods[name] = () if trained else readers  # it has its own method
    check_listed(given, vars(cfg))
    refuse_unread(by_tasks, "tasks", cfg.tasks, given)
    named = "tasks" in given and "perplexity" in tasks
    task = ("give --tasks=continuation",) if named else ()
    by = ("kv", kv) if by_kv else ("methods", ",".join(methods))
    refuse_unread(by_methods, *by, given, task)


def refuse_unread(
    unread: dict[str, Collection[str]],
    flag: str,
    value: str,
    given: Collection[str],
    selecting: Collection[str] = (),
) -> None:
    """Raise ValueError for flags that are not read beside another one's value, and name the first
    value of it that reads all of them; where no --kv does, one of --methods (rivals). selecting:
    what has to be given, too, where a selection is named, in words."""
    first = next(iter(unread.values()), ())
    readers = [way for way in first if all(way in others for others in unread.values())]
    ways = [f"give --{flag}={reader}" for reader in readers]
    if flag == "kv":
        stored = [f"give --kv={reader}" for reader in readers if reader in measuring.STORAGES]
        ways = stored or [f"give --methods={way} instead of --kv" for way in readers]
    do = ""
    if ways:
        more = wanted_beside(unread, given)
        if readers[0] == "select":
            more += selecting
        do = f", or {together([ways[0], *more])}"
    check(
        not unread,
        f"{', '.join(unread)} with {flag}={value}",
        "it is not read",
        f"leave it out{do}",
    )


@dataclass(frozen=True)
class SampleConfig:
    """What sample.py writes."""

    out_dir: str = opt("", "run, stage or checkpoint folder to sample from")
    prompt: str = opt("The ", "text to continue; with --chat the first message (empty: ask)")
    prompt_file: str = opt("", "file of UTF-8 text, instead of --prompt")
    chat: bool = opt(False, "talk with a model that was trained to, by its own chat template")
    park: str = opt(
        "", "file that the cache is put away in at the end, in few bytes, with its text"
    )
    unpark: str = opt("", "file of --park to go on from; a prompt that is given follows its text")
    max_new_tokens: int = opt(200, "tokens to generate, at most; with --chat in an answer", least=1)
    num_samples: int = opt(1, "continuations, each from its own random stream", least=1)
    temperature: float = opt(0.8, "0 is greedy", least=0)
    top_k: int = opt(0, "draw from the k likeliest tokens (0: all)", least=0)
    top_p: float = opt(1.0, "draw from the smallest set of tokens with this mass", above=0, most=1)
    seed: int = opt(0, "seed of the draws", least=0, most=MAX_SEED)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    devices: str = opt(
        "",
        "devices that the layers are split over, such as cuda:0,cuda:1, for a model larger than "
        "one GPU (empty: --device)",
    )
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
        check(
            self.num_samples == 1 or not (self.park or self.unpark),
            f"num_samples={self.num_samples} with park or unpark",
            "one text is put away",
            "leave one of them out",
        )
        check(
            not (self.unpark and self.devices),
            f"unpark with devices={self.devices}",
            "a cache goes to one device",
            "leave one of them out",
        )


def check_sample_flags(given: Collection[str], cfg: SampleConfig, kv: str) -> None:
    """Raise ValueError for flags of those given that sample.py does not read beside the others. kv:
    --kv, or its default."""
    if "kv" in given or not cfg.out_dir:
        check_storage_flags(given, kv)
    calibrates = kv != "dense" and storage_flags(given)
    unread = sorted(measuring.CALIBRATED_WITH & {*given})
    check(
        calibrates or not unread,
        f"{', '.join(unread)} without a way to store",
        "nothing is calibrated",
        "leave it out, or give --kv=select",
    )
    unread = sorted({"top_k", "top_p"} & {*given})
    check(
        cfg.temperature > 0 or not unread,
        f"{', '.join(unread)} with temperature=0",
        "the likeliest token is taken",
        "leave it out, or give --temperature=0.8",
    )


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
    from_keys: bool = opt(
        False,
        "decode: also read each case of 16 bits whose tokens keep as many groups as "
        "residuals of values predicted from keys",
    )
    memory_gb: float = opt(1.0, "memory: the memory that sequences are put into, in GiB", above=0)
    new_tokens: int = opt(256, "generate: tokens after prompts of block_size less these", least=1)
    prefill_tokens: int = opt(
        0, "generate: tokens of the prompts processed at a time (0: all)", least=0
    )
    compile: bool = opt(False, "generate: torch.compile what lies between two attentions")
    parts: bool = opt(False, "generate: what prefills spend their time on, too, part by part")
    json: bool = opt(
        False, "print the rows as JSON on stdout, as is done where that is no terminal"
    )

    def __post_init__(self):
        check_fields(self)


def check_bench_flags(args) -> None:
    """Raise ValueError for flags that the comparison does not read. args: cli.parse_args of
    bench.py's settings."""
    cfg: BenchConfig = args.bench
    groups = [group for group, settings in vars(args).items() if is_dataclass(settings)]
    group_of = {f.name: group for group in groups for f in fields(getattr(args, group))}
    given = [name for name in group_of if name in args.given]
    unread = [n for n in given if not measuring.read_by_bench(cfg.what, group_of[n], n)]
    check(not unread, f"{', '.join(unread)} with {cfg.what}", "it is not read", "leave it out")
    loaded = bool(cfg.out_dir) or args.base.init_from != "scratch"
    shape = [n for n in given if loaded and group_of[n] == "model" and n != "block_size"]
    check(
        not shape,
        f"{', '.join(shape)} with a model that is loaded",
        "it has its own",
        "leave it out",
    )
    # Of a model's settings alone; how it stores is judged by STORED_WITH below.
    check_beside({*given} & {*to_dict(args.model)}, stages.READ_WITH, [to_dict(args.model)])
    if cfg.what not in measuring.MODELS:
        return
    if cfg.what == "generate" and not cfg.out_dir:
        check_not_shared(args.kv.kv)
        check_storage_flags(given, args.kv.kv)
        check_storing(given, args.kv, args.select)
        return
    stored = sorted(storage_flags(given))
    check(
        not stored,
        f"{', '.join(stored)} with out_dir={cfg.out_dir}",
        "it stores as it was trained to",
        "leave it out, or give the base as --init_from",
    )
