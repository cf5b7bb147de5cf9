"""RoPE frequencies of models whose context was lengthened after training: linear, llama3, yarn.

Letters: D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from config import ModelConfig


def scale_frequencies(cfg: ModelConfig, freq: Tensor) -> Tensor:
    """Return frequencies (D/2,), in radians a token, scaled as cfg says: a share of each stays, and
    the rest is divided by rope_factor."""
    stay = unscaled_share(cfg, freq)
    return freq * (stay + (1 - stay) / cfg.rope_factor)


def unscaled_share(cfg: ModelConfig, freq: Tensor) -> Tensor:
    """Return the share (D/2,) of each frequency (D/2,), in radians a token, that RoPE scaling
    leaves as it is.

    linear: none. llama3, yarn: all of one that turns more than rope_high_freq times in
    rope_original tokens, none of one that turns fewer than rope_low_freq times; in between llama3
    blends by the turns, yarn (arXiv 2309.00071) by the dimension, from whole ones."""
    if cfg.rope_scaling == "linear":
        return torch.zeros_like(freq)
    if cfg.rope_scaling == "llama3":
        turns = cfg.rope_original * freq / (2 * math.pi)
        range_of_turns = cfg.rope_high_freq - cfg.rope_low_freq
        return ((turns - cfg.rope_low_freq) / range_of_turns).clamp(0, 1)

    def pair_that_turns(n: float) -> float:
        # theta^(-2i/D) rope_original = 2 pi n, solved for i
        turns_of_first = cfg.rope_original / (2 * math.pi)
        return cfg.head_dim / 2 * math.log(turns_of_first / n, cfg.rope_theta)

    low = max(math.floor(pair_that_turns(cfg.rope_high_freq)), 0)
    high = min(math.ceil(pair_that_turns(cfg.rope_low_freq)), cfg.head_dim - 1)
    pair = torch.arange(len(freq), dtype=freq.dtype, device=freq.device)
    return 1 - ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
