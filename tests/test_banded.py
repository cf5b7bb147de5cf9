"""Training over value groups on a CPU: fused attention mended in a band (storage/banded.py)."""

import pytest
import torch
from helpers import TINY, qkv, random_path

import kv_router
from storage import banded


def both(monkeypatch, path, x, q, k, v):
    """What a path in training makes of x, q, k, v, and the gradients of a weighted sum of it, by
    the band and by the plain form."""
    results = []
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=q.dtype)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    inputs = [*leaves, *(p for p in path.parameters() if p.requires_grad)]
    for fast in (True, False):
        monkeypatch.setattr(kv_router, "is_banded", lambda q, fast=fast: fast)
        y = path(x, *leaves)
        grads = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)
        results.append([y, *(g for g in grads if g is not None)])
    return results


@pytest.mark.parametrize("T", (1, 3, 16, 37, 64))
@pytest.mark.parametrize("tail, block", ((1, 1), (4, 1), (0, 3), (3, 4), (16, 1), (21, 3)))
def test_banded_attention_equals_the_plain_form(T, tail, block, monkeypatch):
    """In float64 the band's outputs and gradients are those of attention with its weights in
    memory, two query heads to a KV head, for windows shorter and longer than a block and a
    prompt."""
    kv = dict(value_router="norm", mask_scope="head", kv_tail=tail, kv_tail_block=block)
    path = random_path(kv, learn_basis=True).train()
    got, want = both(monkeypatch, path, *qkv(path, T=T))
    assert len(got) == len(want) >= 4
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 1e-11


def test_first_tokens_that_stay_whole_do_not_fill_the_window(monkeypatch):
    """With a map from keys the first tokens are whole and the window begins after them: outputs and
    gradients equal the plain form's."""
    kv = dict(value_router="norm", reconstructor="keys", kv_sinks=3, kv_tail=5, kv_tail_block=2)
    path = random_path(kv, lm_to_router=True).train()
    got, want = both(monkeypatch, path, *qkv(path, T=29))
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 1e-11


def test_the_band_is_for_a_processor_without_autocast():
    """Under autocast the plain form is taken, whose products are cast one by one."""
    q = torch.zeros(1, 1, 2, 4)
    assert banded.is_banded(q) and not banded.is_banded(q.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not banded.is_banded(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_a_path_of_any_type_and_batch_is_computed(dtype, batch):
    """Of 16 bits, and of no sequences, the plain form is taken: what comes out, and the gradients,
    are those of float64, rounded."""
    path = random_path(dict(value_router="norm", kv_tail=4)).train()
    leaves = [t[:batch].detach().to(dtype).requires_grad_() for t in qkv(path, B=2, T=37)[1:]]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found = []
    for inputs in (leaves, wide):
        path.to(inputs[0].dtype)
        y = path(None, *inputs)
        assert y.dtype == inputs[0].dtype
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for got, want in zip(*found, strict=True):
        assert got.shape == want.shape
        assert ((got - want).norm() <= 20 * torch.finfo(dtype).eps * want.norm()).all()


def test_heads_do_not_read_each_other(monkeypatch):
    """A strip's keys before a head's first block are another head's: with huge ones there nothing
    changes."""
    path = random_path(dict(value_router="norm", mask_scope="head", kv_tail=4)).train()
    x, q, k, v = qkv(path, T=32)  # whole blocks: no zeros between heads
    before = path(x, q, k, v)
    k[:, 1] *= 1e3
    v[:, 1] *= 1e3
    after = path(x, q, k, v)
    n = TINY.n_head // TINY.n_kv_head
    apart = [h for h in range(TINY.n_head) if h // n != 1]
    assert torch.equal(before[:, apart], after[:, apart])
    assert not torch.equal(before[:, n], after[:, n])
