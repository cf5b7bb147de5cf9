"""Parity with transformers and PEFT (promise 16). They run in a process of their own, in another
folder and without our path: a package they import is shadowed by our kernels.py. Tensors travel
through safetensors files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from config import ModelConfig
from generate import generate
from model import Transformer
from settings.adapters import AdapterConfig

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
HAS_PEFT = all(map(importlib.util.find_spec, ("transformers", "peft")))
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="transformers or peft is not installed")

VOCAB = 61
CONTEXT = 29
TOLERANCE = 1e-5
# all with grouped-query attention; only Llama and Mistral may choose a head dimension other than
# n_embd / n_head
SHAPES = {
    "llama": {
        "n_embd": 18,
        "n_head": 6,
        "n_kv_head": 2,
        "head_dim": 8,
        "n_inner": 33,
        "rope_theta": 500.0,
        "norm_eps": 1e-5,
    },
    "qwen2": {
        "n_embd": 24,
        "n_head": 4,
        "n_kv_head": 2,
        "head_dim": 6,
        "n_inner": 31,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "qkv_bias": True,
    },
    "mistral": {
        "n_embd": 20,
        "n_head": 4,
        "n_kv_head": 1,
        "head_dim": 10,
        "n_inner": 35,
        "rope_theta": 1e4,
        "norm_eps": 1e-3,
    },
}
CASES = {
    f"{arch}-{'tied' if tied else 'untied'}": (arch, tied)
    for arch in SHAPES
    for tied in (True, False)
}

BUILD = '''
import json, sys
import torch
import transformers
from safetensors.torch import load_file, save_file

def build(arch, c, weights):
    """The Hugging Face model of our config `c`, with our tensors: every name and shape must fit."""
    Config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "mistral": transformers.MistralConfig}[arch]
    kw = dict(vocab_size=c["vocab_size"], max_position_embeddings=c["block_size"], num_hidden_layers=c["n_layer"],
              hidden_size=c["n_embd"], num_attention_heads=c["n_head"], num_key_value_heads=c["n_kv_head"],
              intermediate_size=c["n_inner"], rms_norm_eps=c["norm_eps"], tie_word_embeddings=c["tie_embeddings"])
    kw |= {"head_dim": c["head_dim"]} if arch != "qwen2" else {}
    rope = {"rope_theta": c["rope_theta"]}
    if int(transformers.__version__.split(".")[0]) >= 5:
        rope = {"rope_parameters": {"rope_type": "default", **rope}}
    model = transformers.AutoModelForCausalLM.from_config(Config(**kw, **rope), attn_implementation="eager").float().eval()
    own = {k if k.startswith("lm_head") else "model." + k: t for k, t in weights.items()}
    model.load_state_dict(own, strict=True)
    return model
'''

LOGITS = (
    BUILD
    + """
out = {}
for name, case in json.load(open("cases.json")).items():
    model, idx = build(case["arch"], case["config"], load_file(name + ".safetensors")), torch.tensor(case["ids"])
    with torch.no_grad():
        out[name + ".logits"] = model(input_ids=idx).logits
        pad = torch.tensor(case["pad"])
        mask = (torch.arange(idx.size(1)) >= pad[:, None]).long()
        out[name + ".padded"] = model(input_ids=idx, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
        out[name + ".greedy"] = model.generate(idx, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None,
                                               pad_token_id=0)
"""
)
SAVE = 'save_file(out, "out.safetensors")'

PEFT = """
import logging, warnings
from peft import PeftModel

class Keep(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())

keep = Keep(logging.WARNING)
for name in (None, "transformers", "peft"):
    logging.getLogger(name).addHandler(keep)
case, said = json.load(open("case.json")), {}
for name in case["adapters"]:
    heard = []
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for kind in (FutureWarning, DeprecationWarning):  # between PEFT and transformers, not about our files
            warnings.simplefilter("ignore", kind)
        base = build("llama", case["config"], load_file("base.safetensors"))
        out["base"] = base(torch.tensor(case["ids"])).logits.clone()
        heard.clear()
        caught.clear()
        model = PeftModel.from_pretrained(base, name).eval()
        out[name] = model(torch.tensor(case["ids"])).logits
        out[name + ".merged"] = model.merge_and_unload()(torch.tensor(case["ids"])).logits
    said[name] = heard + [f"{w.category.__name__}: {w.message}" for w in caught]
json.dump(said, open("said.json", "w"))
"""


def build(arch: str, tied: bool) -> Transformer:
    """A tiny model of that family, float32, every parameter large and random, norms and biases too;
    with std 0.3 everywhere float32 rounding alone, theirs and ours, comes to 1e-5."""
    torch.manual_seed(sum(map(ord, arch)) + tied)
    model = Transformer(
        ModelConfig(
            vocab_size=VOCAB, block_size=CONTEXT, n_layer=2, tie_embeddings=tied, **SHAPES[arch]
        )
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name
            p.copy_((0.3 if norm else 0.24) * torch.randn(p.shape) + norm)
    return model.eval()


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(seed))


PAD = torch.tensor([0, 5, 11])


def elsewhere(script: str, folder) -> dict[str, torch.Tensor]:
    """Run a script in `folder` without our path, offline; return the tensors it left."""
    (folder / "script.py").write_text(script)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "script.py"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "out.safetensors")


def save(model: Transformer, path) -> None:
    save_file({k: t.clone() for k, t in model.state_dict().items()}, path)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What transformers computes from our weights, all six models, and PEFT with our adapters: one
    process, which leaves what PEFT said in `said`."""
    folder = tmp_path_factory.mktemp("transformers")
    cases = {}
    for name, (arch, tied) in CASES.items():
        model = build(arch, tied)
        save(model, folder / f"{name}.safetensors")
        cases[name] = {
            "arch": arch,
            "config": vars(model.cfg),
            "ids": ids().tolist(),
            "pad": PAD.tolist(),
        }
    (folder / "cases.json").write_text(json.dumps(cases))
    if not HAS_PEFT:
        return elsewhere(LOGITS + SAVE, folder), {}
    write_adapters(folder)
    out = elsewhere(LOGITS + PEFT + SAVE, folder)
    return out, json.loads((folder / "said.json").read_text())


@needs_transformers
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, theirs):
    """Our parameters under their names, loaded strictly, give transformers' logits to 1e-5
    absolute, the logits being of order 1 to 5."""
    with torch.no_grad():
        got = build(*CASES[name])(ids())
    want = theirs[0][f"{name}.logits"]
    assert want.std() > 0.8 and (got - want).abs().max() <= TOLERANCE


