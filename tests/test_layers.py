"""benchmarks/layers.py: what keys tell of values, and few bits of keys, layer by layer, against
plain computations; its rows, its picture and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import TINY, error_line, tiny_model
from test_eval import drawn

from benchmarks import layers
from cli import parse_args
from coding import basis
from model import apply_rope
from report import page
from report.figures import layers_figure
from routing.bases import output_metric
from runs import call_main, pretrain, python

HKV, D = 3, 16
P = HKV * D


def some_sums(n: int = 301, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, layers.Sums]:
    """Keys and values (n, P) of which a part is a linear map of the keys, in two pieces."""
    torch.manual_seed(0)
    told = torch.randn(P, P, dtype=torch.float64) / P**0.5
    torch.manual_seed(seed)
    k = torch.randn(n, P, dtype=torch.float64) + 0.5
    v = k @ told + torch.randn(n, P, dtype=torch.float64)
    sums = layers.Sums()
    sums.add(k[:100], v[:100])
    sums.add(k[100:], v[100:])
    return k, v, sums


def test_told_is_the_energy_that_a_map_leaves_of_what_is_written():
    """Of residuals that are written out by W_o head by head, for maps of own and of all heads, on
    another text than the maps' own; own heads tell less."""
    _, _, fitted_on = some_sums()
    k, v, sums = some_sums(97, seed=1)
    w_o = torch.randn(40, 6 * D, dtype=torch.float64)
    weights = layers.maps(fitted_on, HKV)
    row = layers.told(sums, weights, output_metric(w_o, HKV, D))

    def energy(x: torch.Tensor) -> float:
        """Squares of what the six query heads, two of each KV head, write."""
        total = 0.0
        for head in range(6):
            own = x[:, head // 2 * D : (head // 2 + 1) * D]
            total += float((own @ w_o[:, head * D : (head + 1) * D].T).square().sum())
        return total

    for name, weight in weights.items():
        want = 1 - energy(v - k @ weight) / energy(v)
        assert row[f"told_{name}"] == pytest.approx(want, rel=1e-9)
    assert 0.02 < row["told_own"] < row["told_all"] < 1
    assert weights["own"][:D, D:].count_nonzero() == 0
    k, v, _ = some_sums()
    for h in range(HKV):
        at = slice(h * D, (h + 1) * D)
        least = torch.linalg.lstsq(k[:, at], v[:, at]).solution
        torch.testing.assert_close(weights["own"][at, at], least, rtol=0, atol=1e-3)
    assert (row["map_bytes_own"], row["map_bytes_all"]) == (2 * 3 * 16 * 16, 2 * 48 * 48)


def test_what_a_map_saves_is_the_bits_of_what_it_leaves():
    """Reverse water-filling in loops: values take two bits a number, what a map leaves fewer, and
    after `pays_after` tokens the difference is the map's own bits."""
    _, _, sums = some_sums()
    metric = output_metric(torch.randn(40, 6 * D), HKV, D)
    weights = layers.maps(sums, HKV)
    row = layers.told(sums, weights, metric)

    def variances(moment: torch.Tensor) -> list[float]:
        found = []
        for h in range(HKV):
            at = slice(h * D, (h + 1) * D)
            # the eigenvalues of G C are those of G^1/2 C G^1/2
            found += torch.linalg.eigvals(metric[h] @ moment[at, at]).real.tolist()
        return found

    def bits(moment: torch.Tensor, theta: float) -> float:
        return sum(max(0.0, 0.5 * math.log2(x / theta)) for x in variances(moment))

    whole = sums.vv / sums.n
    low, high = 1e-6, 1e6
    for _ in range(100):
        theta = math.sqrt(low * high)
        low, high = (theta, high) if bits(whole, theta) > 2 * P else (low, theta)
    for name, weight in weights.items():
        saved = bits(whole, theta) - bits(sums.untold(weight) / sums.n, theta)
        assert row[f"saved_bits_{name}"] == pytest.approx(saved, rel=0.02)
        mine = 8 * row[f"map_bytes_{name}"] / row[f"saved_bits_{name}"]
        assert row[f"pays_after_{name}"] == pytest.approx(mine)
    none = {"own": torch.zeros(P, P).double(), "all": torch.zeros(P, P).double()}
    assert layers.told(sums, none, metric)["pays_after_all"] is None


def test_queries_are_turned_to_where_a_key_before_rope_is():
    """The product of a turned query and a key before RoPE is the logit of some token at or before
    the query's; tokens are drawn from all of them."""
    model = tiny_model(0, torch.float64, TINY)
    q = torch.randn(1, 6, 30, D, dtype=torch.float64)
    raw = torch.randn(D, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    u = layers.read_from(q, model, draw)
    cos, sin = model.rope_cos[:30].double(), model.rope_sin[:30].double()
    k = apply_rope(raw.expand(1, 1, 30, D), cos, sin)[0, 0]
    chosen = []
    for t in range(30):
        logits = q[0, 2, t] @ k.T
        (near,) = (logits[: t + 1] - u[0, 2, t] @ raw).abs().lt(1e-4).nonzero(as_tuple=True)
        assert len(near) >= 1
        chosen.append(int(near[0]) / max(t, 1))
    assert min(chosen[10:]) < 0.3 and max(chosen[10:]) > 0.7


def test_coordinates_take_the_bits_that_they_may():
    """Coded keys are coordinates rounded to one step, those that vary least to zero: the finest step
    whose codes, coordinate by coordinate, take no more bits; more bits leave a smaller error."""
    k, _, sums = some_sums(800)
    block = layers.coordinates(sums, torch.eye(D, dtype=torch.float64).expand(HKV, D, D))
    y = block.encode(k)
    table = basis.counted([y], [block.spread])
    cost = table.cost()[: basis.ROWS] + basis.low_bits(torch.arange(basis.ROWS))[:, None]

    def rounded(step: int) -> tuple[torch.Tensor, float]:
        """Coordinates, and bits a number."""
        z = torch.zeros_like(y)
        total = 0.0
        for i, spread in enumerate(block.spread.tolist()):
            row = (spread - step + 8) // 16 + 32
            if row >= basis.FIRST:
                codes = (y[:, i] / 2 ** (step / 64)).round()
                z[:, i] = codes * 2 ** (step / 64)
                low = int(basis.low_bits(torch.tensor(row)))
                total += float(cost[row, (codes.long() >> low) + basis.ZERO].sum())
        return z, total / y.numel()

    errors = []
    for bits in (0.5, 1.0, 2.5):
        read = layers.coded(k, block, cost, bits)
        z = block.encode(read)
        off = {s: float((rounded(s)[0] - z).square().sum()) for s in range(-260, 260)}
        step = min(off, key=off.get)
        assert off[step] < 1e-3 * float(y.square().sum())
        assert rounded(step)[1] <= bits < rounded(step - 1)[1]
        errors.append(float((read - k).square().mean()))
    assert errors[0] > 1.3 * errors[1] > 2.5 * errors[2]


def test_error_of_logits_is_relative_to_what_differs_among_keys():
    """Against loops; an error that all keys share is none."""
    torch.manual_seed(0)
    q = torch.randn(1, 6, 5, D, dtype=torch.float64)
    k = torch.randn(1, HKV, 9, D, dtype=torch.float64)
    read = k + 0.1 * torch.randn_like(k)
    error, variance = layers.logit_error(q, k, read)
    want = [0.0, 0.0]
    for head in range(6):
        for t in range(5):
            for i, keys in enumerate((read - k, k)):
                logits = [float(q[0, head, t] @ keys[0, head // 2, j]) for j in range(9)]
                average = sum(logits) / 9
                want[i] += sum((x - average) ** 2 for x in logits) / 8
    assert (error, variance) == pytest.approx(tuple(want))
    shared = k + torch.randn(1, HKV, 1, D, dtype=torch.float64)
    assert layers.logit_error(q, k, shared)[0] < 1e-20


@pytest.fixture(scope="module")
def long_base(tmp_path_factory, text) -> Path:
    """The folder of a pretrained stage with room for two blocks of keys."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(folder / "run", text, "--pretrain_steps=1", "--block_size=160")


def measured(folder: Path, base: Path, *flags: str) -> list[dict]:
    """The rows of the program on a tiny run."""
    sizes = ["--block_size=160", "--calibration=3", "--sequences=2", "--device=cpu"]
    named = [f"--init_from={base}", f"--results={folder}", *sizes, *flags]
    call_main(layers, parse_args(layers.CONFIGS, named))
    return json.loads((folder / "results.json").read_text())


def test_rows_of_all_layers_are_made_and_drawn(long_base, text, own_cache, tmp_path, capsys):
    """A row for each layer and one for all, of which shares are means and bytes sums; a record and a
    picture; the table of a page has their columns."""
    rows = measured(tmp_path / "rows", long_base, f"--dataset={text}", "--calibrate=pydocs")
    assert [r["impl"] for r in rows] == ["layer 0", "layer 1", "all layers"]
    fields = [[f for f in r if not f.startswith("pays_after")] for r in rows]
    assert fields[2] == fields[0]
    assert rows[2]["told_all"] == pytest.approx((rows[0]["told_all"] + rows[1]["told_all"]) / 2)
    assert rows[2]["map_bytes_own"] == 2 * rows[0]["map_bytes_own"] == 2 * 2 * 2 * 16 * 16
    saved = rows[0]["saved_bits_all"] + rows[1]["saved_bits_all"]
    assert rows[2]["pays_after_all"] == pytest.approx(8 * rows[2]["map_bytes_all"] / saved)
    for r in rows:
        assert r["coordinates_4"] < r["coordinates_2"] and r["integers_4"] < r["integers_2"]
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {
        "results.json",
        "made.json",
        "layers.png",
    }
    cells = page.cells_of(rows[:1])
    assert cells["own head tells"] == f"{rows[0]['told_own']:.1%}"
    made = json.loads((tmp_path / "rows" / "made.json").read_text())
    assert [t["sha256"] for t in made["texts"]] == [rows[0]["text"]["sha256"]]
    assert [file["flag"] for file in made["files"]] == ["dataset"]


def test_layers_are_drawn_one_by_one(tmp_path, monkeypatch, pictures):
    """Three panels, a line for each way, a point for each layer; the row of all layers is none, nor
    a map that saves nothing."""
    row = dict(told_own=0.1, told_all=0.3, pays_after_own=900.0, integers_2=0.1, coordinates_2=0.01)
    rows = [{"impl": f"layer {i}", "pays_after_all": None, **row} for i in (2, 3, 5)]
    rows.append(rows[0] | {"impl": "all layers", "told_own": 0.9})
    told, pays, error = drawn(monkeypatch, layers_figure, tmp_path, rows)
    assert [*told.lines[1].get_xdata()] == [2, 3, 5]
    assert [*told.lines[1].get_ydata()] == [10, 10, 10]
    assert [*pays.lines[1].get_ydata()] == [900, 900, 900]
    labels = [line.get_label() for line in error.lines]
    assert labels == ["integers, 2.5 bits a number", "calibrated coordinates, 2.5 bits a number"]


def test_what_layers_are_not_measured_on(long_base, text, own_cache, tmp_path, capsys):
    """One line for a text that is fitted on, too, no model and short sequences."""
    line = error_line(
        measured, tmp_path, long_base, f"--dataset={text}", f"--calibrate={text},pydocs"
    )
    assert "that is the text that is measured" in line
    with pytest.raises(SystemExit):
        measured(tmp_path, long_base, "--block_size=71")
    assert "block_size=71" in capsys.readouterr().err
    done = python("-m", "benchmarks.layers", "--dataset=pycode")
    assert done.returncode == 2 and done.err.count("\n") == 1 and "--init_from" in done.err
