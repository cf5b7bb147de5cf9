"""Routed precision: tokens, groups and their bits under one budget of bytes, and what eval.py says
of it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from choosing import config, prefilled, run, selecting
from helpers import error_line, tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from select_runs import base, measure, selected  # noqa: F401 (fixtures)

import eval as evaluation
from config import PLANNED_SINKS, SelectConfig
from generate import generate
from report.against_bytes import envelope
from selection.budgets import REFINED
from selection.calibration import calibrate, see_layers
from storage import packing
from storage.cache import KVCache
from storage.integers.codecs import IntCodec
from storage.integers.format import LEVEL_ERRORS
from storage.kernel_base import triton
from storage.layout import tile_size

W = 9
T = 131
SINKS = 4
X = tokens(2, T, seed=4)
Y = tokens(2, 6, seed=5)


def greedy(value: list[list[float]], key: int, cost: list[int], m: int) -> list[list[bool]]:
    """select_joint in words and Fractions: a token comes with the parts that make worth per cost
    largest, further ones alone; best first, until one does not fit."""
    items = []
    for t, worth in enumerate(value):
        if worth[0] == float("-inf"):
            continue
        order = sorted(range(len(cost)), key=lambda i, w=worth: (-Fraction(w[i]) / cost[i], i))
        totals = [
            (sum(Fraction(worth[i]) for i in order[:n]), key + sum(cost[i] for i in order[:n]))
            for n in range(1, len(order) + 1)
        ]
        n = max(range(len(order)), key=lambda i, r=totals: (r[i][0] / r[i][1], -i))
        items.append(
            ((-totals[n][0] / totals[n][1], t, 0), totals[n][1], [(t, i) for i in order[: n + 1]])
        )
        items += [
            ((-Fraction(worth[i]) / cost[i], t, r), cost[i], [(t, i)])
            for r, i in enumerate(order[n + 1 :], 1)
        ]
    kept = set()
    for _, price, parts in sorted(items):
        if price > m:
            break
        m -= price
        kept.update(parts)
    return [[(t, i) in kept for i in range(len(cost))] for t in range(len(value))]


@pytest.mark.parametrize("key", [3, 40])
def test_select_joint_with_costs_equals_the_greedy_rule(key):
    """Whole worths full of ties, parts of cost 1, 2 and 4, at many budgets."""
    cost = torch.tensor([1, 2, 4, 1])
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        value = torch.randint(0, 9, (7, 4), generator=g).double()
        value[3] = float("-inf")
        for m in range(0, 7 * (key + 8), 5):
            got = packing.select_joint(value, torch.tensor(m), key=key, cost=cost)
            assert got.tolist() == greedy(value.tolist(), key, cost.tolist(), m)


@pytest.mark.parametrize(
    "impl",
    [
        "torch",
        pytest.param(
            "triton", marks=pytest.mark.skipif(triton is None, reason="the kernels need triton")
        ),
    ],
)
def test_prices_may_be_large(impl):
    """Tokens of more than 2^15 half bytes, as 64 heads of 128 that share a mask have them: five of
    fifty fit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    cost = torch.full((8,), 2048)
    got = packing.select_joint(
        value.to(device),
        torch.tensor(5 * (18000 + 8 * 2048), device=device),
        impl,
        key=18000,
        cost=cost.to(device),
    )
    assert got.any(-1).sum() == 5 and got.sum() == 40


def half_bytes(key_bits: int, value_bits: int, block: int, scope: str) -> tuple[int, list[int]]:
    """What a token's key and the levels of a group cost, in half bytes, by what is stored: TINY has
    D = 16, S = 4, 3 KV heads."""
    heads = 1 if scope == "head" else 3
    own, tile = (4, tile_size(4)) if value_bits else (2, 16)  # its own step, and middle
    # codes, share of the steps; masks, before, tile
    key = heads * (16 * key_bits / 8 + 2 * 2 * 16 / block + own) + 1 + 1 + 4 / tile
    return -(-2 * key // 1), [heads * value_bits] if value_bits else [
        heads * 2,
        heads * 2,
        heads * 4,
    ]


