"""What a decode step does around attention in four kernels, against the blocks' own code."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from helpers import tokens

import generate
from config import ModelConfig
from generate import DecodeGraph, block_is_fused, prefill
from model import Block, Transformer
from storage import fused
from storage.kernel_base import triton

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")]
pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")


def model_of(n_embd: int = 40, n_head: int = 4, n_kv_head: int = 2, D: int = 32, **more):
    """A model whose weights are large enough for norms and gates to matter, their gains too."""
    torch.manual_seed(0)
    shape = dict(n_embd=n_embd, n_head=n_head, n_kv_head=n_kv_head, head_dim=D, n_inner=50)
    cfg = ModelConfig(n_layer=2, vocab_size=101, block_size=64, **(shape | more))
    model = Transformer(cfg)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.to(DEVICE)


def around(block, before, after, x, y, rope) -> list[torch.Tensor]:
    """All that a block does around an attention whose output is y."""
    return [*before(block, x, *rope), after(block, x, y)]


def errors(B: int, dtype: torch.dtype, **shape) -> tuple[list[float], list[float]]:
    """Relative errors against the block's own code in float64: of the kernels, and of the block's
    own code in `dtype`; for norm(x), q, k, v and the block's result."""
    model = model_of(**shape).to(dtype)
    block = model.layers[0]
    D = model.cfg.head_dim
    x = torch.randn(B, 1, model.cfg.n_embd).to(DEVICE, dtype)
    y = torch.randn(B, model.cfg.n_head, 1, D).to(DEVICE, dtype)
    position = torch.arange(B, device=DEVICE) * 3 % 64
    rope = model._rope(position[:, None])[0]
    got = around(block, fused.before, fused.after, x, y, rope)
    plain = around(block, Block.before, Block.after, x, y, rope)
    wide = [t.double() for t in (x, y, *rope)]
    want = around(block.double(), Block.before, Block.after, wide[0], wide[1], wide[2:])
    assert [t.shape for t in got] == [t.shape for t in want]
    assert all(t.dtype == dtype for t in got)
    return tuple(
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(some, want, strict=True)]
        for some in (got, plain)
    )


@pytest.mark.parametrize(
    "B, shape",
    [
        (5, dict(n_embd=96, n_head=3, n_kv_head=1, n_inner=72)),
        (1, dict(n_embd=64, D=64, n_head=2, n_inner=160, query_scale=0.2)),
        (19, dict()),
    ],
)
def test_kernels_do_what_a_block_does(B, shape):
    """In float32, for sizes that fill no tile, one KV head, another query scale: within a few
    roundings of float64."""
    got, _ = errors(B, torch.float32, **shape)
    assert max(got) < 2e-6, got


@pytest.mark.parametrize("B", [pytest.param(n, marks=GPU) for n in (1, 19, 64)])
def test_kernels_are_as_exact_as_a_block_in_bfloat16(B):
    """SmolLM2's shape: no more than 1.5 times the error of the block's own code, plus a unit."""
    shape = dict(n_embd=576, n_head=9, n_kv_head=3, D=64, n_inner=1536)
    got, plain = errors(B, torch.bfloat16, **shape)
    assert all(a < 1.5 * b + 2**-9 for a, b in zip(got, plain, strict=True)), (got, plain)


def test_a_step_runs_them_and_gives_the_same_logits(monkeypatch):
    """DecodeGraph takes the kernels where blocks allow it: logits of two steps of padded prompts as
    those of decode."""
    if not CUDA:
        monkeypatch.setattr(generate, "use_triton", lambda *about: True)
    model = model_of().eval()
    x = tokens(2, 9).to(DEVICE)
    pad = torch.tensor([0, 4], device=DEVICE)
    follow = tokens(2, 4, seed=5).to(DEVICE)
    seen = []

    def pick(logits, step):
        seen.append(logits.clone())
        return follow.index_select(1, step)

    with torch.no_grad():
        caches = [prefill(model, x, 20, pad)[1] for _ in range(2)]
        graph = DecodeGraph(model, caches[1], follow[:, :1], pick, 2)
        assert graph.before is fused.before and graph.after is fused.after
        for i in range(2):
            want = model.decode(follow[:, i : i + 1], caches[0])[:, -1]
            graph._once()
            assert (seen[i] - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    "shape",
    [
        dict(qkv_bias=True),
        dict(qk_norm=True),
        dict(norm="layer", positions="learned"),
        dict(activation="gelu_tanh"),
        dict(D=24),
    ],
)
def test_other_blocks_keep_their_own_code(shape, monkeypatch):
    """What the kernels lack is refused: biases, norms of heads, other norms, positions and
    activations, heads of no power of 2; and float16, whose sums before the norm may overflow."""
    monkeypatch.setattr(generate, "use_triton", lambda *about: True)
    assert block_is_fused(model_of().layers[0])
    assert not block_is_fused(model_of(**shape).layers[0])
    assert not block_is_fused(model_of().half().layers[0])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert not block_is_fused(model_of().layers[0])
        assert block_is_fused(model_of().bfloat16().layers[0])
