"""Which settings the tasks and methods of eval.py read, the ways to store of sample.py, and the
comparisons of bench.py, in tables. By them flags are refused, and --help shows what is chosen.

A setting that no table names is read always."""

from __future__ import annotations

from settings import stages
from settings.stages import Choice

# -- how keys and values are stored

# What only training reads, or what leaves a part that has to be trained.
TRAINED = (
    "learn_basis",
    "recon_hidden",
    "aux_weight",
    "lm_to_router",
    "kv_warmup",
    "predictors",
    "readers",
    "recall",
    "shortest",
    "predictor_loss",
)
# a selection reads none of them
FIXED_K = ("topk_groups", "value_router", "kv_tail_block")
STORAGES = ("dense", "value_groups", "select")
# What says how sample.py calibrates a base.
CALIBRATED_WITH = {"calibrate", "calibration", "data_dir"}


def read_by_storage(kv: str, group: str, name: str) -> bool:
    """Whether storing by `kv` without training reads a setting of a group."""
    if group not in ("kv", "select") or name == "kv":
        return True
    if kv == "select":
        return name not in (*TRAINED, *FIXED_K)
    return kv != "dense" and group == "kv" and name not in TRAINED


# -- eval.py

SHARED = ("mixsga", "gqa", "cla")  # how a trained run may store, beside the methods
CUT = ("value_groups", "select", "quest")  # methods that cut values in groups, of a basis
CALIBRATED = (*CUT, "kvtc", "routed")
READING = ("perplexity", "continuation", "copy", "mixsga")  # tasks that read a corpus
RULER = ("multi_key", "multi_value", "multi_query", "common_words", "frequent_words")
PROMPTS = (
    "needle",
    "needle_reuse",
    "copy",
    "variable_tracking",
    "multiple_choice",
    "zero_shot",
    "instruct",
    *RULER,
)
CORPUS = ("dataset", "split", "detokenize", "text_field", "val_fraction", "data_dir")
OF_TASKS = {
    "query": ("continuation", *PROMPTS),
    "continuation": ("continuation",),
    "distractors": ("needle", "needle_reuse"),
    "question": ("needle", "copy", "zero_shot"),
    "needles": ("needle",),
    "answer": ("needle",),
    "chains": ("variable_tracking",),
    "hops": ("variable_tracking",),
    "questions": ("multiple_choice",),
    "shots": ("multiple_choice",),
    "shots_from": ("multiple_choice",),
    "items": ("zero_shot",),
    "answered": ("mixsga",),
    "answer_tokens": ("instruct", "mixsga"),
    "template": ("instruct", "mixsga"),
    "kv_tail": ("perplexity", "mixsga"),  # of a prompt --query stays whole
    "kv_tail_block": ("perplexity",),
    "tokenizer": ("mixsga",),
    **dict.fromkeys(("mixes", "steps", "lr", "seeds", "h2o", "ablations"), ("mixsga",)),
    **dict.fromkeys(CORPUS, READING),
    "dataset": (*READING, "instruct"),
    "split": ("perplexity", "continuation", "copy"),
}
OF_METHODS = {
    **dict.fromkeys(("bases", "groups", "splits", "budgets"), CUT),
    **dict.fromkeys(("calibrate", "calibration"), CALIBRATED),
    "token_budgets": ("select", "quest"),
    "quest_whole": ("quest",),
    **dict.fromkeys(("kv_budgets", "relevances", "token_relevances"), ("select",)),
    "kv_byte_budgets": ("select", "routed", "kvtc", "rdkv"),
    "kv_bits": ("value_groups", "select", "kivi", *SHARED),
    "topk_groups": ("value_groups",),
    "reconstructor": ("value_groups", "select"),
    "value_router": ("value_groups", "quest"),
    **dict.fromkeys(("key_bits", "value_bits", "key_block"), ("value_groups", "select", *SHARED)),
    "kv_sinks": ("value_groups", "select"),  # experts have none
    "kv_tail": ("value_groups", "select", "quest", *SHARED),
}
OF_MIXSGA = ("kv_tail", "n_groups", "key_bits", "value_bits", "key_block")


def read_by_task(task: str, group: str, name: str) -> bool:
    """Whether a task of eval.py reads a setting, by some method."""
    if name in TRAINED or task not in OF_TASKS.get(name, (task,)):
        return False
    if task == "mixsga":  # its rows are trained, by no method
        storing = group in ("kv", "select") or name in OF_METHODS
        return name in OF_MIXSGA or not (storing or name in ("methods", "beside"))
    methods = methods_that_read(group, name)
    return methods is None or task != "perplexity" or methods != ("select",)


def methods_that_read(group: str, name: str) -> tuple[str, ...] | None:
    """The methods of eval.py that read a setting; None where it is theirs in no way."""
    usual = {"kv": CUT, "select": ("select",)}
    return OF_METHODS.get(name, usual.get(group))


# -- bench.py

MODELS = ("select", "generate")  # comparisons that load a model
OF_BENCHES = {
    "steps": ("train", "adapter", "select", "decode", "generate"),
    "cases": ("decode", "memory"),
    "from_keys": ("decode",),
    "memory_gb": ("memory",),
    **dict.fromkeys(("new_tokens", "prefill_tokens", "compile", "parts"), ("generate",)),
    "out_dir": MODELS,
}
LAYER = {
    "decode": ("n_head", "n_kv_head", "head_dim", "block_size"),
    "memory": ("n_kv_head", "head_dim", "block_size"),
}


def read_by_bench(what: str, group: str, name: str) -> bool:
    """Whether a comparison of bench.py reads a setting."""
    if group == "bench":
        return what in OF_BENCHES.get(name, (what,))
    if group == "model":
        return name in LAYER.get(what, (name,))
    return what == "generate" or (group, what) == ("base", "select")


# -- what a command line chooses

TASKS = ("perplexity", "continuation", *PROMPTS, "mixsga")
BENCHES = ("train", "adapter", "select", "decode", "memory", "generate")
CHOICES = {
    "train": stages.CHOICE,
    "eval": Choice("tasks", "perplexity", TASKS, read_by_task),
    "sample": Choice("kv", "dense", STORAGES, read_by_storage),
    "bench": Choice("what", "train", BENCHES, read_by_bench),
}
