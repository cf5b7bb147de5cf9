"""An adaptation step of routed subspace LoRA against plain LoRA of the same total rank."""

from __future__ import annotations

from collections.abc import Callable

import torch

import lora
from benchmarks.common import random_batches
from benchmarks.train import step_rows, stepper
from config import ModelConfig
from loaders.device import pick_device
from measure_config import BenchConfig
from model import Transformer
from settings.adapters import AdapterConfig
from training.loss import lm_loss


def bench_adapter(cfg: BenchConfig, c: ModelConfig) -> list[dict]:
    """Return the rows of `adapter`; the first is the routed one, with its ratio to LoRA."""
    device = pick_device(cfg.device)
    torch.manual_seed(0)
    batches = random_batches(c.vocab_size, cfg.batch_size, c.block_size, device)
    routed = AdapterConfig(adapter="routed")
    plain = AdapterConfig(
        adapter="lora", r=routed.r * routed.subspaces, alpha=routed.alpha * routed.subspaces
    )
    steps = {
        "routed subspace LoRA": adapted_step(cfg, c, routed, device),
        "LoRA": adapted_step(cfg, c, plain, device),
    }
    return step_rows(cfg, c, steps, batches)


def adapted_step(
    cfg: BenchConfig, c: ModelConfig, adapter: AdapterConfig, device: torch.device
) -> Callable:
    """Return the training step of a model of random weights with that adapter."""
    model = lora.attach(Transformer(c).to(device), adapter).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss_of(x, y):
        return lm_loss(model(x), y) + adapter.balance_weight * lora.balance_loss(model)

    return stepper(loss_of, trained, device, cfg.dtype, True)
