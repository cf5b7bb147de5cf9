"""Attention with whole values in a window and routed ones before it, fused: against the plain form
that has all weights in memory."""

import pytest
import torch

import kv_router
from config import KVConfig, ModelConfig
from routing.in_window import plain_windowed_attention
from storage.windowed import Window, windowed_attention

CASES = {  # query heads, KV heads, tokens, window, how many leave at a time, first that are whole
    "no window but blocks": (4, 4, 37, 0, 3, 0),
    "one token": (6, 2, 41, 1, 1, 0),
    "several blocks": (9, 3, 101, 16, 1, 0),
    "wider than a block": (4, 2, 131, 40, 5, 0),
    "shorter than the window": (3, 1, 7, 16, 1, 0),
    "first tokens whole": (4, 2, 79, 9, 4, 3),
}
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def path_of(tail: int, leaves: int, n_sinks: int = 0) -> kv_router.ValueGroupPath:
    cfg = ModelConfig(n_head=3, n_kv_head=1, head_dim=16, n_embd=48)
    block = {} if leaves == 1 else {"kv_tail_block": leaves}
    if n_sinks:
        block |= {"reconstructor": "keys", "kv_sinks": n_sinks}
    return kv_router.ValueGroupPath(cfg, KVConfig(n_groups=4, topk_groups=2, kv_tail=tail, **block))


def both(case: str, dtype: torch.dtype, autocast: bool = False, device: str = "cpu"):
    """Outputs and gradients of q, k, v and routed values: fused ones, and the plain form's."""
    H, Hkv, T, *sizes = CASES[case]
    window = Window(*sizes)
    g = torch.Generator().manual_seed(0)
    shapes = [(2, H, T, 16)] + [(2, Hkv, T, 16)] * 3 + [(2, H, T, 16)]
    drawn = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    *inputs, weight = (t.to(device) for t in drawn)

    def run(attention, dtype):
        q, k, v, routed = leaf = [t.to(dtype).requires_grad_(True) for t in inputs]
        y = attention(q, k, v, routed)
        return [y, *torch.autograd.grad((y * weight.to(y.dtype)).sum(), leaf)]

    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        got = run(lambda q, k, v, r: windowed_attention(q, k, v, r, window), dtype)
    want = run(lambda q, k, v, r: plain_windowed_attention(q, k, v, k, r, window), torch.float64)
    return got, want


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "dtype, autocast, tol, device",
    [
        pytest.param(torch.float64, False, 1e-12, "cpu", id="float64"),
        pytest.param(torch.float32, False, 2e-6, "cpu", id="float32"),
        pytest.param(torch.float32, True, 0.03, "cpu", id="autocast"),
        pytest.param(torch.float32, False, 2e-5, "cuda", id="float32 on a GPU", marks=ON_GPU),
        pytest.param(torch.float32, True, 0.03, "cuda", id="autocast on a GPU", marks=ON_GPU),
    ],
)
def test_fused_window_equals_the_plain_form(case, dtype, autocast, tol, device):
    """Outputs and gradients agree with float64's plain form: largest difference over the largest
    number of all, to rounding of the type computed in."""
    got, want = both(case, dtype, autocast, device)
    assert case.startswith("shorter") == (want[4].abs().max() == 0)  # of routed values
    scale = max(t.abs().max() for t in want)
    for ours, plain in zip(got, want, strict=True):
        assert ours.shape == plain.shape and (ours - plain).abs().max() <= tol * scale


def test_fused_window_keeps_no_attention_matrix():
    """For the backward pass the path keeps less than half a matrix of attention weights, all
    tensors together; the plain form keeps more."""
    T = 400
    window = Window(3, 1)
    shapes = [(1, 3, T, 16), (1, 1, T, 16), (1, 1, T, 16)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)

    def kept(forward) -> int:
        sizes = {}

        def see(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            y = forward()
        assert y.requires_grad
        return sum(sizes.values())

    half = 3 * T * T * 4 / 2
    routed = v * 0.5
    assert kept(lambda: windowed_attention(q, k, v, routed, window)) < half / 2
    assert kept(lambda: plain_windowed_attention(q, k, v, k, routed, window)) > half


def test_path_takes_the_fused_form(monkeypatch):
    """Where there is a fused call, a path that needs neither padding nor caps reads through it."""
    calls = []

    def fused(q, k, v, routed, window):
        calls.append(window)
        return windowed_attention(q, k, v, routed, window)

    path = path_of(3, 1).double()
    torch.manual_seed(0)
    shapes = [(1, 11, 48), (1, 3, 11, 16), (1, 1, 11, 16), (1, 1, 11, 16)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    want = path(*inputs)
    assert not calls
    monkeypatch.setattr(kv_router, "is_banded", lambda q: False)
    monkeypatch.setattr(kv_router, "is_fused", lambda q: True)
    monkeypatch.setattr(kv_router, "windowed_attention", fused)
    assert (path(*inputs) - want).abs().max() < 1e-12 and calls == [(3, 1, 0)]
    path(*inputs, torch.tensor([2]))
    assert len(calls) == 1
