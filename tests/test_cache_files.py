"""Caches in files: they go on as the saved one, and files of other models, damaged or forged ones
are refused by name."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers import error_line, tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from stores import (  # noqa: F401 (fixtures)
    FOREIGN,
    PATHS,
    agree,
    decoded,
    model,
    name,
    named,
    other,
    saved,
)

from storage.cache import KVCache
from storage.saved import numbers_hash


def test_a_loaded_cache_goes_on_as_the_saved_one(model, tmp_path):
    """Of any max_len, filled or empty: what is loaded decodes, grows and takes prompts."""
    path = tmp_path / "c.safetensors"
    want = saved(model, path)
    agree(decoded(model, KVCache.load(path, model), 8), want)
    idx = tokens(2, 30, seed=4)
    for max_len in (60, 90):
        empty = model.new_cache(2, max_len)
        empty.save(path)
        loaded = KVCache.load(path, model)
        assert loaded.lengths.tolist() == [0, 0]
        with torch.no_grad():
            agree(model.prefill(idx, loaded), model.prefill(idx, empty))
        agree(decoded(model, loaded, 5), decoded(model, empty, 5))


@pytest.mark.parametrize("difference", FOREIGN)
def test_a_file_of_another_model_is_refused_by_name(difference, tmp_path):
    """Other weights, shapes, types, positions, ways to store: one line that names the difference
    and the file. The model it was saved with still loads it."""
    saver, loader, word = FOREIGN[difference]
    path = tmp_path / "c.safetensors"
    model = saver()
    want = saved(model, path)
    line = error_line(KVCache.load, path, loader())
    assert word in line and str(path) in line, line
    agree(decoded(model, KVCache.load(path, saver()), 8), want)


@pytest.mark.parametrize("kind", ["value groups", "integers", "levels", "mixsga", "cla"])
def test_a_damaged_file_is_refused(kind, tmp_path):
    """Cut anywhere, or with one bit turned anywhere that counts: one line, no raw error."""
    model = PATHS[kind]()
    path = tmp_path / "c.safetensors"
    want = saved(model, path)
    data = path.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for n in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:n])
        assert str(bad) in error_line(KVCache.load, bad, model)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    at = [*range(8), *range(8, header, max(1, header // 60))]
    at += list(range(header, len(data), len(data) // 40))
    for i in at:
        turned = bytearray(data)
        turned[i] ^= 1 << i % 8
        bad.write_bytes(turned)
        try:
            loaded = KVCache.load(bad, model)
        except ValueError as e:
            assert type(e) is ValueError and "\n" not in str(e) and str(bad) in str(e)
            refused += 1
        else:  # blanks that fill the header
            assert i < header
            agree(decoded(model, loaded, 8), want)
    assert refused > len(at) - 4


def test_what_is_no_cache_is_refused(tmp_path):
    """Files of weights, of text, of nothing, folders, places where nothing is: one line."""
    model = tiny_model()
    weights = tmp_path / "weights.safetensors"
    save_file({"0.window_k": torch.zeros(2, 3, 4, 16)}, weights)
    named = tmp_path / "named.safetensors"
    save_file({"n_window": torch.zeros(2)}, named, {"format": "pt"})
    text = tmp_path / "text.safetensors"
    text.write_text("a cache\n" * 20)
    for path in (weights, named, text, tmp_path, tmp_path / "none.safetensors"):
        assert str(path) in error_line(KVCache.load, path, model)


def forge(to, meta: dict, tensors: dict) -> None:
    """Write a cache's file of these tensors, with a checksum that fits."""
    digest = hashlib.sha256((numbers_hash(tensors) + meta["about"]).encode()).hexdigest()
    save_file({k: t.contiguous() for k, t in tensors.items()}, to, {**meta, "sha256": digest})


@pytest.mark.parametrize("kind", ["dense", "value groups", "integers", "levels", "mixsga", "cla"])
def test_a_file_whose_parts_do_not_fit_is_refused(kind, tmp_path):
    """Every tensor in turn is missing, shorter, of another type or shape, and every count out of
    range, under a checksum that fits: one line."""
    model = PATHS[kind]()
    path = tmp_path / "c.safetensors"
    saved(model, path)
    bad = tmp_path / "bad.safetensors"
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    forge(bad, meta, tensors)
    KVCache.load(bad, model)  # the checksum does fit
    for field, t in tensors.items():
        changes = {
            "missing": None,
            "another type": t.half(),
            "another shape": t[None],
            "a scalar": t.new_zeros(()),
        }
        if t.numel() and not field.endswith("_base"):  # those follow from the others
            changes["shorter"] = t[:-1]
        if t.ndim > 1 and t.size(-1):
            changes["wider"] = torch.cat((t, t[..., :1]), -1)
        if field.split(".")[-1].startswith("n_"):
            changes["negative"] = torch.full_like(t, -1)
            changes["huge"] = torch.full_like(t, 2**40)
        for what, changed in changes.items():
            if what == "another type" and t.dtype == torch.float16:
                continue
            others = {k: other for k, other in tensors.items() if k != field}
            forge(bad, meta, others if changed is None else {**others, field: changed})
            try:
                assert str(bad) in error_line(KVCache.load, bad, model)
            except BaseException as e:
                raise AssertionError(f"{field}: {what}") from e
