"""Layers on several devices."""

import pytest
import torch
from helpers import error_line, grouped_model, tiny_model

from generate import generate
from loaders.split import layers_by_device, split

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7]]
gpu = pytest.mark.gpu


def whole_and_split(make, devices, kv):
    """What a model generates whole on the first device, and split over the devices."""
    want = generate(make().to(devices[0]), PROMPTS, 12)
    model = split(make(), devices, kv)
    return want, generate(model, PROMPTS, 12), model


@pytest.mark.parametrize("kv, make", [("dense", tiny_model), ("value_groups", grouped_model)])
def test_split_generates_the_same(kv, make):
    """Rows of several lengths, decoded through caches: the tokens of the model in one piece, the
    same bytes held; logits without a cache, too."""
    (rows, cache), (got, held), model = whole_and_split(make, ["cpu", "cpu"], kv)
    assert got == rows and held.nbytes() == cache.nbytes()
    x = torch.tensor([PROMPTS[0]])
    assert torch.equal(model(x), make()(x))
    assert layers_by_device(model) == {"cpu": len(model.layers)}


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize("kv, make", [("dense", tiny_model), ("value_groups", grouped_model)])
def test_split_over_two_gpus_generates_the_same(kv, make):
    """The same on two GPUs, every layer's cache on its own."""
    devices = ["cuda:0", "cuda:1"]
    (rows, cache), (got, held), model = whole_and_split(make, devices, kv)
    assert got == rows and held.nbytes() == cache.nbytes()
    assert len(layers_by_device(model)) == 2
    for block, layer in zip(model.layers, held.layers, strict=True):
        assert {t.device for t in layer.state_dict().values()} == {block.device}


def test_layers_that_store_together_are_not_split():
    """Selection and CLA, and devices that do not exist, are refused in one line."""
    for kv in ("select", "cla"):
        assert kv in error_line(split, tiny_model(), ["cpu", "cpu"], kv)
    assert "cuda:7" in error_line(split, tiny_model(), "cpu,cuda:7")
