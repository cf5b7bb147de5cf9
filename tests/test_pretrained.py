"""Models of others, in and out: Hugging Face folders against transformers, export, refusals,
memory, adapters on such a base (promise 17)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import (
    EXPORTS,
    OUR_SHAPE,
    SHAPES,
    TEXT,
    THEIR_FOLDERS,
    config_json,
    definition,
    exported_model,
    fitting,
    ids,
    random_model,
    run_of,
    theirs,
    write_folder,
)
from helpers import error_line
from safetensors.torch import load_file, save_file
from test_no_code_in_files import bombs
from test_parity import needs_transformers

import kv_router
import lora
from config import KVConfig
from loaders import checkpoint
from loaders.device import autocast
from loaders.export import export
from loaders.huggingface import model_config
from loaders.runs import Run, added_state, base_reference, is_foreign, load_pretrained, load_run
from loaders.tokenizer import ByteTokenizer
from loaders.tokenizer_json import LibraryTokenizer, from_definition
from loaders.weights import load_model_state, model_state
from model import Transformer
from runs import ROOT, python
from settings.adapters import AdapterConfig
from settings.fields import to_dict

pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")


def logits(model: Transformer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny Llama's folder, all in order."""
    return write_folder(tmp_path / "m", config_json())


def edit(folder: Path, **changes) -> None:
    """Change settings in a folder's config.json; ... takes one out."""
    d = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in d.items() if v is not ...}))


def edit_tensors(folder: Path, **changes) -> None:
    """Change tensors of a folder by their name with _ for every dot; ... takes one out."""
    tensors = load_file(folder / "model.safetensors")
    names = {k.replace(".", "_"): k for k in tensors}
    for key, value in changes.items():
        if value is ...:
            del tensors[names[key]]
        else:
            tensors[names.get(key, key)] = value
    save_file(tensors, folder / "model.safetensors")


# ----------------------------------------------------------------------------- in


@needs_transformers
@pytest.mark.parametrize("name", THEIR_FOLDERS)
def test_folder_logits_equal_transformers(name, tmp_path_factory):
    """A folder that transformers' save_pretrained wrote gives its logits to 1e-5 (they are of order
    1): Llama with a head dimension of its own, Llama 3's RoPE past its original context, Qwen2 with
    bias, Mistral; tied and not, one file and shards, three dtypes."""
    at, out, said = theirs(tmp_path_factory)
    shape, tied, dtype = THEIR_FOLDERS[name]
    run = load_run(at / name)
    assert (len(list((at / name).glob("*.safetensors"))) > 1) == name.endswith("sharded")
    assert run.model.cfg.tie_embeddings == tied == said[name]["tied"] and not any(
        said[name]["wrong"].values()
    )
    assert (
        run.model.cfg.qkv_bias == (shape == "qwen2")
        and next(run.model.parameters()).dtype == torch.float32
    )
    x = ids(name, SHAPES[shape]["vocab_size"], *out[name].shape[:2])
    assert out[name].std() > 0.6 and (logits(run.model, x) - out[name]).abs().max() < 1e-5
    assert run.tokenizer.encode(TEXT) == from_definition(definition(), "tiny").encode(TEXT)
    # the scaling is felt, and the sequence is longer than the original context
    if shape == "llama3":
        plain = replace(run.model.cfg, rope_factor=1.0)
        other = Transformer(plain)
        load_model_state(other, model_state(run.model), "test")
        assert (
            x.size(1) > 2 * run.model.cfg.rope_original
            and (logits(other.eval(), x) - out[name]).abs().max() > 0.05
        )
    if dtype != "f32":
        half = load_run(at / name, weights="bfloat16").model
        assert {p.dtype for p in half.parameters()} == {
            torch.bfloat16
        } and half.rope_cos.dtype == torch.float32
        assert dtype == "f16" or all(
            torch.equal(a.float(), b)
            for a, b in zip(half.parameters(), run.model.parameters(), strict=True)
        )


SCALING = SHAPES["llama3"]["scaling"]
THETA = {"rope_theta": 500.0}


