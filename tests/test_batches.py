"""What a sequence gets does not depend on how a batch was put together: caches that are joined
decode as one that was filled at once."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, grouped_model, tiny_model, tokens

from baselines import shared_heads
from config import KVConfig
from generate import prefill
from settings.experts import MixConfig
from storage.packed import PackedCache


def steps(model, idx, pad, at_once, n):
    """Logits after the prompts and after each of n steps, (B, n + 1, V)."""
    logits, cache = prefill(model, idx, idx.size(1) + n, pad, at_once)
    out = [logits]
    follow = tokens(len(idx), n, seed=8)
    with torch.no_grad():
        for i in range(n):
            out.append(model.decode(follow[:, i : i + 1], cache)[:, -1])
    return torch.stack(out, 1)


def padded(lengths):
    """A left-padded batch of prompts of these lengths, and its padding."""
    T = max(lengths)
    idx = torch.zeros(len(lengths), T, dtype=torch.int64)
    for b, n in enumerate(lengths):
        idx[b, T - n :] = tokens(n, seed=b)
    return idx, torch.tensor([T - n for n in lengths])


@pytest.mark.parametrize("tail", [0, 2])
def test_joined_experts_of_unequal_capacity_decode_as_one_batch(tail):
    """Pairs of prompt lengths: experts' caches of one row each, whose capacities differ, are joined;
    logits equal those of a batch that was never cut."""
    model = tiny_model()
    mix = MixConfig(group_sizes="1,3", expert_ratios="1:1")
    shared_heads.attach(model, KVConfig(kv="mixsga", kv_tail=tail), mix).eval()
    for a in range(20, 90, 10):
        for more in (1, 2, 3, 5, 8, 12):
            idx, pad = padded((a, a + more))
            want = steps(model, idx, pad, 0, 2)
            got = steps(model, idx, pad, 1, 2)
            assert (got - want).abs().max() < 1e-9 * want.abs().max(), (a, more)


def test_joining_caches_of_unequal_capacity_was_seen_to_fail(monkeypatch):
    """The comparison above sees capacities that are not made equal."""
    grow = PackedCache._grow
    monkeypatch.setattr(PackedCache, "_grow", lambda self, need, exact=False: grow(self, need))
    with pytest.raises((AssertionError, RuntimeError)):
        test_joined_experts_of_unequal_capacity_decode_as_one_batch(2)


@pytest.mark.parametrize("short", [1, 2, 3, 5])
def test_joined_integers_go_on_filling_first_tokens(short):
    """A prompt shorter than the first tokens that stay whole, beside a longer one: read row by row
    and joined it decodes as in one batch, over steps that fill them and form blocks."""
    ints = dict(key_bits=4, value_bits=4, key_block=16, value_router="norm")
    model = grouped_model(prefill="exact", kv_tail=2, topk_groups=4, **ints)
    idx, pad = padded((30, short))
    want = steps(model, idx, pad, 0, 40)
    got = steps(model, idx, pad, 30, 40)
    assert TINY.block_size > 70 and (got - want).abs().max() < 1e-9 * want.abs().max()
