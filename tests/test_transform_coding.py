"""KVTC (baselines/kvtc.py) and the cache that it, RDKV and routed coding share (baselines/coded.py):
bits against every way to give them, strings and their bytes, what is read of a prompt, and rows of
eval.py."""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import replace

import pytest
import torch
from helpers import TINY, error_line, read_in_pieces, tiny_model, tokens
from test_published import measured

from baselines import coded, kvtc, rdkv
from baselines.coded import Kept
from coding import basis, routed
from model import DensePath, rope_table
from runs import pretrain
from storage.cache import KVCache

CFG = replace(TINY, n_layer=3)
P = 3 * 3 * 16  # numbers of a token's keys in all layers
KEPT = Kept(0.5, sinks=2, tail=3)
CODED = ("kvtc", "rdkv")
ALL_CODED = ("routed", *CODED)


@pytest.fixture(scope="module")
def streams() -> list[kvtc.Stream]:
    """Components of the tiny model."""
    model = tiny_model(0, torch.float64, CFG)
    return kvtc.calibrate(model, [tokens(2, 150, seed=1), tokens(1, 150, seed=2)], sinks=2)


def coded_model(method: str, streams, kept: Kept = KEPT, n_tokens: int = 90):
    """A tiny model that codes prompts."""
    model = tiny_model(0, torch.float64, CFG)
    if method == "rdkv":
        return rdkv.attach(model, kept)
    if method == "routed":
        found = basis.calibrate(model, [tokens(2, 150, seed=1)], span=2, sinks=2)
        return routed.attach(model, found, kept, n_tokens)
    return kvtc.attach(model, streams, kept, n_tokens)


def filled(model, x, pad=None) -> KVCache:
    """A cache that a prompt was read into."""
    cache = model.new_cache(len(x), x.size(1))
    with torch.no_grad():
        model.prefill(x, cache, pad)
    return cache


# -------------------- bits


def every_way(n: int, first: int, errors, dropped):
    """Every way to group and code components from `first` on: (bits, error, groups)."""
    if first == n:
        yield 0, 0.0, []
        return
    for bits, error, groups in every_way(n, first + 1, errors, dropped):
        yield bits, error + float(dropped[first]), groups
    for (size, b), of_kind in errors.items():
        if first + size <= n and of_kind[first] < math.inf:
            group = kvtc.Group(first, size, b)
            cost = b if size == 1 else size * b + 16
            for bits, error, groups in every_way(n, first + size, errors, dropped):
                yield bits + cost, error + float(of_kind[first]), [group, *groups]


@pytest.mark.parametrize("seed", range(4))
def test_bits_are_the_best_of_every_way_to_give_them(seed):
    """Within every budget no grouping of components, with any bits of any group, leaves less; groups
    begin where they may, do not overlap and fit."""
    torch.manual_seed(seed)
    n = 7
    errors = {(1, 16): torch.rand(n).double() * 0.01}
    for size, b in itertools.product((2, 4), (2, 4)):
        errors[size, b] = torch.rand(n).double() * 3 * size / b
        errors[size, b][1::2] = math.inf
    dropped = torch.rand(n).double() * 3
    ways = list(every_way(n, 0, errors, dropped))
    for budget in (0, 15, 16, 23, 40, 60, 81, 200):
        groups = kvtc.best_groups(errors, dropped, budget)
        left = [float(dropped[i]) for i in range(n)]
        error = 0.0
        for g in groups:
            error += float(errors[g.size, g.bits][g.first])
            for i in range(g.first, g.first + g.size):
                assert left[i] is not None
                left[i] = None
        error += sum(e for e in left if e is not None)
        cost = sum(g.bits if g.size == 1 else g.size * g.bits + 16 for g in groups)
        assert cost <= budget
        assert error == pytest.approx(min(e for bits, e, _ in ways if bits <= budget))


