"""Real weights and their tokenizers, in and out; and what a run of train.py left, put together
again.

In: a Hugging Face folder (config.json, .safetensors, tokenizer.json), a .gguf file, or hf:ORG/NAME
from the hub. Llama (SmolLM2, Llama 3's RoPE scaling), Qwen2 and Qwen2.5 (bias on q, k, v), Mistral.
Every tensor's name and shape is checked; what is missing, unexpected or not supported is refused by
name. Tensors go one by one into a model without storage, so that loading needs the model's size and
one tensor. Out: `export`, a folder that transformers loads with equal logits.

A checkpoint folder of ours holds model.safetensors (a base), adapter.safetensors (adapters, value
routers and bases, with the base they belong to) or selector.safetensors (bases and predictors,
likewise), config.json and a manifest. `load_run` takes any of all these.

    python pretrained.py --init_from=SmolLM2-135M-Instruct.Q4_1.gguf --to=out/smollm2
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cli import exit_on_bad_input, parse_args
from config import BaseConfig, ExportConfig

CONFIGS = {"export": ExportConfig, "base": BaseConfig}
if __name__ == "__main__":  # flags are checked before torch is loaded: --help answers at once
    ARGS = parse_args(CONFIGS, description=__doc__.splitlines()[0])

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kv_router
import lora
import mixsga
import selector
from config import (
    SHARED,
    AdapterConfig,
    KVConfig,
    MixConfig,
    ModelConfig,
    SelectConfig,
    check,
    from_dict,
    to_dict,
)
from loaders import checkpoint
from loaders.tokenizer import definition_from_gguf, from_definition, get_tokenizer, one_line
from model import Transformer
from storage.state import copy_tensors, listed


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a device that exists. Raises ValueError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ok = name == "cpu" or (
        name.split(":")[0] == "cuda"
        and torch.cuda.is_available()
        and (name == "cuda" or (name[5:].isdigit() and int(name[5:]) < torch.cuda.device_count()))
    )
    gpus = (
        f", cuda:0..{torch.cuda.device_count() - 1}"
        if torch.cuda.is_available()
        else " (no GPU here)"
    )
    check(ok, f"device={name!r}", f"auto, cpu{gpus}", "choose one")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def in_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether --dtype computes in bfloat16 on this device."""
    return dtype == "bfloat16" or (
        dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )


def autocast(device: torch.device, dtype: str):
    """The context in which the model computes: bfloat16 autocast, or float32 as it is. auto:
    bfloat16 on a GPU that has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, dtype))


def check_weights(weights: str, device: torch.device, dtype: str) -> None:
    """Raise ValueError where weights held in bfloat16 would meet a computation in float32."""
    check(
        weights == "float32" or in_bfloat16(device, dtype),
        f"weights={weights} with dtype={dtype} on {device.type}",
        "they need computing in bfloat16",
        "give --dtype=bfloat16 or --weights=float32",
    )


def place(model: Transformer, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """The model on a device, its weights in dtype, in place. The tables of positions stay as they
    are: bfloat16 would blur them."""
    tables = model.rope_cos, model.rope_sin
    model.to(device, dtype)
    model.rope_cos, model.rope_sin = (t.to(device) for t in tables)
    return model


def model_state(model: Transformer) -> dict[str, Tensor]:
    """The base model's tensors; a tied head is left out."""
    return {
        k: t
        for k, t in model.state_dict().items()
        if not (model.cfg.tie_embeddings and k == "lm_head.weight")
    }


def load_model_state(model: Transformer, saved: dict[str, Tensor], what: str) -> None:
    """Copy a base model's tensors, strictly (ValueError lists what does not fit)."""
    copy_tensors(model_state(model), saved, what)


def added_state(model: Transformer) -> dict[str, Tensor]:
    """Everything that was added to a base: adapters, value routers, reconstructors, bases, the
    selector."""
    return {**lora.adapter_state(model), **kv_router.state(model), **selector.state(model)}


