"""Which text eval.py reads, in windows of how many tokens, and which text bases are calibrated on:
never the one that is measured."""

from __future__ import annotations

from torch import Tensor

from config import check, comma_list
from data import content_hash, label_of, prepare_splits, same_text, whole_split
from loaders.compress import windows_of
from loaders.runs import Run, is_foreign
from measure_config import EvalConfig
from report.plan import Asked
from report.progress import say
from tasks.text import Text

LONGEST = 2048  # tokens of a sequence for a pretrained model, unless a flag says otherwise


def window_of(run: Run, cfg: EvalConfig) -> int:
    """Tokens per sequence: --block_size, else what the run was trained with."""
    longest = run.model.cfg.block_size
    usual = min(LONGEST, longest) if is_foreign(run.path) else longest
    window = cfg.block_size or run.config.get("block_size") or usual
    check(
        longest >= window,
        f"block_size={window}",
        f"the model's context is {longest}",
        f"give --block_size={longest} or less, or a model of a longer context",
    )
    return window


def corpus_of(run: Run, cfg: EvalConfig) -> str:
    """The corpora that are read, a list: --dataset, else what was trained on."""
    return cfg.dataset or run.config.get("corpus", "pycode")


def read_texts(run: Run, asked: Asked) -> list[Text]:
    """The texts that are read, one for each corpus."""
    texts = []
    for corpus in comma_list(corpus_of(run, asked.eval)):
        split = split_of(run, corpus, asked.eval.split)
        (tokens,) = prepare_splits(corpus, asked.data, run.tokenizer, [split])
        sha256 = content_hash(corpus, asked.data)
        texts.append(Text(tokens, {"corpus": label_of(corpus), "split": split, "sha256": sha256}))
    return texts


def split_of(run: Run, corpus: str, split: str) -> str:
    """The part of a corpus that --split means: its own; test is all of a corpus without files of
    its own for that, unless the run was trained on it."""
    if split != "test" or same_text(corpus, run.config.get("corpus", "")):
        return split
    return whole_split(corpus, "test")


def calibration_windows(run: Run, asked: Asked, window: int, texts: list[Text]) -> list[Tensor]:
    """Batches that bases are calibrated on. ValueError where they are of a text that is read."""
    cfg = asked.eval
    corpus = corpus_of(run, cfg)
    held_out = all(text.about["split"] in ("val", "test") for text in texts)
    check(
        held_out or bool(cfg.calibrate),
        f"split={cfg.split}",
        "bases would be calibrated on the text that is measured",
        "give --calibrate=CORPUS",
    )
    check(
        not (texts and cfg.calibrate and same_text(cfg.calibrate, corpus)),
        f"calibrate={cfg.calibrate!r}",
        "that is the text that is measured",
        "give another, or leave it out to calibrate on the training split",
    )
    split = whole_split(cfg.calibrate, "train") if cfg.calibrate else "train"
    n = cfg.calibration
    say(f"calibrating on {cfg.calibrate or corpus}, {n} sequences (--calibration) ...")
    (text,) = prepare_splits(cfg.calibrate or corpus, asked.data, run.tokenizer, [split])
    return windows_of(text, run, cfg.seed, cfg.calibration, window, cfg.batch_size)