@needs_transformers
@pytest.mark.parametrize("name", CASES)
def test_padded_logits_equal_transformers(name, theirs):
    """Left padding means what it means there: attention mask and positions counted from the first
    real token."""
    with torch.no_grad():
        got = build(*CASES[name])(ids(), pad=PAD)
    out, _ = theirs
    want = out[f"{name}.padded"]
    for b, p in enumerate(PAD.tolist()):
        assert (got[b, p:] - want[b, p:]).abs().max() <= TOLERANCE
        # the padding made a difference
        assert p == 0 or (want[b, p:] - out[f"{name}.logits"][b, p:]).abs().max() > 0.1


@needs_transformers
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name, theirs):
    """Greedy decoding of a left-padded batch through our cache gives the tokens of transformers'
    generate."""
    prompts = [row[p:] for row, p in zip(ids().tolist(), PAD.tolist(), strict=True)]
    rows, _ = generate(build(*CASES[name]), prompts, 6)
    assert rows == theirs[0][f"{name}.greedy"][:, 17:].tolist()
    assert len({tuple(r) for r in rows}) == 3


ADAPTERS = {"all": "q,k,v,o,gate,up,down", "some": "v,down"}


def adapted(targets: str) -> Transformer:
    """The Llama with plain LoRA, trained for three steps from a random A and B, so that scale and
    layout show."""
    model = lora.attach(
        build("llama", False),
        AdapterConfig(adapter="lora", r=3, alpha=5.0, lora_dropout=0.1, lora_targets=targets),
    )
    torch.manual_seed(7)
    for p in lora.adapter_state(model).values():
        torch.nn.init.normal_(p, std=0.12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(ids()).square().mean().backward()
        optimizer.step()
    return model.eval()


def write_adapters(folder: Path) -> None:
    """The base, our exported adapters, and one whose key prefix is wrong."""
    base = build("llama", False)
    save(base, folder / "base.safetensors")
    for name, targets in ADAPTERS.items():
        lora.export_peft(adapted(targets), folder / name, "base")
    lora.export_peft(adapted(ADAPTERS["all"]), folder / "wrong", "base")
    file = folder / "wrong" / "adapter_model.safetensors"
    save_file(
        {
            k.replace("base_model.model.model.", "base_model.model."): t
            for k, t in load_file(file).items()
        },
        file,
    )
    (folder / "case.json").write_text(
        json.dumps(
            {"config": vars(base.cfg), "ids": ids().tolist(), "adapters": [*ADAPTERS, "wrong"]}
        )
    )


@needs_peft
@pytest.mark.parametrize("name", ADAPTERS)
def test_exported_lora_loads_in_peft(name, theirs):
    """PEFT loads our export without a word, and its logits, adapter apart and merged, are ours to
    1e-5 and far from the base's."""
    out, said = theirs
    got = adapted(ADAPTERS[name])(ids()).detach()
    base = build("llama", False)(ids()).detach()
    assert said[name] == []
    assert (out["base"] - base).abs().max() <= TOLERANCE
    for logits in (out[name], out[f"{name}.merged"]):
        assert (logits - got).abs().max() <= TOLERANCE
        assert (logits - out["base"]).abs().max() > 1e-2


@needs_peft
def test_wrong_key_prefix_is_heard_in_peft(theirs):
    """The control: with a wrong prefix PEFT only warns and leaves the base as it is, so the silence
    above means something."""
    out, said = theirs
    assert any("missing" in line for line in said["wrong"])
    assert torch.equal(out["wrong"], out["base"])
