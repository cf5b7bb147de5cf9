"""From the settings of eval.py to its tasks."""

from __future__ import annotations

from collections.abc import Sequence

from data import batch, same_text, sequential
from loaders.runs import Run
from measure_config import EvalConfig
from settings.fields import check, comma_list
from tasks.choices import multiple_choice
from tasks.common import Task
from tasks.instruct import instruct
from tasks.items import item_files
from tasks.prompts import needle, variable_tracking
from tasks.recall import copying, needles
from tasks.ruler import MAKERS, ruler
from tasks.text import Continuation, Perplexity, Text
from tasks.zero_shot import zero_shot

READING = ("perplexity", "continuation", "copy")  # the tasks that need a corpus


def make_tasks(
    cfg: EvalConfig, run: Run, T: int, texts: Sequence[Text], template: str = "auto"
) -> list[Task]:
    """Make the tasks named by cfg.tasks, in that order, in contexts of T tokens, those in READING
    once for each of the texts. template: how instructions are written."""
    tasks: list[Task] = []
    common = (run.tokenizer, T, cfg.sequences, cfg.seed, cfg.query)
    for name in comma_list(cfg.tasks):
        if name == "perplexity":
            for text in texts:
                x, y = sequential(text.tokens, cfg.sequences, T)
                tasks.append(Perplexity(x, y, text.about))
        elif name == "continuation":
            longest = run.model.cfg.block_size
            tasks += [continuation(cfg, T, text, longest) for text in texts]
        elif name == "copy":
            for text in texts:
                tasks.append(copying(*common, text, cfg.question))
        elif name == "needle" and cfg.asks_facts():
            tasks.append(needles(*common, cfg.distractors, cfg.question, cfg.needles, cfg.answer))
        elif name in ("needle", "needle_reuse"):
            tasks.append(needle(*common, cfg.distractors, name == "needle_reuse"))
        elif name == "variable_tracking":
            tasks.append(variable_tracking(*common, cfg.chains, cfg.hops))
        elif name in MAKERS:
            tasks.append(ruler(name, *common))
        elif name == "zero_shot":
            tasks += [zero_shot(*common, path, cfg.question) for path in item_files(cfg)]
        elif name == "instruct":
            held_out = held_out_of(run, cfg.dataset)
            tasks.append(instruct(*common, cfg.dataset, template, cfg.answer_tokens, held_out))
        else:
            tasks.append(multiple_choice(*common, cfg.questions, cfg.shots, cfg.shots_from))
    return tasks


def held_out_of(run: Run, corpus: str) -> float:
    """Return the share of a corpus that the run's training held out; 0 where it is another's."""
    if not same_text(corpus, run.config.get("corpus", "")):
        return 0.0
    return run.config["data"]["val_fraction"]


def continuation(cfg: EvalConfig, T: int, text: Text, longest: int) -> Continuation:
    """Draw the windows of T tokens by the seed. longest: tokens that the model can read. ValueError
    where no context would be left."""
    larger = "" if longest == T else ", or a larger --block_size"
    check(
        cfg.query + cfg.continuation < T,
        f"query={cfg.query}, continuation={cfg.continuation} with {T} tokens",
        "some context must be left",
        f"give a smaller --continuation or --query{larger}",
    )
    x, _ = batch(text.tokens, "continuation", cfg.seed, 0, cfg.sequences, T)
    return Continuation(x, cfg.query, cfg.continuation, text.about)