def split_added(
    saved: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(what belongs to value groups, what to the selector, what to adapters) of an added_state."""
    groups = {k: t for k, t in saved.items() if ".kv_path." in k}
    chosen = {k: t for k, t in saved.items() if k.startswith("selector.")}
    return groups, chosen, {k: t for k, t in saved.items() if k not in groups and k not in chosen}


def load_added_state(model: Transformer, saved: dict[str, Tensor]) -> None:
    """Put added_state back into a model with the same things attached, not folded yet (ValueError
    lists what does not fit)."""
    groups, chosen, adapters = split_added(saved)
    kv_router.load_state(model, groups)
    selector.load_state(model, chosen)
    lora.load_adapter_state(model, adapters)


@dataclass
class Run:
    """A loaded model and where it came from. base: the base checkpoint's folder or the pretrained
    model's files, as a later load needs it; base_sha256: of its weights."""

    model: Transformer
    tokenizer: object
    path: Path
    config: dict
    adapter: AdapterConfig
    kv: KVConfig
    base: str
    base_sha256: str
    select: SelectConfig = field(default_factory=SelectConfig)


def find_checkpoint(folder: str | os.PathLike) -> Path:
    """The checkpoint meant by a folder: itself; of a stage, the best, else the newest valid; of a
    run, that of its first stage routed-s*, else of its only stage, else of pretrain. Raises
    ValueError that says what was found instead."""
    folder = Path(folder)
    check(folder.is_dir(), f"{folder}", "no such folder", "give a folder that train.py wrote")
    if (folder / checkpoint.MANIFEST).is_file():
        return folder
    newest, why = checkpoint.newest(folder)
    if (folder / "best").is_dir() and checkpoint.verify(folder / "best") is None:
        return folder / "best"
    if newest is not None:
        return newest
    stages = sorted(
        p
        for p in folder.iterdir()
        if p.is_dir() and ((p / "best").is_dir() or any(p.glob("step-*")))
    )
    for stage in [
        *(s for s in stages if s.name.startswith("routed-s")),
        *(stages if len(stages) == 1 else []),
        folder / "pretrain",
    ]:
        if stage in stages:
            return find_checkpoint(stage)
    names = ", ".join(p.name for p in stages) or "none"
    raise ValueError(
        f"{folder}: no usable checkpoint ({'; '.join(why) or f'stages found: {names}'}); give a "
        "stage's folder"
    )


def load_run(
    where: str | os.PathLike,
    device: torch.device | str = "cpu",
    *,
    base: str = "",
    weights: str = "float32",
    revision: str = "",
) -> Run:
    """Base, value groups and adapters of a checkpoint, stage or run folder of ours, or a pretrained
    model (see load_pretrained).

    base: where the base of an adapter lies now, if it was moved. ValueError names what is damaged
    or does not fit."""
    options = dict(weights=weights, revision=revision)
    if is_foreign(where):
        return load_pretrained(where, device, **options)
    path = find_checkpoint(where)
    ckpt = checkpoint.load(path)
    entries = {"model", "tokenizer", "adapter", "kv"}
    check(
        entries <= set(ckpt.config),
        f"{path}/config.json",
        f"lacks {sorted(entries - set(ckpt.config))}",
        "was it written by train.py?",
    )
    adapter = from_dict(AdapterConfig, ckpt.config["adapter"])
    kv = from_dict(KVConfig, ckpt.config["kv"])
    if "base" not in ckpt.config:
        model = Transformer(from_dict(ModelConfig, ckpt.config["model"]))
        if kv.kv in SHARED:
            mixsga.attach(model, kv, from_dict(MixConfig, ckpt.config.get("mix", {})))
        load_model_state(model, ckpt.tensors.get("model", {}), str(path))
        place(model, device, getattr(torch, weights))
        return Run(
            model.eval(),
            get_tokenizer(ckpt.config["tokenizer"]),
            path,
            ckpt.config,
            adapter,
            kv,
            str(path),
            checkpoint.tensor_hash(path),
        )
    below = _load_base(path, ckpt.config, base, device, options)
    select = from_dict(SelectConfig, ckpt.config.get("select", {}))
    attach_storage(below.model, kv, select)
    lora.attach(below.model, adapter)
    load_added_state(
        below.model, {**ckpt.tensors.get("adapter", {}), **ckpt.tensors.get("selector", {})}
    )
    kv_router.fold(below.model)
    return Run(
        below.model.eval(),
        below.tokenizer,
        path,
        ckpt.config,
        adapter,
        kv,
        below.base,
        below.base_sha256,
        select,
    )


def attach_storage(
    model: Transformer,
    kv: KVConfig,
    select: SelectConfig,
    batches: list[Tensor] | None = None,
    seed: int = 0,
    fit: bool = False,
) -> Transformer:
    """Give a model the KV paths of `kv`, in place: value groups, selecting ones, or none. Returns
    the model."""
    check(
        kv.kv not in SHARED,
        f"kv={kv.kv}",
        "a whole model is trained on with it",
        "give --out_dir of a run of train.py --stage=continue",
    )
    if kv.kv == "select":
        return selector.attach(model, kv, select, batches, seed, fit)
    return kv_router.attach(model, kv, batches, seed)


def _load_base(
    path: Path, config: dict, moved: str, device: torch.device | str, options: dict
) -> Run:
    """The base that the adapter in `path` belongs to, from where its config says or from `moved`;
    its weights must be the same."""
    where = moved or config["base"]
    at = ""
    if where.startswith("hf:"):
        where, _, at = where.partition("@")
    elif not moved and not os.path.isabs(where):
        where = os.path.normpath(path / where)
    check(
        where.startswith("hf:") or Path(where).exists(),
        f"{path} adapts {where}",
        "that is gone",
        "move base and adapter together, or say where it is with --init_from",
    )
    run = load_run(where, device, **{**options, "revision": at or options["revision"]})
    check(
        run.base_sha256 == config["base_sha256"],
        f"{where}: the weights have sha256 {run.base_sha256[:12]}...",
        f"{path} was trained on {config['base_sha256'][:12]}...",
        "give the base it was trained on",
    )
    return run


def base_reference(run: Run, folder: Path) -> str:
    """How an adapter in folder/step-* names its base: one of our checkpoints by relative path, a
    model's files by absolute path."""
    return (
        os.path.relpath(run.path.resolve(), (folder / "x").resolve())
        if (run.path / checkpoint.MANIFEST).is_file()
        else run.base
    )


# ----------------------------------------------------------------------------- a model's own files

SUPPORTED = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
}


