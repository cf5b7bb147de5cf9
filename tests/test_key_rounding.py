"""Selection rounds the keys of a context for its own queries: --key_rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from choosing import config, run, selecting
from helpers import error_line, tokens
from test_rounding import quantise_keys_for

from config import SelectConfig
from storage.integers.rounding import QueryMoments
from storage.layout import cdiv


def test_a_context_is_rounded_for_its_own_queries():
    """--key_rounding changes the codes of keys and nothing else, in every row as alone; logits
    after the prompt come nearer to dense."""
    X = tokens(6, 131, seed=4)
    Y = tokens(6, 29, seed=5)
    errors = []
    m = selecting()
    dense = run(m, config(kv_keep=1.0), X, Y, None)[1]
    caches = []
    m.selector.kv = replace(m.selector.kv, key_bits=2, value_bits=8)
    prompts = []
    choose = m.selector.choose
    m.selector.choose = lambda p: prompts.append(p) or choose(p)
    for how in ("queries", "nearest"):
        _, got, _, cache = run(m, config(kv_keep=1.0, key_rounding=how), X, Y, None)
        caches.append(cache.layers[0].state_dict())
        if how == "queries":  # each layer for its own queries; the first four tokens are whole
            n = prompts[0].n_context - 4
            blocks = cdiv(n, 64)
            segment = torch.arange(18).repeat_interleave(n)  # 6 rows, 3 KV heads
            block = segment * blocks + torch.arange(n).repeat(18) // 64
            for i, c in enumerate(cache.layers):
                keys = prompts[0].keys[i, :, :, 4 : 4 + n].flatten(0, 2)
                moment = prompts[0].moments()[i].flatten(0, 1)
                moments = QueryMoments(moment, torch.full((18,), n))
                want = quantise_keys_for(moments, keys, block, 18 * blocks, 2)
                assert torch.equal(c.keys, want[0])
        errors.append((got - dense).square().mean().item())
    differ = {name for name, t in caches[0].items() if not torch.equal(t, caches[1][name])}
    assert differ == {"keys"}
    assert errors[0] < 0.8 * errors[1], errors  # another seed: 0.64 to 0.77
    for budget in (dict(kv_bytes=0.3), dict(kv_keep=0.5)):
        both = run(m, config(**budget), X[:2], Y[:2], (0, 40))[1]
        alone = run(m, config(**budget), X[1:2, 40:], Y[1:2], None)[1]
        torch.testing.assert_close(both[1], alone[0])


def test_other_roundings_are_refused():
    """In a line."""
    assert "key_rounding='down'" in error_line(SelectConfig, key_rounding="down")
