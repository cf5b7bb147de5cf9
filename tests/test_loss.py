"""The loss, which has float32 logits of a few tokens at a time: against PyTorch's over all."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, tiny_model, tokens

from tasks.text import answers_loss
from training import loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks that end inside a sequence, and a last one that is not full."""
    monkeypatch.setattr(loss, "LOSS_CHUNK", 7)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_loss_and_gradients_equal_pytorchs(cap):
    """Mean over targets that count, and the gradient of every parameter of a tied head under a
    cap, in float64 to 1e-12; so of answers, a mean per sequence."""
    transformer = tiny_model(cfg=replace(TINY, logit_cap=cap, tie_embeddings=True))
    x = tokens(3, 12)
    y = tokens(3, 12, seed=1)
    y[0, :5] = -100
    y[2, 3] = -100

    def plain_answers(logits, y):
        each = [F.cross_entropy(row, target) for row, target in zip(logits, y, strict=True)]
        return torch.stack(each).mean()

    pairs = [
        (loss.lm_loss, lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten())),
        (answers_loss, plain_answers),
    ]
    for ours, plain in pairs:
        params = list(transformer.parameters())
        got = ours(transformer(x), y)
        want = plain(transformer(x), y)
        assert abs(got - want) < 1e-12
        grads = zip(
            torch.autograd.grad(got, params), torch.autograd.grad(want, params), strict=True
        )
        assert all((a - b).abs().max() < 1e-12 for a, b in grads)
    assert torch.isnan(loss.lm_loss(transformer(x), torch.full_like(y, -100)))


def test_bfloat16_logits_lose_nothing_in_the_loss():
    """The loss of bfloat16 logits is that of the same numbers in float64, to float32's rounding,
    and its gradient to bfloat16's."""
    torch.manual_seed(0)
    logits = torch.randn(2, 10, 53).bfloat16().requires_grad_(True)
    wide = logits.detach().double().requires_grad_(True)
    y = torch.randint(53, (2, 10))
    got = loss.lm_loss(logits, y)
    want = F.cross_entropy(wide.flatten(0, 1), y.flatten())
    assert got.dtype == torch.float32 and abs(got - want) < 1e-6
    got.backward()
    want.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert ((logits.grad - wide.grad).abs() <= 2**-8 * wide.grad.abs() + 1e-9).all()
