"""Files that ask for more than they hold: sizes are checked against their headers before anything
is allocated, for models of others and for our own runs; a base that leads to itself ends."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from foreign import config_json, random_model, write_folder
from helpers import error_line

import lora
from config import KVConfig
from loaders import checkpoint, runs, weights
from loaders.runs import added_state, attach_storage, load_run
from loaders.weights import model_shapes, model_state
from settings.adapters import AdapterConfig
from settings.fields import to_dict

pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")

N = 10**11


@pytest.fixture
def nothing_made(monkeypatch):
    """No model, no adapter and no KV path may be made."""

    def made(*args, **kwargs):
        raise AssertionError("made before the sizes were checked")

    for module in (runs, weights):
        monkeypatch.setattr(module, "Transformer", made)
    monkeypatch.setattr(lora, "attach", made)
    monkeypatch.setattr(runs, "attach_storage", made)


@pytest.mark.parametrize("shape", [{}, dict(qkv_bias=True), dict(tie_embeddings=True, n_layer=1)])
def test_model_shapes_are_the_models(shape):
    """The shapes computed from a config are those of the model made from it, in order."""
    model = random_model(**shape)
    want = [(k, tuple(t.shape)) for k, t in model_state(model).items()]
    assert sorted(model_shapes(model.cfg).items()) == sorted(want)


# ----------------------------------------------------------------------------- models of others

THEIRS = {
    "width": dict(hidden_size=N),
    "layers": dict(num_hidden_layers=N),
    "vocabulary": dict(vocab_size=N),
    "head": dict(head_dim=N),
    "inner": dict(intermediate_size=N),
    "heads": dict(num_attention_heads=N, num_key_value_heads=N),
    "context": dict(max_position_embeddings=N),
    "context of YaRN": dict(rope_scaling=dict(rope_type="yarn", factor=1e9)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_absurd_model_of_others_is_refused_before_it_is_made(tmp_path, name, nothing_made):
    """A config that asks for 10^12 parameters, or for as long a table of positions, beside a small
    file: one line, and no model is made."""
    config = config_json("llama")
    folder = write_folder(tmp_path / "m", config)
    (folder / "config.json").write_text(json.dumps(config | THEIRS[name]))
    line = error_line(load_run, folder)
    assert "does not fit its config" in line or "max_position_embeddings" in line


HEADERS = {
    "nested": b'{"a":' + b"[" * 100_000,
    "nested objects": b'{"a":' + b'{"a":' * 50_000,
    "a length of 10^12": struct.pack("<Q", 10**12) + b"{}",
    "a shape of 10^12": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
    "a shape past counting": {"dtype": "F32", "shape": [10**12] * 2, "data_offsets": [0, 4]},
    "offsets past the end": {"dtype": "F32", "shape": [1], "data_offsets": [10**12, 10**12 + 4]},
}


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_safetensors_header_is_one_line(tmp_path, name, nothing_made):
    """A header that nests deeply or names sizes that the file has not."""
    head = HEADERS[name]
    if isinstance(head, dict):
        head = json.dumps({"model.norm.weight": head}).encode()
    if name != "a length of 10^12":
        head = struct.pack("<Q", len(head)) + head
    folder = write_folder(tmp_path / "m", config_json("llama"))
    (folder / "model.safetensors").write_bytes(head + bytes(4))
    assert "a .safetensors file cannot be read" in error_line(load_run, folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_json_of_a_terabyte_is_not_read(tmp_path, file):
    """A file with a hole of 10^12 bytes: its size is said, not its content read."""
    folder = write_folder(tmp_path / "m", config_json("llama"))
    with open(folder / file, "wb") as f:
        f.truncate(10**12)
    line = error_line(load_run, folder)
    assert f"{folder / file} cannot be read" in line and "1000000000000 bytes" in line


# ----------------------------------------------------------------------------- our own


def save(stage: Path, made, base: Path | None = None, **changes) -> Path:
    """A checkpoint of a model, or of what was added to it; `changes` go into its config's parts."""
    config = {
        "stage": "adapt" if base else "pretrain",
        "model": to_dict(made.cfg),
        "tokenizer": "byte",
        "adapter": to_dict(AdapterConfig(adapter="none")),
        "kv": to_dict(KVConfig(kv="dense")),
    }
    name = "model"
    tensors = model_state(made)
    if base is not None:
        config |= {"base": str(base), "base_sha256": checkpoint.tensor_hash(base)}
        name = "adapter"
        tensors = added_state(made)
    for key, change in changes.items():
        config[key] = config[key] | change
    tensors = {k: t.detach().clone() for k, t in tensors.items()}
    return checkpoint.save(stage, "best", step=1, tensors={name: tensors}, config=config)


