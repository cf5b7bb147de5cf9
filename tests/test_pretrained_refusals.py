"""Folders of others that are refused: the setting, file or tensor is named in a line, and no pickle
runs (promise 17)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign import (  # noqa: F401 (fixture)
    SCALING,
    config_json,
    edit,
    edit_tensors,
    fitting,
    folder,
)
from helpers import error_line
from test_no_code_in_files import bombs

from loaders.runs import load_pretrained, load_run

pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")


CONFIG_REFUSALS = {
    "mixtral": (dict(model_type="mixtral"), "model_type='mixtral'"),
    "gemma": (dict(model_type="gemma"), "model_type='gemma'"),
    "qwen2_moe": (dict(model_type="qwen2_moe"), "model_type='qwen2_moe'"),
    "null type": (dict(model_type=None), "model_type=None"),
    "odd type": (dict(model_type=["llama"]), "model_type=['llama']"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
    "attention_bias": (dict(attention_bias=True), "attention_bias=True"),
    "mlp_bias": (dict(mlp_bias=True), "mlp_bias=True"),
    "hidden_act": (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "partial rotary": (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "yarn untruncated": (
        dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "truncate": False}),
        "truncate=False of its RoPE scaling",
    ),
    "yarn without a base": (
        dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_theta=1.0),
        "rope_theta=1.0",
    ),
    "yarn past every table": (
        dict(rope_scaling={"rope_type": "yarn", "factor": 1e6}),
        "max_position_embeddings=29000000",
    ),
    "linear without factor": (dict(rope_scaling={"type": "linear"}), "lacks 'factor'"),
    "linear the other way": (dict(rope_scaling={"type": "linear", "factor": 0.5}), "rope_factor"),
    "longrope": (dict(rope_scaling={"type": "longrope"}), "RoPE scaling 'longrope'"),
    "mrope": (dict(use_mrope=True), "use_mrope=True"),
    "dynamic, new keys": (
        dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}),
        "RoPE scaling 'dynamic'",
    ),
    "llama3 without factor": (dict(rope_scaling={"rope_type": "llama3"}), "lacks 'factor'"),
    "llama3 upside down": (
        dict(rope_scaling=SCALING | {"low_freq_factor": 8.0}),
        "rope_low_freq=8.0",
    ),
    "scaling is text": (dict(rope_scaling="llama3"), "rope_scaling='llama3'"),
    "window of nothing": (dict(model_type="mistral", sliding_window=0), "sliding_window=0"),
    "no layers": (dict(num_hidden_layers=...), "lacks 'num_hidden_layers'"),
    "zero heads": (dict(num_attention_heads=0), "num_attention_heads=0"),
    "text": (dict(hidden_size="eighteen"), "hidden_size='eighteen'"),
    "digits as text": (dict(hidden_size="18"), "hidden_size='18'"),
    "list": (dict(num_key_value_heads=[2, 2]), "num_key_value_heads=[2, 2]"),
    "true": (dict(num_hidden_layers=True), "num_hidden_layers=True"),
    "half a head": (dict(num_attention_heads=6.5), "num_attention_heads=6.5"),
    "infinite": (dict(rope_theta=float("inf")), "rope_theta=inf"),
    "nan": (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    "huge": (dict(max_position_embeddings=10**12), "max_position_embeddings=1000000000000"),
    "odd head": (dict(head_dim=9), "head_dim=9"),
    "heads do not divide": (dict(num_key_value_heads=4), "n_kv_head=4"),
    "more layers": (dict(num_hidden_layers=10**6), "missing: layers.999999"),
    "fewer layers": (dict(num_hidden_layers=1), "unexpected: layers.1"),
    "other width": (
        dict(intermediate_size=34),
        "of another shape: layers.0.mlp.gate_proj.weight (33, 18) for (34, 18)",
    ),
    "bias not there": (
        dict(model_type="qwen2", head_dim=8),
        "missing: layers.0.self_attn.q_proj.bias",
    ),
    "small vocabulary": (dict(vocab_size=260), "a tokenizer of 261 ids: the model has 260"),
}


@pytest.mark.parametrize("name", CONFIG_REFUSALS)
def test_config_refusals_name_the_setting(folder, name):
    """Another architecture, a setting this trunk lacks, or one of the wrong type or size: one line
    that names it."""
    changes, words = CONFIG_REFUSALS[name]
    edit(folder, **changes)
    assert words in error_line(load_pretrained, folder)


def write_text(name: str, text: str | bytes):
    return lambda folder: (folder / name).write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )


def shards(weight_map: object, *files: str):
    """Replace the one file by an index; `files` are made as copies of it."""

    def act(folder: Path) -> None:
        for name in files:
            shutil.copy(folder / "model.safetensors", folder / name)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return act


def cut(n: int):
    def act(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:n])

    return act


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NAMES = list(fitting(config_json()))
NAN = torch.full((18,), float("nan"))
FILE_REFUSALS = {
    "missing tensor": (lambda f: edit_tensors(f, model_norm_weight=...), "missing: norm.weight"),
    "missing head": (lambda f: edit_tensors(f, lm_head_weight=...), "missing: lm_head.weight"),
    "unexpected tensor": (lambda f: edit_tensors(f, extra=torch.ones(1)), "unexpected: extra"),
    "another shape": (
        lambda f: edit_tensors(f, model_norm_weight=torch.ones(17)),
        "norm.weight (17,) for (18,)",
    ),
    "nan": (lambda f: edit_tensors(f, model_norm_weight=NAN), "norm.weight: not all finite"),
    "too large": (
        lambda f: edit_tensors(f, model_norm_weight=NAN.double().nan_to_num(1e300)),
        "norm.weight: not all finite in torch.float32",
    ),
    "integers": (
        lambda f: edit_tensors(f, model_norm_weight=torch.ones(18, dtype=torch.int64)),
        "norm.weight is torch.int64",
    ),
    "float8": (
        lambda f: edit_tensors(f, model_norm_weight=torch.ones(18).to(torch.float8_e4m3fn)),
        "norm.weight is torch.float8_e4m3fn",
    ),
    "both prefixes": (
        lambda f: edit_tensors(f, **{"norm.weight": torch.ones(18)}),
        "with and without the prefix",
    ),
    "empty file": (cut(0), "cannot be read"),
    "cut in the header": (cut(100), "cannot be read"),
    "cut in the data": (cut(9000), "cannot be read"),
    "pickles only": (only_bin, "it has .bin files, which can run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file in it"),
    "missing shard": (
        shards(
            {n: "b.safetensors" if "norm" in n else "a.safetensors" for n in NAMES}, "a.safetensors"
        ),
        "lacks b.safetensors",
    ),
    "shard lacks a tensor": (
        shards(dict.fromkeys([*NAMES, "model.more"], "a.safetensors"), "a.safetensors"),
        "no tensor model.more",
    ),
    "shard above": (
        shards(dict.fromkeys(NAMES, "../other/model.safetensors")),
        "has no weight_map of file names",
    ),
    "shard elsewhere": (
        shards(dict.fromkeys(NAMES, "/etc/passwd")),
        "has no weight_map of file names",
    ),
    "shard is the parent": (shards(dict.fromkeys(NAMES, "..")), "lacks .."),
    "shard is a number": (shards(dict.fromkeys(NAMES, 3)), "has no weight_map of file names"),
    "index is a list": (shards(NAMES), "has no weight_map"),
    "index is no json": (
        lambda f: (shards({})(f), write_text("model.safetensors.index.json", "{")(f)),
        "cannot be read as JSON",
    ),
    "index is empty": (shards({}), "layers.1"),
    "config cut": (
        write_text("config.json", '{"model_type": "lla'),
        "config.json cannot be read as JSON",
    ),
    "config is a list": (write_text("config.json", "[1]"), "config.json: holds no JSON object"),
    "config is not text": (
        write_text("config.json", b"\xff\xfe\x00"),
        "config.json cannot be read as JSON",
    ),
    "config nests deep": (
        write_text("config.json", "[" * 100_000),
        "config.json cannot be read as JSON",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json in it"),
    "tokenizer cut": (
        write_text("tokenizer.json", '{"model":'),
        "tokenizer.json cannot be read as JSON",
    ),
    "tokenizer of another kind": (write_text("tokenizer.json", "{}"), "tokenizer m"),
}


@pytest.mark.parametrize("name", FILE_REFUSALS)
def test_file_refusals_name_the_file_or_tensor(folder, name):
    """A tensor or a file that is missing, damaged, foreign, or outside the folder: one line that
    names it."""
    act, words = FILE_REFUSALS[name]
    act(folder)
    assert words in error_line(load_run, folder)


def test_folder_that_names_no_model_type_is_refused(folder):
    """Without model_type a config.json is nobody's: asked for as a model it is refused by that
    name, and as a run by the lack of one."""
    edit(folder, model_type=...)
    assert "model_type=None" in error_line(load_pretrained, folder)
    assert "its config.json names no model_type" in error_line(load_run, folder)


def test_too_large_for_bfloat16_is_refused(folder):
    """float32's largest number is no bfloat16: it would become inf."""
    edit_tensors(folder, model_norm_weight=torch.full((18,), 3.4028e38))
    assert "norm.weight: not all finite in torch.bfloat16" in error_line(
        load_run, folder, weights="bfloat16"
    )
    load_run(folder)


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "m.gguf",
    ],
)
def test_malicious_pickle_in_a_models_folder_never_runs(folder, file, kind):
    """Promise 6 for models of others: a pickle under each name that is read is a one-line
    ValueError and leaves no mark."""
    marker = folder / "ran"
    bomb = bombs(marker)[kind]
    if file == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(bomb)
    if file == "m.gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    error_line(load_run, folder / file if file == "m.gguf" else folder)
    assert not marker.exists()
