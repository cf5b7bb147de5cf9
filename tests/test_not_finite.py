"""Promise 29: numbers that stop being numbers stop generation."""

import pytest
import torch
from helpers import error_line, tiny_model

from generate import generate


@pytest.mark.parametrize("place", ["embed_tokens", "layers.0", "layers.1", "norm"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_names_the_first_layer_that_is_not_finite(place, temperature):
    """A weight that is NaN or infinite ends the first token, by the name of its layer, and leaves
    no hook behind; mended, the model generates."""
    model = tiny_model()
    module = model.get_submodule(place)
    weight = module.mlp.down_proj.weight if "." in place else module.weight
    kept = weight.data.clone()
    for wrong in (torch.nan, torch.inf):
        weight.data[..., :1] = wrong
        line = error_line(generate, model, [[1, 2, 3], [4]], 5, temperature=temperature)
        assert f"{place} is the first whose output is not" in line
    weight.data.copy_(kept)
    assert not any(m._forward_hooks for m in model.modules())
    rows, _ = generate(model, [[1, 2, 3], [4]], 5, temperature=temperature)
    assert all(len(row) == 5 for row in rows)


def test_damaged_cache_is_told_apart_from_weights():
    """Where the weights are sound, what is stored is blamed; no token of it is given."""
    model = tiny_model()
    _, cache = generate(model, [[1, 2, 3]], 3)
    cache.layers[0].window_v.fill_(torch.nan)
    seen = []
    line = error_line(generate, model, [[5]], 3, cache=cache, on_token=seen.append)
    assert "what is stored is damaged" in line and seen == []
