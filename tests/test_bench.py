"""bench.py decode, memory, generate: the rows it prints, that they are right, and that a wrong
kernel gets no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from benchmarks.cases import BLOCK, WINDOW, Case
from benchmarks.decode import bench_decode, check_kernel
from benchmarks.generate import bench_generate
from benchmarks.memory import bench_memory
from config import KVConfig, ModelConfig, SelectConfig
from measure_config import BenchConfig
from settings.base import BaseConfig
from storage.layout import WindowView

ROOT = Path(__file__).parent.parent
SHAPE = dict(n_head=6, n_kv_head=3, head_dim=32, block_size=301)


def run(*flags: str) -> subprocess.CompletedProcess:
    """bench.py as a user calls it."""
    return subprocess.run(
        [sys.executable, "bench.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_decode_rows_name_the_peer_and_count_the_bytes_held():
    """Every form of every case has a row, the first; bytes are those of the caches; the fastest
    fused dense attention has ratio 1."""
    rows = bench_decode(
        BenchConfig(what="decode", cases="4:0.5,8:0.25:0.5", steps=2, batch_size=2, device="cpu"),
        ModelConfig(**SHAPE),
    )
    ours = [r for r in rows if r["impl"].startswith("packed")]
    assert (
        [r["impl"] for r in rows[:3]]
        == [r["impl"] for r in ours]
        == ["packed S=4 K=2", "packed S=4 rho=0.5", "packed S=8 rho=0.25 tokens=0.5"]
    )
    dense = 2 * 4 * 2 * 3 * (301 + WINDOW) * 32
    peers = {r["impl"]: r for r in rows if r["impl"].startswith("SDPA")}
    assert min(r["ratio"] for r in peers.values()) == 1 and {r["peer"] for r in rows} == {
        min(peers, key=lambda n: peers[n]["ms"])
    }
    assert all(r["bytes"] == dense for r in peers.values())
    assert all(r["ms"] > 0 and r["gb_per_s"] > 0 and r["shape"] == "B2 T301 H6/3 D32" for r in rows)
    kept = 301 // 2
    token = 4 * 32  # bytes of a float32 key
    rows_kept = 301 * 8 * kept // 301 // 4  # a quarter of the survivors' groups, rounded down
    by_hand = 2 * 3 * (kept * token + rows_kept * 16 + 2 * WINDOW * token)
    assert by_hand < ours[2]["bytes"] < 1.05 * by_hand
    assert 0.75 < ours[0]["bytes_kept"] < 0.79 and {
        "reference S=4 K=2",
        "masked S=4 K=2",
        "ours, dense",
    } <= {r["impl"] for r in rows}


def test_predicted_values_are_timed_at_the_same_bytes():
    """--from_keys adds a row by kernel and two plain ones to a case that keeps as many groups of
    every token, none to others, and counts their bytes."""
    cfg = BenchConfig(
        what="decode",
        cases="4:0.5,8:0.25:0.5",
        steps=1,
        batch_size=2,
        device="cpu",
        from_keys=True,
    )
    rows = bench_decode(cfg, ModelConfig(**SHAPE))
    told = {r["impl"]: r for r in rows if r["impl"].endswith("keys")}
    assert sorted(told) == [
        "packed S=4 K=2 from own keys",
        "reference S=4 K=2 from all keys",
        "reference S=4 K=2 from own keys",
    ]
    held = next(r["bytes"] for r in rows if r["impl"] == "packed S=4 K=2")
    assert all(r["bytes"] == held for r in told.values())


def test_memory_rows_are_what_is_held():
    """Bytes equal what the caches say, within 2 % of keys and kept values, and as many more
    sequences fit as bytes are fewer."""
    shape = ModelConfig(n_head=4, n_kv_head=1, head_dim=128, block_size=900)
    rows = bench_memory(
        BenchConfig(
            what="memory", cases="16:0.5,16:0.5:0.5", batch_size=2, memory_gb=0.01, device="cpu"
        ),
        shape,
    )
    assert [r["impl"] for r in rows] == [
        "packed S=16 K=8",
        "packed S=16 rho=0.5",
        "packed S=16 rho=0.5 tokens=0.5",
    ]
    for r in rows:
        assert r["bytes"] == r["bytes_said"] and 0 < r["over_keys_and_values"] < 0.02
        assert (
            r["sequences"] == 0.01 * 2**30 // (r["bytes"] / 2)
            and r["times_more"] >= 0.95 / r["ratio"]
        )


def test_cases_of_integers():
    """Bits of keys and values and levels: a third of the kept groups at each, bytes as they follow
    from that, every row compared with float64."""
    shape = ModelConfig(**{**SHAPE, "block_size": 320})
    cfg = BenchConfig(
        what="decode",
        cases="4:1:1:4,4:0.5:0.5:8:2,8:0.75:0.5:4:0",
        steps=2,
        batch_size=2,
        device="cpu",
    )
    rows = bench_decode(cfg, shape)
    ours = [r for r in rows if r["impl"].startswith("packed")]
    assert [r["impl"][7:] for r in ours] == [
        "S=4 K=4 keys:4 values:4",
        "S=4 rho=0.5 tokens=0.5 keys:8 values:2",
        "S=8 rho=0.75 tokens=0.5 keys:4 values:routed",
    ]
    # float32; blocks form in the tail
    whole = [n * 32 * 8 for n in (WINDOW + BLOCK, WINDOW, WINDOW)]
    # keys, a 64th of their steps, values, steps of those
    by_hand = [320 * (16 + 2 + 16 + 4), 160 * (32 + 2 + 4 + 4), 160 * (16 + 2 + 14 + 2)]
    assert all(
        6 * (b + w) < r["bytes"] < 1.09 * 6 * (b + w)
        for b, w, r in zip(by_hand, whole, ours, strict=True)
    )
    k, v = torch.randn(2, 2, 3, 70 + WINDOW, 32, generator=torch.Generator().manual_seed(0))
    _, mask = Case("8:0.75:0.4:4:0", 32).fill(k, v, False)
    # 28 of 70 tokens, 6 of 8 groups, three levels
    assert all(mask.unique(return_counts=True)[1][1:] == 2 * 3 * 56)


@pytest.mark.parametrize("fixed", [True, False])
def test_case_keeps_what_it_says(fixed):
    """A filled cache holds every key that survives and the best groups of the values, the rest
    zeros, the tail whole."""
    k, v = torch.randn(2, 2, 3, 70 + WINDOW, 32, generator=torch.Generator().manual_seed(0))
    case = Case("4:0.5" if fixed else "4:0.5:0.3", 32)
    cache, mask = case.fill(k, v, fixed)
    got_k, z, held, valid = cache.view().packed[0].unpack()
    energy = v[:, :, :70].unflatten(-1, (4, 8)).square().sum(-1)  # (B, Hkv, C, S)
    if fixed:
        worst_kept = energy.masked_fill(~mask, float("inf")).amin(-1)
        best_lost = energy.masked_fill(mask, 0).amax(-1)
        assert bool((mask.sum(-1) == 2).all()) and bool((worst_kept >= best_lost).all())
    else:
        assert mask.sum((-1, -2)).unique().tolist() == [21 * 4 // 2] and valid.sum(
            -1
        ).unique().tolist() == [21]
        best = [
            sorted(range(70), key=lambda t, e=energy[b, h].sum(-1): -e[t])[:21]
            for b in range(2)
            for h in range(3)
        ]
        for (b, h), tokens in zip([(b, h) for b in range(2) for h in range(3)], best, strict=True):
            assert torch.equal(got_k[b, h, :21], k[b, h, sorted(tokens)])
    assert int(held.sum()) == int(mask.sum()) and float(z.abs().sum()) > 0
    window = cache.view().window
    assert window.count.tolist() == [WINDOW] * 2
    assert torch.equal(window.aligned(WINDOW)[1], v[:, :, 70:])


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    """Results that are off by more than rounding end the run before anything is timed."""
    k, v = torch.randn(2, 2, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    q = torch.randn(2, 6, 1, 32)
    window = WindowView(k, v, None, torch.full((2,), 40))
    check_kernel(q, None, window, "right")
    right = decode.packed_attention
    monkeypatch.setattr(
        decode, "packed_attention", lambda *a, **kw: (right(*a, **kw)[0] * (1 + 1e-4), None)
    )
    with pytest.raises(AssertionError, match="its time would mean nothing"):
        check_kernel(q, None, window, "wrong")


@pytest.mark.parametrize(
    "text, message",
    [
        ("4:2", "shares lie in"),
        ("5:0.5", "n_groups"),
        ("4", "give S:share"),
        ("32:0.5", "must divide D"),
        ("a:b", "give S:share"),
        ("4:1:1:4:4:4", "give S:share"),
        ("4:1:1:5", "key_bits=5"),
    ],
)
def test_a_case_that_cannot_be_is_refused(text, message):
    """What came and what is allowed."""
    with pytest.raises(ValueError, match=message):
        Case(text, 16)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["decode", "--cases=4:2", "--device=cpu"], "shares lie in"),
        (["generate", "--device=cpu"], "run it on a GPU"),
        (["memory", "--memory_gb=0"], "memory_gb"),
    ],
)
def test_wrong_flags_get_one_line(flags, message):
    """Exit code 2, one line that says what is wrong, no traceback."""
    got = run(*flags)
    assert (
        got.returncode == 2
        and message in got.stderr
        and got.stderr.count("\n") == 1
        and not got.stdout
    )


def test_decode_ends_with_one_json_line():
    """A table on stderr, one JSON line on stdout."""
    shape = ("--n_head=4", "--n_kv_head=2", "--head_dim=16", "--block_size=65", "--batch_size=1")
    got = run("decode", "--device=cpu", *shape, "--steps=1", "--cases=4:0.5")
    rows = json.loads(got.stdout)
    assert (
        got.returncode == 0 and got.stdout.count("\n") == 1 and got.stderr.count("\n") == len(rows)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_generate_rows():
    """Packed and dense, tokens per second and bytes, on a random model."""
    shape = ModelConfig(
        vocab_size=101,
        block_size=400,
        n_layer=2,
        n_embd=64,
        n_head=4,
        n_kv_head=2,
        head_dim=32,
        n_inner=96,
    )
    cfg = BenchConfig(what="generate", new_tokens=60, steps=3, batch_size=3, prefill_tokens=700)
    for kv in (KVConfig(n_groups=4, topk_groups=2), KVConfig(kv="select", n_groups=4, kv_tail=16)):
        rows = bench_generate(cfg, shape, BaseConfig(), kv, SelectConfig(kv_keep=0.5))
        assert (
            [r["peer"] for r in rows] == ["dense"] * 2
            and rows[1]["impl"] == "dense"
            and rows[1]["ratio"] == 1
        )
        assert (
            all(r["tokens_per_s"] > 0 and r["eager_tokens_per_s"] > 0 for r in rows)
            and rows[0]["bytes_of_dense"] < 0.85
        )