OURS = {
    "width": dict(n_embd=N),
    "layers": dict(n_layer=N),
    "vocabulary": dict(vocab_size=N),
    "head": dict(head_dim=N),
    "inner": dict(n_inner=N),
    "heads": dict(n_head=N, n_kv_head=N),
    "context": dict(block_size=N),
}


@pytest.mark.parametrize("kv", ["dense", "mixsga"])
@pytest.mark.parametrize("name", OURS)
def test_absurd_run_of_ours_is_refused_before_it_is_made(tmp_path, name, kv, nothing_made):
    """The same for a checkpoint of ours with a manifest that fits, shared heads too."""
    path = save(tmp_path, random_model(vocab_size=257), model=OURS[name], kv={"kv": kv})
    line = error_line(load_run, path)
    assert "does not fit its config" in line or "block_size=" in line


LINEAR = KVConfig(n_groups=2, topk_groups=1, reconstructor="mlp", recon_hidden=3)
ADDED = {
    "rank": ("lora", KVConfig(kv="dense"), "adapter", dict(r=N)),
    "subspaces": ("routed", KVConfig(kv="dense"), "adapter", dict(subspaces=N)),
    "experts": ("moe_lora", KVConfig(kv="dense"), "adapter", dict(experts=N)),
    "reconstructor": ("none", LINEAR, "kv", dict(recon_hidden=N)),
}


@pytest.mark.parametrize("name", ADDED)
def test_absurd_adapter_of_ours_is_refused_before_it_is_made(tmp_path, name, request):
    """The same for what was added: ranks, branches, the reconstructor's width. As it was saved it
    loads."""
    kind, kv, key, change = ADDED[name]
    base = save(tmp_path / "base", random_model(vocab_size=257))
    adapter = AdapterConfig(adapter=kind, r=2)
    model = lora.attach(attach_storage(load_run(base).model, kv, None), adapter)
    parts = {"adapter": to_dict(adapter), "kv": to_dict(kv)}
    load_run(save(tmp_path / "good", model, base, **parts))
    parts[key] |= change
    path = save(tmp_path / "bad", model, base, **parts)
    request.getfixturevalue("nothing_made")
    line = error_line(load_run, path)
    assert f"does not fit its config: {'lora_A' if key == 'adapter' else 'reconstructor'}" in line
    assert "00000000 rows are said" in line


def test_manifest_of_a_terabyte_is_not_read(tmp_path):
    """A manifest with a hole of 10^12 bytes is named by its size; a file whose manifest says 10^12
    bytes is one line, too."""
    path = save(tmp_path, random_model(vocab_size=257))
    with open(path / "manifest.json", "r+b") as f:
        f.truncate(10**12)
    assert "manifest.json has 1000000000000 bytes" in error_line(load_run, path)
    entries = {"model.safetensors": {"bytes": 10**12, "sha256": "0" * 64}}
    (path / "manifest.json").write_bytes(checkpoint.manifest_bytes(1, entries))
    assert "model.safetensors has" in error_line(load_run, path)


def test_base_that_leads_to_itself_is_refused(tmp_path):
    """A base that is the adapter itself, or another whose base it is: one line, no recursion."""
    base = save(tmp_path / "base", random_model(vocab_size=257))
    adapter = AdapterConfig(adapter="lora", r=2)
    model = lora.attach(load_run(base).model, adapter)
    one = save(tmp_path / "one", model, base, adapter=to_dict(adapter))
    for places in ((one,), (one, tmp_path / "two" / "best")):
        for i, place in enumerate(places):
            c = checkpoint.load(one)
            config = c.config | {"base": str(places[(i + 1) % len(places)])}
            checkpoint.save(place.parent, place.name, step=1, tensors=c.tensors, config=config)
        line = error_line(load_run, one)
        assert f"{one} adapts {places[-1]}: that is an adapter itself" in line
    assert load_run(one, base=str(base)).adapter == adapter


# ----------------------------------------------------------------------------- hints


def test_name_of_the_hub_without_hf_gets_the_hint(tmp_path, monkeypatch):
    """ORG/NAME that is no folder here is taken for a model of the hub; other paths, and those in
    a folder that is here, are not, and a folder of that name is what it is."""
    monkeypatch.chdir(tmp_path)
    line = error_line(load_run, "HuggingFaceTB/SmolLM2-135M")
    assert "no such folder" in line and "hf:HuggingFaceTB/SmolLM2-135M" in line
    Path("here").mkdir()
    for other in (
        "out",
        "out/run/pretrain",
        "./out/run",
        "/out/run",
        "~/run",
        "../run",
        "here/run",
    ):
        assert "hf:" not in error_line(load_run, other), other
    Path("here/m.Q4_0.GGUF").write_bytes(b"")
    assert "here: a folder of m.Q4_0.GGUF; give the .gguf file itself" in error_line(
        load_run, "here"
    )
    save(Path("org/name"), random_model(vocab_size=257))
    load_run("org/name")
