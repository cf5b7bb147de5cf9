"""Layer by layer: how much of a value its key tells, and what few bits of a key do to its logits.

Everything is fitted on one text and measured on another.

* *Values from keys*: the share of the energy of values, as W_o writes them, that a linear map W
  tells from keys before RoPE, each head's own or those of all heads of the layer; all tokens count
  alike, unlike in reconstruct.py. What W weighs
  stands beside what it saves: by reverse water-filling values whose variances in the `output` basis
  are lambda_i take

      bits = sum over i of max(0, 1/2 log2(lambda_i / theta))

  of a token, with theta such that they are 2 a number, and what W leaves of them takes fewer with
  the same theta. "Pays after": so many tokens save as many bits as W has.
* *Few bits of keys*: the squared error of a query's logits over their variance, of keys stored as
  integers (after RoPE, blocks of 64 tokens, the nearest code), and in calibrated coordinates: those
  of coding/basis.py for keys alone, before RoPE, all heads of the layer, in the metric of the
  queries that read them, in one step and an entropy code. Both take the bits of the integers and
  their scales.

    python -m benchmarks.layers --init_from=model.gguf --calibrate=text:PATH --dataset=pydocs \\
        --results=out/layers

Leaves results.json (a row for each layer and one for all), made.json and layers.png in the folder.
Letters: storage/layout.py; p = Hkv D numbers of a token in a layer.
"""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from cli import exit_on_bad_input, note, parse_args
from settings.base import BaseConfig
from settings.fields import MAX_SEED, check, check_fields, opt
from settings.places import check_inputs
from settings.train import DataConfig, check_corpora


@dataclass(frozen=True)
class LayersConfig:
    """What is measured, layer by layer."""

    calibrate: str = opt("pydocs", "corpus that maps and coordinates are fitted on")
    dataset: str = opt("pycode", "corpus that is measured")
    calibration: int = opt(16, "sequences of the first", least=1)
    sequences: int = opt(8, "sequences of the second", least=1)
    block_size: int = opt(512, "tokens of a sequence", least=72)
    results: str = opt("out/layers", "folder of the rows and the picture")
    seed: int = opt(0, "seed of windows and of what queries read", least=0, most=MAX_SEED)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    json: bool = opt(
        False, "print the rows as JSON on stdout, as is done where that is no terminal"
    )

    def __post_init__(self):
        check_fields(self)
        check_corpora(self.calibrate, "calibrate")
        check_corpora(self.dataset, "dataset")


CONFIGS = {"layers": LayersConfig, "base": BaseConfig, "data": DataConfig}


def check_places(args) -> None:
    """Raise ValueError where no model is named, or what flags name is not there."""
    args.base.place("")
    check_inputs(args, "init_from")


if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__)
    exit_on_bad_input(lambda: check_places(ARGS))

import torch
from torch import Tensor

from baselines.coded import as_vectors, coded_layers, unturned
from benchmarks.common import leave_rows
from cli import print_rows
from coding.basis import (
    FIRST,
    OCTAVE,
    ROWS,
    Block,
    codes_of,
    counted,
    low_bits,
    principal,
    row_of,
    size_of,
    symbols_of,
)
from coding.routed import STEPS, smallest
from data import content_hash, label_of, prepare_splits, same_text, whole_split
from loaders.compress import windows_of
from loaders.device import device_name, pick_device
from loaders.runs import Run, load_run
from model import Transformer, evaluating
from reconstruct import RIDGE, change_by, own_heads, ridge_solve
from report.figures import layers_figure
from routing.bases import output_metric
from routing.calibration import record_layers
from storage.integers.format import keys_as_read
from storage.layout import cdiv

SINKS = 4  # first tokens, which stay whole
BLOCK = 64  # tokens whose keys share steps as integers
BITS = (2, 4)  # of integers
SCALES = 32 / BLOCK  # bits of a number's part of step and middle
VALUE_BITS = 2  # of a value's number, at which it is said what W saves
SAMPLED = 1024  # vectors that codes are counted on


class Seen(NamedTuple):
    """What a layer gets of one sequence."""

    q: Tensor  # (1, H, T, D) after RoPE
    k: Tensor  # (1, Hkv, T, D) after RoPE
    v: Tensor  # (1, Hkv, T, D)


