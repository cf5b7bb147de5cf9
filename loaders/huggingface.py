"""A model's Hugging Face folder: config.json, .safetensors, tokenizer.json.

Llama (SmolLM2, DeepSeek-R1-Distill-Llama), Qwen2 and Qwen2.5 (DeepSeek-R1-Distill-Qwen), Qwen3,
Mistral, Phi-3, OPT, Gemma 2 and the text models of Gemma 3 are read (loaders/families.py), with
linear, Llama 3's and YaRN's RoPE scaling. What is missing, unexpected or not supported is refused
by name."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import LONGEST_CONTEXT, ROPE_SCALINGS, ModelConfig, check
from loaders.families import FAMILIES, USE, Family, check_supported, norm_offset, our_parts
from loaders.weights import ModelFiles
from settings.fields import one_line

LAYER_TYPES = ("full_attention", "sliding_attention")
MOST_JSON = 2**28  # bytes: the largest tokenizers take some thirty million
OWN_CONFIG = "use the model's own config"


def read_json(path: Path) -> dict:
    """Read a JSON object from a model's folder. Raises ValueError, one line, naming the file."""
    try:
        size = path.stat().st_size
        if size > MOST_JSON:
            raise ValueError(f"{size} bytes are no settings")
        d = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{path} cannot be read as JSON ({one_line(e)}): a model's folder needs it; copy the "
            "folder again"
        ) from None
    check(isinstance(d, dict), f"{path}", "holds no JSON object", "copy the folder again")
    return d


# ----------------------------------------------------------------------------- config.json