@pytest.mark.parametrize(
    "how, changes",
    {
        "transformers 5": dict(rope_theta=..., rope_scaling=..., rope_parameters=THETA | SCALING),
        "type, not rope_type": dict(
            rope_scaling={"type" if k == "rope_type" else k: v for k, v in SCALING.items()}
        ),
        "both styles": dict(rope_parameters=THETA | SCALING),
        "theta in rope_scaling": dict(rope_theta=..., rope_scaling=THETA | SCALING),
        "rope_parameters null": dict(rope_parameters=None),
        "counts as floats": dict(rope_scaling=SCALING | {"original_max_position_embeddings": 32.0}),
    }.items(),
)
def test_llama3_config_in_every_spelling_is_the_same(how, changes):
    """The keys of transformers 4 and 5 for Llama 3's scaling give one ModelConfig."""
    want = model_config(config_json("llama3"), "x")
    assert want.rope_factor == 8 and want.rope_original == 32 and want.rope_theta == 500
    assert model_config(config_json("llama3", **changes), "x") == want


def test_config_defaults_are_those_of_transformers():
    """Absent or null: head_dim n_embd / n_head, KV heads as many as heads, rope_theta 10000,
    untied; a Mistral's window is 4096."""
    c = model_config(
        config_json(
            "qwen2",
            num_key_value_heads=None,
            head_dim=None,
            rope_theta=...,
            tie_word_embeddings=...,
        ),
        "x",
    )
    assert (c.head_dim, c.n_kv_head, c.rope_theta, c.tie_embeddings, c.qkv_bias) == (
        6,
        4,
        10000,
        False,
        True,
    )
    c = model_config(
        config_json(
            "llama", hidden_size=36, num_key_value_heads=..., head_dim=..., rope_parameters=None
        ),
        "x",
    )
    assert (c.head_dim, c.n_kv_head, c.rope_factor, c.qkv_bias) == (6, 6, 1, False)
    assert (
        model_config(
            config_json("mistral", max_position_embeddings=8192, sliding_window=...), "x"
        ).block_size
        == 4096
    )
    assert (
        model_config(
            config_json("qwen2", use_sliding_window=False, sliding_window=8), "x"
        ).block_size
        == 29
    )


def test_a_sliding_window_cuts_the_context(folder):
    """A Mistral or Qwen2 whose window is shorter than its context loads with the window as its
    context: same logits inside, refused past it."""
    x = ids("x", 263, 2, 11)
    want = logits(load_run(folder).model, x)
    edit(folder, model_type="mistral", sliding_window=11)
    model = load_run(folder).model
    assert model.cfg.block_size == 11 and torch.equal(logits(model, x), want)
    assert "the model's context is 11" in error_line(model, ids("x", 263, 1, 12))
    assert (
        model_config(
            config_json("qwen2", use_sliding_window=True, sliding_window=5), "x"
        ).block_size
        == 5
    )


def test_names_without_prefix_old_tables_and_extra_files_load(folder):
    """Names without 'model.', the inverse frequencies that old files hold, a tied head stored
    twice, and a second format beside model.safetensors (consolidated.safetensors) all give the same
    model."""
    want = load_run(folder).model
    tensors = load_file(folder / "model.safetensors")
    x = ids("x", 263, 2, 17)
    save_file(
        {k.removeprefix("model."): t for k, t in tensors.items()}
        | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        folder / "model.safetensors",
    )
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert torch.equal(logits(load_run(folder).model, x), logits(want, x))
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tied, folder / "model.safetensors")
    edit(folder, tie_word_embeddings=True)
    model = load_run(folder).model
    assert (
        model.lm_head.weight is model.embed_tokens.weight
        and (logits(model, x) - logits(want, x)).abs().max() > 0.1
    )
    edit(folder, tie_word_embeddings=False)
    assert torch.equal(logits(load_run(folder).model, x), logits(model, x))


