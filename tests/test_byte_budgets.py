"""Bytes held of a prompt beside the share of them that was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from choosing import config, selecting
from helpers import TINY, tiny_model, tokens

from report.rows import filled_cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [601, 2047])
def test_the_share_of_dense_is_the_budget(n, dtype):
    """What eval.py's column says of a prompt is never above --kv_byte_budgets, in whatever dtype
    is computed, and as near below it as half_bytes_for says: a head's counts and one block's
    scales, half a byte of rounding a kept token, and what the next token would cost."""
    cfg = replace(TINY, block_size=2047)
    m = selecting(model=tiny_model(dtype=torch.float32, cfg=cfg))
    dense = 4 * 16 * n  # bytes of a head, in 16 bits
    for share in (0.5, 0.25, 0.125, 0.0625):
        m.selector.set(config(kv_bytes=share))
        cache = filled_cache(m, tokens(1, n, seed=8), dtype)
        kept = sum(int(c.n_packed.sum()) for c in cache.layers)
        next_token = 16 * (8 + 8) / 8 + 12  # a key and a value of 8 bits, mask and scales
        short = (4 * 16 + 80) * 6 + kept / 2 + next_token
        of_dense = m.share_of_dense(n, cache)
        assert share - short / (6 * dense) <= of_dense <= share
        assert kept > 0 and short / (6 * dense) < 0.1 * share


@pytest.mark.parametrize(("n_layer", "head_dim"), [(2, 16), (3, 32)])
def test_a_budget_holds_for_one_head(n_layer, head_dim):
    """Of a single KV head of a single sequence, whose counts weigh most, no more is held than the
    share asked for."""
    shape = dict(n_layer=n_layer, n_head=2, n_kv_head=1, head_dim=head_dim, block_size=400)
    model = tiny_model(dtype=torch.float32, cfg=replace(TINY, **shape))
    m = selecting(model=model, kv_tail=4, kv_sinks=2)
    for share in (0.13, 0.25, 0.4):
        m.selector.set(config(kv_bytes=share))
        for n in range(150, 389, 34):
            cache = filled_cache(m, tokens(1, n, seed=n), "float32")
            assert m.share_of_dense(n, cache) <= share, (share, n)
