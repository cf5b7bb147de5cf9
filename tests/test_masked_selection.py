"""The masked execution of a selection, query by query."""

from __future__ import annotations

import pytest
import torch

from selection.masked import attend_to_kept


def by_loops(q, k, v, routed, keep, first, pad):
    """Attend one query at a time to a list of the tokens that it may read."""
    B, H, T, D = q.shape
    n = H // k.size(1)
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            head = h // n
            own_keep = keep[b, min(head, keep.size(1) - 1)]
            for t in range(pad[b], T):
                columns = range(pad[b], t + 1)
                read = v[b, head]
                if t >= first:
                    context = routed.size(2)
                    columns = [j for j in columns if j >= context or own_keep[j] or j == t]
                    read = torch.cat((routed[b, head], v[b, head, context:]))
                logits = torch.stack([q[b, h, t] @ k[b, head, j] for j in columns]) / D**0.5
                values = torch.stack([read[j] for j in columns])
                out[b, h, t] = logits.softmax(0) @ values
    return out


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("first", [0, 7, 9])
def test_queries_read_what_is_kept_and_themselves(first, heads):
    """Queries from `first` on read kept tokens of the context as routed, their own token though it
    was dropped, and whole ones after the context; those before read all as it is."""
    torch.manual_seed(first)
    B, H, Hkv, T, C, D = 2, 6, 3, 9, 7, 5
    q = torch.randn(B, H, T, D, dtype=torch.float64)
    k = torch.randn(B, Hkv, T, D, dtype=torch.float64)
    v = torch.randn(B, Hkv, T, D, dtype=torch.float64)
    routed = torch.randn(B, Hkv, C, D, dtype=torch.float64)
    keep = torch.rand(B, heads, C) < 0.4
    keep[:, :, :2] = False
    pad = torch.tensor([0, 2])
    want = by_loops(q, k, v, routed, keep, first, pad.tolist())
    got = attend_to_kept(q, k, v, routed, keep, first, pad)
    for b, n_pad in enumerate(pad.tolist()):
        torch.testing.assert_close(got[b, :, n_pad:], want[b, :, n_pad:])
