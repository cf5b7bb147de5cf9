"""What the rivals' paths share: a model gets its dense paths back."""

from __future__ import annotations

import torch.nn as nn

from model import DensePath


def put_dense_back(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Put dense paths in the place of paths of a kind, which have Hkv, D and cap, in place. Returns
    the model."""
    for block in model.layers:
        path = block.self_attn.kv_path
        if isinstance(path, kind):
            block.self_attn.kv_path = DensePath(path.Hkv, path.D, path.cap)
    return model
