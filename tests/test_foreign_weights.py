"""Weights as people have them, against transformers and PEFT: scaled RoPE, a head called tied that
is not, folders of DeepSeek-R1-Distill's kind, adapters that PEFT wrote.

Both run once, in a process of their own (see tests/foreign.py)."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import config_json, definition, ids, write_folder
from foreign import fitting as random_tensors
from helpers import error_line
from safetensors.torch import load_file, save_file
from test_parity import elsewhere, needs_peft, needs_transformers

import lora
from config import ModelConfig
from loaders.huggingface import model_config, rope_json
from loaders.runs import load_run
from loaders.weights import load_model_state, model_state
from model import Transformer, rope_table
from settings.adapters import AdapterConfig

pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")

T = 90  # tokens, past every original context below
SHAPE = dict(
    vocab_size=263,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_hidden_layers=2,
    intermediate_size=33,
    max_position_embeddings=96,
    rms_norm_eps=1e-5,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
ROPES = {
    "linear": ("llama", dict(rope_type="linear", factor=4.0)),
    "yarn": ("llama", YARN),
    "yarn with bounds": ("qwen2", YARN | dict(factor=2.5, beta_fast=3, beta_slow=0.7)),
    "yarn with its own growth": ("mistral", YARN | dict(attention_factor=1.7)),
    "yarn of two scales": ("llama", YARN | dict(mscale=0.7, mscale_all_dim=2.3)),
    "yarn of one scale": ("llama", YARN | dict(mscale=0.7)),
    "yarn without a factor": ("llama", YARN | dict(factor=None)),
    "yarn without a context": ("qwen2", dict(rope_type="yarn", factor=1.5)),
}
# what config.json of DeepSeek-R1-Distill-Qwen-1.5B says besides its sizes
DISTILLED = dict(
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    attention_dropout=0.0,
    bos_token_id=256,
    eos_token_id=257,
    hidden_act="silu",
    initializer_range=0.02,
    max_window_layers=21,
    rope_theta=10000,
    sliding_window=4096,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.44.0",
    use_cache=True,
    use_mrope=False,
    use_sliding_window=False,
)
RANDOM = """
import json, logging, sys, warnings
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
transformers.logging.set_verbosity_error()
jobs, out, said = json.load(open("jobs.json")), {}, {}

@torch.no_grad()
def logits(model, name):
    return model.eval()(input_ids=torch.tensor(jobs["ids"][name])).logits.contiguous()

def load(name):
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(Path(name).resolve()), dtype=torch.float32, attn_implementation="eager")
"""
SCRIPT = (
    RANDOM
    + """
for name in jobs["folders"]:
    model = load(name)
    out[name] = logits(model, name)
    rope = model.model.rotary_emb
    out[name + ".freq"] = rope.inv_freq.clone()
    said[name] = {"growth": float(rope.attention_scaling),
                  "tied": model.lm_head.weight is model.model.embed_tokens.weight}
if jobs["peft"]:
    import peft
    for name, how in jobs["peft"].items():
        torch.manual_seed(3)
        model = peft.get_peft_model(load("base"), peft.LoraConfig(task_type="CAUSAL_LM", **how))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.normal_(std=0.1)
        model.save_pretrained(name)
        out[name] = logits(model, "base")
save_file(out, "out.safetensors")
json.dump(said, open("said.json", "w"))
"""
)
ADAPTERS = {
    "plain": dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rslora": dict(r=4, lora_alpha=2, use_rslora=True, target_modules="all-linear"),
}


def fitting(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for a config.json, small enough that rounding stays far below 1e-5."""
    return {k: 0.6 * t if t.ndim > 1 else t for k, t in random_tensors(config, seed).items()}


def rope_config(name: str) -> dict:
    kind, scaling = ROPES[name]
    own = {"head_dim": 16} if kind != "qwen2" else {}
    more = dict(scaling=..., sliding_window=None, rope_theta=500.0, rope_scaling=scaling)
    return config_json(kind, **(SHAPE | own | more))