def model_config(d: dict, where: str) -> ModelConfig:
    """Make a ModelConfig from a config.json's content. The context is cut to the sliding window,
    within which attention is the same.

    Raises ValueError, naming it, for an architecture or a setting that this trunk does not have."""
    check_supported(d, where)
    family = FAMILIES[d["model_type"]]
    rope = _rope_settings(d, where, family)
    block_size = _context_length(d, where, rope)
    settings = d | {ours: d.get(theirs) for ours, theirs in family.keys.items()}
    number = partial(_number, where, settings)
    n_embd = number("hidden_size", int)
    n_head = number("num_attention_heads", int)
    return ModelConfig(
        vocab_size=number("vocab_size", int),
        block_size=block_size,
        n_layer=number("num_hidden_layers", int),
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=number("num_key_value_heads", int, n_head),
        head_dim=number("head_dim", int, n_embd // n_head),
        n_inner=number("intermediate_size", int),
        norm_eps=number("rms_norm_eps", float, 1e-5 if family.fixed.get("norm") else None),
        tie_embeddings=bool(d.get("tie_word_embeddings", family.tied)),
        **rope,
        **family.fixed,
        **(_gemma_settings(d, where, family) if family.every else {}),
    )


def _gemma_settings(d: dict, where: str, family: Family) -> dict[str, int | float]:
    """Return, under ModelConfig's names, what Gemma's config.json says of scales, caps and sliding
    layers."""
    number = partial(_number, where, d)
    every = _global_every(d, where, family)
    settings = {
        "embedding_scale": number("hidden_size", int) ** 0.5,
        "query_scale": number("query_pre_attn_scalar", float, 256.0) ** -0.5,
        "sliding_window": number("sliding_window", int, 4096) if every > 1 else 0,
        "global_every": every,
    }
    names = {"attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
    for (ours, theirs), default in zip(names.items(), family.caps, strict=True):
        if d.get(theirs, default):  # null: none
            settings[ours] = number(theirs, float, default)
    return settings


def _global_every(d: dict, where: str, family: Family) -> int:
    """Return n where every n-th layer reads everything and the others slide."""
    kinds = d.get("layer_types")
    if kinds is None:
        return _number(where, d, "sliding_window_pattern", int, family.every)
    known = isinstance(kinds, list) and all(k in LAYER_TYPES for k in kinds)
    everything = [i for i, kind in enumerate(kinds) if kind == LAYER_TYPES[0]] if known else []
    every = everything[0] + 1 if everything else len(kinds) + 1
    check(
        known and everything == list(range(every - 1, len(kinds), every)),
        f"{where}: layer_types={kinds!r}",
        f"every n-th layer of {LAYER_TYPES[0]}, the others of {LAYER_TYPES[1]}, is supported",
        USE,
    )
    return every


def _number(where: str, settings: dict, key: str, kind: type, default=None) -> int | float:
    """Return a positive setting as an int or a float; an absent or null one is the default."""
    value = default if settings.get(key) is None else settings[key]
    check(
        value is not None,
        f"{where}: its config lacks {key!r}",
        "every setting is needed",
        OWN_CONFIG,
    )
    ok = type(value) in (int, float) and 0 < value < 2**40
    if kind is int:
        ok = ok and value == int(value)
    needed = "number" if kind is float else "whole number"
    check(ok, f"{where}: {key}={value!r}", f"a positive {needed} is needed", OWN_CONFIG)
    return kind(value)


def _rope_settings(d: dict, where: str, family: Family) -> dict[str, int | float | str]:
    """Return the settings of RoPE under ModelConfig's names: its bases and its scaling."""
    scaling = {}
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4, of transformers 5
        check(
            isinstance(d.get(key), dict | None),
            f"{where}: {key}={d.get(key)!r}",
            "an object or null is needed",
            OWN_CONFIG,
        )
        scaling |= d.get(key) or {}
    sliding = scaling.pop(LAYER_TYPES[1], {})  # transformers 5, where layers have their own
    scaling |= scaling.pop(LAYER_TYPES[0], {})
    check(
        isinstance(sliding, dict) and sliding.get("rope_type") in ("default", None),
        f"{where}: RoPE {sliding!r} of layers that slide",
        "only a base is supported",
        USE,
    )
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    check(
        name in ("default", *ROPE_SCALINGS),
        f"{where}: RoPE scaling {name!r}",
        f"one of {', '.join(ROPE_SCALINGS)} is supported",
        USE,
    )
    number = partial(_number, where, {**d, **scaling})
    base, local_base = family.bases
    rope = {"rope_theta": number("rope_theta", float, base)}
    if local_base:
        local_base = sliding.get("rope_theta") or local_base
        rope["rope_local_theta"] = number("rope_local_base_freq", float, local_base)
    if name == "default":
        return rope
    rope["rope_scaling"] = name
    number = partial(_number, where, scaling)
    if name == "yarn":
        longest = _number(where, d, "max_position_embeddings", int)
        return rope | _yarn_settings(scaling, longest, where)
    rope["rope_factor"] = number("factor", float)
    if name == "llama3":
        rope["rope_low_freq"] = number("low_freq_factor", float)
        rope["rope_high_freq"] = number("high_freq_factor", float)
        rope["rope_original"] = number("original_max_position_embeddings", int)
    return rope


def _yarn_settings(scaling: dict, longest: int, where: str) -> dict[str, int | float]:
    """Return YaRN's settings under ModelConfig's names, with transformers' defaults: queries and
    keys grow by 1 + 0.1 ln(factor)."""
    number = partial(_number, where, scaling)
    check(
        scaling.get("truncate") in (True, None),
        f"{where}: truncate={scaling.get('truncate')!r} of its RoPE scaling",
        "only True is supported",
        USE,
    )
    original = number("original_max_position_embeddings", int, longest)
    factor = number("factor", float, longest / original)

    def growth(weight: float) -> float:
        return 1 + 0.1 * weight * math.log(max(factor, 1.0))

    attention = growth(1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention = growth(number("mscale", float)) / growth(number("mscale_all_dim", float))
    return {
        "rope_factor": factor,
        "rope_low_freq": number("beta_slow", float, 1.0),
        "rope_high_freq": number("beta_fast", float, 32.0),
        "rope_original": original,
        "rope_attention": number("attention_factor", float, attention),
    }


def rope_json(c: ModelConfig) -> dict | None:
    """Return the scaling of RoPE as a config.json has it, or None where there is none: what
    _rope_settings reads."""
    if c.rope_factor == 1:
        return None
    d = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "linear":
        return d
    d["original_max_position_embeddings"] = c.rope_original
    if c.rope_scaling == "yarn":
        bounds = {"beta_slow": c.rope_low_freq, "beta_fast": c.rope_high_freq}
        return d | bounds | {"attention_factor": c.rope_attention}
    return d | {"low_freq_factor": c.rope_low_freq, "high_freq_factor": c.rope_high_freq}


def _context_length(d: dict, where: str, rope: dict) -> int:
    """Return the longest context: what the config says or, with YaRN, what it reaches; not longer
    than the sliding window."""
    longest = _number(where, d, "max_position_embeddings", int)
    if rope.get("rope_scaling") == "yarn":
        # people add YaRN to a config and leave the context in it as it was
        longest = max(longest, int(rope["rope_factor"] * rope["rope_original"]))
    check(
        longest <= LONGEST_CONTEXT,
        f"{where}: max_position_embeddings={longest}",
        "more than 2 million tokens is no model's context",
        OWN_CONFIG,
    )
    if d["model_type"] in ("mistral", "phi3") or d.get("use_sliding_window"):
        # absent means 4096 in Mistral, null that there is no window
        window = d.get("sliding_window", None if d["model_type"] == "phi3" else 4096)
        if window is not None:
            longest = min(longest, _number(where, d, "sliding_window", int, 4096))
    return longest


# ----------------------------------------------------------------------------- the folder


class _At(NamedTuple):
    """Where a tensor lies: its file, its name there, and its rows (first, end); None: all."""

    path: Path
    theirs: str
    rows: tuple[int, int] | None


def open_folder(folder: Path) -> ModelFiles:
    """Open a model's folder: read its config and its tensors' shapes. Raises ValueError, one line,
    for what is missing or damaged."""
    config = read_json(folder / "config.json")
    try:
        at, shapes = _our_tensors(config, _tensor_files(folder))
    except (SafetensorError, OSError, MemoryError) as e:
        raise ValueError(
            f"{folder}: a .safetensors file cannot be read ({one_line(e)}); copy it again"
        ) from None

    def read(name: str) -> Tensor:
        # opened anew for each tensor: what was mapped for the last one is given back
        path, theirs, rows = at[name]
        with safe_open(path, "pt") as f:
            t = f.get_slice(theirs)[slice(*rows)] if rows else f.get_tensor(theirs)
        more = norm_offset(config, name)
        return t.double() + more if more and t.is_floating_point() else t

    definition = None
    if (folder / "tokenizer.json").is_file():
        definition = read_json(folder / "tokenizer.json")
    weights = sorted({a.path for a in at.values()})
    return ModelFiles(folder.resolve().name, config, shapes, read, definition, weights)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Map each tensor's name to its file: from model.safetensors, else from the index, else from
    every .safetensors file in the folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        return _names_in_index(index)
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    found = _names_inside(files)
    other = ""
    if any(folder.glob("*.bin")):
        other = "; it has .bin files, which can run code: convert them to .safetensors"
    check(
        bool(found),
        f"{folder}",
        f"no .safetensors file in it{other}",
        "give a folder with the weights",
    )
    return found


def _names_in_index(index: Path) -> dict[str, Path]:
    """Map each tensor's name to its file as model.safetensors.index.json has it. The files must be
    there, and in the same folder."""
    folder = index.parent
    names = read_json(index).get("weight_map")
    ok = isinstance(names, dict) and all(
        isinstance(f, str) and Path(f).name == f for f in names.values()
    )
    check(ok, f"{index}", "has no weight_map of file names", "copy the folder again")
    lost = sorted({f for f in names.values() if not (folder / f).is_file()})
    check(
        not lost,
        f"{folder} lacks {', '.join(lost[:4])}",
        "its index names them",
        "copy the folder again",
    )
    return {name: folder / f for name, f in names.items()}


def _names_inside(files: list[Path]) -> dict[str, Path]:
    """Map each tensor's name to its file by opening the files. No name may be in two of them."""
    found = {}
    for path in files:
        with safe_open(path, "pt") as f:
            names = list(f.keys())
        for name in names:
            check(
                name not in found,
                f"{path}: tensor {name}",
                f"is in {found.get(name)} too",
                "remove the extra file",
            )
            found[name] = path
    return found


def _our_tensors(
    config: dict, files: dict[str, Path]
) -> tuple[dict[str, _At], dict[str, tuple[int, ...]]]:
    """Find every tensor under our name, without the prefix 'model.': where it lies, and its shape,
    from the headers of the files."""
    at = {}
    shapes = {}
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as f:
            inside = set(f.keys())
            for theirs in (name for name in files if files[name] == path):
                if theirs.endswith("rotary_emb.inv_freq"):
                    continue  # old files hold this table; ours is computed
                check(
                    theirs in inside,
                    f"{path}: no tensor {theirs}",
                    "the index says it is there",
                    "copy the folder again",
                )
                shape = tuple(f.get_slice(theirs).get_shape())
                parts = our_parts(config.get("model_type"), config, theirs, (*shape, 0)[0])
                for ours, rows in parts.items():
                    check(
                        ours not in at,
                        f"{path}: tensor {theirs}",
                        f"{ours} is there with and without the prefix",
                        "use the model's own files",
                    )
                    at[ours] = _At(path, theirs, rows)
                    shapes[ours] = (rows[1] - rows[0], *shape[1:]) if rows else shape
    return at, shapes
