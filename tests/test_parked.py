"""Parked caches (storage/parked.py): what is put away as bytes comes back bit by bit, whatever the
cache holds, and goes on as if it had never been away; what is damaged or of another model is
refused."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Callable

import pytest
import torch
from helpers import error_line, tiny_model, tokens
from stores import FOREIGN, PATHS, decoded, padded

from generate import generate
from model import Transformer
from storage import entropy, parked, planes
from storage.cache import KVCache, storage_bytes
from storage.integers.format import split_levels
from storage.layout import mask_to_bits
from storage.parked import park, unpark
from storage.saved import tensors_of

# -------------------- planes


def plain_read(coded: planes.Coded, n: int, known: dict, width: int) -> list[int]:
    """The reader in loops: lane by lane and symbol by symbol, whose row is looked up in the order of
    the plane."""
    part = torch.frombuffer(bytearray(zlib.decompress(coded.table)), dtype=torch.int16)
    part = part.view(-1, 256).tolist()
    lanes = planes.lanes_of(n)
    steps = -(-n // lanes)
    words = [coded.data[i] + 256 * coded.data[i + 1] for i in range(0, len(coded.data), 2)]
    states = [words[2 * i] + 65536 * words[2 * i + 1] for i in range(lanes)]
    rest = iter(words[2 * lanes :])
    out = [0] * (lanes * steps)
    lag = {"left": 1, "row": width}.get(coded.context)
    for step in range(steps):
        for lane in range(lanes):
            i = lane * steps + step
            row = 0
            if coded.context in known and i < n:
                row = int(known[coded.context][i])
            elif lag and step >= lag:
                row = out[i - lag]
            x = states[lane]
            low = x % 2**14
            before = 0
            symbol = 0
            while low >= before + part[row][symbol]:
                before += part[row][symbol]
                symbol += 1
            out[i] = symbol
            x = part[row][symbol] * (x // 2**14) + low - before
            states[lane] = x if x >= 2**16 else x * 65536 + next(rest)
    assert next(rest, None) is None and states == [2**16] * lanes
    return out[:n]


def told_by(context: str, n: int, width: int) -> tuple[torch.Tensor, dict]:
    """Symbols (n,) that `context` tells better than any other does, and what is known besides."""
    torch.manual_seed(n)
    noise = torch.randint(3, (n,))
    layer = torch.randint(90, (n,))
    lag = {"left": 1, "row": width}.get(context, n)
    symbols = noise.clone()
    if context == "layer":
        symbols += layer
    for i in range(lag, n):
        symbols[i] = (3 * symbols[i - lag] + noise[i]) % 251
    return symbols.to(torch.uint8), {"layer": layer.to(torch.uint8)}


@pytest.mark.parametrize("context", ["alone", "left", "row", "layer"])
@pytest.mark.parametrize("n", [4096, 9001])
def test_a_plane_is_coded_by_what_tells_it_and_read_as_plainly_as_in_loops(context, n):
    """The context that tells symbols is found; they come back, from a reader in loops, too, which
    uses every word up; no byte of string and table is wasted."""
    symbols, known = told_by(context, n, 7)
    coded = planes.write(symbols, known, 7)
    assert coded.context == context
    assert torch.equal(planes.read(coded, n, known, 7), symbols)
    assert plain_read(coded, n, known, 7) == symbols.tolist()
    assert len(coded.data) < 0.45 * n


@pytest.mark.parametrize("n", [0, 1, 5, 4095, 4096, 300_001])
@pytest.mark.parametrize("width", [1, 3])
def test_any_plane_comes_back(n, width):
    """Of any length: noise, which is stored as it is, one symbol only, symbols that come once."""
    torch.manual_seed(n)
    noise, other = torch.randint(256, (2, n)).to(torch.uint8)
    once = torch.zeros(n, dtype=torch.uint8)
    once[n // 2 : n // 2 + 1] = 255
    for symbols in (noise, torch.full_like(noise, 7), once):
        known = {"high": other}
        coded = planes.write(symbols, known, width)
        assert torch.equal(planes.read(coded, n, known, width), symbols)
        if n >= planes.SMALL:
            assert (coded.context == planes.STORED) == (symbols is noise)


def test_what_is_no_plane_is_refused():
    """Strings cut anywhere, tables that are none, contexts that are not there: an error that unpark
    makes one line of."""
    symbols, known = told_by("left", 5000, 7)
    good = planes.write(symbols, known, 7)
    table = zlib.compress(torch.ones(256, 256, dtype=torch.int16).numpy().tobytes())
    bad = [good._replace(data=good.data[:n]) for n in (0, 1, 15, len(good.data) - 2)]
    bad += [good._replace(table=t) for t in (b"", b"x", table, zlib.compress(b"12"))]
    bad += [good._replace(context=c) for c in ("row", "high", "stored", "deflated", "")]
    for coded in bad:
        with pytest.raises((ValueError, LookupError, zlib.error)):
            planes.read(coded, 5000, known, 1)


# -------------------- caches


@functools.cache
def storing(kind: str) -> Transformer:
    """A model that stores so; tests leave it as it was."""
    return PATHS[kind]()


@pytest.fixture(params=PATHS)
def model(request) -> Transformer:
    """A model of every way to store."""
    return storing(request.param)


@pytest.fixture
def all_coded(monkeypatch) -> None:
    """Nothing is only deflated: small models have small planes."""
    monkeypatch.setattr(planes, "SMALL", 100)


def ragged(model: Transformer, lengths: tuple[int, ...] = (70, 1, 33)) -> KVCache:
    """The cache of prompts of unequal lengths."""
    cache = model.new_cache(len(lengths), 120)
    with torch.no_grad():
        model.prefill(*cut(padded(lengths), cache))
    return cache


def cut(batch: tuple[torch.Tensor, torch.Tensor], cache: KVCache) -> tuple:
    """The arguments of prefill."""
    return batch[0], cache, batch[1]


def grown(model: Transformer) -> KVCache:
    """One that has decoded some steps."""
    cache = ragged(model, (40, 52))
    decoded(model, cache, 9)
    return cache


def truncated(model: Transformer) -> KVCache:
    """One whose newest tokens are forgotten again, as far as it can."""
    cache = grown(model)
    for lengths in ([45, 57], [32, 32], [48, 60]):
        try:
            cache.truncate(torch.tensor(lengths))
        except ValueError:  # inside a block or a context
            continue
    return cache


CACHES: dict[str, Callable[[Transformer], KVCache]] = {
    "ragged": ragged,
    "empty": lambda model: model.new_cache(2, 30),
    "one token": lambda model: ragged(model, (1,)),
    "grown": grown,
    "truncated": truncated,
    "picked and joined": lambda model: KVCache.cat(
        [ragged(model).select_sequences([2, 0]), ragged(model, (20,))]
    ),
}


def held(cache: KVCache) -> int:
    """The bytes held, less those of where segments start, which a loaded layer has of its own."""
    tensors = [
        t
        for layer in cache.layers
        for name, t in layer.state_dict().items()
        if layer.owners.get(name) != "base"
    ]
    return storage_bytes(tensors)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether type, shape and every bit are equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


@pytest.mark.parametrize("which", CACHES)
def test_every_tensor_comes_back_and_decoding_goes_on(model, which):
    """Of every kind of cache, ragged, empty, of one token, grown, truncated and joined: all tensors
    have the bits they had, no byte more is held, and later steps give the same logits, bit for
    bit."""
    cache = CACHES[which](model)
    back, beside = unpark(park(cache), model)
    want = tensors_of(cache)
    got = tensors_of(back)
    assert list(got) == list(want) and beside == {}
    for name, t in want.items():
        assert same_bits(got[name], t), name
    assert held(back) == held(cache) and back.length == int(cache.lengths.max())
    idx = tokens(len(cache.lengths), 20, seed=4)
    with torch.no_grad():
        if which == "empty":
            assert torch.equal(model.prefill(idx, back), model.prefill(idx, cache))
        assert torch.equal(decoded(model, back, 6), decoded(model, cache, 6))


@pytest.mark.parametrize("kind", ["dense", "value groups", "integers", "selection", "levels"])
def test_planes_of_caches_are_coded(kind, all_coded):
    """The same where contexts code what is long enough, scales, levels and planes of bits too."""
    model = storing(kind)
    cache = ragged(model)
    back = unpark(park(cache), model).cache
    got = tensors_of(back)
    for name, t in tensors_of(cache).items():
        assert same_bits(got[name], t), name
    assert torch.equal(decoded(model, back, 2), decoded(model, cache, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_numbers_of_any_type_come_back_shorter(dtype):
    """Keys and values of every float type, infinities and NaNs among them, come back bit by bit, in
    fewer bytes."""
    model = tiny_model(dtype=dtype)
    cache = model.new_cache(4, 150)
    with torch.no_grad():
        model.prefill(tokens(4, 150), cache)
    cache.layers[0].window_k[0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), -0.0])
    data = park(cache)
    back = unpark(data, model).cache
    for name, t in tensors_of(cache).items():
        assert same_bits(tensors_of(back)[name], t), name
    assert len(data) < 0.95 * cache.nbytes()


def test_generation_goes_on_with_the_same_tokens():
    """A prompt's answer cut in two by parking is the answer in one go; what is put beside the cache
    comes back."""
    for kind in ("dense", "value groups", "integers", "levels"):
        model = storing(kind)
        prompt = tokens(70, seed=3).tolist()
        (want,), _ = generate(model, [prompt], 30)
        (first,), cache = generate(model, [prompt], 12)
        data = park(cache, beside={"ids": first})
        back, beside = unpark(data, model)
        (rest,), _ = generate(model, [beside["ids"][-1:]], 18, cache=back)
        assert first + rest == want


def test_rows_are_told_by_their_levels():
    """A row's level and which plane of it that is, token by token and group by group; where heads
    have masks of their own a selection's planes are coded by them."""
    levels = torch.randint(4, (40, 8), generator=torch.Generator().manual_seed(0))
    want = []
    for token in levels.tolist():
        for level in token:
            want += [4 * level + plane for plane in range((0, 1, 2, 4)[level])]
    bits = mask_to_bits(split_levels(levels.to(torch.uint8)))
    assert parked.row_levels(bits, 8).tolist() == want
    cache = ragged(storing("levels"))
    tensors = tensors_of(cache)
    kinds = {name: parked.Kind("uint8", list(t.shape)) for name, t in tensors.items()}
    layers = [{"bits": "4:0", "n_groups": "4"} for _ in cache.layers]
    known = parked.known_of(["0.rows", "1.rows"], kinds, tensors, layers)
    each = [parked.row_levels(layer.bits, 4) for layer in cache.layers]
    width = cache.layers[0].rows.size(1)
    assert torch.equal(known["level"], torch.cat(each).repeat_interleave(width))
    assert known["layer"].sum() == tensors["1.rows"].numel()