def folders(at: Path) -> dict[str, Path]:
    """Write every folder that both sides read; returns them by name."""
    made = {}
    for i, name in enumerate(ROPES):
        config = rope_config(name)
        made[name] = write_folder(at / name, config, fitting(config, i))
    config = config_json("llama", **SHAPE, head_dim=16)
    for i, name in enumerate(("base", "called tied")):
        made[name] = write_folder(at / name, config, fitting(config, 20 + i))
    called = config | {"tie_word_embeddings": True}
    (made["called tied"] / "config.json").write_text(json.dumps(called))
    config = SHAPE | DISTILLED
    tensors = {k: t.bfloat16() for k, t in fitting(config, 30).items()}
    made["distilled"] = write_folder(at / "distilled", config, tensors, distilled_tokenizer())
    return made


def distilled_tokenizer() -> dict:
    """A tokenizer.json whose end and beginning have DeepSeek's names."""
    spec = definition()
    end = spec["added_tokens"][0]
    names = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")
    spec["added_tokens"] = [end | {"id": 260 + i, "content": n} for i, n in enumerate(names)]
    return spec


_results: dict[str, tuple] = {}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folders by name, transformers' and PEFT's tensors, and what else was said."""
    at = tmp_path_factory.mktemp("weights")
    made = folders(at)
    has_peft = not needs_peft.args[0]
    jobs = {
        "folders": [*made],
        "peft": ADAPTERS if has_peft else {},
        "ids": {name: ids(name, 263, 2, T).tolist() for name in made},
    }
    (at / "jobs.json").write_text(json.dumps(jobs))
    out = elsewhere(SCRIPT, at)
    return made, out, json.loads((at / "said.json").read_text())


def logits(model: Transformer, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(name, 263, 2, T))


# ----------------------------------------------------------------------------- RoPE


@needs_transformers
@pytest.mark.parametrize("name", ROPES)
def test_scaled_rope_equals_transformers(name, theirs):
    """Linear and YaRN scaling, with and without its optional settings: transformers' frequencies to
    1e-6 of each, its growth of queries and keys, its logits to 1e-5 past the original context; and
    they are not those of the unscaled model."""
    made, out, said = theirs
    model = load_run(made[name]).model
    cos, sin = (t[1].double() for t in rope_table(model.cfg))
    freq = torch.atan2(sin, cos)  # of position 1, where no angle has come round
    want = out[f"{name}.freq"].double()
    assert ((freq - want) / want).abs().max() < 1e-6
    assert abs(model.cfg.rope_attention - said[name]["growth"]) < 1e-9
    assert (logits(model, name) - out[name]).abs().max() < 1e-5 < 0.5 < out[name].std()
    for other in (dict(rope_factor=1.0), dict(rope_attention=2.0)):
        changed = Transformer(replace(model.cfg, **other)).eval()
        load_model_state(changed, model_state(model), "test")
        assert (logits(changed, name) - out[name]).abs().max() > 0.05


def test_yarn_equals_its_equations():
    """Frequency by frequency, in plain Python: with r(i) = L theta_i / 2 pi turns, the ramp runs
    from the last whole dimension that turns beta_fast times to the first that turns beta_slow."""
    for factor, fast, slow, original, theta, D in (
        (4.0, 32, 1, 4096, 1e4, 128),
        (40.0, 32, 1, 4096, 1e6, 64),
        (2.5, 5, 0.5, 33, 500.0, 18),
    ):
        cfg = ModelConfig(
            head_dim=D,
            rope_theta=theta,
            rope_scaling="yarn",
            rope_factor=factor,
            rope_high_freq=fast,
            rope_low_freq=slow,
            rope_original=original,
            block_size=2,
        )
        turns = [original * theta ** (-2 * i / D) / (2 * math.pi) for i in range(4 * D)]
        low = max([i for i in range(4 * D) if turns[i] >= fast], default=0)
        high = min(next(i for i in range(4 * D) if turns[i] <= slow), D - 1)
        cos, sin = (t[1].double() for t in rope_table(cfg))
        for i in range(D // 2):
            ramp = min(max((i - low) / (high - low), 0), 1)
            want = theta ** (-2 * i / D) * ((1 - ramp) + ramp / factor)
            got = math.atan2(sin[i], cos[i])
            assert abs(got - want) < 1e-6 * want, (i, got, want)


@pytest.mark.parametrize("name", ROPES)
def test_rope_json_is_what_is_read(name):
    """Written and read again, every scaling is the same; its context is YaRN's where that is
    longer than the config's."""
    cfg = model_config(rope_config(name), "x")
    config = rope_config(name) | {"rope_scaling": rope_json(cfg)}
    assert model_config(config, "x") == cfg
    reach = int(cfg.rope_factor * cfg.rope_original)
    assert cfg.block_size == (max(96, reach) if cfg.rope_scaling == "yarn" else 96)
    assert rope_json(replace(cfg, rope_factor=1.0)) is None


