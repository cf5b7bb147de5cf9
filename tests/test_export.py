"""Models exported as Hugging Face folders: transformers computes the same from them, and so does the
project (promise 17)."""

from __future__ import annotations

import pytest
import torch
from foreign import (  # noqa: F401 (fixture)
    EXPORTS,
    OUR_SHAPE,
    TEXT,
    definition,
    exported_model,
    folder,
    ids,
    logits,
    random_model,
    run_of,
    theirs,
)
from helpers import error_line
from test_parity import needs_transformers

import lora
from loaders.export import export
from loaders.runs import load_run
from loaders.tokenizer import ByteTokenizer
from loaders.tokenizer_json import from_definition
from loaders.weights import model_state
from model import Transformer
from runs import python
from settings.adapters import AdapterConfig

pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")


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