class Sums:
    """Second moments of one layer's keys before RoPE and values, float64, (p, p) each."""

    def __init__(self):
        self.n = 0
        self.key = 0.0  # (p,), the sum of keys
        self.kk = 0.0
        self.kv = 0.0
        self.vv = 0.0

    def add(self, k: Tensor, v: Tensor) -> None:
        """Take vectors k and v (n, p)."""
        k = k.double()
        v = v.double()
        self.n += len(k)
        self.key = self.key + k.sum(0)
        self.kk = self.kk + k.T @ k
        self.kv = self.kv + k.T @ v
        self.vv = self.vv + v.T @ v

    def untold(self, weight: Tensor) -> Tensor:
        """Return the second moment (p, p) of v - k @ weight."""
        return self.vv + change_by(weight, self.kk, self.kv)


# -------------------- values from keys


def solve_own_heads(xx: Tensor, xy: Tensor, Hkv: int, D: int) -> Tensor:
    """Return ridge_solve of every head by itself, from the moments (Hkv*D, Hkv*D) of all: blocks on
    the diagonal, zeros elsewhere."""
    heads = zip(own_heads(xx, Hkv, D), own_heads(xy, Hkv, D), strict=True)
    own = [ridge_solve(*head, RIDGE) for head in heads]
    return torch.block_diag(*own)


def maps(sums: Sums, n_kv_head: int) -> dict[str, Tensor]:
    """Return the maps (p, p) from keys to values by least squares: of own heads, in blocks on the
    diagonal, and of all heads."""
    D = len(sums.kk) // n_kv_head
    own = solve_own_heads(sums.kk, sums.kv, n_kv_head, D)
    return {"own": own, "all": ridge_solve(sums.kk, sums.kv, RIDGE)}


def as_written(moment: Tensor, metric: Tensor) -> Tensor:
    """Return the variances (Hkv, D) of values of second moment (p, p) in the `output` basis, where
    squared error is that of what W_o writes. metric: (Hkv, D, D)."""
    Hkv, D = metric.shape[:2]
    own = own_heads(moment, Hkv, D)
    found, axes = torch.linalg.eigh(metric)
    scale = found.clamp_min(0).sqrt()
    root = axes * scale.unsqueeze(-2)
    variance = torch.linalg.eigvalsh(root.mT @ own @ root)
    return variance.clamp_min(0)


def bits_of(variance: Tensor, step: int) -> float:
    """Count the bits that reverse water-filling gives numbers of these variances, theta the square
    of a step in 64ths of an octave."""
    octaves = 0.5 * variance.clamp_min(1e-30).log2()
    above = octaves - step / OCTAVE
    return float(above.clamp_min(0).sum())


def told(sums: Sums, weights: dict[str, Tensor], metric: Tensor) -> dict[str, float]:
    """Return of each map the share of energy that it tells, its bytes in 16 bits a number, the bits
    that it saves of a token, and after how many tokens these are its own."""
    whole = as_written(sums.vv / sums.n, metric)
    most = VALUE_BITS * whole.numel()
    step = smallest(lambda s: bits_of(whole, s) <= most, -STEPS, STEPS)
    row = {}
    for name, weight in weights.items():
        untold = as_written(sums.untold(weight) / sums.n, metric)
        heads = len(metric) if name == "own" else 1  # of own heads the diagonal alone
        numbers = weight.numel() // heads
        saved = bits_of(whole, step) - bits_of(untold, step)
        row[f"told_{name}"] = 1 - float(untold.sum() / whole.sum())
        row[f"map_bytes_{name}"] = 2 * numbers
        row[f"saved_bits_{name}"] = saved
        row[f"pays_after_{name}"] = 16 * numbers / saved if saved > 0 else None
    return row


# -------------------- few bits of keys


def read_from(q: Tensor, model: Transformer, draw: torch.Generator) -> Tensor:
    """Return queries q (1, H, T, D) as keys before RoPE see them, each from one token at or before
    its own: its product with a key there is the logit."""
    T = q.size(2)
    share = torch.rand(T, generator=draw).to(q.device)
    seen = torch.arange(1, T + 1, device=q.device)  # tokens up to each
    token = (share * seen).long()
    return unturned(q, model, token[None])


def coordinates(sums: Sums, moment: Tensor) -> Block:
    """Return the coordinates of a layer's keys in the metric of queries of second moment (Hkv, D,
    D)."""
    average = sums.key / sums.n
    covariance = sums.kk / sums.n - average.outer(average)
    return principal(average, covariance, torch.block_diag(*moment))


