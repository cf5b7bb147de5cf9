"""The gates' kernels against the plain form of routed adapters, forward and backward."""

import pytest
import torch

import lora

# kernels read a CPU's tensors in Triton's interpreter alone
INTERPRETER = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
)
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)


def outputs(layer, x, weight):
    """Output, load-balance loss, and the gradients of input and adapter of a layer in training."""
    layer.zero_grad()
    x = x.clone().requires_grad_(True)
    y = layer.train()(x)
    balance = layer.gate.balance
    ((y * weight).sum() + 3 * balance).backward()
    grads = [layer.lora_A, layer.lora_B, layer.gate.linear.weight, layer.gate.linear.bias]
    return [y.detach(), balance.detach(), x.grad, *(p.grad for p in grads)]


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize(
    "n, r, k, dtype, tol",
    [
        (8, 2, 4, torch.float32, 1e-5),
        (5, 3, 2, torch.float32, 1e-5),
        (3, 1, 3, torch.float32, 1e-5),
        (4, 4, 1, torch.bfloat16, 0.03),
    ],
)
def test_gate_kernels_equal_the_plain_form(n, r, k, dtype, tol, device):
    """Output, load balance and all gradients are those of the plain form in float64, ties among
    scores included (two branches share a router row): largest difference over largest number."""
    torch.manual_seed(0)
    layer = lora.RoutedLoRALinear(11, 7, True, r, 3.0, 0.0, n=n, gate=lora.Gate(11, n, k))
    torch.nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.gate.linear.weight[-1] = layer.gate.linear.weight[0]
        layer.gate.linear.bias[-1] = layer.gate.linear.bias[0]
    x = torch.randn(2, 67, 11).to(device)
    weight = torch.randn(2, 67, 7).to(device)
    layer.to(device)
    if dtype == torch.bfloat16:  # scores of the same bits choose the same branches
        x = x.to(dtype).float()
        layer.to(dtype).float()
        layer.gate.linear.weight.data.mul_(0)
        layer.gate.linear.weight.data[:, :1] = torch.arange(1.0, n + 1, device=device)[:, None]
    layer.impl = "triton"
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        got = outputs(layer, x, weight)
    want = outputs(layer.double(), x.double(), weight.double())
    for ours, plain in zip(got, want, strict=True):
        scale = plain.abs().max().clamp_min(1e-3)
        assert ours.shape == plain.shape and (ours - plain).abs().max() <= tol * scale
