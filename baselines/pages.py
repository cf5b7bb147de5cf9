"""Pages of keys and what bounds their logits (Quest, arXiv 2406.10774): of every key coordinate a
page holds the least and the largest. No key of a page can have a larger logit than

    sum over coordinates of max(q * least, q * largest)  =  q+ . largest + q- . least.

A row's first token begins a page. Letters: storage/layout.py; P pages."""

from __future__ import annotations

from torch import Tensor

PAGE = 16  # tokens in a page


def page_bounds(k: Tensor, number: Tensor, there: Tensor, n_pages: int) -> tuple[Tensor, Tensor]:
    """Return the least and the largest of every key coordinate in each page, (..., B, Hkv, P, D)
    twice: inf and -inf where a page is empty.

    k       (..., B, Hkv, T, D)
    number  (B or 1, T) int64, of each token in its sequence
    there   (B, T) bool, False for padding"""
    page = number.clamp_min(0) // PAGE
    page = page[:, None, :, None].expand_as(k)
    padding = ~there[:, None, :, None]
    shape = (*k.shape[:-2], n_pages, k.size(-1))
    low = k.new_full(shape, float("inf"))
    high = k.new_full(shape, float("-inf"))
    low.scatter_reduce_(-2, page, k.masked_fill(padding, float("inf")), "amin")
    high.scatter_reduce_(-2, page, k.masked_fill(padding, float("-inf")), "amax")
    return low, high


def logit_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the largest logit q . k / sqrt(D) that the bounds of each page allow, (..., T, P); 0
    where a page is empty.

    q          (..., T, D)
    low, high  (..., P, D)"""
    empty = low.isinf()
    low = low.masked_fill(empty, 0)
    high = high.masked_fill(empty, 0)
    from_largest = q.clamp_min(0) @ high.mT
    from_least = q.clamp_max(0) @ low.mT
    return (from_largest + from_least) * q.size(-1) ** -0.5
