"""Weights, gradients and moments shared out over the ranks of a job (--shard), by PyTorch's FSDP2.

A rank keeps its part of every matrix of the base and of that matrix's gradient and moments; a
block's matrices are put together before the block runs and let go after it. What is small, or is
trained over a frozen base, stays whole on every rank and is summed as without --shard: norms,
biases, adapters, value routers. So a step means the same as that of one process.

Of 16 bytes a parameter in training (weight, gradient, two moments in float32) a rank holds 16 / N.
A stage is built whole on each device before its weights are shared out: 4 bytes a parameter must
fit one. A checkpoint is that of one process and loads on any number of ranks: rank 0 puts it
together in its host's memory, 12 bytes a parameter that is trained.

    torchrun --nproc_per_node=2 -- train.py --stage=pretrain --shard
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from config import check
from loaders.weights import model_shapes
from model import Transformer
from settings.train import TrainConfig
from storage.state import check_fit
from training.world import World


def is_sharded(t: Tensor) -> bool:
    """Say whether this rank holds a part of it only."""
    return isinstance(t, DTensor)


def check_shares(cfg: TrainConfig, w: World, batch_size: int, n_val: int) -> None:
    """Raise ValueError where ranks would not run the model equally often: they wait for each other
    in every block."""
    check(
        w.size > 1,
        "shard in one process",
        "there is nobody to share with",
        "start it by torchrun --nproc_per_node=2, or give --shard=false",
    )
    check(
        batch_size >= w.size * cfg.accumulation,
        f"shard with a batch of {batch_size} sequences for {w.size} ranks of {cfg.accumulation} "
        "micro-steps",
        "every rank needs one sequence for each",
        "give a larger batch, less --accumulation or fewer ranks",
    )
    check(
        n_val % w.size == 0,
        f"shard with {n_val} validation sequences",
        f"a multiple of {w.size} ranks",
        f"give --eval_sequences={max(1, n_val // w.size) * w.size}",
    )


def shard(
    model: Transformer, params: list[nn.Parameter], w: World, bfloat16: bool
) -> list[nn.Parameter]:
    """Share the base's matrices out over the ranks, in place: return params as they are now.

    bfloat16: blocks are put together in it, as autocast would compute them; the parts, gradients
    that are summed, embeddings and the head stay as they are"""
    shapes = model_shapes(model.cfg)
    named = dict(model.named_parameters())
    matrices = {p for name, p in named.items() if len(shapes.get(name, ())) == 2}
    small = {p for p in named.values() if p not in matrices}
    name_of = {p: name for name, p in named.items()}
    mesh = init_device_mesh(w.device.type, (w.size,))
    settings = dict(mesh=mesh, ignored_params=small, reshard_after_forward=True)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bfloat16:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mp_policy=policy, **settings)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **settings)
    for module in (*model.layers, model):
        # a sum, not a mean: each loss is weighed by its share of the batch
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    named = dict(model.named_parameters())
    return [named[name_of[p]] if p in matrices else p for p in params]


def clip(params: list[nn.Parameter], most: float, w: World) -> Tensor:
    """Scale gradients so that the norm of all of them is `most` at most; return the norm before
    that, ()."""
    if not any(is_sharded(p) for p in params):
        return nn.utils.clip_grad_norm_(params, most)
    have = [p for p in params if p.grad is not None]
    parts = [p.grad.to_local() for p in have if is_sharded(p)]
    whole = [p.grad for p in have if not is_sharded(p)]
    square = w.sum(nn.utils.get_total_norm(parts) ** 2)
    norm = (square + nn.utils.get_total_norm(whole) ** 2).sqrt()
    scale = (most / (norm + 1e-6)).clamp_max(1.0)
    for g in (*parts, *whole):
        g.mul_(scale)
    return norm


# -- checkpoints


def gathered(value, keep: bool):
    """Put every sharded tensor in nested dicts and lists together, on the CPU, where `keep` is
    set. All ranks must call it; others get None in those places."""
    if isinstance(value, dict):
        return {k: gathered(v, keep) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [gathered(v, keep) for v in value]
    if not (isinstance(value, Tensor) and is_sharded(value)):
        return value
    whole = value.full_tensor()
    return whole.cpu() if keep else None


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, sharded as `like` is, on its device and in its
    dtype; `whole` where that is not sharded."""
    if not is_sharded(like):
        return whole
    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(own: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy whole tensors into those of a model, sharded or not, all or nothing: see check_fit."""
    check_fit(own, saved, what)
    for name, t in own.items():
        t.copy_(part_of(saved[name], t))


def load_optimizer(opt: torch.optim.Optimizer, saved: dict) -> None:
    """Load an optimizer's state_dict of whole tensors, of which a rank keeps its parts."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = {}
    for i, entries in saved["state"].items():
        like = params[int(i)]
        state[i] = {k: part_of(t, like) if t.ndim else t for k, t in entries.items()}
    opt.load_state_dict(saved | {"state": state})