def test_errors_of_groups_are_what_coding_leaves():
    """A group's error is the mean over tokens of the squares that codes of its bits, rounded to a
    step of its root mean square, leave; it falls with the bits, and groups begin at multiples of
    the least size."""
    torch.manual_seed(0)
    y = torch.randn(9, 8) * torch.tensor([9.0, 5, 4, 3, 2, 1, 0.5, 0.2])
    errors = kvtc.group_errors(y, (2, 4))
    steps = {2: 1.0, 4: 0.3359375, 8: 0.050048828125}
    for (size, bits), of_kind in errors.items():
        for first in range(8):
            if size == 1:
                continue
            if first % 2 or first + size > 8:
                assert of_kind[first] == math.inf
                continue
            total = 0.0
            for token in y[:, first : first + size].tolist():
                rms = math.sqrt(sum(n * n for n in token) / size)
                step = float(torch.tensor(rms).half()) * steps[bits]
                for number in token:
                    code = min(
                        max(math.floor(number / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1
                    )
                    total += (number - (code + 0.5) * step) ** 2
            assert float(of_kind[first]) == pytest.approx(total / 9, rel=1e-4)
    for size in (2, 4):
        falls = [float(errors[size, bits][0]) for bits in (2, 4, 8)]
        assert falls == sorted(falls, reverse=True) and falls[2] < falls[0] / 10
    assert errors[1, 16].max() < 1e-5


# -------------------- the transform


def test_components_are_those_of_keys_before_rope_and_of_values(streams):
    """Of the calibration text's tokens but its first, the components are orthonormal, uncorrelated
    and largest first; keys are taken without their rotation, heads of all layers side by side."""
    model = tiny_model(0, torch.float64, CFG)
    seen = {}
    for i, block in enumerate(model.layers):
        block.self_attn.kv_path.register_forward_pre_hook(
            lambda module, args, i=i: seen.setdefault(i, []).append(args[:4])
        )
    with torch.no_grad():
        for ids in (tokens(2, 150, seed=1), tokens(1, 150, seed=2)):
            model(ids)
    cos, sin = (t.double() for t in rope_table(CFG))
    keys = []
    values = []
    for i in range(3):
        parts = []
        for _, _, k, _ in seen[i]:
            even, odd = k[..., :8], k[..., 8:]
            c, s = cos[:150], sin[:150]
            parts.append(torch.cat((even * c + odd * s, odd * c - even * s), -1))
        keys.append(torch.cat(parts).transpose(1, 2)[:, 2:].reshape(-1, 48))
        values.append(torch.cat([v for *_, v in seen[i]]).transpose(1, 2)[:, 2:].reshape(-1, 48))
    for stream, layers in zip(streams, (keys, values), strict=True):
        x = torch.cat(layers, -1)
        assert stream.basis.shape == (P, P)
        torch.testing.assert_close(stream.mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
        y = (x - x.mean(0)) @ stream.basis.double()
        moment = y.T @ y / len(y)
        spread = moment.diagonal()
        assert (moment - spread.diag()).abs().max() < 1e-4 * spread.max()
        assert (spread.diff() < 1e-4 * spread.max()).all()
        eye = stream.basis.T @ stream.basis
        torch.testing.assert_close(eye, torch.eye(P), rtol=0, atol=1e-4)


# -------------------- strings


PLAN = [
    [kvtc.Group(0, 1, 16), kvtc.Group(1, 16, 4), kvtc.Group(32, 16, 2)],
    [kvtc.Group(16, 16, 8)],
]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_strings_hold_codes_and_scales_and_nothing_else(n):
    """A sequence's string is as long as its groups' bits, odd codes filled up to a byte; what is
    read of it is what each group's codes stand for, and zero where a component has no bits."""
    torch.manual_seed(n)
    y = [torch.randn(n, 48), torch.randn(n, 32)]
    written = kvtc.write(y, PLAN)
    assert len(written) == n * 2 + n * (2 + 8) + n * (2 + 4) + n * (2 + 16)
    got = kvtc.read(kvtc.as_tensor(written, "cpu"), n, PLAN)
    for have, numbers, groups in zip(got, y, PLAN, strict=True):
        want = torch.zeros_like(numbers)
        for first, size, bits in groups:
            part = slice(first, first + size)
            if size == 1:
                want[:, part] = numbers[:, part].half().float()
            else:
                codes = kvtc.quantise(numbers[:, part], bits)
                want[:, part] = kvtc.dequantise(*codes, bits)
        assert torch.equal(have, want)


def test_a_plan_has_the_share_that_is_asked_for_on_its_calibration(streams):
    """After DEFLATE a calibration token has at most the bits asked for, and nearly as many; more
    bits leave less error."""
    errors = []
    for bits in (150.0, 400.0, 1200.0):
        plan = kvtc.planned(streams, bits)
        written = zlib.compress(kvtc.write([s.sample for s in streams], plan))
        got = 8 * len(written) / len(streams[0].sample)
        assert 0.95 * bits < got <= bits
        left = 0.0
        for stream, groups in zip(streams, plan, strict=True):
            coded_bits = sum(float(stream.errors[g.size, g.bits][g.first]) for g in groups)
            kept = {i for g in groups for i in range(g.first, g.first + g.size)}
            left += coded_bits + sum(
                float(e) for i, e in enumerate(stream.dropped) if i not in kept
            )
        errors.append(left)
    assert errors[0] > errors[1] > errors[2]


# -------------------- what is read


def test_a_prompt_is_read_as_its_strings_say(streams):
    """Of each row, padding apart, the first 2 tokens and the newest 3 are whole, and those between
    are what the components' codes stand for, keys turned to their own places."""
    model = coded_model("kvtc", streams)
    x = tokens(3, 60)
    pad = torch.tensor([0, 7, 57])
    cache = filled(model, x, pad)
    plain = filled(tiny_model(0, torch.float64, CFG), x, pad)
    plan = model.layers[0].self_attn.kv_path.codec.plan
    cos, sin = (t.double() for t in rope_table(CFG))
    assert cache.layers[0].n_coded.tolist() == [55, 48, 0]
    for b, first in enumerate(pad.tolist()):
        n = 60 - first
        middle = range(2, max(2, n - 3))
        for t in middle:
            c, s = cos[t], sin[t]
            vectors = [[], []]
            for layer in plain.layers:
                k, v = layer.window_k[b, :, t], layer.window_v[b, :, t]
                even, odd = k[:, :8], k[:, 8:]
                vectors[0].append(torch.cat((even * c + odd * s, odd * c - even * s), -1).flatten())
                vectors[1].append(v.flatten())
            back = []
            for stream, groups, parts in zip(streams, plan, vectors, strict=True):
                y = (torch.cat(parts).float() - stream.mean) @ stream.basis
                have = torch.zeros(P)
                for g in groups:
                    part = y[g.first : g.first + g.size]
                    if g.size == 1:
                        have[g.first] = part.half().float()
                    else:
                        codes = kvtc.quantise(part, g.bits)
                        have[g.first : g.first + g.size] = kvtc.dequantise(*codes, g.bits)
                back.append((stream.basis @ have + stream.mean).double().view(3, 3, 16))
            for i, layer in enumerate(cache.layers):
                read = layer.read()
                even, odd = back[0][i][:, :8], back[0][i][:, 8:]
                turned = torch.cat((even * c - odd * s, odd * c + even * s), -1)
                close = dict(rtol=0, atol=0.02 * float(turned.abs().max()))
                off = (read.k[b, :, t - 2] - turned).abs().max()
                assert off < close["atol"], (b, t, i)
                assert (read.v[b, :, t - 2] - back[1][i]).abs().max() < close["atol"]
        for layer, dense in zip(cache.layers, plain.layers, strict=True):
            there = layer.read().there[b, 0]
            assert int(there.sum()) == n
            whole = [*range(min(2, n)), *range(max(2, n - 3), n)]
            assert torch.equal(layer.window_k[b, :, : len(whole)], dense.window_k[b, :, whole])
            assert torch.equal(layer.window_v[b, :, : len(whole)], dense.window_v[b, :, whole])


@pytest.mark.parametrize("method", CODED)
def test_coded_prompts_of_all_bits_are_nearly_dense(method, streams):
    """With nearly all bytes logits are those of whole keys and values; with fewer they err more."""
    x = tokens(2, 100)
    plain = tiny_model(0, torch.float64, CFG)
    want = read_in_pieces(plain, x, plain.new_cache(2, 100), [90, *[1] * 10])[:, 90:]
    off = []
    for share in (0.95, 0.4, 0.2):
        model = coded_model(method, streams, KEPT._replace(share=share))
        got = read_in_pieces(model, x, model.new_cache(2, 100), [90, *[1] * 10])[:, 90:]
        off.append(float((got - want).abs().mean()))
    assert off[0] < 0.02 * want.std() and off[0] < off[1] < off[2]


@pytest.mark.parametrize("method", ALL_CODED)
def test_coded_rows_do_not_depend_on_neighbours_padding_or_pieces(method, streams):
    """What follows a prompt reads the same in a batch with padding and alone, token by token and as
    one piece."""
    model = coded_model(method, streams)
    x = tokens(2, 70)
    pad = torch.tensor([9, 0])
    both = read_in_pieces(model, x, model.new_cache(2, 70), [60, *[1] * 10], pad)[:, 60:]
    piece = read_in_pieces(model, x, model.new_cache(2, 70), [60, 10], pad)[:, 60:]
    torch.testing.assert_close(both, piece, rtol=0, atol=1e-9)
    for b, first in enumerate(pad.tolist()):
        own = x[b : b + 1, first:]
        sizes = [60 - first, *[1] * 10]
        alone = read_in_pieces(model, own, model.new_cache(1, 70), sizes)[:, 60 - first :]
        torch.testing.assert_close(both[b : b + 1], alone, rtol=0, atol=1e-4)


def test_components_go_where_the_model_goes_and_keep_their_type(streams):
    """model.to moves what prompts are coded by to its device; its dtype is not theirs."""
    model = coded_model("kvtc", streams)
    codec = model.layers[0].self_attn.kv_path.codec
    before = [t for stream in codec.streams for t in (stream.mean, stream.basis)]
    model.to(torch.bfloat16)
    after = [t for stream in codec.streams for t in (stream.mean, stream.basis)]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before, strict=True))
    model.to("meta")
    assert {t.device.type for stream in codec.streams for t in stream[:2]} == {"meta"}


@pytest.mark.parametrize("method", CODED)
def test_bytes_of_coded_caches_are_those_of_tensors(method, streams):
    """A cache's bytes are its strings, its whole tokens and its counts; the share of the bytes is
    near what is asked for."""
    cfg = replace(CFG, block_size=1000)
    model = tiny_model(0, torch.float32, cfg)
    x = tokens(2, 900, seed=5)
    if method == "kvtc":
        found = kvtc.calibrate(model, [tokens(2, 900, seed=4)], sinks=2)
        kvtc.attach(model, found, KEPT._replace(share=0.25), 900)
    else:
        rdkv.attach(model, KEPT._replace(share=0.25))
    cache = filled(model, x)
    strings = sum(len(s) for layer in cache.layers for s in layer.strings())
    whole = 3 * 2 * 2 * 3 * 5 * 16  # numbers in 3 layers
    counts = 3 * 2 * 8 * 4
    assert cache.nbytes() == strings + 4 * whole + counts
    assert cache.nbytes_in_16_bits() == strings + 2 * whole + counts
    assert 0.23 < model.share_of_dense(1800, cache) < 0.26


@pytest.mark.parametrize("method", ALL_CODED)
def test_coded_caches_are_picked_joined_saved_and_cut(method, streams, tmp_path):
    """Sequences that were picked, joined, or saved and loaded read on as before; a prompt's newest
    tokens can be taken back, its middle cannot."""
    model = coded_model(method, streams)
    x = tokens(3, 50)
    cache = filled(model, x, torch.tensor([0, 4, 0]))
    with torch.no_grad():
        swapped = cache.select_sequences([2, 1])
        joined = KVCache.cat([swapped, cache.select_sequences([0])])
        joined.save(tmp_path / "cache", model)
        loaded = KVCache.load(tmp_path / "cache", model)
        cut = cache.select_sequences([0, 1, 2])
        model.decode(x[:, :1], cut)
        cut.truncate(torch.tensor([50, 46, 50]))
        want = model.decode(x[:, :1], cache)
        order = [2, 1, 0]
        for got in (joined, loaded):
            torch.testing.assert_close(model.decode(x[order, :1], got), want[order])
        torch.testing.assert_close(model.decode(x[:, :1], cut), want)
    assert "coded as a whole" in error_line(cut.truncate, 20)
    assert "is not a cache of this model" in error_line(
        KVCache.load, tmp_path / "cache", tiny_model(0, torch.float64, CFG)
    )


@pytest.mark.parametrize("method", ALL_CODED)
def test_no_sequences_are_read_as_none(method, streams):
    """A cache of which no sequence was picked holds no bytes, is read, and can be joined again."""
    model = coded_model(method, streams)
    x = tokens(2, 50)
    cache = filled(model, x)
    none = cache.select_sequences([])
    for layer in none.layers:
        read = layer.read()
        assert layer.strings() == [] and len(read.k) == len(read.v) == len(read.there) == 0
    joined = KVCache.cat([none, cache.select_sequences([0, 1])])
    with torch.no_grad():
        want = model.decode(x[:, :1], cache)
        torch.testing.assert_close(model.decode(x[:, :1], joined), want)


@pytest.mark.parametrize("method", ALL_CODED)
def test_coding_is_detached(method, streams):
    """After detach the model is dense."""
    model = coded.detach(coded_model(method, streams))
    assert {type(block.self_attn.kv_path) for block in model.layers} == {DensePath}
    assert coded.codec_of(model) is None


def test_shares_that_are_none(streams):
    """A share of all or of nothing, and one that the whole tokens fill, each in one line."""
    for method in CODED:
        for share in (0.0, 1.0):
            line = error_line(coded_model, method, streams, KEPT._replace(share=share))
            assert "above 0 and below 1" in line
    line = error_line(coded_model, "kvtc", streams, KEPT._replace(share=0.05))
    assert "5 of them stay whole" in line
    model = coded_model("rdkv", streams, KEPT._replace(share=0.05))
    assert "give a larger --kv_byte_budgets" in error_line(filled, model, tokens(1, 90))
    assert "1 tokens to calibrate on" in error_line(
        kvtc.calibrate, tiny_model(0, torch.float64, CFG), [tokens(1, 5)]
    )


# -------------------- rows of eval.py


@pytest.fixture(scope="module")
def base(tmp_path_factory, text):
    """A base with a context of 192 tokens."""
    folder = tmp_path_factory.mktemp("coded")
    flags = ["--n_layer=2", "--block_size=192", "--pretrain_steps=2"]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(folder / "run", text, "--pretrain_batch_size=2", *flags)


def test_rows_of_coded_prompts_say_their_bytes(base, text, own_cache):
    """Each share is a row, with the bytes that it holds, the size of what lies apart and a
    divergence; the base's own value is what it is compared with."""
    asked = dict(methods="dense,routed,kvtc,rdkv", kv_byte_budgets="0.5,0.3", query=3)
    rows = measured(base, text, {"kv_byte_budgets", "methods", "calibration"}, **asked)
    want = ["dense", "routed", "routed", "kvtc", "kvtc", "rdkv", "rdkv"]
    assert [r["method"] for r in rows] == want
    for r, share in zip(rows[1:], (0.5, 0.3) * 3, strict=True):
        assert r["dense_value"] == rows[0]["value"] and r["kl"] > 0 and r["prefill"] == "exact"
        assert f"in {share:.1%}" in r["setting"]
        if r["method"] == "routed":  # no more than it has a use for
            assert r["of_dense"] <= share
        else:
            assert abs(r["of_dense"] - share) < 0.04
    assert all("MB of them apart" in r["setting"] for r in rows[1:5])
    for high, low in (rows[3:5], rows[5:7]):
        assert high["kl"] < low["kl"]


def test_flags_that_coded_rivals_cannot_be_asked(base, text, own_cache):
    """No share, a share of all, and perplexity, each with one line."""
    for flags, why in (
        (dict(methods="kvtc"), "give --kv_byte_budgets"),
        (dict(methods="rdkv", kv_byte_budgets="1"), "above 0 and below 1"),
        (dict(methods="rdkv", kv_byte_budgets="0.5", tasks="perplexity"), "they code prompts"),
    ):
        assert why in error_line(measured, base, text, **flags)
