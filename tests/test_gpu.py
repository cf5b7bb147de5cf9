"""What only a GPU can show: bfloat16 autocast, torch.compile and the packed cache on the device."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, grouped_model, tokens

import train
from generate import generate
from loaders.device import autocast
from loaders.runs import load_run
from loaders.tokenizer import get_tokenizer
from model import attend
from runs import adapt_arguments, losses, pretrain
from storage.layout import top_k_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("own_cache"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "setting",
    [
        dict(kv_tail=0),
        dict(kv_tail=4, value_router="norm", mask_scope="head", value_basis="output"),
        dict(reconstructor="mlp", n_groups=8, topk_groups=3),
    ],
    ids=["paper-like", "default", "mlp"],
)
@pytest.mark.parametrize("dtype, tol", [("float32", 1e-3), ("bfloat16", 0.15)])
def test_packed_equals_masked_on_the_device(setting, dtype, tol):
    """Decoding from the packed cache gives the uncached forward's logits, float32 and bfloat16
    autocast (tolerance relative to the largest logit; with near-ties between groups a bfloat16 mask
    may differ, so its bound is on the mean)."""
    model = grouped_model(dtype=torch.float32, **setting).to(CUDA)
    x = tokens(3, 67).to(CUDA)
    with torch.no_grad(), autocast(CUDA, dtype):
        want = model(x).float()
        cache = model.new_cache(3, 67)
        steps = [model.decode(step, cache).float() for step in x.split(1, 1)]
        got = torch.cat(steps, 1)
    error = (got - want).abs() / want.abs().max()
    assert got.isfinite().all() and float(error.max() if dtype == "float32" else error.mean()) < tol
    assert cache.nbytes() < 2 * 4 * 67 * 3 * TINY.n_kv_head * TINY.head_dim * TINY.n_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_pad", [None, 5])
def test_attention_forms_no_weights_of_grouped_heads(dtype, n_pad):
    """Nine query heads of three KV heads over 4,001 tokens, padded and not, forward and backward:
    within a quarter of the bytes that one matrix of weights takes, with the values of float64."""
    T = 4001
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, T, 64) for heads in (9, 3, 3))
    q, k, v = (torch.randn(s, generator=generator).to(CUDA, dtype) for s in shapes)
    pad = None if n_pad is None else torch.tensor([0, n_pad], device=CUDA)
    asked = q.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = attend(asked, k, v, pad)
    y.sum().backward()
    torch.cuda.synchronize()
    matrix = 2 * 9 * T * T * dtype.itemsize
    masks = 0 if n_pad is None else 2 * T * T * (2 + 3 * dtype.itemsize)  # as bits and as numbers
    assert torch.cuda.max_memory_allocated() - before < matrix / 4 + masks
    some = slice(T - 7, T)
    want = attend(q[:, :, some].detach().double(), k.double(), v.double(), pad)
    error = (y[:, :, some] - want).abs().max().item()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)


def test_top_k_mask_is_the_same_on_both_devices():
    """Ties included: the lower index wins on the GPU as on the CPU."""
    scores = torch.randint(0, 3, (4001, 16), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 7, 16):
        assert torch.equal(top_k_mask(scores.to(CUDA), k).cpu(), top_k_mask(scores, k))


def test_training_in_bfloat16_follows_float32_and_compiles(tmp_path, text):
    """Thirty steps of adaptation: bfloat16 within 3 % of float32's loss at every step, compiled
    within 3 % of uncompiled."""
    base = pretrain(
        tmp_path / "base", text, "--device=cuda", "--dtype=float32", "--pretrain_steps=30"
    )
    traces = {}
    for name, flags in {
        "float32": ["--dtype=float32"],
        "bfloat16": ["--dtype=bfloat16"],
        "compiled": ["--dtype=float32", "--compile"],
    }.items():
        train.run(
            adapt_arguments(
                tmp_path / name,
                text,
                base,
                "--device=cuda",
                "--adapt_steps=30",
                "--lora_dropout=0",
                *flags,
            )
        )
        traces[name] = [float(v) for _, v in losses(tmp_path / name / "routed-s0")]
    for name in ("bfloat16", "compiled"):
        assert len(traces[name]) == 30
        assert (
            max(abs(a / b - 1) for a, b in zip(traces[name], traces["float32"], strict=True)) < 0.03
        ), name
    run = load_run(tmp_path / "bfloat16", CUDA)
    rows, cache = generate(run.model, [get_tokenizer("byte").encode("ab")], 12)
    assert len(rows[0]) == 12 and cache.nbytes() > 0