def coded(x: Tensor, block: Block, cost: Tensor, bits: float) -> Tensor:
    """Return vectors x (n, p) as they are read when they take at most so many bits a number, all
    coordinates in one step. cost: (ROWS, 256), bits of the symbols of each row."""
    y = block.encode(x)

    def coded_in(step: int) -> tuple[Tensor, float]:
        """Return the coordinates in a step, and the bits that they take."""
        at = torch.tensor([[step]], device=y.device)
        row = row_of(block.spread, at).expand_as(y)
        codes = codes_of(y, at, row)
        used = row >= FIRST
        taken = cost[row.long(), symbols_of(codes, row).long()]
        return codes * used * size_of(at), float((taken * used).sum())

    most = bits * x.numel()
    finest = int(block.spread[0]) - 10 * OCTAVE  # rows end one octave below
    step = smallest(lambda s: coded_in(s)[1] <= most, finest, STEPS)
    return block.decode(coded_in(step)[0])


def logit_error(q: Tensor, k: Tensor, read: Tensor) -> tuple[float, float]:
    """Return the variance, among keys k (1, Hkv, n, D), of the error that queries q (1, H, m, D)
    see where keys are read as `read`, and that of their logits, both summed over queries. What is
    the same for all keys changes no attention."""
    by_head = q.unflatten(1, (k.size(1), -1))
    k = k.unsqueeze(2)
    error = by_head @ (read.unsqueeze(2) - k).mT
    logits = by_head @ k.mT
    return float(error.var(-1).sum()), float(logits.var(-1).sum())


# -------------------- a model


