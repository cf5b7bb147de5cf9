"""What a stage of training says: what it will do, what came out, and what to run next."""

from __future__ import annotations

import shlex

from config import comma_list
from data import label_of
from loaders.device import device_name, in_bfloat16
from selection.budgets import small_budget


def start_of(trainer) -> list[str]:
    """What a stage will do: on what, with how many parameters and which text, and where."""
    stage = trainer.s
    cfg = trainer.cfg
    w = trainer.w
    dtype = "bfloat16" if in_bfloat16(w.device, cfg.dtype) else "float32"
    ranks = f", {w.size} processes" if w.size > 1 else ""
    params = {*stage.model.parameters(), *stage.params}
    every = sum(p.numel() for p in params)
    trained = sum(p.numel() for p in stage.params)
    corpora = comma_list(stage.about["corpus"])
    text = " and ".join(label_of(name) for name in corpora)
    held_out = len(stage.corpus.val)
    lines = [
        f"{stage.name}: {every:,} parameters, {trained:,} of them trained, in {dtype} on "
        f"{device_name(w.device)}{ranks}",
        f"  text: {text}, {len(stage.corpus.train):,} tokens and {held_out:,} held out",
        f"  {stage.steps} steps of {stage.batch_size} sequences of {stage.window} tokens, into "
        f"{stage.folder}",
        f"  a checkpoint every {cfg.save_interval} steps, at the end, and when stopped",
        *small_budgets(stage),
    ]
    if w.device.type == "cuda":
        why = trainer.why_not_captured
        if why:
            lines.append(f"  steps run kernel by kernel: {why}")
        else:
            lines.append("  a step is a CUDA graph")
    return lines


def small_budgets(stage) -> list[str]:
    """Where the tokens that stay whole take most of a share of bytes at which contexts are stored,
    or at which a selection that is trained will store them."""
    selection = stage.about.get("select", {})
    shares = stage.byte_budgets or [selection.get("kv_bytes", 0.0)]
    length = stage.n_context or stage.window
    shares = sorted({*shares})
    lines = [small_budget(stage.kv, share, length) for share in shares]
    return [f"  {line}: give a larger share, or a larger --block_size" for line in lines if line]


def end_of(trainer) -> list[str]:
    """What came out of a stage, how long it took, where it lies, and what to run next."""
    stage = trainer.s
    took = ""
    if trainer.first < stage.steps:
        seconds = trainer.clock() - trainer.began
        took = f" after {seconds:.0f} s"
    lines = [f"{stage.name}: validation loss {trainer.val:.4f}{took}, in {stage.folder}"]
    if trainer.cfg.stage == "all":  # there the next stage follows by itself
        return lines
    lines += [f"  next: {command}" for command in next_commands(stage)]
    if stage.kind == "adapt" and not can_be_exported(stage):
        lines.append(
            "  (for transformers: those of --adapter=lora can be exported, where --kv=dense)"
        )
    return lines


def next_commands(stage) -> list[str]:
    """What can be run on a trained stage."""
    folder = shlex.quote(str(stage.folder))
    if stage.kind == "pretrain":
        return [f"python train.py --stage=adapt --init_from={folder}"]
    commands = [f"python eval.py --out_dir={folder}"]
    if stage.kind == "adapt":
        commands.append(f"python sample.py --out_dir={folder}")
        if can_be_exported(stage):
            to = shlex.quote(f"{stage.folder}-exported")
            commands.append(f"python -m loaders.export --out_dir={folder} --to={to}")
    return commands


def can_be_exported(stage) -> bool:
    """Whether transformers can represent what was adapted: plain LoRA over whole values."""
    return stage.adapter.adapter == "lora" and stage.kv.kv == "dense"