def test_tokenizers_of_other_kinds_and_bos(folder):
    """A tokenizer.json that only the package tokenizers reads comes with the model; a template's
    first token is bos; a vocabulary smaller than the model's is fine."""
    pytest.importorskip("tokenizers", reason="the case needs the package tokenizers")
    vocab = {"[UNK]": 0, "hello": 1, "world": 2, "<|endoftext|>": 3}
    spec = definition() | {
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": None,
        "added_tokens": [definition()["added_tokens"][0] | {"id": 3}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_run(folder).tokenizer
    assert (
        isinstance(tokenizer, LibraryTokenizer)
        and tokenizer.encode("hello world") == [1, 2]
        and (tokenizer.vocab_size, tokenizer.eot) == (4, 3)
    )
    (folder / "tokenizer.json").write_text(json.dumps(definition(bos=True)))
    tokenizer = load_run(folder).tokenizer
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.bos) == (
        261,
        260,
        260,
    ) and tokenizer.encode("hello") == [259]


def test_run_says_where_its_base_is_and_hashes_all_weights(tmp_path):
    """base is the absolute path; base_sha256 follows the weights' bytes in every shard, not the
    config, and not the folder's place."""
    folder = write_folder(tmp_path / "a", config_json())
    one = load_run(folder)
    assert (
        one.base == str(folder.resolve())
        and one.adapter.adapter == "none"
        and one.kv.kv == "dense"
        and one.model.training is False
    )
    shutil.copytree(folder, tmp_path / "b")
    assert load_run(tmp_path / "b").base_sha256 == one.base_sha256
    tensors = load_file(folder / "model.safetensors")
    seen = {one.base_sha256}
    (tmp_path / "b" / "model.safetensors").unlink()
    for changed in "123", "1", "2", "3":  # three files without an index; then one of them changes
        tensors = {k: t + 1 for k, t in tensors.items()}
        for i in map(int, changed):
            save_file(
                {k: tensors[k] for k in sorted(tensors)[i - 1 :: 3]},
                tmp_path / "b" / f"{i}.safetensors",
            )
        seen.add(load_run(tmp_path / "b").base_sha256)
    assert len(seen) == 5


def test_is_foreign_tells_theirs_from_ours(folder, tmp_path):
    """hf:, .gguf and a folder with a model's config.json are foreign; a checkpoint, a stage, a run
    and nothing at all are not."""
    step = checkpoint.save(
        tmp_path / "run" / "pretrain",
        "best",
        step=1,
        tensors={"model": {"a": torch.ones(1)}},
        config={"model_type": "llama"},
    )
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"model": {"n_layer": 2}, "train": {}})
    )
    assert [is_foreign(p) for p in ("hf:a/b", "x/y.gguf", folder, str(folder))] == [True] * 4
    assert [
        is_foreign(p) for p in (step, step.parent, tmp_path / "run", tmp_path / "none", "scratch")
    ] == [False] * 5


# ----------------------------------------------------------------------------- refusals

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


# ----------------------------------------------------------------------------- the hub


def fake_hub(monkeypatch, answer) -> list[tuple]:
    """Put a huggingface_hub in place whose snapshot_download records its arguments and gives, or
    raises, `answer`: one for all names, or one for each."""
    asked = []
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(name, **how):
        asked.append((name, how))
        if isinstance(answer, Exception):
            raise answer
        return str(answer[name] if isinstance(answer, dict) else answer)

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return asked


def test_hub_model_loads_at_the_revision_asked_for(tmp_path, monkeypatch):
    """hf:ORG/NAME hands name and revision to the hub's client, asks for no file that can run code,
    and notes the commit it got."""
    asked = fake_hub(monkeypatch, write_folder(tmp_path / "0123abcd", config_json()))
    run = load_run("hf:org/name", revision="v1")
    load_run("hf:org/name")
    assert [(n, how["revision"]) for n, how in asked] == [("org/name", "v1"), ("org/name", "main")]
    assert all(p.endswith((".json", ".safetensors")) for p in asked[0][1]["allow_patterns"])
    assert run.base == "hf:org/name@0123abcd" and run.tokenizer.name.startswith("org-name-")