def windows_seen(model: Transformer, windows: list[Tensor]) -> Iterator[list[Seen]]:
    """Yield of each sequence what the layers that do not slide get, a list of Seen."""
    layers = [block.self_attn for block in coded_layers(model)]
    seen: list[Seen] = []

    def see(i: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        seen.append(Seen(q.float(), k.float(), v.float()))

    for ids in windows:
        seen.clear()
        with evaluating(model), record_layers(layers, see):
            model(ids, last_only=True)
        yield seen


def vectors(model: Transformer, seen: Seen) -> tuple[Tensor, Tensor]:
    """Return a layer's keys before RoPE and values but for the first tokens, (n, p) each."""
    number = torch.arange(seen.k.size(2), device=seen.k.device)[None]
    k = as_vectors([unturned(seen.k, model, number)])
    v = as_vectors([seen.v])
    return k[0, SINKS:], v[0, SINKS:]


class Fitted(NamedTuple):
    """What calibration finds, a list entry for each layer, and how many bits codes take."""

    weights: list[dict[str, Tensor]]
    blocks: list[Block]
    cost: Tensor  # (ROWS, 256)


def fit(model: Transformer, windows: list[Tensor], seed: int) -> Fitted:
    """Return the maps and coordinates of every layer, of sequences ids (1, T)."""
    n_layer = len(coded_layers(model))
    Hkv = model.cfg.n_kv_head
    draw = torch.Generator().manual_seed(seed)
    sums = [Sums() for _ in range(n_layer)]
    moments = [0.0] * n_layer
    some: list[list[Tensor]] = [[] for _ in range(n_layer)]
    every = cdiv(sum(ids.size(1) for ids in windows), SAMPLED)
    for seen in windows_seen(model, windows):
        for i, layer in enumerate(seen):
            k, v = vectors(model, layer)
            sums[i].add(k, v)
            some[i].append(k[::every].clone())
            u = read_from(layer.q, model, draw)[0]  # (H, T, D)
            u = u.unflatten(0, (Hkv, -1)).flatten(1, 2).double()
            moments[i] = moments[i] + u.mT @ u / u.size(1)
    blocks = [coordinates(s, m / len(windows)) for s, m in zip(sums, moments, strict=True)]
    ys = [block.encode(torch.cat(xs)) for block, xs in zip(blocks, some, strict=True)]
    table = counted(ys, [block.spread for block in blocks])
    below = low_bits(torch.arange(ROWS))
    cost = table.cost()[:ROWS] + below[:, None]
    weights = [maps(s, Hkv) for s in sums]
    return Fitted(weights, blocks, cost.to(blocks[0].to.device))


def key_errors(model: Transformer, seen: Seen, block: Block, cost: Tensor) -> dict[str, Tensor]:
    """Return for each way to store keys the error of logits and their variance, (2,) float64, of
    the queries behind whole blocks of tokens."""
    T = seen.k.size(2)
    n = (T - SINKS - 1) // BLOCK * BLOCK
    k = seen.k[:, :, SINKS : SINKS + n]
    q = seen.q[:, :, SINKS + n :]
    number = torch.arange(SINKS, SINKS + n, device=k.device)[None]
    x = as_vectors([unturned(k, model, number)])[0]
    found = {}
    for bits in BITS:
        y = coded(x, block, cost, bits + SCALES)
        before_rope = y.view(1, n, k.size(1), -1).transpose(1, 2)
        ways = {
            f"integers_{bits}": keys_as_read(k, bits, BLOCK),
            f"coordinates_{bits}": unturned(before_rope, model, number, back=True),
        }
        for name, read in ways.items():
            found[name] = torch.tensor(logit_error(q, k, read), dtype=torch.float64)
    return found


def measure(model: Transformer, windows: list[Tensor], fitted: Fitted) -> list[dict]:
    """Return a row for each layer, and one for all: shares and errors of it are means, bytes and
    bits sums."""
    layers = {i: block for i, block in enumerate(model.layers) if not block.slides}
    sums = [Sums() for _ in layers]
    errors: list[dict[str, Tensor]] = [{} for _ in layers]
    for seen in windows_seen(model, windows):
        for i, layer in enumerate(seen):
            sums[i].add(*vectors(model, layer))
            found = key_errors(model, layer, fitted.blocks[i], fitted.cost)
            for name, pair in found.items():
                errors[i][name] = errors[i].get(name, 0) + pair
    rows = []
    shape = (model.cfg.n_kv_head, model.cfg.head_dim)
    of_layers = zip(layers.items(), sums, fitted.weights, errors, strict=True)
    for (i, block), own, weights, pairs in of_layers:
        row = {"name": "layers", "impl": f"layer {i}"}
        o_proj = block.self_attn.o_proj.weight.detach()
        row |= told(own, weights, output_metric(o_proj, *shape))
        row |= {name: float(error / variance) for name, (error, variance) in pairs.items()}
        rows.append(row)
    return [*rows, of_all(rows)]


def of_all(rows: list[dict]) -> dict:
    """Return the row of all layers."""
    row = {"name": "layers", "impl": "all layers"}
    for field in rows[0]:
        if field in row:
            continue
        numbers = [r[field] for r in rows]
        adds_up = field.startswith(("map_bytes", "saved_bits"))
        if not field.startswith("pays_after"):
            row[field] = sum(numbers) if adds_up else mean(numbers)
    for name in ("own", "all"):
        saved = row[f"saved_bits_{name}"]
        row[f"pays_after_{name}"] = 8 * row[f"map_bytes_{name}"] / saved if saved > 0 else None
    return row


def windows_from(corpus: str, official: str, n: int, run: Run, args) -> list[Tensor]:
    """Return n sequences (1, T) of a corpus, of its part `official` or all of it."""
    cfg: LayersConfig = args.layers
    split = whole_split(corpus, official)
    (text,) = prepare_splits(corpus, args.data, run.tokenizer, [split])
    return windows_of(text, run, cfg.seed, n, cfg.block_size, at_once=1)


def main() -> None:
    """Measure, and leave rows and picture."""
    began = time.time()
    cfg: LayersConfig = ARGS.layers
    check(
        not same_text(cfg.calibrate, cfg.dataset),
        f"calibrate={cfg.calibrate!r}",
        "that is the text that is measured",
        "give another",
    )
    device = pick_device(cfg.device)
    note(f"loading {ARGS.base.place('')}")
    run = load_run(ARGS.base.place(""), device, **ARGS.base.options(""))
    note(f"fitting on {cfg.calibrate}")
    first = windows_from(cfg.calibrate, "train", cfg.calibration, run, ARGS)
    fitted = fit(run.model, first, cfg.seed)
    note(f"measuring on {cfg.dataset}")
    second = windows_from(cfg.dataset, "val", cfg.sequences, run, ARGS)
    rows = measure(run.model, second, fitted)
    text = {"corpus": label_of(cfg.dataset), "sha256": content_hash(cfg.dataset, ARGS.data)}
    rows = [row | {"text": text, "seed": cfg.seed} for row in rows]
    folder = Path(cfg.results)
    leave_rows(folder, rows, device_name(device), began, ARGS)
    layers_figure(folder, rows)
    print_rows(rows, cfg.json)


if __name__ == "__main__":
    exit_on_bad_input(main)