# ----------------------------------------------------------------------------- heads


@needs_transformers
def test_head_called_tied_is_the_files_where_it_differs(theirs):
    """tie_word_embeddings beside a head of its own: the file's head, as transformers has it; its
    config says so from then on."""
    made, out, said = theirs
    run = load_run(made["called tied"])
    assert not said["called tied"]["tied"] and not run.model.cfg.tie_embeddings
    assert run.config["model"]["tie_embeddings"] is False
    assert (logits(run.model, "called tied") - out["called tied"]).abs().max() < 1e-5
    tied = run.model.embed_tokens.weight @ run.model.norm.weight
    assert (tied - run.model.lm_head.weight @ run.model.norm.weight).abs().max() > 0.1


def test_head_is_compared_bit_by_bit(tmp_path):
    """A head that is the embedding's copy stays tied, in any dtype; one changed number, another
    dtype or another shape is another head, and a shape that does not fit is named."""
    config = config_json("llama", **SHAPE, head_dim=16, tie_word_embeddings=True)
    tensors = fitting(config)
    embedding = tensors["model.embed_tokens.weight"].half()
    tensors["model.embed_tokens.weight"] = embedding
    one = embedding.clone()
    one[262, 31] += 1
    for i, (head, tied) in enumerate(
        (
            (embedding.clone(), True),
            (one, False),
            (embedding.float(), False),
            (embedding.view(torch.bfloat16).clone(), False),
        )
    ):
        folder = write_folder(tmp_path / f"{i}", config, tensors | {"lm_head.weight": head})
        model = load_run(folder).model
        assert model.cfg.tie_embeddings == tied
        assert torch.equal(model.lm_head.weight, head.float())
    folder = write_folder(tmp_path / "x", config, tensors | {"lm_head.weight": one[:260]})
    assert "of another shape: lm_head.weight (260, 32) for (263, 32)" in error_line(
        load_run, folder
    )


@needs_transformers
def test_folder_of_deepseek_r1_distills_kind_loads(theirs):
    """Its config's odd entries, its tokens' names, a vocabulary larger than its tokenizer's, in
    bfloat16: transformers' logits, the whole context, its own end token."""
    made, out, _ = theirs
    run = load_run(made["distilled"])
    assert (logits(run.model, "distilled") - out["distilled"]).abs().max() < 1e-5
    assert run.model.cfg.block_size == 96 and run.model.cfg.qkv_bias
    assert run.tokenizer.eot == 260


# ----------------------------------------------------------------------------- adapters


@needs_peft
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_that_peft_wrote_loads_on_its_base(name, theirs, tmp_path):
    """A folder of PEFT's gives PEFT's logits to 1e-5, far from the base's; a base that has moved is
    asked for and taken from base=."""
    made, out, _ = theirs
    folder = made["base"].parent / name
    run = load_run(folder)
    assert run.adapter.adapter == "lora" and run.base == str(made["base"])
    x = ids("base", 263, 2, T)
    with torch.no_grad():
        got = run.model(x)
    assert (got - out[name]).abs().max() < 1e-5 < 0.1 < (got - out["base"]).abs().max()
    moved = shutil.copytree(folder, tmp_path / "adapter")
    edit(moved, base_model_name_or_path=str(tmp_path / "gone"))
    assert "say where it is with --init_from" in error_line(load_run, moved)
    with torch.no_grad():
        assert torch.equal(load_run(moved, base=str(made["base"])).model(x), got)


def edit(folder: Path, **changes) -> None:
    """Change settings of an adapter_config.json; ... takes one out."""
    file = folder / "adapter_config.json"
    d = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in d.items() if v is not ...}))


