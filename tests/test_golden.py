"""Every storage computes what the code before the refactoring did, recorded in golden.json.

For each setting, on the CPU: greedy tokens of a padded batch and of a prompt alone, the bytes of
the cache after them, logits of the prompt, of three steps and of nine later ones (windows overflow,
blocks of integers are formed), and of an uncached forward. Tokens and bytes are equal, logits
within rounding. Levels were recorded anew when a budget of bytes began to choose otherwise, and when
it left one first token whole for four. Bytes alone were, when caches began to hold every sequence's
length and no longer the positions of selected tokens. `weights`, a sum of squares, tells whether the model
itself was drawn otherwise: where it differs, nothing else that is told of the setting means
anything.

    PYTHONPATH=. python tests/test_golden.py            # what differs from golden.json
    PYTHONPATH=. python tests/test_golden.py --write    # record anew; "train" stays as it is
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import INT4, STORED_GROUPS, TINY, grouped_model, randomise, tiny_model, tokens
from shared_head_models import with_random_routers

import kv_router
import lora
import selector
from baselines import shared_heads
from config import KVConfig, SelectConfig
from generate import generate, prefill
from settings.adapters import AdapterConfig
from settings.experts import MixConfig

GOLDEN = Path(__file__).with_name("golden.json")
RTOL = {torch.float64: 1e-9, torch.float32: 2e-5}
LENGTHS = (45, 30, 7)
NEW = 12

GROUPS = {**STORED_GROUPS, "mlp": dict(reconstructor="mlp", prefill="routed")}
KEEP = dict(kv_keep=0.5)
SELECT = {  # KVConfig, SelectConfig
    "select": (dict(mask_scope="head"), KEEP),
    "select, one mask": (dict(mask_scope="shared"), KEEP),
    "select, routed": (
        dict(mask_scope="shared", prefill="routed"),
        dict(token_keep=0.6, value_keep=0.5),
    ),
    "select, int4": (dict(mask_scope="head", **INT4), KEEP),
    "select, levels": (dict(mask_scope="head", key_block=16), dict(kv_bytes=0.8)),
    "select, 8 and levels": (
        dict(mask_scope="layer", key_bits=8, value_bits=0, key_block=64),
        dict(kv_bytes=0.6),
    ),
}
SHARED = {  # KVConfig, MixConfig
    "mixSGA": (dict(kv="mixsga", kv_tail=0), dict()),
    "mixSGA, tail": (dict(kv="mixsga", kv_tail=4), dict()),
    "mixSGA, groups": (dict(kv="mixsga", kv_tail=4), dict(expert_groups=2)),
    "gqa, tail": (dict(kv="gqa", kv_tail=1), dict(kv_share=0.35)),
    "cla, tail": (dict(kv="cla", kv_tail=4), dict()),
}
FLOAT64 = " (float64)"  # of what holds integers: whole tokens and attention are, codes stay codes
STORED = ["dense", "MoE-LoRA", *GROUPS, *SELECT, *SHARED]
NAMES = [*STORED, *(n + FLOAT64 for n in STORED if "int" in n or "levels" in n)]


def dtype_of(name: str) -> torch.dtype:
    """float32 for what holds integers, unless it says otherwise, else float64."""
    ints = "int" in name or "levels" in name
    return torch.float32 if ints and not name.endswith(FLOAT64) else torch.float64


def adapted(dtype: torch.dtype) -> torch.nn.Module:
    """tiny_model with random MoE-LoRA."""
    cfg = AdapterConfig(
        adapter="moe_lora", lora_targets="q,v,gate,down", r=2, experts=3, expert_topk=2
    )
    return randomise(lora.attach(tiny_model(dtype=dtype), cfg)).eval()


def selecting(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """tiny_model that selects as SELECT says, folded."""
    kv, cfg = SELECT[name]
    kv = KVConfig(kv="select", n_groups=4, kv_tail=5, **kv)
    cfg = SelectConfig(**cfg, relevance="future", readers=20, past=16, observers=0)
    model = tiny_model(dtype=dtype)
    return kv_router.fold(selector.attach(model, kv, cfg, [tokens(2, 70, seed=1)]))


def sharing(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """tiny_model of eight KV heads that share as SHARED says, random routers."""
    kv, mix = SHARED[name]
    model = tiny_model(dtype=dtype, cfg=replace(TINY, n_head=8, n_kv_head=8))
    shared_heads.attach(model, KVConfig(**kv), MixConfig(**mix))
    return with_random_routers(model)


def made(name: str) -> torch.nn.Module:
    """The model of a setting, in evaluation mode."""
    dtype = dtype_of(name)
    name = name.removesuffix(FLOAT64)
    if name == "dense":
        return tiny_model(dtype=dtype)
    if name == "MoE-LoRA":
        return adapted(dtype)
    if name in GROUPS:
        return grouped_model(dtype=dtype, **GROUPS[name])
    return selecting(name, dtype) if name in SELECT else sharing(name, dtype)


def summary(logits: torch.Tensor) -> dict:
    """Of logits (..., vocab): the first five of the last, the sum and the sum of squares of all."""
    wide = logits.double()
    last = wide.flatten(0, -2)[-1]
    return {
        "first": last[:5].tolist(),
        "sum": wide.sum().item(),
        "squares": wide.square().sum().item(),
    }


def decoded(model: torch.nn.Module, prompts: list[list[int]]) -> dict:
    """Greedy tokens, the cache's bytes, and logits where given tokens follow: of the prompt and
    three steps, and of later steps."""
    ids, cache = generate(model, prompts, NEW)
    n = max(map(len, prompts))
    idx = torch.tensor([[0] * (n - len(p)) + p for p in prompts])
    pad = torch.tensor([n - len(p) for p in prompts])
    after = tokens(len(prompts), NEW, seed=5)
    with torch.no_grad():
        logits, kept = prefill(model, idx, n + NEW, pad if pad.any() else None)
        seen = torch.stack([logits, *(model.decode(t, kept)[:, -1] for t in after.split(1, 1))])
    return {
        "ids": ids,
        "nbytes": cache.nbytes(),
        "logits": summary(seen[:4]),
        "later": summary(seen[4:]),
    }


def measured(name: str) -> dict:
    """Everything that golden.json holds of a setting."""
    # attached paths may be in training mode, in which integers are not read uncached
    model = made(name).eval()
    weights = sum(p.detach().double().square().sum().item() for p in model.parameters())
    prompts = [tokens(n, seed=n).tolist() for n in LENGTHS]
    with torch.no_grad():
        uncached = model(tokens(1, 40, seed=3))
    return {
        "weights": weights,
        "batch": decoded(model, prompts),
        "alone": decoded(model, prompts[:1]),
        "uncached": summary(uncached),
    }


def differences(got, want, rtol: float, at: str = "") -> list[str]:
    """Where got is not want, in words: floats within rtol, of the norm of their logits if they are
    some, everything else exactly."""
    if isinstance(want, dict) and set(got) != set(want):
        return [f"{at}: {sorted(got)} instead of {sorted(want)}"]
    if isinstance(want, dict) and "squares" in want:
        near = rtol * want["squares"] ** 0.5
        return [
            f"{at}.{key}: {got[key]!r} instead of {want[key]!r}"
            for key in want
            if got[key] != pytest.approx(want[key], rel=rtol, abs=near)
        ]
    if isinstance(want, dict):
        return [d for key in want for d in differences(got[key], want[key], rtol, f"{at}.{key}")]
    same = got == pytest.approx(want, rel=rtol) if isinstance(want, float) else got == want
    return [] if same else [f"{at}: {got!r} instead of {want!r}"]


def compared(name: str) -> list[str]:
    """Where a setting is not what golden.json says."""
    want = json.loads(GOLDEN.read_text())[name]
    return differences(measured(name), want, RTOL[dtype_of(name)], name)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_recorded(name):
    """Tokens, bytes and logits of every storage."""
    assert not compared(name)


@pytest.mark.parametrize("place, key", [("batch", "nbytes"), ("alone", "ids"), ("alone", "first")])
def test_a_changed_value_is_noticed(place, key):
    """One byte, one token, one logit beyond rounding: each is told, and nothing else."""
    want = json.loads(GOLDEN.read_text())["norm"]
    got = json.loads(GOLDEN.read_text())["norm"]
    if key == "nbytes":
        got[place]["nbytes"] += 1
    elif key == "ids":
        got[place]["ids"][0][3] += 1
    else:
        got[place]["logits"]["first"][2] += 1e-7
    told = differences(got, want, 1e-9, "norm")
    assert len(told) == 1 and told[0].startswith(f"norm.{place}.") and key in told[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--write" in sys.argv[1:]:
        old = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        new = {name: measured(name) for name in NAMES} | {"train": old.get("train")}
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in new.items()]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    else:
        print("\n".join(d for name in NAMES for d in compared(name)) or "nothing differs")
