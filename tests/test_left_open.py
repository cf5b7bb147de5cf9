"""The block of keys and the whole first tokens that nobody gave are the plan's under a budget of
bytes; those that somebody gave are stored so, whatever they are, by every program."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import select_runs
import torch
from choosing import config, selecting
from foreign import run_of
from helpers import BY_NORM, TINY, grouped_model, tiny_model, tokens
from select_runs import measure  # noqa: F401 (a fixture)
from sources import ROOT, sources

import cli
import sample
import train
from config import PLANNED_SINKS, KVConfig
from loaders import checkpoint
from loaders.compress import stored_as_asked
from loaders.runs import attach_storage, find_checkpoint, load_run
from report.rows import filled_cache
from runs import adapt_arguments
from selection.budgets import small_budget
from settings.fields import from_dict, to_dict, to_file
from settings.train import DataConfig
from storage.cache import KVCache
from storage.packed import PackedCache
from training import mixsga_table, stage
from training.same_run import entry

pytestmark = pytest.mark.usefixtures("own_cache")
sharp = select_runs.base
LONG = replace(TINY, block_size=401, vocab_size=261)
SHARE = 0.15  # of which the plan makes blocks of 32 keys
PLANNED = (32, PLANNED_SINKS)
GIVEN = [
    ({}, PLANNED),
    (dict(key_block=64), (64, PLANNED_SINKS)),
    (dict(kv_sinks=4), (32, 4)),
    (dict(kv_sinks=0), (32, 0)),
    (dict(key_block=64, kv_sinks=4), (64, 4)),
    (dict(key_block=0, kv_sinks=-1), PLANNED),
]
FIELDS = ("key_block", "kv_sinks")
OLD_USUAL = {"key_block": 64, "kv_sinks": 4}


def as_flags(given: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in given.items()]


def stored(cache: KVCache) -> set[tuple[int, int]]:
    """The block of keys and the number of whole first tokens in a cache's layers."""
    return {(layer.codec.block, layer.codec.n_sinks) for layer in cache.layers}


def older(cfg) -> dict:
    """What a file held of settings before some could be left open: their usual values."""
    d = to_dict(cfg)
    if isinstance(cfg, KVConfig):
        usual = KVConfig()
        d |= {name: OLD_USUAL[name] for name in FIELDS if d[name] == getattr(usual, name)}
    return d