def test_layers_of_one_mask_put_it_away_once():
    """Tensors that layers share are shared again: they count once."""
    model = storing("selection, shared")
    cache = ragged(model)
    back = unpark(park(cache), model).cache
    bits = [layer.bits for layer in back.layers]
    assert bits[0] is bits[1] and held(back) == held(cache)


# -------------------- refused


@pytest.mark.parametrize(
    "difference",
    ["one number", "heads", "dtype", "kind", "basis", "K", "bits", "levels", "experts"],
)
def test_a_string_of_another_model_is_refused_by_name(difference):
    """Other weights, shapes, types, positions, ways to store: one line that names the difference."""
    saver, loader, word = FOREIGN[difference]
    cache = ragged(saver(), (40, 40))
    model = saver()
    data = park(cache, model)
    line = error_line(unpark, data, loader())
    assert word in line and "parked" in line, line
    unpark(data, model)


@pytest.mark.parametrize("kind", ["dense", "integers", "levels", "mixsga"])
def test_a_damaged_string_is_refused(kind):
    """Cut anywhere, something else altogether, longer, or with a bit turned anywhere: one line."""
    model = storing(kind)
    data = park(ragged(model))
    bad = [data[:n] for n in (0, 1, 8, 43, 44, 100, len(data) // 2, len(data) - 1)]
    bad += [b"a cache\n" * 20, data + b"\0"]
    at = [*range(44), *range(44, len(data), len(data) // 60)]
    for i in at:
        turned = bytearray(data)
        turned[i] ^= 1 << i % 8
        bad.append(bytes(turned))
    for one in bad:
        assert "parked" in error_line(unpark, one, model)
    cache = ragged(model)
    line = error_line(unpark, data[:-1], model)
    assert "cut or damaged" in line and str(len(data) - 1) in line
    assert park(cache) == data


def forged(manifest: dict, rest: bytes) -> bytes:
    """A string with this manifest, and a sum that fits."""
    text = zlib.compress(json.dumps(manifest).encode())
    digest = hashlib.sha256(text + rest).digest()
    return parked.HEAD.pack(parked.MAGIC, digest, len(text)) + text + rest


@pytest.mark.parametrize("kind", ["dense", "levels"])
def test_a_string_whose_parts_do_not_fit_is_refused(kind, all_coded):
    """A manifest that lacks a part or says another type, shape, number of planes, context or length
    than the planes have, under a sum that fits: one line."""
    model = storing(kind)
    data = park(ragged(model))
    size = parked.HEAD.unpack_from(data)[2]
    text = zlib.decompress(data[parked.HEAD.size :][:size])
    rest = data[parked.HEAD.size + size :]
    unpark(forged(json.loads(text), rest), model)  # the sum does fit

    def refused(change: Callable[[dict], object], rest: bytes = rest) -> None:
        manifest = json.loads(text)
        change(manifest)
        assert "parked" in error_line(unpark, forged(manifest, rest), model)

    for part in ("about", "kinds", "shared", "planes"):
        refused(lambda m, part=part: m.pop(part))
        refused(lambda m, part=part: m.update({part: None}))
        refused(lambda m, part=part: m.update({part: [1]}))
    for name in list(json.loads(text)["kinds"])[::11]:
        refused(lambda m, name=name: m["kinds"].pop(name))
        for kind in ("float8", "complex64", 3):
            refused(lambda m, name=name, kind=kind: m["kinds"][name].__setitem__(0, kind))
        for shape in ([], [3, 2**40], [-1], None, ["x"]):
            refused(lambda m, name=name, shape=shape: m["kinds"][name].__setitem__(1, shape))
    for i in range(0, len(json.loads(text)["planes"]), 5):
        refused(lambda m, i=i: m["planes"][i].pop())
        refused(lambda m, i=i: m["planes"][i][0].__setitem__(0, "none"))
        refused(lambda m, i=i: m["planes"][i][0].__setitem__(2, 10**12))
        refused(lambda m, i=i: m["planes"][i][0].__setitem__(2, -5))
    refused(lambda m: m, rest[: len(rest) // 2])


def test_a_cache_that_cannot_be_used_is_not_put_away():
    """One in which a step failed, and one whose model is gone: one line."""
    cache = ragged(tiny_model())
    assert "model is gone" in error_line(park, cache)
    model = tiny_model()
    assert unpark(park(cache, model), model).cache.lengths.tolist() == [70, 1, 33]
    cache.broken = True
    assert "half-way" in error_line(park, cache, model)


def test_probabilities_cost_what_the_string_takes():
    """A plane's string has the bits that its counts say, and 32 at most for each lane."""
    symbols, known = told_by("row", 50_000, 7)
    coded = planes.write(symbols, known, 7)
    laid = planes.in_lanes(symbols)
    rows = planes.table_rows(laid, "row", {}, 7)
    counts = planes.count(laid, rows, "row")
    allowed = counts > 0
    allowed[:, 0] |= ~allowed.any(1)
    table = entropy.table_of(counts, allowed)
    bits = float((counts * table.cost().double().clamp_max(99)).sum())
    assert bits - 1 < 8 * len(coded.data) <= bits * 1.001 + 34 * laid.size(1)