@pytest.mark.parametrize(
    ("scope", "allocation", "bits"),
    [
        ("head", "global", 0),
        ("head", "head", 0),
        ("layer", "layer", 0),
        ("layer", "global", 0),
        ("head", "global", 4),
        ("layer", "layer", 8),
    ],
)
def test_the_choice_is_the_greedy_rule_of_bytes(scope, allocation, bits):
    """Levels of every (token, group), or which groups where all have the same bits, against the
    rule in Fractions, from relevance and norms; first tokens and padding have none."""
    m = selecting(scope)
    if bits:
        m.selector.kv = replace(m.selector.kv, key_bits=bits, value_bits=bits)
    cfg = config(kv_bytes=0.19, allocation=allocation, relevance="observed")
    prompts = []
    choose = m.selector.choose
    m.selector.choose = lambda p: prompts.append(p) or choose(p)
    x = tokens(1, 120, seed=7)
    choice = run(m, cfg, x, Y[:1], pad=(3,))[2]
    p = prompts[0]
    s = m.selector
    C = p.n_context
    Lm = 2
    Hm = 3 if scope == "head" else 1
    assert (s.stored.key_bits, s.stored.value_bits) == (bits or 4, bits)
    alpha = s.relevance(p, "observed")
    norm = s.norms(p, cfg.hedge)  # (2, 1, Hm, C), (..., S)
    worth = (alpha.unsqueeze(-1) ** cfg.hedge * norm).square()
    # the planner's below 20 % of the bytes
    key, cost = half_bytes(bits or 4, bits, 64 if bits else 32, scope)
    gain = [1.0]
    if not bits:
        errors = [LEVEL_ERRORS[i] - LEVEL_ERRORS[i + 1] for i in range(3)]
        gain = [errors[0], REFINED * errors[1], REFINED * errors[2]]
    n = C - 3  # tokens of the context
    first = SINKS if bits else PLANNED_SINKS
    per_mask = (3 // Hm) * 2 * (4 * 16 * (0.19 * (n + W) - (first + W)) - 4 * 16 - 80)
    shared = {"head": 1, "layer": Hm, "global": Lm * Hm}[allocation]
    places = [(a, b) for a in range(Lm) for b in range(Hm)]
    groups = [places[i : i + shared] for i in range(0, Lm * Hm, shared)]
    seen = 0
    for group in groups:
        value = [
            [float(worth[a, 0, b, t, g]) * r for g in range(4) for r in gain]
            if t >= 3 + first
            else [float("-inf")] * 4 * len(gain)
            for a, b in group
            for t in range(C)
        ]
        want = greedy(value, int(key), cost * 4, max(0, int(shared * per_mask // 1)))
        levels = torch.tensor(want).view(len(group), C, 4, len(gain)).sum(-1)
        for (a, b), level in zip(group, levels, strict=True):
            assert torch.equal(choice.mask[a, 0, b].long(), level)
            seen += int(level.sum())
    assert torch.equal(choice.keep, (choice.mask > 0).any(-1)) and (seen > 0) == (per_mask > key)


@pytest.mark.parametrize(
    ("scope", "allocation", "bits"),
    [
        ("head", "global", 0),
        ("head", "head", 0),
        ("layer", "global", 0),
        ("layer", "head", 0),
        ("head", "global", 8),
    ],
)
def test_bytes_held_stay_under_the_budget_and_near_it(scope, allocation, bits):
    """In bfloat16, where 16 bits are 16 bits: everything the cache holds of a prompt, whole tokens
    and all indices included."""
    m = selecting(scope, model=tiny_model(dtype=torch.float32)).bfloat16()
    last = 0
    if bits:
        m.selector.kv = replace(m.selector.kv, key_bits=bits, value_bits=bits)
    m.selector.float()
    dense = 2 * 2 * 3 * 16 * 2 * T * 2
    for share in (0.3, 0.4, 0.5, 1.0):  # all at 8 bits are about 0.62
        m.selector.set(config(kv_bytes=share, allocation=allocation))
        with torch.no_grad():
            cache = m.new_cache(2, T)
            m.prefill(X, cache)
        held = cache.nbytes()
        assert last < held <= share * dense
        assert all(isinstance(c.codec, IntCodec) for c in cache.layers)
        assert share == 1 or held > (0.85 if allocation == "global" else 0.75) * share * dense, (
            held / dense
        )
        last = held


def test_a_prompt_is_stored_as_chosen_and_its_first_tokens_whole():
    """Survivors in order at their levels; the window begins with the first tokens and the query
    region, also of a row shorter than that."""
    m = selecting()
    n_first = 3
    m.selector.kv = replace(m.selector.kv, kv_sinks=n_first)
    pad = (0, T - W - 2)
    _, _, choice, cache = run(m, config(kv_bytes=0.6), X, Y, pad)
    _, _, k, z = see_layers(m.selector, m, X, torch.tensor(pad))
    C = T - W
    assert cache.lengths.tolist() == [T + Y.size(1) - n for n in pad]
    for i, c in enumerate(cache.layers):
        _, _, level, valid = c.view().packed[0].unpack()
        window = c.view().window
        assert c.lengths.tolist() == cache.lengths.tolist()
        assert window.first is None
        assert window.count.tolist() == [n + W + Y.size(1) for n in (n_first, 2)]
        for b in range(2):
            first = list(range(pad[b], min(pad[b] + n_first, C)))
            whole = first + list(range(C, T))
            for h in range(3):
                assert torch.equal(window.k[b, h, : len(whole)], k[i][b, h, whole])
                assert torch.equal(window.v[b, h, : len(whole)], z[i][b, h, whole])
                mine = choice.keep[i, b, h].nonzero().flatten()
                assert valid[b, h].sum() == len(mine)
                assert torch.equal(level[b, h][valid[b, h]], choice.mask[i, b, h, mine])
                assert not len(mine) or int(mine[0]) >= pad[b] + n_first
    assert choice.keep[:, 0].any() and not choice.keep[:, 1].any()
    layer = cache.layers[0]
    for n in (C - n_first, C - 1):  # in the context, though its first tokens lie in the window
        assert "selected context" in error_line(layer.truncate, torch.tensor([n, 99]))
    layer.truncate(torch.tensor([C + 2, 5]))
    assert layer.lengths.tolist() == [C + 2, 5] and layer.n_window.tolist() == [n_first + 2, 5]


def test_more_bytes_are_closer_to_dense():
    """Logits after the prompt approach those of whole values; with all bytes, 8 bits of everything,
    they are near."""
    m = selecting()
    dense = run(m, config(kv_keep=1.0), X, Y, None)[1]
    errors = [
        (run(m, config(kv_bytes=share), X, Y, None)[1] - dense).abs().mean().item()
        for share in (0.2, 0.45, 1.0)
    ]
    assert errors[0] > 1.5 * errors[1] > 4 * errors[2] > 0 and errors[2] < 0.05 * dense.std()
    uniform = (run(m, config(kv_keep=1.0), X, Y, None)[1] - dense).abs().max()
    assert uniform == 0


def test_uniform_bits_on_top_of_a_choice():
    """kv=select with --key_bits: what is chosen stays what it was, but for first tokens, which are
    whole; 8 bits are nearer than 2."""
    m = selecting()
    whole = run(m, config(kv_keep=0.5, sinks=SINKS), X, Y, None)
    errors = []
    for bits in (8, 4, 2):
        m.selector.kv = replace(m.selector.kv, key_bits=bits, value_bits=bits)
        got = run(m, config(kv_keep=0.5, sinks=SINKS), X, Y, None)
        assert torch.equal(got[2].keep, whole[2].keep) and got[3].nbytes() < whole[3].nbytes()
        assert int(got[3].layers[0].n_packed.sum()) == int(got[2].keep[0, :, :, SINKS:].sum())
        errors.append((got[1] - whole[1]).abs().mean().item())
    assert 0 < 3 * errors[0] < errors[1] < errors[2]


def test_masks_that_layers_share_go_with_integers():
    """Where everything is kept it makes no difference who shares masks: every layer reads its own
    steps, in every row."""
    got = {}
    for scope in ("layer", "shared"):
        m = selecting(scope)
        m.selector.kv = replace(m.selector.kv, key_bits=4, value_bits=8, key_block=32)
        got[scope] = run(m, config(kv_keep=1.0), X, Y, (0, 40))[1]
        torch.testing.assert_close(
            got[scope][1], run(m, config(kv_keep=1.0), X[1:, 40:], Y[1:], None)[1][0]
        )
    torch.testing.assert_close(got["shared"], got["layer"])


def test_rows_are_alone_and_caches_are_saved(tmp_path):
    """A padded row gives what it gives alone; caches that are saved, joined and picked from go on
    as they were; generated tokens do not depend on the batch."""
    m = selecting()
    cfg = config(kv_bytes=0.5, allocation="global")
    both = run(m, cfg, X, Y, (0, 40))[1]
    one = run(m, cfg, X[1:, 40:], Y[1:], None)[1]
    torch.testing.assert_close(both[1], one[0])
    apart = [prefilled(m, x, None, 6) for x in (X[1:, 40:], X[:1], X[:1, :5])]
    joined = KVCache.cat(apart).select_sequences([1, 0])
    cache = prefilled(m, X, None, 6)
    cache.save(tmp_path / "c")
    again = KVCache.load(tmp_path / "c", m)
    with torch.no_grad():
        torch.testing.assert_close(m.prefill(Y, joined, last_only=False), both)
        assert torch.equal(m.prefill(Y, again), m.prefill(Y, cache))
    with safe_open(tmp_path / "c", "pt") as f:
        held = {k: f.get_tensor(k) for k in f.keys()}
        meta = f.metadata()
    save_file(held, tmp_path / "c", {k: v for k, v in meta.items() if k != "format"})
    assert "format None" in error_line(KVCache.load, tmp_path / "c", m)
    save_file(held, tmp_path / "c", meta)
    ours = m.selector.stored
    block = 64 if ours.key_block != 64 else 32
    m.selector.kv = replace(m.selector.kv, key_block=block, key_bits=8, value_bits=0)
    assert "key_block" in error_line(KVCache.load, tmp_path / "c", m)
    m.selector.kv = replace(m.selector.kv, key_block=ours.key_block, key_bits=4)
    assert "bits is" in error_line(KVCache.load, tmp_path / "c", m)
    m.selector.kv = replace(m.selector.kv, key_block=64, key_bits=16, value_bits=16)
    prompts = [X[0].tolist(), X[1, 50:].tolist(), X[1, :5].tolist(), X[0, :1].tolist()]
    rows = generate(m, prompts, 9)[0]
    assert [generate(m, [p], 9)[0][0] for p in prompts] == rows


def test_rows_of_any_length_are_as_alone():
    """Prompts of one token, within the query region, within region and first tokens, and longer
    ones, together and each alone: the same logits after them, in integers of every kind."""
    m = selecting()
    ends = (T, 1, W, W + 1, W + SINKS, W + SINKS + 1, 60)
    idx = torch.stack([torch.cat((X[0, : T - n] * 0, X[1, :n])) for n in ends])
    y = Y[:1].expand(len(ends), -1)
    pad = tuple(T - n for n in ends)
    for bits, budget in ((0, dict(kv_bytes=0.5)), (4, dict(kv_keep=0.5)), (8, dict(kv_bytes=0.5))):
        kv = replace(m.selector.kv, key_bits=bits or 16, value_bits=bits or 16)
        m.selector.kv = kv
        got = run(m, config(**budget), idx, y, pad)[1]
        for i, n in enumerate(ends):
            alone = run(m, config(**budget), X[1:, :n], Y[:1], None)[1]
            torch.testing.assert_close(got[i], alone[0], rtol=0, atol=1e-9)


def test_what_is_measured_later_leaves_a_cache_alone():
    """Root mean squares that levels are relative to belong to the cache: measured anew on other
    text they are those of new caches only."""
    m = selecting()
    cfg = config(kv_bytes=0.4)
    want = run(m, cfg, X, Y, None)[1]
    cache = prefilled(m, X, None, 6)
    before = m.selector.rms.clone()
    calibrate(m.selector, m, [tokens(1, 66, seed=11)])
    with torch.no_grad():
        assert torch.equal(m.prefill(Y, cache, last_only=False), want)
    assert not torch.equal(m.selector.rms, before)
    assert not torch.equal(run(m, cfg, X, Y, None)[1], want)


def test_what_cannot_be_is_said_in_a_line():
    """One budget only, no mask that layers share, rows that fill bytes."""
    for bad, said in (
        (dict(kv_bytes=0.1, kv_keep=0.5), "kv_bytes=0.1"),
        (dict(kv_bytes=1.5), "kv_bytes=1.5"),
        (dict(kv_bytes=0.1, token_relevance="h2o"), "token_relevance"),
    ):
        assert said in error_line(SelectConfig, **bad)
    assert "mask_scope=shared" in error_line(selecting, "shared", cfg=config(kv_bytes=0.2))
    assert "must fill bytes" in error_line(selecting, n_groups=8, cfg=config(kv_bytes=0.2))


def test_the_planner_takes_what_was_best_at_that_budget():
    """Bits of keys, levels for values, tokens that share steps; what the user gives stays."""
    m = selecting(cfg=config(kv_bytes=0.04))
    for share, bits, block in (
        (0.02, 3, 64),
        (0.04, 4, 64),
        (0.1, 4, 64),
        (0.15, 4, 32),
        (0.2, 8, 128),
        (1.0, 8, 128),
    ):
        m.selector.set(config(kv_bytes=share))
        kv = m.selector.stored
        assert (kv.key_bits, kv.value_bits, kv.key_block) == (bits, 0, block)
    m.selector.kv = replace(m.selector.kv, key_block=16)
    assert m.selector.stored.key_block == 16 and m.selector.stored.key_bits == 8
    m.selector.kv = replace(m.selector.kv, key_bits=4, value_bits=4)
    assert m.selector.stored == m.selector.kv


COMMON = [
    "--tasks=continuation",
    "--query=6",
    "--continuation=9",
    "--block_size=161",
    "--sequences=3",
    "--batch_size=2",
    "--calibration=2",
]


def test_rows_of_bits(base, measure):
    """Every bits with every budget, routed bits once; bytes of the tensors held; the picture, also
    beside earlier rows."""
    rows = measure(
        f"--init_from={base}",
        *COMMON,
        "--methods=dense,select",
        "--relevances=observed",
        "--kv_byte_budgets=0.5,0.3",
        "--kv_budgets=1,0.5",
        "--kv_bits=16,4:2,3:0",
    )
    assert [(r["method"], r["key_bits"], r["value_bits"]) for r in rows] == [
        ("dense", 16, 16),
        *[("select", 8, 0)] * 2,
        ("dense", 16, 16),
        ("select", 16, 16),
        *[("select", 4, 2)] * 4,
        *[("select", 3, 0)] * 2,
    ]
    assert [r["relevance"].split(" hedge")[0] for r in rows] == [
        "none",
        "observed bytes=0.5",
        "observed bytes=0.3",
        "none",
        "observed kv=0.5",
        *[f"observed {b}" for b in ("bytes=0.5", "bytes=0.3", "kv=1", "kv=0.5")],
        "observed bytes=0.5",
        "observed bytes=0.3",
    ]
    assert (
        all(r["dense_value"] == rows[0]["value"] for r in rows)
        and "keys:4 values:2" in rows[5]["setting"]
        and "keys:8/128 values:routed" in rows[1]["setting"]
    )
    assert (
        rows[1]["cache_bytes"] > rows[2]["cache_bytes"]
        and rows[7]["cache_bytes"] < 0.5 * rows[0]["cache_bytes"]
    )
    assert rows[7]["value"] != rows[0]["value"] and rows[7]["token_keep"] == pytest.approx(
        1 - 4 / 146
    )
    assert rows[6]["cache_bytes"] < rows[5]["cache_bytes"] <= rows[7]["cache_bytes"]
    assert (measure.folder / "bytes.png").is_file()
    earlier = measure.folder.rename(measure.folder.parent / "earlier")
    fixed = measure(
        f"--init_from={base}",
        *COMMON,
        "--methods=dense,value_groups",
        "--budgets=1,0.5",
        "--kv_bits=8,4",
        f"--beside={earlier}",
        "--bases=native",
        "--key_block=16",
    )
    assert [(r["method"], r["key_bits"]) for r in fixed] == [
        ("dense", 16),
        *[("value_groups", 8)] * 2,
        *[("value_groups", 4)] * 2,
    ]
    assert (
        fixed[1]["dense_value"] == fixed[0]["value"] != fixed[3]["value"]
        and fixed[3]["cache_bytes"] < fixed[1]["cache_bytes"]
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv_bits=5"], "kv_bits='5'"),
        (["--kv_bits=4:2:2"], "kv_bits="),
        (["--kv_byte_budgets=2"], "kv_byte_budgets"),
        (["--key_bits=4"], "value_bits=16"),
        (["--kv_bytes=0.2", "--fixed_k"], "fixed_k"),
        (["--value_bits=0", "--key_bits=4", "--kv=value_groups"], "value_bits=0"),
    ],
)
def test_flags_say_what_is_wrong_with_bits(flags, said, base, measure, capsys):
    """One line and exit code 2, before anything is measured."""
    with pytest.raises(SystemExit) as e:
        measure(f"--init_from={base}", *COMMON, *flags)
    assert e.value.code == 2 and said in capsys.readouterr().err and not measure.folder.exists()
    assert "beside=nowhere" in error_line(
        measure, f"--init_from={base}", *COMMON, "--beside=nowhere"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods=select", "--kv_budgets=0.5", "--kv_bits=4:0"], "kv_byte_budgets"),
        (["--methods=select", "--kv_budgets=0.5", "--kv_bits=4,4:0"], "levels"),
        (
            ["--methods=dense,value_groups,select", "--kv_byte_budgets=0.4", "--kv_bits=4:0"],
            "value_bits=0 with kv=value_groups",
        ),
        (
            ["--methods=select", "--kv_byte_budgets=0.4", "--kv_bits=16,4:2", "--n_groups=8"],
            "must fill bytes",
        ),
    ],
)
def test_bits_that_cannot_be_are_said_before_anything_is_measured(
    flags, said, base, measure, monkeypatch
):
    """Of every setting with every bits."""
    monkeypatch.setattr(evaluation, "whole_rows", None)
    assert said in error_line(measure, f"--init_from={base}", *COMMON, *flags)


def test_levels_by_flags(base, measure):
    """--key_bits and --value_bits=0 are what every row has, as --kv_bits=4:0."""
    common = [
        f"--init_from={base}",
        *COMMON,
        "--methods=select",
        "--relevances=observed",
        "--kv_byte_budgets=0.5",
    ]
    assert measure(*common, "--kv_bits=4:4", "--key_rounding=nearest")[0]["setting"].endswith(
        "keys:4 values:4 nearest"
    )
    rows = [
        measure(*common, *flags)[0]
        for flags in (
            ["--kv=select", "--key_bits=4", "--value_bits=0"],
            ["--kv_bits=4:0"],
            ["--key_bits=4", "--value_bits=4"],
        )
    ]
    assert [(r["key_bits"], r["value_bits"]) for r in rows] == [(4, 0), (4, 0), (4, 4)] and rows[0][
        "value"
    ] == rows[1]["value"] != rows[2]["value"]


def test_a_trained_run_has_rows_of_everything_in_integers(selected, measure):
    """The whole row once, in 16 bits; everything in 4 bits where it is asked for; where nothing is
    left to measure, that is said."""
    where = [
        f"--out_dir={selected.folder}",
        "--tasks=continuation",
        "--query=6",
        "--continuation=9",
        "--block_size=161",
        "--sequences=2",
    ]
    rows = measure(
        *where,
        "--methods=dense,select",
        "--relevances=observed",
        "--kv_budgets=1,0.5",
        "--kv_bits=16,4",
    )
    assert [(r["method"], r["key_bits"]) for r in rows] == [
        ("dense", 16),
        ("dense", 16),
        ("select", 16),
        ("select", 4),
        ("select", 4),
    ]
    assert (
        rows[3]["kl"] > 0
        and rows[3]["dense_value"] == rows[0]["value"]
        and rows[4]["kl"] > rows[3]["kl"]
    )
    (only,) = measure(*where, "--methods=dense,select", "--kv_budgets=1", "--kv_bits=4")
    signal = {"select", "relevance"}  # which nothing is chosen by
    assert {k: v for k, v in only.items() if k not in signal} == {
        k: v for k, v in rows[3].items() if k not in signal
    }
    line = error_line(measure, *where, "--methods=dense", "--kv_bits=4")
    assert "kv_bits with methods=dense: it is not read" in line


def test_the_envelope_is_what_nothing_beats():
    """By hand: fewer bytes or less loss, ties included."""
    assert envelope([(3, 1.0), (1, 5.0), (2, 5.0), (2, 3.0), (4, 1.0), (5, 0.5)]) == [
        (1, 5.0),
        (2, 3.0),
        (3, 1.0),
        (5, 0.5),
    ]
