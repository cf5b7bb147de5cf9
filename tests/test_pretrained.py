"""Models of others: Hugging Face folders against transformers, the hub, memory, adapters on such a
base (promise 17)."""

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
from foreign import (  # noqa: F401 (fixture)
    SCALING,
    SHAPES,
    TEXT,
    THEIR_FOLDERS,
    config_json,
    definition,
    edit,
    edit_tensors,
    folder,
    ids,
    logits,
    random_model,
    theirs,
    write_folder,
)
from helpers import error_line
from safetensors.torch import load_file, save_file
from test_parity import needs_transformers

import kv_router
import lora
from config import KVConfig
from loaders import checkpoint
from loaders.device import autocast
from loaders.export import export
from loaders.huggingface import model_config
from loaders.runs import Run, added_state, base_reference, is_foreign, load_run
from loaders.tokenizer_json import LibraryTokenizer, from_definition
from loaders.weights import load_model_state, model_state
from model import Transformer
from runs import ROOT
from settings.adapters import AdapterConfig
from settings.fields import to_dict

pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")


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
