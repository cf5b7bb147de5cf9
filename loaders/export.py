"""A model written as a Hugging Face folder that transformers loads with equal logits.

python -m loaders.export --init_from=SmolLM2-135M-Instruct.Q4_1.gguf --to=out/smollm2
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from cli import exit_on_bad_input, parse_args
from config import BaseConfig
from settings.train import ExportConfig

CONFIGS = {"export": ExportConfig, "base": BaseConfig}
if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__.splitlines()[0])

from safetensors.torch import save_file

import lora
from config import check
from loaders.huggingface import SUPPORTED, rope_json
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
    check(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder}",
        "is not an empty folder",
        "name a fresh one",
    )
    config = config_json(run.model, run.tokenizer)
    lora.merge(run.model)
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        (part / "config.json").write_text(json.dumps(config, indent=1))
        _write_weights(run.model, part / "model.safetensors")
        if run.tokenizer.definition is not None:
            _write_tokenizer(run.tokenizer, part)
        if folder.exists():
            folder.rmdir()
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _write_weights(model: Transformer, path: Path) -> None:
    """Write the model's tensors under transformers' names."""
    tensors = {}
    for ours, t in model_state(model).items():
        theirs = ours if ours.startswith("lm_head") else f"model.{ours}"
        tensors[theirs] = t.contiguous()
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
    """Write the model's shape as transformers' config.json. Raises ValueError where no architecture
    there has it."""
    c = model.cfg
    kind = "qwen2" if c.qkv_bias else "llama"
    check(
        kind == "llama" or c.head_dim * c.n_head == c.n_embd,
        f"head_dim={c.head_dim} with a bias on q, k, v",
        "Qwen2 needs n_embd / n_head",
        "export is not possible",
    )
    d = {
        "architectures": [SUPPORTED[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "intermediate_size": c.n_inner,
        "hidden_act": "silu",
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.bos,
        "eos_token_id": one_or_more(end_tokens(tokenizer)),
    }
    if kind == "llama":
        d["head_dim"] = c.head_dim
    scaling = rope_json(c)
    if scaling is not None:
        d["rope_scaling"] = scaling
    return d


def main() -> None:
    """Export the model that the command line names, and say in one line what was written."""
    cfg: ExportConfig = ARGS.export
    base: BaseConfig = ARGS.base
    run = load_run(base.place(cfg.out_dir), "cpu", **base.options(cfg.out_dir))
    folder = export(run, cfg.to)
    n = sum(p.numel() for p in run.model.parameters())
    dtype = run.model.norm.weight.dtype
    print(f"{folder}: {n:,} parameters in {dtype}, tokenizer {run.tokenizer.name}")


if __name__ == "__main__":
    exit_on_bad_input(main)
