"""What a stage of training is: the model and what of it is trained, the text, how long, the loss,
and what its checkpoints hold. training/loop.py runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from config import KVConfig
from data import Corpus
from loaders.examples import Examples
from loaders.runs import added_state, load_added_state
from loaders.weights import model_state
from model import Transformer
from selection.training import predictor_loss
from settings.adapters import AdapterConfig
from settings.fields import to_dict, to_file
from tasks.text import answers_loss
from training.distillation import continuation_loss, distillation_loss
from training.loss import lm_loss
from training.sharded import copy_whole


@dataclass(kw_only=True)
class Stage:
    """One training stage: what is trained, on what, how long, and the folder that keeps it."""

    kind: str  # pretrain, adapt, select or continue
    name: str
    folder: Path | None  # None: nothing is written, and nothing but training happens
    model: Transformer
    params: list[torch.nn.Parameter]
    tokenizer: object
    corpus: Corpus
    window: int  # tokens in a training sequence
    steps: int
    batch_size: int
    lr: float
    seed: int
    kv: KVConfig
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(adapter="none"))
    objective: str = "lm"  # lm, distill or select
    byte_budgets: list[float] = field(default_factory=list)  # distill over a selection: its shares
    n_context: int = 0  # distill over a selection: tokens of a window that are compressed
    about: dict = field(default_factory=dict)  # what checkpoints say besides the fields above

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained, and not only what was added to a frozen base."""
        return self.kind in ("pretrain", "continue")

    @property
    def config(self) -> dict:
        """What a checkpoint of this stage says of it, in JSON types."""
        settings = {
            "stage": self.kind,
            "model": to_dict(self.model.cfg),
            "tokenizer": self.tokenizer.name,
            "adapter": to_dict(self.adapter),
            "kv": to_file(self.kv),
            "seed": self.seed,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "block_size": self.window,
            "trainable_parameters": sum(p.numel() for p in self.params),
        }
        if not self.trains_all:
            settings["objective"] = self.objective
        return settings | self.about

    @property
    def part(self) -> str:
        """The name of what a checkpoint holds: model, adapter or selector."""
        if self.trains_all:
            return "model"
        return "selector" if self.objective == "select" else "adapter"

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint of this stage holds: the model, or only what was added to the frozen
        one."""
        state = model_state if self.trains_all else added_state
        return {self.part: state(self.model)}

    def restore(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Put a checkpoint's tensors back into this stage's model."""
        if self.trains_all:
            copy_whole(model_state(self.model), saved[self.part], "checkpoint")
        else:
            load_added_state(self.model, saved[self.part])

    def groups_kept(self, step: int) -> int:
        """Value groups kept per token in a training step: all of them while warming up."""
        return self.kv.n_groups if self.warming(step) else self.kv.topk_groups

    def warming(self, step: int) -> bool:
        """Whether a training step reads whole values, before what is stored is read."""
        return step < self.kv.kv_warmup * self.steps

    def loss(self, forward, x: Tensor, y: Tensor, budget: float | None = None) -> Tensor:
        """What is minimised over x, y (B, T), a mean over sequences: by objective lm, distill or
        select. budget: the one of byte_budgets that these sequences draw, where there are some."""
        if self.objective == "select":
            return predictor_loss(self.model, x)
        if self.objective == "distill" and self.kv.kv == "select":
            return continuation_loss(self.model, x, budget, self.n_context)
        if self.objective == "distill":
            return distillation_loss(self.model, self.kv, forward, x)
        loss = answers_loss if isinstance(self.corpus.train, Examples) else lm_loss
        return loss(forward(x), y)
