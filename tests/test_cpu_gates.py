"""Gates of routed adapters on a CPU: one step of autograd (storage/cpu_gates.py)."""

import pytest
import torch
from helpers import randomise

import lora
from storage import cpu_gates


@pytest.mark.parametrize("n, k, r", ((8, 4, 2), (3, 1, 5), (5, 5, 1), (1, 1, 3), (4, 2, 3)))
@pytest.mark.parametrize("ties", (False, True), ids=["", "ties"])
def test_gates_equal_the_plain_form(n, k, r, ties, monkeypatch):
    """In float64 a routed projection's output, its load balance and the gradients of both, of its
    input and of all that is trained, are those of Gate.route and weigh; equal scores too."""
    gate = lora.Gate(7, n, k)
    layer = lora.RoutedLoRALinear(7, 11, True, r, 3.0, 0.0, n=n, gate=gate)
    randomise(layer.double()).train()
    if ties:
        gate.linear.weight.data.zero_()
        gate.linear.bias.data.fill_(0.3)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 13, 7, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(3, 13, 11, generator=draw, dtype=torch.float64)
    results = []
    for fast in (True, False):
        monkeypatch.setattr(cpu_gates, "is_gated_here", lambda h, fast=fast: fast)
        y = layer(x)
        total = (y * weight).sum() + 7 * gate.balance
        grads = torch.autograd.grad(total, [x, *layer.parameters()])
        results.append([y, gate.balance, *grads])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 1e-12 * max(1.0, want.abs().max())


def test_gates_are_made_here_on_a_processor_in_full_precision():
    """Narrow types and autocast take the plain form."""
    h = torch.zeros(1, 2, 3)
    assert cpu_gates.is_gated_here(h) and cpu_gates.is_gated_here(h.double())
    assert not cpu_gates.is_gated_here(h.bfloat16()) and not cpu_gates.is_gated_here(h.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_gates.is_gated_here(h)
