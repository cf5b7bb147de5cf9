"""Routed transform coding (coding/) and its entropy code (storage/entropy.py): strings against a
plain reader, coordinates against their equation, gradients against differences, and what is read of
a prompt against a simulation in loops."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import TINY, error_line, read_in_pieces, tiny_model, tokens
from test_transform_coding import filled

from baselines.coded import Kept, codec_of
from coding import basis, routed
from model import apply_rope
from storage import entropy

CFG = replace(TINY, n_layer=3)
KEPT = Kept(0.15, sinks=2, tail=3)


@pytest.fixture(scope="module")
def found() -> basis.Basis:
    """Coordinates of the tiny model: a block of two layers and one of the third."""
    model = tiny_model(0, torch.float64, CFG)
    return basis.calibrate(model, [tokens(2, 150, seed=1), tokens(1, 150, seed=2)], 2, sinks=2)


def coded_model(found, kept: Kept = KEPT, n_tokens: int = 90):
    """A tiny model that codes prompts."""
    return routed.attach(tiny_model(0, torch.float64, CFG), found, kept, n_tokens)


# -------------------- the entropy code


def some_table(n_rows: int = 3) -> entropy.Table:
    """Rows of 9 symbols, some frequent, some seen never, the last symbol not allowed."""
    counts = torch.tensor([[0.0, 5, 100, 3, 0, 1, 1, 0, 7]]).repeat(n_rows, 1)
    counts[1] = torch.arange(9)
    allowed = (torch.arange(9) < 8).expand(n_rows, -1)
    return entropy.table_of(counts, allowed)


def test_a_table_gives_every_allowed_symbol_a_part():
    """Rows add up to 2^14 parts, in the order of the counts; what is not allowed has none."""
    table = some_table()
    assert (table.part.sum(1) == 2**14).all()
    assert (table.part[:, 8] == 0).all() and (table.part[:, :8] >= 1).all()
    assert abs(table.part[0, 2] / 2**14 - 100 / 110) < 1e-3
    for row in range(3):
        for symbol in range(8):
            first = table.before[row, symbol]
            own = table.symbol[row, first : first + table.part[row, symbol]]
            assert len(own) == table.part[row, symbol] and (own == symbol).all()


def read_plainly(data: list[int], rows: list[int], table: entropy.Table, lanes: int) -> list[int]:
    """The reader in loops, one symbol at a time."""
    words = [data[i] + 256 * data[i + 1] for i in range(0, len(data), 2)]
    states = [words[2 * i] + 65536 * words[2 * i + 1] for i in range(lanes)]
    rest = iter(words[2 * lanes :])
    out = []
    for i, row in enumerate(rows):
        x = states[i % lanes]
        low = x % 2**14
        symbol = next(s for s in range(9) if low < table.before[row, s] + table.part[row, s])
        out.append(symbol)
        x = int(table.part[row, symbol]) * (x // 2**14) + low - int(table.before[row, symbol])
        states[i % lanes] = x if x >= 2**16 else x * 65536 + next(rest)
    assert next(rest, None) is None and states == [2**16] * lanes
    return out


@pytest.mark.parametrize("n", [0, 1, 7, 2047, 9001])
def test_strings_are_read_as_they_were_written_and_as_long_as_their_cost(n):
    """Any symbols come back, from the plain reader, too, which uses every word up; a string has the
    bits that its symbols' probabilities say and at most 32 for each lane."""
    torch.manual_seed(n)
    table = some_table()
    rows = torch.randint(3, (n,)).to(torch.uint8)
    symbols = torch.randint(8, (n,)).to(torch.uint8)
    symbols[n // 2 :] = 2
    data = entropy.write(symbols, rows, table)
    assert torch.equal(entropy.read(data, rows, table), symbols)
    lanes = entropy.lanes_of(n)
    assert lanes == (2 if n == 9001 else 1)
    assert read_plainly(data.tolist(), rows.tolist(), table, lanes) == symbols.tolist()
    bits = float(table.cost()[rows.long(), symbols.long()].sum())
    assert bits - 1 < 8 * len(data) <= bits * 1.001 + 34 * lanes


# -------------------- coordinates


def test_coordinates_are_uncorrelated_and_an_error_costs_as_much_in_each():
    """Coordinates have no covariance and the variance that spreads say, largest first; they are
    decoded exactly, in float32 under autocast, too; an error of a vector costs e^T M e, the square of
    what it is in coordinates."""
    torch.manual_seed(0)
    x = torch.randn(500, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 3
    g = torch.randn(500, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    fisher = g.T @ g / 500
    block = basis.principal(x.mean(0), torch.cov(x.T, correction=0), fisher)
    y = block.encode(x)
    covariance = torch.cov(y.T.double(), correction=0)
    variance = 4 ** (block.spread / 64)
    assert (variance.diff() <= 0).all()
    torch.testing.assert_close(covariance.diagonal(), variance.double(), rtol=0.03, atol=0.01)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.005 * variance[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block.encode(x), y)
        decoded = block.decode(y)
    torch.testing.assert_close(decoded.double(), x, rtol=0, atol=0.02)
    e = torch.randn(7, dtype=torch.float64)
    metric = fisher + basis.RIDGE * fisher.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    moved = (block.encode(x[:1] + e) - y[:1]).double()
    assert float(moved.square().sum()) == pytest.approx(float(e @ metric @ e), rel=0.01)


def test_gradients_are_what_a_small_change_of_keys_and_values_does():
    """The loss of tokens drawn from the model changes by the gradient where one number of a value,
    or of a key before RoPE, is changed a little."""
    model = tiny_model(0, torch.float64, CFG)
    ids = tokens(1, 20, seed=4)
    got = basis.gradients(model, ids, torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(ids)[0].float()
    draw = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]

    def loss(i: int, s: int, head: int, t: int, d: int, by: float) -> float:
        change = torch.zeros(1, CFG.n_kv_head, 20, CFG.head_dim, dtype=torch.float64)
        change[0, head, t, d] = by
        if s == 0:
            cos, sin = (table[:20] for table in (model.rope_cos, model.rope_sin))
            change = apply_rope(change, cos, sin)

        def add(module, args):
            x, q, k, v, *rest = args
            return (x, q, k + change, v, *rest) if s == 0 else (x, q, k, v + change, *rest)

        hook = model.layers[i].self_attn.kv_path.register_forward_pre_hook(add)
        with torch.no_grad():
            share = model(ids)[0].log_softmax(-1)
        hook.remove()
        return -float(share.gather(1, drawn[:, None]).sum())

    for i, s, head, t, d in ((0, 0, 1, 3, 2), (1, 0, 0, 9, 11), (2, 1, 2, 5, 7), (0, 1, 0, 0, 1)):
        slope = (loss(i, s, head, t, d, 1e-4) - loss(i, s, head, t, d, -1e-4)) / 2e-4
        assert float(got[1][s][i][0, head, t, d]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_coordinates_of_small_gradients_are_those_of_large_ones(found, monkeypatch):
    """Gradients 2^-24 times as large, whose roots float16 would not hold, leave all that calibration
    finds as it is, bit for bit."""
    exact = basis.gradients

    def small(*args):
        here, costs = exact(*args)
        return here, [[g * 2.0**-24 for g in of_layers] for of_layers in costs]

    monkeypatch.setattr(basis, "gradients", small)
    model = tiny_model(0, torch.float64, CFG)
    got = basis.calibrate(model, [tokens(2, 150, seed=1), tokens(1, 150, seed=2)], 2, sinks=2)
    for a, b in zip(got.blocks, found.blocks, strict=True):
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert (got.table.part == found.table.part).all()


def test_rows_of_the_longest_codes_have_counted_probabilities(found):
    """In every row of long codes, those that a calibration's steps do not reach, too, a symbol near
    zero is likelier than one near the largest."""
    part = found.table.part[basis.LONG + 1 : basis.ROWS]
    near = part[:, basis.ZERO - 4 : basis.ZERO + 4].sum(1)
    far = part[:, basis.ZERO + 60 : basis.ZERO + 68].sum(1)
    assert (near > 4 * far).all()


def test_calibration_that_fails_leaves_the_model_as_it_was(monkeypatch):
    """A model that trains goes on training after an error."""

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(basis, "gradients", fails)
    model = tiny_model(0, torch.float64, CFG).train()
    with pytest.raises(RuntimeError):
        basis.calibrate(model, [tokens(1, 20)], 2)
    assert model.training


# -------------------- weights


def test_weights_are_the_root_mean_square_of_what_last_queries_read(monkeypatch):
    """Against loops: of each KV head's query heads and the last queries that are no padding."""
    monkeypatch.setattr(routed, "ASKING", 5)
    torch.manual_seed(0)
    q = torch.randn(2, 4, 9, 8)
    k = torch.randn(2, 2, 9, 8)
    pad = torch.tensor([0, 6])
    got = routed.read_by_last(q, k, pad)
    for b, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        total = [0.0] * 9
        queries = [t for t in range(4, 9) if t >= pad[b]]
        for h in (2 * head, 2 * head + 1):
            for t in queries:
                logits = [float(q[b, h, t] @ k[b, head, j]) / 8**0.5 for j in range(9)]
                there = range(int(pad[b]), t + 1)
                mass = sum(math.exp(logits[j]) for j in there)
                for j in there:
                    total[j] += (math.exp(logits[j]) / mass) ** 2
        want = [math.sqrt(n / len(queries) / 2) for n in total]
        assert got[b, head].tolist() == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_classes_are_powers_of_two_of_the_mean():
    """A weight of the mean has class 8, twice as much 9; none at all has the least."""
    assert routed.classes_of(torch.tensor([2.0, 4, 1, 1, 0, 4])).tolist() == [8, 9, 7, 7, 0, 9]


# -------------------- what is read


def test_a_prompt_is_read_as_a_plain_simulation_says(found):
    """Of each row, padding apart, tokens between the first 2 and the newest 3 are what rounding
    their coordinates to steps by their weight leaves, keys turned to their own places."""
    model = coded_model(found)
    codec = codec_of(model)
    x = tokens(3, 60)
    pad = torch.tensor([0, 7, 57])
    cache = filled(model, x, pad)
    plain = filled(tiny_model(0, torch.float64, CFG), x, pad)
    strings = cache.layers[-1].strings()
    assert cache.layers[0].n_coded.tolist() == [55, 48, 0] and len(strings[2]) == 0
    cos, sin = (t.double() for t in (model.rope_cos, model.rope_sin))
    n_used = 0
    for b in (0, 1):
        first = int(pad[b])
        n = 55 - first
        data = strings[b].tolist()
        step = int.from_bytes(data[:2], "little", signed=True)
        half = 2 * n // 2
        nibbles = data[2 : 2 + half]
        classes = [c & 15 for c in nibbles] + [c >> 4 for c in nibbles]
        assert len(set(classes)) > 2
        for i, block in enumerate(codec.blocks):
            layers = (0, 1) if i == 0 else (2,)
            for m in range(0, n, 5):
                t = 2 + m
                parts = []
                for layer in layers:
                    k = plain.layers[layer].window_k[b, :, t][None, :, None]
                    parts.append(apply_rope(k, cos[t : t + 1], -sin[t : t + 1]).flatten())
                for layer in layers:
                    parts.append(plain.layers[layer].window_v[b, :, t].flatten())
                y = (torch.cat(parts).double() - block.mean) @ block.to.double()
                own = step - 32 * (classes[i * n + m] - 8)
                own = max(own, int(block.spread[0]) - 704)
                size = 2.0 ** (own / 64)
                have = torch.zeros_like(y)
                for j, (number, spread) in enumerate(
                    zip(y.tolist(), block.spread.tolist(), strict=True)
                ):
                    row = math.floor((spread - own + 8) / 16) + 32
                    if row < basis.FIRST:
                        continue
                    code = round(number / size)
                    assert row < basis.ROWS and abs(code) <= basis.reach()[row]
                    have[j] = code * size
                    n_used += code != 0
                back = have @ block.back.double() + block.mean
                back = back.view(2, len(layers), 3, 16)
                for layer, k, v in zip(layers, *back, strict=True):
                    k = apply_rope(k[None, :, None], cos[t : t + 1], sin[t : t + 1])[0, :, 0]
                    read = cache.layers[layer].read()
                    torch.testing.assert_close(read.k[b, :, m], k, rtol=0, atol=2e-5)
                    torch.testing.assert_close(read.v[b, :, m], v, rtol=0, atol=2e-5)
    assert n_used > 500


def test_bytes_are_counted_and_never_more_than_the_share(found):
    """Of prompts of odd lengths, each sequence's string, its whole tokens and its counts are within
    its share of its own 16-bit bytes, and nearly all of it; fewer bytes leave a larger error."""
    x = tokens(2, 97)
    pad = torch.tensor([0, 20])
    plain = tiny_model(0, torch.float64, CFG)
    want = read_in_pieces(plain, x, plain.new_cache(2, 97), [91, *[1] * 6], pad)[:, 91:]
    number = 3 * 2 * 3 * 16 * 2  # bytes of a token
    off = []
    for share in (0.2, 0.15, 0.12):
        model = coded_model(found, KEPT._replace(share=share))
        cache = filled(model, x[:, :91], pad)
        strings = cache.layers[-1].strings()
        for n, string in zip((91, 71), strings, strict=True):
            used = len(string) + 5 * number + 3 * 4 * 8
            assert 0.97 * share * n * number < used <= share * n * number
        assert cache.nbytes_in_16_bits() == sum(map(len, strings)) + 2 * (5 * number + 3 * 4 * 8)
        got = read_in_pieces(model, x, model.new_cache(2, 97), [91, *[1] * 6], pad)[:, 91:]
        off.append(float((got - want).abs().mean() / want.std()))
    assert off[0] < 0.02 and off[0] < off[1] < off[2]


def test_the_finest_step_still_reaches_the_largest_coordinates(found):
    """With the least step, and tokens of all classes, a string still says every coordinate to within
    a 2,000th of the largest one's spread: codes are never cut short."""
    codec = codec_of(coded_model(found))
    torch.manual_seed(0)
    ys = [torch.randn(31, len(b.spread)) * basis.size_of(b.spread) for b in codec.blocks]
    classes = [torch.arange(31) % 16 for _ in ys]
    got = codec.numbers(codec.string(ys, classes, -routed.STEPS), 31)
    for y, have, block in zip(ys, got, codec.blocks, strict=True):
        assert (y - have).abs().max() < basis.size_of(block.spread[0]) / 2000


def test_the_step_does_not_depend_on_where_it_is_looked_for_first(found, monkeypatch):
    """A first guess from tokens that vary most, which is far too coarse, leaves the string as it is
    where all tokens make it."""
    codec = codec_of(coded_model(found))
    torch.manual_seed(0)
    ys = [torch.randn(64, len(b.spread)) * basis.size_of(b.spread) for b in codec.blocks]
    for y in ys:
        y[::8] *= 30
    classes = [torch.full((64,), routed.MIDDLE_CLASS) for _ in ys]
    got = codec.fitting(ys, classes, 69)
    monkeypatch.setattr(routed, "SAMPLED", 1)
    assert torch.equal(got, codec.fitting(ys, classes, 69))


def test_a_basis_has_what_its_share_uses_and_says_how_large_it_is(found):
    """A smaller share holds fewer coordinates; their bytes are those of tensors."""
    sizes = []
    for share in (0.3, 0.1):
        codec = codec_of(coded_model(found, KEPT._replace(share=share)))
        of_blocks = [
            2 * (t.to.numel() + t.back.numel() + t.mean.numel() + t.spread.numel())
            for t in codec.blocks
        ]
        assert codec.basis_bytes() == sum(of_blocks) + 2 * 256 * (basis.ROWS + 8)
        assert f"{codec.basis_bytes() / 1e6:.1f} MB" in codec.described()
        sizes.append(sum(of_blocks))
    assert sizes[0] > sizes[1]


def test_what_routed_coding_cannot_do_is_said_in_one_line(found):
    """A share that whole tokens fill, no share, and calibration without tokens."""
    model = coded_model(found, KEPT._replace(share=0.05))
    assert "5 stay whole, and" in error_line(filled, model, tokens(1, 90))
    assert "above 0 and below 1" in error_line(coded_model, found, KEPT._replace(share=1.0))
    tiny = tiny_model(0, torch.float64, CFG)
    assert "1 tokens to calibrate on" in error_line(basis.calibrate, tiny, [tokens(1, 5)])


def test_a_prompt_of_one_coded_token_names_the_share_that_it_needs(found):
    """One token more than what stays whole: the line has the least share that the prompt can be held
    in, which is taken, and where no share is enough it asks for longer contexts."""
    x = tokens(1, KEPT.whole + 1)
    line = error_line(filled, coded_model(found, KEPT._replace(share=0.5), 6), x)
    assert line.startswith("a share of 0.5 of 6 tokens: 5 stay whole, ") and "--query" not in line
    least = float(re.search(r"give --kv_byte_budgets=([\d.]+) or more", line)[1])
    assert 5 / 6 < least < 0.9
    (string,) = filled(coded_model(found, KEPT._replace(share=least), 6), x).layers[-1].strings()
    assert len(string) > 0
    line = error_line(filled, coded_model(found, KEPT._replace(share=least - 0.001), 6), x)
    assert f"={least:.3f} or more" in line
    codec = codec_of(coded_model(found))
    assert error_line(codec.check_fits, 10**6, 6).endswith("of the bytes; give longer contexts")


def test_coordinates_go_where_the_model_goes_and_keep_their_bits(found):
    """model.to moves them to its device, and its dtype is not theirs: strings are read by these
    bits."""
    model = coded_model(found)
    codec = codec_of(model)
    before = [t for block in codec.blocks for t in block]
    model.to(torch.bfloat16)
    after = [t for block in codec.blocks for t in block]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before, strict=True))
    model.to("meta")
    assert {t.device.type for block in codec.blocks for t in block} == {"meta"}
    assert codec.cost.device.type == "meta"