def test_adapter_on_the_hub_loads_on_the_base_that_it_names(tmp_path, monkeypatch):
    """hf:ORG/NAME of an adapter that PEFT wrote is it, on the model of the hub that it names, at
    that one's own revision: the adapter's folder from the disk is the same; as a base it is refused
    by name."""
    base = write_folder(tmp_path / "0123abcd", config_json())
    model = load_run(base).model
    lora.attach(model, AdapterConfig(adapter="lora", r=2, alpha=3.0))
    for p in lora.adapter_state(model).values():
        torch.nn.init.normal_(p, std=0.2)
    lora.export_peft(model, tmp_path / "adapter", "org/base")
    asked = fake_hub(monkeypatch, {"org/base": base, "org/name": tmp_path / "adapter"})
    run = load_run("hf:org/name", revision="v1")
    assert [(n, how["revision"]) for n, how in asked] == [("org/name", "v1"), ("org/base", "main")]
    assert "adapter_config.json" in asked[0][1]["allow_patterns"]
    assert run.base == "hf:org/base@0123abcd" and run.adapter.r == 2
    found = lora.adapter_state(load_run(tmp_path / "adapter").model)
    for name, p in lora.adapter_state(run.model).items():
        assert torch.equal(p, found[name]) and torch.equal(p, lora.adapter_state(model)[name])
    line = error_line(load_run, "hf:org/name", base="hf:org/name")
    assert line.startswith("hf:org/name: an adapter, not a model")


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c", "hf:/name", "hf:org/"])
def test_hub_names_are_checked_before_anything_is_asked(name, monkeypatch):
    """A name that is not ORG/NAME is refused without a request."""
    asked = fake_hub(monkeypatch, OSError("never"))
    assert "a model is named hf:ORG/NAME" in error_line(load_run, name) and asked == []


def test_hub_failures_are_one_line(monkeypatch):
    """What the hub raises offline or for a missing model, of several lines, becomes one; without
    its package the line says what to install."""

    class Transport(Exception):  # as httpx has it: neither OSError nor ValueError
        pass

    for error in (
        FileNotFoundError("cannot find it\nand traffic is disabled"),
        ValueError("bad name"),
        Transport("reset\nby peer"),
    ):
        fake_hub(monkeypatch, error)
        line = error_line(load_run, "hf:org/name", revision="v1")
        assert "hf:org/name at revision v1 cannot be had" in line and "go online" in line
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in error_line(load_run, "hf:org/name")


# ----------------------------------------------------------------------------- out


@needs_transformers
@pytest.mark.parametrize("name", EXPORTS)
def test_export_loads_in_transformers_with_equal_logits(name, tmp_path_factory):
    """Promise 17: transformers loads the folder without a missing or unexpected tensor and gives
    our logits to 1e-5, for large random weights, bias on and off, tied and not, scaled RoPE,
    bfloat16, LoRA merged; AutoTokenizer gives our ids."""
    _, out, said = theirs(tmp_path_factory)
    model, adapter = exported_model(name)
    base = Transformer(model.cfg).eval()
    base.load_state_dict({k: t for k, t in model.state_dict().items() if "lora_" not in k})
    model = lora.merge(model).float()
    x = ids(name, OUR_SHAPE["vocab_size"], 2, 57)
    assert not any(said[name]["wrong"].values()) and said[name]["tied"] == model.cfg.tie_embeddings
    assert out[name].std() > 0.6 and (logits(model, x) - out[name]).abs().max() < 1e-5
    assert ((logits(base, x) - out[name]).abs().max() > 0.1) == (adapter == "lora")
    assert said[name]["tokens"] == from_definition(definition(), "tiny").encode(TEXT)
    config = said[name]["config"]
    assert (
        config["eos_token_id"] == 260
        and config["max_position_embeddings"] == OUR_SHAPE["block_size"]
    )


