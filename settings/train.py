"""What text is read and how models are trained: settings like those of config.py, and the
paper's."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from settings.fields import DTYPES, MAX_SEED, check, check_fields, comma_list, opt

CORPORA = (
    "pydocs",
    "pycode",
    "cheaders",
    "dialogue",
    "markup",
    "records",
    "shakespeare",
    "wikitext2",
    "wikitext103",
)
# What predictors of relevance are trained on, where no flag names a corpus: no part of it needs a
# network. cheaders and records are of other kinds, kept for measuring.
SELECT_MIXTURE = "pydocs,pycode,dialogue,markup"
TOKENIZERS = ("byte", "gpt2")
STAGES = ("all", "pretrain", "adapt", "select", "continue")
OBJECTIVES = ("lm", "distill")
TEMPLATES = ("auto", "chat", "plain")


def check_corpus(name: str, flag: str = "dataset") -> None:
    """Raise ValueError unless `name` is a known corpus, text:PATH or instruct:PATH (the path itself
    is checked when it is read)."""
    kind, _, path = name.partition(":")
    is_path = "/" in name or Path(name).exists()
    check(
        name in CORPORA or (kind in ("text", "instruct") and bool(path)),
        f"{flag}={name!r}",
        f"one of {', '.join(CORPORA)}, text:PATH or instruct:PATH",
        f"give --{flag}=text:{name}" if is_path else "choose one",
    )


def check_corpora(names: str, flag: str = "dataset") -> None:
    """Raise ValueError unless `names` is a comma-separated list of different corpora, one at
    least, each of which passes check_corpus."""
    parts = comma_list(names)
    check(
        bool(parts),
        f"{flag}={names!r}",
        "a list of corpora",
        "give for example pydocs,text:PATH",
    )
    for name in parts:
        check_corpus(name, flag)
        check(parts.count(name) == 1, f"{flag}={names!r}", f"{name} is named twice", "name it once")
        alone = len(parts) == 1 or not name.startswith("instruct:")
        check(alone, f"{flag}={names!r}", "instructions are not mixed", "give them alone")


# Flags that only some kinds of corpora read.
READ_OF = {
    "template": ("instruct:",),
    "text_field": ("text:",),
    "detokenize": ("text:", "wikitext2", "wikitext103"),
}


def check_text_flags(given: Collection[str], corpora: str) -> None:
    """Raise ValueError for flags of those given that none of a list of corpora reads."""
    for name, kinds in READ_OF.items():
        read = any(corpus.startswith(kinds) for corpus in comma_list(corpora))
        check(
            name not in given or read,
            f"{name} with {', '.join(comma_list(corpora))}",
            f"it is read of {', '.join(kinds).replace(':', ':PATH')} alone",
            "leave it out",
        )


def all_between(listed: str, top: float) -> bool:
    """Say whether a comma-separated list holds nothing but numbers above 0 and below `top`."""
    try:
        return all(0 < float(number) < top for number in comma_list(listed))
    except ValueError:
        return False


@dataclass(frozen=True)
class DataConfig:
    """Text and its tokens."""

    tokenizer: str = opt("byte", "tokenizer", TOKENIZERS)
    val_fraction: float = opt(
        0.1, "share of the text, by document, held out for validation", above=0, below=1
    )
    detokenize: bool = opt(
        False,
        "undo WikiText's spacing (' @-@ ', ' ,' ...) in wikitext2, wikitext103 and text:PATH, "
        "before text becomes tokens",
    )
    text_field: str = opt("text", "field of a line that holds its text, in JSONL of text:PATH")
    template: str = opt(
        "auto",
        "instruct:PATH: how a prompt is written: chat: by the model's own template; plain: with "
        "empty lines between; auto: the model's own where it has one",
        TEMPLATES,
    )
    data_dir: str = opt(
        "", "where token files and downloads are kept; empty: the user's cache folder"
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class TrainConfig:
    """What train.py does. Steps are optimizer steps; batch sizes are sequences of the *global*
    batch, whatever the rank count."""

    stage: str = opt(
        "all",
        "all: pretrain, then every adapter, then the table; or one stage (select: predictors of "
        "relevance; continue: all weights of a base, with --kv=mixsga, gqa, cla or dense)",
        STAGES,
    )
    out_dir: str = opt("", "folder for everything the run leaves; empty: a fresh one under out/")
    resume: bool = opt(False, "continue the run in --out_dir from its newest valid checkpoint")
    preset: str = opt(
        "default",
        "paper: the sub-token paper's settings for the adapt stage (explicit flags still win)",
        ("default", "paper"),
    )
    dataset: str = opt(
        "",
        "corpus of the stage, or a list of corpora, mixed; with stage=all the pretraining one "
        f"(empty: pydocs, pycode to adapt, {SELECT_MIXTURE} to select); text:PATH; "
        "or, but with stage=all, instruct:PATH",
    )
    adapt_dataset: str = opt(
        "",
        "corpus for adaptation, or a list of them, where it differs from --dataset (empty: pycode)",
    )
    test_dataset: str = opt(
        "",
        "stage=all: corpus that gives the table's numbers, all of it or WikiText's test split "
        "(empty: the adaptation corpus's validation split)",
    )
    test_sequences: int = opt(192, "stage=all: sequences behind each number of the table", least=1)
    distill_steps: int = opt(
        0,
        "stage=all with --learn_basis: steps that distil the value basis on the frozen base "
        "before the table's adaptations",
        least=0,
    )
    distill_lr: float = opt(3e-3, "peak learning rate of those steps", above=0)
    kv_from: str = opt(
        "",
        "adapt, select: run whose trained value groups (same base and settings) are started from, "
        "instead of calibrating",
    )
    objective: str = opt(
        "lm",
        "adapt: lm: next-token loss; distill: KL to the same model reading whole values (needs "
        "--adapter=none, or --kv=select and --kv_from)",
        OBJECTIVES,
    )
    kv_byte_budgets: str = opt(
        "0.125",
        "adapt with --kv=select: shares of a context's bytes, a list, of which each window draws "
        "the one at which its context is stored; the first is the trained run's own",
    )
    context: float = opt(
        0.75,
        "adapt with --kv=select: share of a window that is stored so; the rest reads it",
        above=0,
        below=1,
    )
    seed: int = opt(0, "seed of initialisation, batches and dropout", least=0, most=MAX_SEED)
    seeds: int = opt(
        3,
        "stage=all: adaptation seeds per row, fewer when --max_minutes would be passed",
        least=1,
        most=10**6,
    )
    max_minutes: float = opt(
        3.7, "stage=all: start no further seed that would end after this many minutes", above=0
    )
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt(
        "auto",
        "compute type; auto: bfloat16 autocast on a GPU that has it, else float32",
        DTYPES,
    )
    compile: bool = opt(False, "torch.compile the model")
    capture: bool = opt(
        True,
        "on a GPU: capture an optimizer step as a CUDA graph and replay it, under torchrun one on "
        "each; losses are logged, and signals answered, a few steps late. false: kernel by kernel",
    )
    GONE = ("capture_ranks",)  # see settings.fields.from_dict
    shard: bool = opt(
        False,
        "under torchrun: share weights, gradients and moments out over the ranks (FSDP2), instead "
        "of keeping all of them on each",
    )
    pretrain_steps: int = opt(500, "steps of pretraining", least=1)
    adapt_steps: int = opt(60, "steps of adaptation", least=1)
    pretrain_batch_size: int = opt(8, "sequences in a pretraining step", least=1)
    adapt_batch_size: int = opt(8, "sequences in an adaptation step", least=1)
    select_steps: int = opt(400, "steps of training predictors", least=1)
    select_batch_size: int = opt(4, "sequences in such a step", least=1)
    select_lr: float = opt(
        1e-2, "its peak learning rate (a tenth of it for the paper's predictors)", above=0
    )
    accumulation: int = opt(1, "micro-steps a rank splits its share of the batch into", least=1)
    pretrain_lr: float = opt(3e-3, "peak learning rate of pretraining", above=0)
    adapt_lr: float = opt(
        5e-3,
        "peak learning rate of adaptation (a pretrained model's where this is not given: 1e-3, and "
        "1e-4 where all weights are trained)",
        above=0,
    )
    adapt_rates: str = opt(
        "",
        "stage=all: peak learning rates, a list, each tried with a row's first seed; all of its "
        "seeds take the one of the lowest validation loss (empty: --adapt_lr)",
    )
    warmup: float = opt(
        0.1,
        "share of the steps spent warming up linearly; cosine to zero after it",
        least=0,
        most=1,
    )
    weight_decay: float = opt(0.01, "AdamW weight decay (matrices only)", least=0)
    beta1: float = opt(0.9, "AdamW beta1", least=0, below=1)
    beta2: float = opt(0.99, "AdamW beta2", least=0, below=1)
    grad_clip: float = opt(1.0, "largest global gradient norm; 0 means no clipping", least=0)
    eval_interval: int = opt(0, "steps between validation losses; 0: only at the end", least=0)
    eval_sequences: int = opt(48, "validation sequences per evaluation while training", least=1)
    sample_interval: int = opt(
        0, "steps between sampled texts; 0: only at the end of pretraining", least=0
    )
    save_interval: int = opt(200, "steps between checkpoints", least=1)
    keep_checkpoints: int = opt(
        2,
        "newest checkpoints kept per stage (the best by validation loss is kept besides)",
        least=1,
    )

    def __post_init__(self):
        check_fields(self)
        for name in ("dataset", "adapt_dataset"):
            if getattr(self, name):
                check_corpora(getattr(self, name), name)
        if self.test_dataset:
            check_corpus(self.test_dataset, "test_dataset")
        check(
            self.stage in ("adapt", "select") or not self.kv_from,
            f"kv_from={self.kv_from!r} with stage={self.stage}",
            "one stage starts from it",
            "give --stage=adapt, or --distill_steps=N for the table",
        )
        check(
            self.stage == "all" or not self.distill_steps,
            f"distill_steps={self.distill_steps} with stage={self.stage}",
            "the table's rows use it",
            "give --stage=all, or --objective=distill",
        )
        check(
            all_between(self.adapt_rates, math.inf),
            f"adapt_rates={self.adapt_rates!r}",
            "a list of finite numbers above 0",
            "give for example 5e-4,1e-3,2e-3",
        )
        check(
            bool(comma_list(self.kv_byte_budgets)) and all_between(self.kv_byte_budgets, 1),
            f"kv_byte_budgets={self.kv_byte_budgets!r}",
            "a list of shares above 0 and below 1",
            "give for example 0.125,0.0625",
        )
        check(
            not (self.shard and self.compile),
            "shard with compile",
            "a sharded model runs as it is",
            "leave one of them out",
        )
        check(
            not self.resume or bool(self.out_dir),
            "resume without out_dir",
            "a run to continue is needed",
            "give --out_dir=DIR",
        )

    @property
    def rates(self) -> list[float]:
        """Learning rates that are tried for each row of the table."""
        return [float(rate) for rate in comma_list(self.adapt_rates)]

    @property
    def byte_budgets(self) -> list[float]:
        """Shares of bytes at which windows of an adaptation are stored."""
        return [float(share) for share in comma_list(self.kv_byte_budgets)]

    def corpus(self, stage: str) -> str:
        """Return the corpus of `stage` ('pretrain' or 'adapt', which selection's predictors go
        by, too)."""
        if stage == "pretrain":
            return self.dataset or "pydocs"
        named = self.adapt_dataset
        if not named and self.stage in ("adapt", "select", "continue"):
            named = self.dataset
        usual = SELECT_MIXTURE if self.stage == "select" else "pycode"
        return named or usual


@dataclass(frozen=True)
class ExportConfig:
    """Where a model is exported to."""

    out_dir: str = opt("", "run, stage or checkpoint folder to export")
    to: str = opt("", "folder to write, for transformers to load")

    def __post_init__(self):
        check(bool(self.to), "no folder to export to", "one is needed", "give --to=DIR")


# ST 4.1 and 3.1; the rest of the paper's settings are the defaults.
PAPER = dict(
    adapter="routed",
    r=4,
    alpha=8.0,
    lora_dropout=0.05,
    subspaces=4,
    subspace_topk=2,
    balance_weight=0.01,
    n_groups=4,
    topk_groups=2,
    value_basis="native",
    value_router="linear",
    mask_scope="layer",
    reconstructor="mlp",
    aux_weight=0.1,
    lm_to_router=False,
    prefill="routed",
    kv_tail=0,
    adapt_lr=5e-4,
    weight_decay=0.01,
    beta1=0.9,
    beta2=0.999,
    adapt_batch_size=8,
    block_size=512,
)
