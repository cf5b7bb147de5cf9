"""From the settings of eval.py to its tasks."""

from __future__ import annotations

from data import TokenFile, batch, sequential
from measure_config import EvalConfig
from settings.fields import check, comma_list
from tasks.choices import multiple_choice
from tasks.common import Task
from tasks.prompts import needle, variable_tracking
from tasks.text import Continuation, Perplexity

READING = ("perplexity", "continuation")  # the tasks that need a corpus


def make_tasks(cfg: EvalConfig, tokenizer, T: int, text: TokenFile | None) -> list[Task]:
    """Make the tasks named by cfg.tasks, in that order, in contexts of T tokens; text: the corpus
    of those in READING."""
    tasks: list[Task] = []
    common = (tokenizer, T, cfg.sequences, cfg.seed, cfg.query)
    for name in comma_list(cfg.tasks):
        if name == "perplexity":
            tasks.append(Perplexity(*sequential(text, cfg.sequences, T)))
        elif name == "continuation":
            tasks.append(continuation(cfg, T, text))
        elif name in ("needle", "needle_reuse"):
            tasks.append(needle(*common, cfg.distractors, name == "needle_reuse"))
        elif name == "variable_tracking":
            tasks.append(variable_tracking(*common, cfg.chains, cfg.hops))
        else:
            tasks.append(multiple_choice(*common, cfg.questions, cfg.shots, cfg.shots_from))
    return tasks


def continuation(cfg: EvalConfig, T: int, text: TokenFile) -> Continuation:
    """Draw the windows of T tokens by the seed. ValueError where no context would be left."""
    check(
        cfg.query + cfg.continuation < T,
        f"query={cfg.query}, continuation={cfg.continuation} with {T} tokens",
        "some context must be left",
        "give a larger --block_size",
    )
    x, _ = batch(text, "continuation", cfg.seed, 0, cfg.sequences, T)
    return Continuation(x, cfg.query, cfg.continuation)