@pytest.mark.parametrize("name", [n for n in EXPORTS if "lora" not in n])
def test_export_and_load_give_the_same_bits_back(name, tmp_path):
    """export -> load_run: equal ModelConfig, bit-equal tensors in their dtype, equal logits and
    token ids; and once more the same bytes."""
    model, _ = exported_model(name)
    export(run_of(model), tmp_path / "one")
    again = load_run(tmp_path / "one", weights="bfloat16" if name == "bf16" else "float32")
    # who may read one file may read all
    assert len({p.stat().st_mode for p in (tmp_path / "one").iterdir()}) == 1
    got = model_state(again.model)
    want = model_state(model)
    assert again.model.cfg == model.cfg and got.keys() == want.keys()
    assert all(got[k].dtype == want[k].dtype and torch.equal(got[k], want[k]) for k in want)
    assert again.tokenizer.definition == definition() and again.tokenizer.encode(
        TEXT
    ) == from_definition(definition(), "tiny").encode(TEXT)
    x = ids(name, OUR_SHAPE["vocab_size"], 2, 23)
    assert torch.equal(logits(again.model, x), logits(model, x))
    export(again, tmp_path / "two")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_export_refuses_what_transformers_cannot_hold_and_leaves_nothing(tmp_path, monkeypatch):
    """Routed adapters, value groups, Qwen2 with another head dimension, and a folder in use are
    refused; these and a full disk leave neither folder nor temporary behind, and a refused run's
    model is as it was."""
    model = random_model()
    to = tmp_path / "deep" / "out"
    for run, words in (
        (run_of(model, adapter="routed"), "adapter=routed"),
        (run_of(model, adapter="moe_lora"), "adapter=moe_lora"),
        (run_of(model, kv="value_groups"), "kv=value_groups"),
        (run_of(random_model(qkv_bias=True, head_dim=6)), "head_dim=6 with a bias"),
    ):
        assert words in error_line(export, run, to)
        assert list(tmp_path.iterdir()) == []
    lora.attach(model, AdapterConfig(adapter="lora"))
    to.mkdir(parents=True)
    (to / "mine.txt").write_text("mine")
    assert "is not an empty folder" in error_line(export, run_of(model, adapter="lora"), to)
    assert "is not an empty folder" in error_line(
        export, run_of(model, adapter="lora"), to / "mine.txt"
    )
    assert [p.name for p in to.parent.rglob("*")] == ["out", "mine.txt"] and lora.adapter_state(
        model
    )

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loaders.export.save_file", full)
    (to / "mine.txt").unlink()
    with pytest.raises(OSError, match="No space"):
        export(run_of(model, adapter="lora"), to)
    assert [p.name for p in to.parent.rglob("*")] == ["out"]
    monkeypatch.undo()
    export(run_of(model, adapter="lora"), to)  # into the empty folder
    assert (to / "model.safetensors").is_file() and [p.name for p in to.parent.iterdir()] == ["out"]