@pytest.fixture
def exported(tmp_path):
    """A base's folder, an adapter on it as lora.export_peft writes it, and its logits."""
    config = config_json("llama", **SHAPE, head_dim=16)
    base = write_folder(tmp_path / "base", config)
    model = load_run(base).model
    lora.attach(model, AdapterConfig(adapter="lora", r=3, alpha=7.0, lora_targets="q,o,up"))
    torch.manual_seed(5)
    for p in lora.adapter_state(model).values():
        torch.nn.init.normal_(p, std=0.2)
    lora.export_peft(model.eval(), tmp_path / "adapter", str(base))
    return base, tmp_path / "adapter", logits(model, "x")


def test_exported_adapter_loads_back(exported):
    """What lora.export_peft writes gives the adapted model's logits bit for bit, with its settings,
    whether the base is named by its path or from where the adapter lies."""
    base, folder, want = exported
    run = load_run(folder)
    assert torch.equal(logits(run.model, "x"), want)
    assert (logits(load_run(base).model, "x") - want).abs().max() > 0.1
    assert (run.adapter.r, run.adapter.alpha, run.adapter.targets) == (3, 7.0, ("q", "o", "up"))
    assert run.base_sha256 == load_run(base).base_sha256 and run.tokenizer.vocab_size == 261
    edit(folder, base_model_name_or_path="../base")
    assert torch.equal(logits(load_run(folder).model, "x"), want)


PEFT_REFUSALS = {
    "another method": (dict(peft_type="IA3"), "peft_type='IA3'"),
    "no method": (dict(peft_type=...), "peft_type=None"),
    "dora": (dict(use_dora=True), "use_dora=True"),
    "bias": (dict(bias="all"), "bias='all'"),
    "ranks": (dict(rank_pattern={"q_proj": 4}), "rank_pattern={'q_proj': 4}"),
    "whole modules": (dict(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "no rank": (dict(r=...), "r=None"),
    "another rank": (dict(r=4), "its config says r=4"),
    "absurd rank": (dict(r=10**12), "its config says r=1000000000000"),
    "no alpha": (dict(lora_alpha=0), "lora_alpha=0"),
    "dropout": (dict(lora_dropout=1.5), "lora_dropout=1.5"),
    "no base": (dict(base_model_name_or_path=None), "its base None"),
    "itself": (dict(base_model_name_or_path="../adapter"), "is an adapter itself"),
    "a base that is gone": (dict(base_model_name_or_path="/nowhere/b"), "that is gone"),
}


@pytest.mark.parametrize("name", PEFT_REFUSALS)
def test_adapter_refusals_name_the_setting(name, exported):
    """What an adapter of others is and this project is not: one line that names it."""
    changes, words = PEFT_REFUSALS[name]
    edit(exported[1], **changes)
    assert words in error_line(load_run, exported[1])


def test_adapter_tensors_are_looked_at(exported):
    """A tensor of another module, another prefix, a layer without one, a number that is none, a
    damaged or missing file: one line that names it."""
    _, folder, _ = exported
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    one = next(k for k in tensors if "layers.1" in k and "lora_B" in k)
    for changed, words in (
        ({k.replace("up_proj", "router"): t for k, t in tensors.items()}, "router"),
        ({k.replace("model.model.", "model."): t for k, t in tensors.items()}, "base_model.model."),
        ({k: t for k, t in tensors.items() if k != one}, "missing: layers.1"),
        (tensors | {one: tensors[one] * float("nan")}, "not finite: layers.1"),
        (tensors | {one: tensors[one][:, :2].clone()}, "its config says r=3"),
        (tensors | {one: tensors[one][1:].clone()}, "of another shape: layers.1"),
        (tensors | {one: tensors[one][:, 0].clone()}, "its config says r=3"),
    ):
        save_file(changed, file)
        assert words in error_line(load_run, folder)
    file.write_bytes(file.read_bytes()[:-9])
    assert f"{file} cannot be read" in error_line(load_run, folder)
    file.unlink()
    assert "lacks adapter_model.safetensors" in error_line(load_run, folder)