@pytest.mark.parametrize("given, as_stored", GIVEN, ids=str)
def test_a_budget_of_bytes_stores_what_is_given(given, as_stored):
    """First tokens stand in the window beside the newest, keys in as many blocks as are begun, and
    the budget holds whatever is given."""
    n = 401
    m = selecting(model=tiny_model(dtype=torch.float32, cfg=LONG), kv_tail=4, **given)
    m.selector.set(config(kv_bytes=SHARE))
    cache = filled_cache(m, tokens(1, n, seed=8), "float32")
    assert stored(cache) == {as_stored}
    block, n_first = as_stored
    for layer in cache.layers:
        assert layer.n_window.eq(4 + n_first).all()
        begun = sum(-(-held // block) for held in layer.n_packed.flatten().tolist())
        assert len(layer.key_scale) == begun
    assert m.share_of_dense(n, cache) <= SHARE


@pytest.mark.parametrize("given", [given for given, _ in GIVEN], ids=str)
def test_bits_that_are_given_leave_open_64_and_4(given):
    """Of value groups, and of a selection, under a budget of bytes, too."""
    first = given.get("kv_sinks", -1)
    own = (given.get("key_block") or 64, 4 if first < 0 else first)
    kv = KVConfig(key_bits=4, value_bits=4, **given)
    assert (kv.block, kv.first_whole, kv.tail_leaves) == (*own, own[0])
    groups = grouped_model(key_bits=4, value_bits=4, kv_tail=4, **{**BY_NORM, **given})
    cache = filled_cache(groups, tokens(1, 101, seed=8), "float32")
    assert all(type(layer) is PackedCache for layer in cache.layers) and stored(cache) == {own}
    m = selecting(key_bits=4, value_bits=4, kv_tail=4, **given)
    for cfg in (config(kv_keep=0.5), config(kv_bytes=0.5)):
        m.selector.set(cfg)
        assert stored(filled_cache(m, tokens(1, 101, seed=8), "float32")) == {own}
    whole = f"{4 + own[1]} tokens stay whole, 4 newest and {own[1]} first ones"
    assert small_budget(m.selector.kv, 0.01, 100).startswith(whole)


@pytest.mark.parametrize("kind", ["base", "trained"])
@pytest.mark.parametrize("given, as_stored", GIVEN, ids=str)
def test_sample_stores_what_is_given(kind, given, as_stored, text):
    """What goes on with a text and what chats: of a base, and of a run that selects."""
    run = run_of(tiny_model(dtype=torch.float32, cfg=LONG))
    flags = [f"--kv_bytes={SHARE}", *as_flags(given)]
    if kind == "base":
        flags.append("--kv=select")
    else:
        run.kv = KVConfig(kv="select", kv_tail=2)
        attach_storage(run.model, run.kv, run.select, [tokens(2, 60)])
    args = cli.parse_args(sample.CONFIGS, flags)
    how = dict(corpus=text, sequences=2, seed=0, data=DataConfig())
    with stored_as_asked(run, args.given, args.kv, args.select, **how):
        assert stored(filled_cache(run.model, tokens(1, 40), "float32")) == {as_stored}


def test_rows_of_eval_are_of_what_is_given(sharp, measure):
    """A table that was made with 4 first tokens can be made again: bytes of a row are those of the
    cache, as many as are stored that way, however that was said."""
    common = ["--tasks=continuation", "--query=6", "--continuation=9", "--block_size=400"]
    common += ["--sequences=2", "--calibration=2", "--relevance=observed"]
    common += [f"--init_from={sharp}", "--methods=select", f"--kv_byte_budgets={SHARE}"]
    bytes_of = {}
    for given, as_stored in GIVEN:
        (row,) = [r for r in measure(*common, *as_flags(given)) if r["method"] == "select"]
        assert ("keys:4/32" in row["setting"]) == (as_stored[0] == 32)
        bytes_of.setdefault(as_stored, set()).add(row["cache_bytes"])
    assert all(len(same) == 1 for same in bytes_of.values())
    assert len(set.union(*bytes_of.values())) == len(bytes_of) == 5


def test_a_run_keeps_what_it_was_given_and_an_older_one_its_plan(
    sharp, measure, text, tmp_path, monkeypatch
):
    """A run of --stage=select that was given 4 and 64 stores with them under a budget; one that an
    earlier version wrote, where those were written as usual, as the plan has it."""
    common = ["--tasks=continuation", "--query=6", "--continuation=9", "--block_size=400"]
    common += ["--sequences=2", f"--kv_byte_budgets={SHARE}"]

    def trained(name: str, *flags: str) -> Path:
        few = ["--predictors=predictor_query", "--select_steps=1"]
        return select_runs.select(tmp_path / name, text, sharp, *few, *flags)

    def rows(folder: Path, *flags: str) -> list[dict]:
        return measure(f"--out_dir={folder}", *common, *flags)

    left = trained("left")
    given = trained("given", "--key_block=64", "--kv_sinks=4")
    with monkeypatch.context() as m:
        m.setattr(train, "to_file", older)
        m.setattr(stage, "to_file", older)
        old = trained("old")
    saved = {run: checkpoint.load(find_checkpoint(run)).config["kv"] for run in (left, given, old)}
    assert [saved[run].get("format") for run in (left, given, old)] == [2, 2, None]
    as_saved = [{name: kv[name] for name in FIELDS} for kv in saved.values()]
    assert as_saved == [{"key_block": 0, "kv_sinks": -1}, OLD_USUAL, OLD_USUAL]
    assert load_run(old).kv == load_run(left).kv != load_run(given).kv
    assert rows(old) == rows(left) != rows(given)
    assert rows(old, *as_flags(OLD_USUAL)) == rows(given) == rows(left, *as_flags(OLD_USUAL))
    assert rows(given, "--key_block=0", "--kv_sinks=-1") == rows(left)


def test_an_older_run_is_resumed_and_begun_from(text, base, tmp_path, monkeypatch):
    """With the same flags, which say nothing of either; so is a new one."""
    for name, write in (("new", to_file), ("old", older)):
        out = tmp_path / name
        with monkeypatch.context() as m:
            m.setattr(train, "to_file", write)
            m.setattr(stage, "to_file", write)
            train.run(adapt_arguments(out, text, base, "--adapt_steps=1"))
        assert ("format" in json.loads((out / "config.json").read_text())["kv"]) == (name == "new")
        begun = ["--adapt_steps=1", f"--kv_from={out / 'routed-s0'}"]
        train.run(adapt_arguments(tmp_path / f"from {name}", text, base, *begun))
        more = ["--resume", f"--out_dir={out}", "--adapt_steps=2"]
        train.run(cli.parse_args(train.CONFIGS, more))
        kv = json.loads((out / "config.json").read_text())["kv"]
        assert (kv["key_block"], kv["kv_sinks"], kv["format"]) == (0, -1, 2)


def test_files_say_whether_something_is_left_open():
    """In what a file holds, older ones' usual values are left open; a format to come is unknown."""
    for kv in (KVConfig(), KVConfig(**OLD_USUAL), KVConfig(key_block=32, kv_sinks=0)):
        assert from_dict(KVConfig, to_file(kv)) == kv
    assert from_dict(KVConfig, older(KVConfig(n_groups=8))) == KVConfig(n_groups=8)
    assert from_dict(KVConfig, older(KVConfig(key_block=32))) == KVConfig(key_block=32)
    assert entry({"kv": older(KVConfig())}, "kv") == entry({"kv": to_file(KVConfig())}, "kv")
    with pytest.raises(ValueError, match="'format'"):
        from_dict(KVConfig, to_file(KVConfig()) | {"format": 3})
    with pytest.raises(ValueError, match="key_block=None in a file"):
        from_dict(KVConfig, older(KVConfig()) | {"key_block": None})


def test_a_row_of_an_older_table_is_known_again():
    """A row of the mixsga task is not trained again for how its settings were written."""
    kv = KVConfig(kv="mixsga", kv_tail=9)
    key = {"name": "a", "seed": 0, "kv": to_file(kv)}
    assert mixsga_table.is_of(key | {"kv": older(kv)}, key)
    assert not mixsga_table.is_of(key | {"kv": older(KVConfig(kv="mixsga"))}, key)


def test_what_is_left_open_is_read_in_two_places():
    """Whoever read either field would take 0 or -1 for a number of tokens: config.py says what they
    are, and the planner what they are under a budget."""
    raw = re.compile(rf"\.({'|'.join(FIELDS)})\b")
    readers = [path for path in sources(ROOT) if raw.search(path.read_text())]
    assert {path.relative_to(ROOT).as_posix() for path in readers} == {
        "config.py",
        "selection/budgets.py",
    }
