"""A model written as a Hugging Face folder that transformers loads with equal logits.

    python -m loaders.export --init_from=SmolLM2-135M-Instruct.Q4_1.gguf --to=out/smollm2

Its tokenizer, end tokens and chat template are written with it, as far as it has them."""

from __future__ import annotations

if __name__ == "__main__":  # first of all: from here on Ctrl-C is answered by one line
    from settings.begin import begin_program

    begin_program()

import json
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

from cli import exit_on_bad_input, note, parse_args
from settings.base import BaseConfig
from settings.places import check_fresh, check_inputs
from settings.train import ExportConfig

CONFIGS = {"export": ExportConfig, "base": BaseConfig}


def check_places(args) -> None:
    """Raise ValueError where no model is named or it is not there, or the folder to write is not
    empty."""
    args.base.place(args.export.out_dir)
    check_inputs(args, "init_from", "out_dir")
    check_fresh(args.export.to)


if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__)
    exit_on_bad_input(lambda: check_places(ARGS))

from safetensors.torch import save_file

import lora
from config import ModelConfig, check
from loaders.families import FAMILIES, their_tensors
from loaders.huggingface import LAYER_TYPES, model_config, rope_json
from loaders.runs import Run, load_run
from loaders.tokenizer import end_tokens
from loaders.weights import model_state
from model import Transformer


def export(run: Run, folder: str | os.PathLike) -> Path:
    """Write config.json, model.safetensors (the weights' dtype) and, where it has a definition, the
    tokenizer; return the folder. Plain LoRA is merged first, in place.

    Raises ValueError for what transformers cannot represent (routed adapters, value groups) and for
    a folder that is not empty."""
    folder = Path(folder)
    check(
        run.adapter.adapter in ("none", "lora"),
        f"adapter={run.adapter.adapter}",
        "its update depends on the token: no weight can hold it",
        "export the base, or an adapter=lora",
    )
    check(
        run.kv.kv == "dense",
        f"kv={run.kv.kv}",
        "transformers keeps whole values only",
        "export the base, or a run with --kv=dense",
    )
    check_fresh(folder)
    config = config_json(run.model, run.tokenizer)
    lora.merge(run.model)
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        (part / "config.json").write_text(json.dumps(config, indent=1))
        _write_weights(run.model, config["model_type"], part / "model.safetensors")
        if run.tokenizer.definition is not None:
            _write_tokenizer(run.tokenizer, part)
        if folder.exists():
            folder.rmdir()
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _write_weights(model: Transformer, kind: str, path: Path) -> None:
    """Write the model's tensors under transformers' names."""
    tensors = their_tensors(kind, model_state(model))
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes it 0600, whatever the umask says
    path.chmod((path.parent / "config.json").stat().st_mode)


def _write_tokenizer(tokenizer, folder: Path) -> None:
    """Write the tokenizer's definition, what AutoTokenizer asks for beside it, the chat template
    and the tokens that end generation."""
    definition = json.dumps(tokenizer.definition, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    special = {t["id"]: t["content"] for t in tokenizer.definition.get("added_tokens", [])}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": special.get(tokenizer.eot),
    }
    if tokenizer.chat is not None:
        about |= tokenizer.chat.names
        if tokenizer.chat.template:
            about["chat_template"] = tokenizer.chat.template
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": one_or_more(end_tokens(tokenizer))}
    (folder / "generation_config.json").write_text(json.dumps(ends))


def one_or_more(ids: list[int]) -> int | list[int]:
    """Return the only id, or the list of several, as eos_token_id has it."""
    return ids[0] if len(ids) == 1 else ids


def config_json(model: Transformer, tokenizer) -> dict:
    """Write the model's shape as transformers' config.json: of the first family that has it. Raises
    ValueError where none has."""
    c = model.cfg
    check(
        not c.qkv_bias or c.head_dim * c.n_head == c.n_embd,
        f"head_dim={c.head_dim} with a bias on q, k, v",
        "Qwen2 and OPT need n_embd / n_head",
        "export is not possible",
    )
    for kind in FAMILIES:
        d = shape_json(c, kind)
        if same_model(model_config(d, kind), c):
            return d | {
                "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."),
                "bos_token_id": tokenizer.bos,
                "eos_token_id": one_or_more(end_tokens(tokenizer)),
            }
    llama = model_config(shape_json(c, "llama"), "llama")
    differs = [f.name for f in fields(c) if getattr(c, f.name) != getattr(llama, f.name)]
    raise ValueError(
        f"a Llama but for {', '.join(f'{name}={getattr(c, name)}' for name in differs)}: none of "
        f"{', '.join(FAMILIES)} has just that; export is not possible"
    )


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    """Say whether two shapes are the same but for context and rotations, which rope_json writes."""
    left_out = dict(block_size=1, rope_scaling="linear", rope_factor=1.0, rope_attention=1.0)
    bounds = dict(rope_low_freq=1.0, rope_high_freq=4.0, rope_original=1)
    return replace(a, **left_out, **bounds) == replace(b, **left_out, **bounds)


def shape_json(c: ModelConfig, kind: str) -> dict:
    """Write a shape as the config.json of a family, whether that has all of it or not."""
    family = FAMILIES[kind]
    d = {
        "architectures": [family.architecture],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        family.keys.get("intermediate_size", "intermediate_size"): c.n_inner,
        "max_position_embeddings": c.block_size,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if kind == "opt":
        return d | {"word_embed_proj_dim": c.n_embd, "activation_function": "relu"}
    d |= {
        "num_key_value_heads": c.n_kv_head,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
    }
    if not c.qkv_bias:  # Qwen2 has none of its own
        d["head_dim"] = c.head_dim
    scaling = rope_json(c)
    if scaling is not None:
        d["rope_scaling"] = scaling
    return d | gemma_json(c) if family.every else d


def gemma_json(c: ModelConfig) -> dict:
    """Write scales, caps and sliding layers as Gemma's config.json has them."""
    d = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(c.query_scale**-2) if c.query_scale else c.head_dim,
        "attn_logit_softcapping": c.attention_cap or None,
        "final_logit_softcapping": c.logit_cap or None,
        "layer_types": [LAYER_TYPES[c.slides(i)] for i in range(c.n_layer)],
    }
    if c.sliding_window:
        d["sliding_window"] = c.sliding_window
    if c.rope_local_theta:
        d["rope_local_base_freq"] = c.rope_local_theta
    return d


def main() -> None:
    """Export the model that the command line names, and say in one line what was written."""
    cfg: ExportConfig = ARGS.export
    base: BaseConfig = ARGS.base
    note(f"loading {base.place(cfg.out_dir)}")
    run = load_run(base.place(cfg.out_dir), "cpu", **base.options(cfg.out_dir))
    folder = export(run, cfg.to)
    n = sum(p.numel() for p in run.model.parameters())
    dtype = run.model.norm.weight.dtype
    print(f"{folder}: {n:,} parameters in {dtype}, tokenizer {run.tokenizer.name}")
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    print(f"next, in Python: {load}", file=sys.stderr)


if __name__ == "__main__":
    exit_on_bad_input(main)
