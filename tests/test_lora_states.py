"""Adapters merged, saved, loaded and copied (promise 15)."""

import copy
import math

import pytest
import torch
from adapters_by_hand import KINDS, SHAPE, adapted, assert_close, base_tensors, config, ids
from helpers import tiny_model

import lora

# ---- merge


def test_merge_equals_unmerged():
    """The merged model has the base's names and plain nn.Linear modules, the adapted model's logits
    to 1e-12, and merges idempotently."""
    model = adapted("lora")
    x = ids(2, 9)
    want = model(x)
    base = tiny_model(0, torch.float64, SHAPE)
    assert lora.merge(model) is model
    assert not lora.adapter_state(model) and not [
        m for m in model.modules() if isinstance(m, lora.LoRALinear)
    ]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert_close(model(x), want)
    assert (want - base(x)).abs().max() > 0.1
    once = {k: t.clone() for k, t in model.state_dict().items()}
    assert all(torch.equal(t, once[k]) for k, t in lora.merge(model).state_dict().items())
    # a merged model can be adapted again
    assert lora.adapter_state(lora.attach(model, config("routed")))


def test_merge_leaves_the_weights_it_came_from():
    """Weights are shared with the base until merge, which writes to new ones."""
    model = adapted("lora")
    old = model.layers[0].mlp.up_proj.weight
    before = old.clone()
    lora.merge(model)
    assert torch.equal(old, before) and not torch.equal(model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("kind", ["routed", "moe_lora"])
def test_merge_and_peft_export_refuse_routed_adapters(kind, tmp_path):
    """An update that depends on the token cannot be merged or exported: one-line errors, and
    nothing changes or is written."""
    model = adapted(kind)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="only plain LoRA") as e:
        lora.merge(model)
    with pytest.raises(ValueError, match="plain LoRA") as f:
        lora.export_peft(model, tmp_path / "out", "base")
    assert (
        all(len(str(x.value).splitlines()) == 1 for x in (e, f)) and not (tmp_path / "out").exists()
    )
    assert before.keys() == model.state_dict().keys() and all(
        torch.equal(t, before[k]) for k, t in model.state_dict().items()
    )


# ---- states


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_state_round_trip(kind):
    """An adapter saved from one model and loaded into another over the same base gives the same
    logits, bit for bit."""
    model = adapted(kind)
    other = adapted(kind, random=False)
    x = ids(2, 9)
    saved = {k: t.detach().clone() for k, t in lora.adapter_state(model).items()}
    assert not set(saved) & set(tiny_model(0, torch.float64, SHAPE).state_dict())
    assert set(saved) | set(base_tensors(model)) == set(model.state_dict())
    assert not torch.equal(model(x), other(x))
    lora.load_adapter_state(other, saved)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_state_faults_are_listed_and_nothing_is_loaded(kind):
    """Missing, unexpected, wrong-shaped, NaN and infinite tensors are refused together in one line
    that names each; the model stays."""
    model = adapted(kind)
    before = {k: t.detach().clone() for k, t in lora.adapter_state(model).items()}
    saved = {k: t + 1 for k, t in before.items()}
    missing = list(saved)[1]
    misshaped = list(saved)[2]
    nan = list(saved)[3]
    inf = list(saved)[4]
    del saved[missing]
    saved[misshaped] = saved[misshaped][:-1]
    saved[nan].view(-1)[-1] = math.nan
    saved[inf].view(-1)[0] = -math.inf
    saved["layers.0.mlp.ghost_proj.lora_A"] = torch.zeros(3)
    with pytest.raises(ValueError) as e:
        lora.load_adapter_state(model, saved)
    text = str(e.value)
    assert len(text.splitlines()) == 1 and text.startswith("adapter does not fit")
    sections = dict(
        part.split(": ", 1) for part in text.removeprefix("adapter does not fit: ").split("; ")[:-1]
    )
    assert sections == {
        "missing": missing,
        "unexpected": "layers.0.mlp.ghost_proj.lora_A",
        "not finite": f"{nan}, {inf}",
        "of another shape": f"{misshaped} {tuple(saved[misshaped].shape)} for {tuple(before[misshaped].shape)}",
    }
    assert all(torch.equal(t, before[k]) for k, t in lora.adapter_state(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_can_be_copied(kind):
    """deepcopy of a model gives an independent one: same logits, own weights, and projections that
    read their own block's router."""
    model = adapted(kind)
    x = ids(2, 7)
    twin = copy.deepcopy(model)
    want = model(x)
    assert torch.equal(twin(x), want)
    with torch.no_grad():
        for p in lora.adapter_state(twin).values():
            p.mul_(-2)
    assert torch.equal(model(x), want) and not torch.equal(twin(x), want)