def is_foreign(where: str | os.PathLike) -> bool:
    """True for what another project wrote: hf:ORG/NAME, a .gguf file, a folder with a config.json
    and no manifest of ours."""
    path = Path(where)
    return (
        str(where).startswith("hf:")
        or path.suffix == ".gguf"
        or (
            (path / "config.json").is_file()
            and not (path / checkpoint.MANIFEST).exists()
            and "model_type" in _json(path / "config.json")
        )
    )


def _json(path: Path) -> dict:
    try:
        d = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{path} cannot be read as JSON ({one_line(e)}): a model's folder needs it; copy the "
            "folder again"
        ) from None
    check(isinstance(d, dict), f"{path}", "holds no JSON object", "copy the folder again")
    return d


def model_config(d: dict, where: str) -> ModelConfig:
    """ModelConfig from a Hugging Face config.json's content. The context is cut to the sliding
    window, within which attention is the same.

    Raises ValueError, naming it, for an architecture or a setting that this trunk does not have."""
    kind = d.get("model_type")
    do = "use a Llama, Qwen2 or Mistral model"
    own = "use the model's own config"
    check(
        isinstance(kind, str) and kind in SUPPORTED,
        f"{where}: model_type={kind!r}",
        f"one of {', '.join(SUPPORTED)} is supported",
        do,
    )
    refused = {
        "quantization_config": None,
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "hidden_act": "silu",
    }
    for key, only in refused.items():
        came = d.get(key, only)
        check(came in (only, None), f"{where}: {key}={came!r}", f"only {only!r} is supported", do)

    def number(settings: dict, key: str, kind: type, default=None):
        value = default if settings.get(key) is None else settings[key]
        check(
            value is not None, f"{where}: its config lacks {key!r}", "every setting is needed", own
        )
        ok = (
            type(value) in (int, float)
            and 0 < value < 2**40
            and (kind is float or value == int(value))
        )
        check(
            ok,
            f"{where}: {key}={value!r}",
            f"a positive {'number' if kind is float else 'whole number'} is needed",
            own,
        )
        return kind(value)

    scaling = {}
    scaled = {}
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4, of transformers 5
        check(
            isinstance(d.get(key), dict | None),
            f"{where}: {key}={d.get(key)!r}",
            "an object or null is needed",
            own,
        )
        scaling |= d.get(key) or {}
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    check(
        name in ("default", "llama3"),
        f"{where}: RoPE scaling {name!r}",
        "only Llama 3's is supported",
        do,
    )
    if name == "llama3":
        scaled = dict(
            rope_factor=number(scaling, "factor", float),
            rope_low_freq=number(scaling, "low_freq_factor", float),
            rope_high_freq=number(scaling, "high_freq_factor", float),
            rope_original=number(scaling, "original_max_position_embeddings", int),
        )
    longest = number(d, "max_position_embeddings", int)
    check(
        longest <= 2**24,
        f"{where}: max_position_embeddings={longest}",
        "more than 16 million tokens is no model's context",
        own,
    )
    # absent means 4096 there
    if (kind == "mistral" or d.get("use_sliding_window")) and d.get(
        "sliding_window", 4096
    ) is not None:
        longest = min(longest, number(d, "sliding_window", int, 4096))
    n_embd = number(d, "hidden_size", int)
    n_head = number(d, "num_attention_heads", int)
    return ModelConfig(
        vocab_size=number(d, "vocab_size", int),
        block_size=longest,
        n_layer=number(d, "num_hidden_layers", int),
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=number(d, "num_key_value_heads", int, n_head),
        head_dim=number(d, "head_dim", int, n_embd // n_head),
        n_inner=number(d, "intermediate_size", int),
        rope_theta=number({**d, **scaling}, "rope_theta", float, 10000.0),
        norm_eps=number(d, "rms_norm_eps", float),
        qkv_bias=kind == "qwen2",
        tie_embeddings=bool(d.get("tie_word_embeddings", False)),
        **scaled,
    )


@dataclass
class Files:
    """A model's files, opened: its config, where each tensor (our name) comes from, its tokenizer,
    and the files to be hashed.

    read(name) gives one tensor in the file's dtype, on the CPU."""

    name: str
    config: dict
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    definition: dict | None
    weights: list[Path]


def _safetensors_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file: from model.safetensors, else from the index, else from every
    .safetensors file in the folder."""
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    try:
        if index.is_file() and not whole.is_file():
            where = _json(index).get("weight_map")
            ok = isinstance(where, dict) and all(
                isinstance(f, str) and Path(f).name == f for f in where.values()
            )
            check(ok, f"{index}", "has no weight_map of file names", "copy the folder again")
            lost = sorted({f for f in where.values() if not (folder / f).is_file()})
            check(
                not lost,
                f"{folder} lacks {', '.join(lost[:4])}",
                "its index names them",
                "copy the folder again",
            )
            return {name: folder / f for name, f in where.items()}
        found = {}
        for path in [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    check(
                        name not in found,
                        f"{path}: tensor {name}",
                        f"is in {found.get(name)} too",
                        "remove the extra file",
                    )
                    found[name] = path
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{folder}: a .safetensors file cannot be read ({one_line(e)}); copy it again"
        ) from None
    other = (
        "; it has .bin files, which can run code: convert them to .safetensors"
        if any(folder.glob("*.bin"))
        else ""
    )
    check(
        bool(found),
        f"{folder}",
        f"no .safetensors file in it{other}",
        "give a folder with the weights",
    )
    return found


def _open_folder(folder: Path) -> Files:
    config = _json(folder / "config.json")
    at = {}
    shapes = {}
    for theirs, path in _safetensors_files(folder).items():
        # old files hold this table; ours is computed
        if not theirs.endswith("rotary_emb.inv_freq"):
            ours = theirs.removeprefix("model.")
            check(
                ours not in at,
                f"{path}: tensor {theirs}",
                f"{ours} is there with and without the prefix",
                "use the model's own files",
            )
            at[ours] = (path, theirs)
    try:
        for path in {p for p, _ in at.values()}:
            with safe_open(path, "pt") as f:
                inside = set(f.keys())
                for ours, (p, theirs) in at.items():
                    if p == path:
                        check(
                            theirs in inside,
                            f"{path}: no tensor {theirs}",
                            "the index says it is there",
                            "copy the folder again",
                        )
                        shapes[ours] = tuple(f.get_slice(theirs).get_shape())
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{folder}: a .safetensors file cannot be read ({one_line(e)}); copy it again"
        ) from None

    def read(name: str) -> Tensor:
        path, theirs = at[name]
        # opened anew for each tensor: what was mapped for the last one is given back
        with safe_open(path, "pt") as f:
            return f.get_tensor(theirs)

    definition = _json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
    return Files(
        folder.resolve().name, config, shapes, read, definition, sorted({p for p, _ in at.values()})
    )


GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _our_name(theirs: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight; an unknown name stays as it is."""
    parts = theirs.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in GGUF_NAMES:
        return f"layers.{parts[1]}.{GGUF_NAMES[parts[2]]}.{parts[3]}"
    return (
        f"{GGUF_NAMES[parts[0]]}.{parts[1]}"
        if len(parts) == 2 and parts[0] in GGUF_NAMES
        else theirs
    )


def unpermute(t: Tensor, n_head: int) -> Tensor:
    """Undo llama.cpp's order of a q or k projection's rows (n_head * D, ...): it pairs dimension 2i
    with 2i + 1, RoPE here i with i + D/2."""
    return t.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def _open_gguf(path: Path) -> Files:
    check(path.is_file(), f"{path}", "no such file", "give a .gguf file")
    try:
        import gguf  # here: an optional extra
    except ImportError:
        raise ValueError(
            f"{path}: reading GGUF needs the package gguf; pip install gguf, or give a Hugging "
            "Face folder"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {k: f.contents() for k, f in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read as GGUF ({one_line(e)}); copy it again") from None
    tensors = {_our_name(t.name): t for t in reader.tensors}
    config = _gguf_config(fields, tensors, str(path))
    heads = (
        {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        if config["model_type"] == "llama"
        else {}
    )

    def read(name: str) -> Tensor:
        t = tensors[name]
        try:
            a = gguf.quants.dequantize(t.data, t.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{path}: {t.name} is {t.tensor_type.name}, which gguf cannot dequantise; use "
                "F16, Q8_0, Q4_0 or Q4_1"
            ) from None
        # F32 comes as the mapped file itself
        a = torch.from_numpy(a if a.flags.writeable else a.copy())
        n = heads.get(name.split(".")[-2])
        return unpermute(a, n) if n else a

    definition = None
    if "tokenizer.ggml.model" in fields:
        tok = {
            k.removeprefix("tokenizer.ggml."): v
            for k, v in fields.items()
            if k.startswith("tokenizer.ggml.")
        }
        pre = tok.get("pre", "default")
        bos = tok.get("bos_token_id")
        # llama.cpp's default
        begins = tok.get("add_bos_token", pre in ("llama-bpe", "llama3") and bos is not None)
        try:
            definition = definition_from_gguf(
                tok["tokens"],
                tok["merges"],
                tok["token_type"],
                pre,
                bos,
                bool(begins),
                tok["model"],
            )
        except KeyError as e:
            raise ValueError(
                f"{path}: its tokenizer lacks {e}; use another file of this model"
            ) from None
        except TypeError as e:
            raise ValueError(
                f"{path}: its tokenizer is damaged ({one_line(e)}); copy it again"
            ) from None
    shapes = {k: tuple(int(n) for n in reversed(t.shape)) for k, t in tensors.items()}
    shapes.pop("rope_freqs.weight", None)  # read into the config
    return Files(path.stem, config, shapes, read, definition, [path])


def _gguf_config(fields: dict, tensors: dict, where: str) -> dict:
    """A GGUF file's settings as a config.json."""
    arch = fields.get("general.architecture")
    check(
        arch in ("llama", "qwen2"),
        f"{where}: architecture {arch!r}",
        "llama (Mistral too) and qwen2 are supported",
        "use such a model",
    )

    def get(key: str, default=None):
        value = fields.get(f"{arch}.{key}", default)
        check(
            value is not None,
            f"{where}: {arch}.{key}",
            "is not in the file",
            "use another file of this model",
        )
        check(
            type(value) in (int, float),
            f"{where}: {arch}.{key}={value!r}",
            "one number is needed",
            "use another model",
        )
        return value

    check(
        not get("expert_count", 0),
        f"{where}: {get('expert_count', 0)} experts",
        "mixtures of experts are not supported",
        "use a dense model",
    )
    # without a type they mean linear scaling
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1))
    scaling = fields.get(f"{arch}.rope.scaling.type", "none" if factor in (0, 1) else "linear")
    check(
        scaling == "none",
        f"{where}: RoPE scaling {scaling!r}",
        "only Llama 3's is supported",
        "use another model",
    )
    n_head = get("attention.head_count")
    n_embd = get("embedding_length")
    d = {
        "model_type": arch,
        "hidden_size": n_embd,
        "num_attention_heads": n_head,
        "num_key_value_heads": get("attention.head_count_kv", n_head),
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "head_dim": get(
            "attention.key_length", get("rope.dimension_count", n_embd // max(n_head, 1))
        ),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "use_sliding_window": True,
        "sliding_window": get("attention.sliding_window", 0) or None,
        "vocab_size": int(tensors["embed_tokens.weight"].shape[-1])
        if "embed_tokens.weight" in tensors
        else None,
    }
    check(
        get("rope.dimension_count", d["head_dim"]) == d["head_dim"],
        f"{where}: RoPE on {get('rope.dimension_count', 0)} dimensions",
        f"all {d['head_dim']} of a head are needed",
        "use another model",
    )
    # Llama 3's divisors of each frequency: the four numbers behind them are found again
    if "rope_freqs.weight" in tensors:
        want = np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float64).ravel()
        D = d["head_dim"]
        ok = 2 * want.size == D and want.min() >= 1
        if ok:
            factor = float(want.max())
            turns = 8192 * float(d["rope_theta"]) ** (-np.arange(0, D, 2) / D) / (2 * math.pi)
            stay = np.clip((turns - 1) / 3, 0, 1)
            ok = np.allclose(want, 1 / (stay + (1 - stay) / factor), rtol=1e-3)
        check(
            bool(ok),
            f"{where}: its rope_freqs",
            "are not those of Llama 3's scaling (1, 4, 8192)",
            "use the model's Hugging Face folder",
        )
        d["rope_scaling"] = dict(
            rope_type="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
    return d


def _open_hub(name: str, revision: str) -> Path:
    """The local folder of hf:ORG/NAME at a revision, downloaded by huggingface_hub into its own
    cache."""
    check(
        name.count("/") == 1 and all(name.split("/")),
        f"hf:{name}",
        "a model is named hf:ORG/NAME",
        "for example hf:HuggingFaceTB/SmolLM2-135M",
    )
    try:
        from huggingface_hub import snapshot_download  # here: an optional extra
    except ImportError:
        raise ValueError(
            f"hf:{name} needs the package huggingface_hub; pip install huggingface_hub, or give a "
            "folder"
        ) from None
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or "main",
                allow_patterns=[
                    "config.json",
                    "*.safetensors",
                    "*.safetensors.index.json",
                    "tokenizer.json",
                ],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    # OSError and ValueError of the hub's own; its transport (httpx, hf_xet) raises other kinds
    except Exception as e:
        raise ValueError(
            f"hf:{name} at revision {revision or 'main'} cannot be had ({one_line(e)[:200]}): the "
            "hub or its local cache must have it; "
            "go online, check name and --revision, or give a folder"
        ) from None


def weights_hash(files: list[Path]) -> str:
    """sha256 over the sha256 of each file: the identity of a model's weights."""
    whole = hashlib.sha256()
    for path in files:
        one = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(1 << 24):
                one.update(block)
        whole.update(one.digest())
    return whole.hexdigest()


class _Undrawn(TorchFunctionMode):
    """Modules keep the weights they get: drawing them would be in vain, and on the meta device
    costs a second of imports and 150 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (
            None
            if getattr(func, "__module__", "") == "torch.nn.init"
            else func(*args, **(kwargs or {}))
        )


def _fill(model: Transformer, files: Files, device: torch.device, dtype: torch.dtype) -> None:
    """Put every tensor of `files` into `model`, which was built on the meta device: one at a time,
    to its place and dtype."""
    want = {k: tuple(t.shape) for k, t in model_state(model).items()}
    shapes = dict(files.shapes)
    if model.cfg.tie_embeddings:
        shapes.pop("lm_head.weight", None)  # some files hold the shared matrix twice
    faults = {
        "missing": [k for k in want if k not in shapes],
        "unexpected": [k for k in shapes if k not in want],
        "of another shape": [
            f"{k} {shapes[k]} for {want[k]}" for k in want if k in shapes and shapes[k] != want[k]
        ],
    }
    text = listed(faults)
    check(
        not text,
        f"the tensors of {files.name} do not fit its config: {text}",
        "every name and shape must",
        "use the model's own files",
    )
    for name in want:
        try:
            t = files.read(name)
        except (SafetensorError, OSError) as e:
            raise ValueError(
                f"{files.name}: {name} cannot be read ({one_line(e)}); copy the file again"
            ) from None
        # not float8, whose scales lie elsewhere
        wide = t.is_floating_point() and t.element_size() > 1
        check(
            wide,
            f"{files.name}: {name} is {t.dtype}",
            "bfloat16, float16, float32 and float64 are read",
            "use unquantised weights",
        )
        t = t.to(device, dtype, copy=True)
        check(
            bool(torch.isfinite(t).all()),
            f"{files.name}: {name}",
            f"not all finite in {dtype}",
            "copy the file again",
        )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(t))
    if model.cfg.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.rope_cos = model.rope_cos.to(device)
    model.rope_sin = model.rope_sin.to(device)


def load_pretrained(
    where: str | os.PathLike,
    device: torch.device | str = "cpu",
    weights: str = "float32",
    revision: str = "",
) -> Run:
    """A model and its tokenizer from a Hugging Face folder, a .gguf file or hf:ORG/NAME.

    weights: float32 or bfloat16, the dtype the weights are held in; revision: branch, tag or commit
    of an hf: model. Raises ValueError, one line, naming what is missing or not supported."""
    text = str(where)
    device = torch.device(device)
    hub = text.startswith("hf:")
    path = _open_hub(text[3:], revision) if hub else Path(text)
    files = _open_gguf(path) if path.suffix == ".gguf" else _open_folder(path)
    cfg = model_config(files.config, text)
    check(
        files.definition is not None,
        f"{text}",
        "no tokenizer.json in it",
        "copy the model's tokenizer.json there",
    )
    tokenizer = from_definition(files.definition, text[3:].replace("/", "-") if hub else files.name)
    check(
        tokenizer.vocab_size <= cfg.vocab_size,
        f"{text}: a tokenizer of {tokenizer.vocab_size} ids",
        f"the model has {cfg.vocab_size}",
        "use the model's own tokenizer.json",
    )
    last = f"layers.{cfg.n_layer - 1}.input_layernorm.weight"
    check(
        last in files.shapes,
        f"{text}: a config of {cfg.n_layer} layers",
        f"no tensor {last}",
        "use the model's own files",
    )
    with torch.device("meta"), _Undrawn():
        model = Transformer(cfg)
    _fill(model, files, device, getattr(torch, weights))
    adapter = AdapterConfig(adapter="none")
    kv = KVConfig(kv="dense")
    base = f"hf:{text[3:]}@{path.name}" if hub else str(path.resolve())
    config = {
        "stage": "pretrained",
        "model": to_dict(cfg),
        "tokenizer": tokenizer.name,
        "adapter": to_dict(adapter),
        "kv": to_dict(kv),
    }
    return Run(
        model.eval(), tokenizer, path, config, adapter, kv, base, weights_hash(files.weights)
    )


# ----------------------------------------------------------------------------- out


def export(run: Run, folder: str | os.PathLike) -> Path:
    """Write config.json, model.safetensors (the weights' dtype) and, where it has a definition, the
    tokenizer: a folder that transformers loads with equal logits. Plain LoRA is merged first, in
    place.

    Raises ValueError for what transformers cannot represent (routed adapters, value groups) and for
    a folder that is not empty."""
    model = run.model
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
    config = _their_config(model, run.tokenizer)
    lora.merge(model)
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        (part / "config.json").write_text(json.dumps(config, indent=1))
        tensors = {
            k if k.startswith("lm_head") else f"model.{k}": t.contiguous()
            for k, t in model_state(model).items()
        }
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes it 0600, whatever the umask says
        (part / "model.safetensors").chmod((part / "config.json").stat().st_mode)
        if run.tokenizer.definition is not None:
            (part / "tokenizer.json").write_text(
                json.dumps(run.tokenizer.definition, ensure_ascii=False), encoding="utf-8"
            )
            special = {
                t["id"]: t["content"] for t in run.tokenizer.definition.get("added_tokens", [])
            }
            about = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "eos_token": special.get(run.tokenizer.eot),
            }
            (part / "tokenizer_config.json").write_text(json.dumps(about))
        if folder.exists():
            folder.rmdir()
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _their_config(model: Transformer, tokenizer) -> dict:
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
        "eos_token_id": tokenizer.eot,
    }
    if kind == "llama":
        d["head_dim"] = c.head_dim
    if c.rope_factor > 1:
        d["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": c.rope_factor,
            "low_freq_factor": c.rope_low_freq,
            "high_freq_factor": c.rope_high_freq,
            "original_max_position_embeddings": c.rope_original,
        }
    return d


def main() -> None:
    cfg: ExportConfig = ARGS.export
    run = load_run(ARGS.base.place(cfg.out_dir), "cpu", **ARGS.base.options(cfg.out_dir))
    folder = export(run, cfg.to)
    n = sum(p.numel() for p in run.model.parameters())
    print(
        f"{folder}: {n:,} parameters in {run.model.norm.weight.dtype}, tokenizer "
        f"{run.tokenizer.name}"
    )


if __name__ == "__main__":
    exit_on_bad_input(main)