def test_export_with_the_byte_tokenizer_has_no_tokenizer_json(tmp_path):
    """The byte tokenizer has no tokenizer.json: weights and config are written, and loading the
    folder says what it lacks."""
    export(run_of(random_model(), ByteTokenizer()), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert "no tokenizer.json in it" in error_line(load_run, tmp_path / "out")


# ----------------------------------------------------------------------------- memory

MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import tiktoken, torch
from loaders.runs import load_run
def peak():  # of this process since its start; ru_maxrss would begin at the parent's
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = load_run(sys.argv[2], weights=sys.argv[3]).model
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bfloat16 folder of about 300 MB in few big tensors, gone afterwards."""
    config = config_json(
        vocab_size=24001,
        hidden_size=1536,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=128,
        num_hidden_layers=5,
        intermediate_size=4096,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        shapes = {
            k: t.shape for k, t in model_state(Transformer(model_config(config, "x"))).items()
        }
    tensors = {f"model.{k}": torch.full(s, 0.01, dtype=torch.bfloat16) for k, s in shapes.items()}
    yield write_folder(tmp_path_factory.mktemp("large") / "m", config, tensors)
    shutil.rmtree(tmp_path_factory.getbasetemp() / "large0", ignore_errors=True)


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_loading_needs_little_more_than_the_model(large, weights):
    """In a fresh process the peak rises by less than 1.35 times the weights as they are held, plus
    64 MB (on a busy machine 474 MB for 325)."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT), str(large), weights],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rise, size = map(int, done.stdout.split())
    assert (
        size > 280e6 * (2 if weights == "float32" else 1)
        and 0.95 * size < rise < 1.35 * size + 64e6
    ), (rise / size, rise, size)


# -------------------- adapters on a model of others


def adapt(base: Run, stage: Path, kv: KVConfig, adapter: AdapterConfig) -> torch.Tensor:
    """Put random adapters and calibrated value groups on a base and save them as train.py does;
    returns the folded model's logits."""
    model = base.model
    kv_router.attach(model, kv, [ids("calibrate", 261, 2, 29)])
    lora.attach(model, adapter)
    torch.manual_seed(3)
    for p in lora.adapter_state(model).values():
        torch.nn.init.normal_(p, std=0.2)
    config = {
        "stage": "adapt",
        "model": to_dict(model.cfg),
        "tokenizer": base.tokenizer.name,
        "adapter": to_dict(adapter),
        "kv": to_dict(kv),
        "base": base_reference(base, stage),
        "base_sha256": base.base_sha256,
    }
    tensors = {k: t.detach().clone() for k, t in added_state(model).items()}
    checkpoint.save(
        stage, checkpoint.step_name(5), step=5, tensors={"adapter": tensors}, config=config
    )
    return logits(kv_router.fold(model.eval()), ids("x", 261, 2, 23))


ROUTED = AdapterConfig(adapter="routed"), KVConfig(n_groups=4, topk_groups=2, value_router="linear")
PLAIN = AdapterConfig(adapter="lora", r=2, alpha=3.0), KVConfig(kv="dense")


@pytest.mark.parametrize("adapter, kv", [ROUTED, PLAIN], ids=["routed", "lora"])
def test_adapter_on_a_foreign_base_is_put_together_again(tmp_path, adapter, kv):
    """load_run of a stage finds the base by its absolute path and gives the trained model's logits;
    a moved base is asked for and taken from base=; a base with other weights is refused by sha256;
    the base's tokenizer comes along."""
    folder = write_folder(tmp_path / "models" / "m", config_json())
    want = adapt(load_run(folder), tmp_path / "run" / "s", kv, adapter)
    run = load_run(tmp_path / "run" / "s")
    x = ids("x", 261, 2, 23)
    assert (
        torch.equal(logits(run.model, x), want)
        and run.base == str(folder.resolve())
        and run.adapter == adapter
        and run.kv == kv
    )
    assert (
        run.tokenizer.encode("hello") == [259]
        and (logits(load_run(folder).model, x) - want).abs().max() > 0.1
    )
    with autocast(torch.device("cpu"), "bfloat16"):
        half = logits(load_run(tmp_path / "run" / "s", weights="bfloat16").model, x).float()
    # rounding turns some selections of this random model
    assert (half - want).abs().median() < 0.2 * want.std()
    # the base is named by absolute path: the run may move
    shutil.move(tmp_path / "run", tmp_path / "else" / "where")
    stage = tmp_path / "else" / "where" / "s"
    assert torch.equal(logits(load_run(stage).model, x), want)
    shutil.move(folder, tmp_path / "moved")
    assert "say where it is with --init_from" in error_line(load_run, stage)
    assert torch.equal(logits(load_run(stage, base=str(tmp_path / "moved")).model, x), want)
    edit_tensors(tmp_path / "moved", model_norm_weight=torch.full((18,), 0.5))
    line = error_line(load_run, stage, base=str(tmp_path / "moved"))
    assert "sha256" in line and "give the base it was trained on" in line


def test_adapter_on_a_hub_model_asks_for_the_commit_it_was_trained_on(tmp_path, monkeypatch):
    """The base is noted as hf:ORG/NAME@COMMIT, and that commit is asked for when the adapter is
    loaded, wherever main is by then."""
    asked = fake_hub(monkeypatch, write_folder(tmp_path / "c0ffee", config_json()))
    want = adapt(load_run("hf:org/name"), tmp_path / "s", PLAIN[1], PLAIN[0])
    run = load_run(tmp_path / "s")
    assert asked[-1][1]["revision"] == "c0ffee" and torch.equal(
        logits(run.model, ids("x", 261, 2, 23)), want
    )
    load_run(tmp_path / "s", base=str(tmp_path / "c0ffee"))
    assert len(asked) == 2


def test_merged_export_of_an_adapter_on_a_foreign_base(tmp_path):
    """A LoRA stage exports as one model whose logits are the adapted ones, and which loads without
    its base."""
    folder = write_folder(tmp_path / "m", config_json())
    want = adapt(load_run(folder), tmp_path / "s", PLAIN[1], PLAIN[0])
    export(load_run(tmp_path / "s"), tmp_path / "out")
    shutil.rmtree(folder)
    assert (
        logits(load_run(tmp_path / "out").model, ids("x", 261, 2, 23)) - want
    ).abs().max() < 1e-5


def test_own_base_in_bfloat16_keeps_its_table_of_positions(tmp_path):
    """weights=bfloat16 rounds the weights of one of our checkpoints, not the cosines of its
    positions."""
    model = random_model(vocab_size=257)
    adapter = AdapterConfig(adapter="none")
    kv = KVConfig(kv="dense")
    config = {
        "model": to_dict(model.cfg),
        "tokenizer": "byte",
        "adapter": to_dict(adapter),
        "kv": to_dict(kv),
    }
    path = checkpoint.save(
        tmp_path, "best", step=1, tensors={"model": model_state(model)}, config=config
    )
    got = load_run(path, weights="bfloat16").model
    assert {p.dtype for p in got.parameters()} == {torch.bfloat16}
    assert torch.equal(got.rope_cos, model.rope_cos) and torch.equal(got.rope_sin, model.rope_sin)


# ----------------------------------------------------------------------------- the program


def test_program_exports_a_model_as_a_user_would(folder, tmp_path):
    """python -m loaders.export --init_from=A --to=B: one line and how to load it, exit code 0, a folder
    that loads; again: one line, exit code 2."""
    command = (
        "-m",
        "loaders.export",
        f"--init_from={folder}",
        "--to",
        tmp_path / "out",
        "--weights=bfloat16",
    )
    done = python(*command)
    n = sum(p.numel() for p in load_run(folder).model.parameters())
    loading, after = done.err.splitlines()
    assert done.returncode == 0 and loading == f"loading {folder} ..."
    assert after.endswith(f"transformers.AutoModelForCausalLM.from_pretrained('{tmp_path}/out')")
    assert done.out.startswith(f"{tmp_path}/out: {n:,} parameters in torch.bfloat16, tokenizer m-")
    x = ids("x", 261, 2, 23)
    rounded = load_run(folder, weights="bfloat16").model.float()
    assert torch.equal(logits(load_run(tmp_path / "out").model, x), logits(rounded, x))
    done = python(*command)
    assert (
        (done.returncode, done.out) == (2, "")
        and done.err.count("\n") == 1
        and "is not an empty folder" in done.err
    )


def test_program_offline_with_an_empty_cache_says_so(tmp_path, monkeypatch):
    """The real hub client, offline with an empty cache: one line, exit code 2, no traceback."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    done = python(
        "-m",
        "loaders.export",
        "--init_from=hf:org/name",
        "--revision=v1",
        f"--to={tmp_path / 'out'}",
    )
    assert (done.returncode, done.out) == (2, "")
    assert done.err.startswith("loading hf:org/name ...\n") and done.err.count("\n") == 2
    assert (
        "hf:org/name at revision v1 cannot be had" in done.err and not (tmp_path / "out").exists()
    )


def test_program_help_and_wrong_flags_need_no_torch():
    """--help and a missing --to are answered before torch is imported."""
    done = python("-X", "importtime", "-m", "loaders.export", "--help")
    assert done.returncode == 0 and "--init_from" in done.out and "--to" in done.out
    assert not any(line.rsplit("|", 1)[-1].strip() == "torch" for line in done.err.splitlines())
    done = python("-m", "loaders.export", "--init_from=x")
    assert (
        done.returncode == 2
        and done.err
        == "python -m loaders.export: no folder to export to: one is needed; give --to=DIR\n"
    )
