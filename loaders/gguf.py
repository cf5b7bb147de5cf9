"""A model's .gguf file, or the several that llama.cpp has split it into: its settings as a
config.json, its tensors dequantised, its tokenizer as a tokenizer.json.

Llama (Mistral too), Qwen2 and Qwen3 are read, with the package gguf, in any kind of numbers that it
can dequantise."""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import check
from loaders.gguf_tokenizer import gguf_definition
from loaders.templates import gguf_chat
from loaders.weights import ModelFiles
from settings.fields import one_line
from storage.state import few

OUR_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})")  # NAME-00001-of-00003.gguf
# settings of YaRN with which it is another one than ours, and their only value read here
YARN_ONLY = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
# bytes of a value of each kind in a header; beside these there are strings and arrays
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING = 8
ARRAY = 9
MOST_NAMED = 2**16  # settings or tensors of a header
MOST_LISTED = 2**24  # entries of an array in a header: a vocabulary is the longest
OTHER_FILE = "use another file of this model"
OTHER_MODEL = "use another model"


def open_gguf(path: Path) -> ModelFiles:
    """Open a .gguf file, or any of the parts of a split one: read its settings, its tensors' shapes
    and its tokenizer. Raises ValueError, one line, for what is missing or not supported."""
    check(path.is_file(), f"{path}", "no such file", "give a .gguf file")
    parts = all_parts(path)
    try:
        import gguf  # here: an optional extra
    except ImportError:
        raise ValueError(
            f"{path}: reading GGUF needs the package gguf; pip install gguf, or give a Hugging "
            "Face folder"
        ) from None
    fields = {}
    tensors = {}
    for part in parts:
        settings, inside = _read_header(gguf, part)
        fields = fields or settings  # the first part has all of them
        twice = sorted(set(tensors) & set(inside))
        check(not twice, f"{part}: tensor {twice[:1]}", "is in another part too", OTHER_FILE)
        tensors |= inside
    n = fields.get("split.count", 1)
    check(
        n in (0, len(parts)),
        f"{path} is one of {n} parts",
        f"{len(parts)} found by its name",
        f"name them NAME-00001-of-{n:05d}.gguf and so on",
    )
    config = gguf_config(fields, tensors, str(path))
    permuted = {}  # heads of each projection whose rows llama.cpp's converter has permuted
    if config["model_type"] == "llama":
        permuted["q_proj"] = config["num_attention_heads"]
        permuted["k_proj"] = config["num_key_value_heads"]

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
        n_head = permuted.get(name.split(".")[-2])
        return unpermute(a, n_head) if n_head else a

    shapes = {k: tuple(int(n) for n in reversed(t.shape)) for k, t in tensors.items()}
    shapes.pop("rope_freqs.weight", None)  # read into the config
    name = PART.sub(r"\1", parts[0].stem)
    chat = gguf_chat(fields, str(path))
    return ModelFiles(name, config, shapes, read, gguf_definition(fields, path), parts, chat)


def is_gguf(path: Path) -> bool:
    """Say whether a file's name says that it is a .gguf file."""
    return path.suffix.lower() == ".gguf"


def all_parts(path: Path) -> list[Path]:
    """List the files of a model of which `path` is one: itself, or NAME-00001-of-0000N.gguf and so
    on in order. ValueError names the parts that are not there."""
    found = PART.fullmatch(path.stem)
    if found is None:
        return [path]
    n = int(found[3])
    names = [f"{found[1]}-{i:05d}-of-{found[3]}{path.suffix}" for i in range(1, n + 1)]
    lost = [name for name in names if not (path.parent / name).is_file()]
    check(
        bool(names) and not lost,
        f"{path}: of its {n} parts lacks {few(lost)}",
        "all of them are read",
        "put them into one folder",
    )
    return [path.parent / name for name in names]


def check_counts(data: mmap.mmap | bytes) -> None:
    """Walk through a GGUF header. Raises ValueError, with a short reason, where it says more
    than a header or this file has: the package gguf would count all of it."""
    order = ">" if data[4:6] == b"\0\0" else "<"

    def number(at: int, kind: str = "Q") -> int:
        if at + 8 > len(data):
            raise ValueError("it ends within its header")
        return struct.unpack_from(order + kind, data, at)[0]

    def few_enough(n: int, most: int) -> int:
        if n > most:
            raise ValueError(f"its header counts {n} of what are at most {most}")
        return n

    def end_of_value(at: int, kind: int) -> int:
        if kind == STRING:
            return at + 8 + number(at)
        if kind != ARRAY:
            return at + VALUE_BYTES[kind]
        inner = number(at, "I")
        n = few_enough(number(at + 4), MOST_LISTED)
        at += 12
        if inner == ARRAY:
            raise ValueError("an array of arrays in its header")
        if inner != STRING:
            return at + n * VALUE_BYTES[inner]
        for _ in range(n):
            at += 8 + number(at)
        return at

    n_tensors = few_enough(number(8), MOST_NAMED)
    n_settings = few_enough(number(16), MOST_NAMED)
    at = 24
    for _ in range(n_settings):
        at = end_of_value(at, STRING)
        at = end_of_value(at + 4, number(at, "I"))
    for _ in range(n_tensors):
        at = end_of_value(at, STRING)
        # sizes, their number before them; the kind of numbers and where they lie
        at += 4 + 8 * few_enough(number(at, "I"), 4) + 12
    if at > len(data):
        raise ValueError("it ends within its header")


def _read_header(gguf, path: Path) -> tuple[dict, dict]:
    """Return one file's settings, and its tensors under our names."""
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            check_counts(data)
        reader = gguf.GGUFReader(path)
        fields = {k: f.contents() for k, f in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read as GGUF ({one_line(e)}); copy it again") from None
    return fields, {our_name(t.name): t for t in reader.tensors}


def our_name(theirs: str) -> str:
    """blk.3.attn_q.weight becomes layers.3.self_attn.q_proj.weight; an unknown name stays."""
    parts = theirs.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in OUR_NAMES:
        return f"layers.{parts[1]}.{OUR_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in OUR_NAMES:
        return f"{OUR_NAMES[parts[0]]}.{parts[1]}"
    return theirs


def unpermute(t: Tensor, n_head: int) -> Tensor:
    """Undo llama.cpp's order of a q or k projection's rows (n_head * D, ...): it pairs dimension 2i
    with 2i + 1, RoPE here i with i + D/2."""
    return t.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


# ----------------------------------------------------------------------------- settings


class _Settings:
    """The settings of a GGUF file, whose names begin with its architecture's."""

    def __init__(self, fields: dict, where: str):
        self.fields = fields
        self.where = where
        self.arch = fields.get("general.architecture")
        check(
            self.arch in ("llama", "qwen2", "qwen3"),
            f"{where}: architecture {self.arch!r}",
            "llama (Mistral too), qwen2 and qwen3 are supported",
            "use such a model",
        )

    def number(self, key: str, default=None) -> int | float:
        """Return one number; an absent one is the default."""
        value = self.fields.get(f"{self.arch}.{key}", default)
        check(
            value is not None,
            f"{self.where}: {self.arch}.{key}",
            "is not in the file",
            OTHER_FILE,
        )
        check(
            type(value) in (int, float),
            f"{self.where}: {self.arch}.{key}={value!r}",
            "one number is needed",
            OTHER_MODEL,
        )
        return value

    def rope_scaling(self) -> dict | None:
        """Return the scaling of RoPE as a config.json has it; a factor without a kind means
        linear."""
        old = self.number("rope.scale_linear", 1)
        factor = self.number("rope.scaling.factor", old)
        unnamed = "none" if factor in (0, 1) else "linear"
        kind = self.fields.get(f"{self.arch}.rope.scaling.type", unnamed)
        check(
            kind in ("none", "linear", "yarn"),
            f"{self.where}: RoPE scaling {kind!r}",
            "none, linear, yarn and Llama 3's are supported",
            OTHER_MODEL,
        )
        if kind == "none":
            return None
        factor = self.number("rope.scaling.factor", None if old == 1 else old)
        if kind == "linear":
            return {"rope_type": kind, "factor": factor}
        for key, only in YARN_ONLY.items():
            came = self.number(f"rope.scaling.{key}", only)
            check(
                came == only,
                f"{self.where}: rope.scaling.{key}={came}",
                f"only {only} is supported",
                OTHER_MODEL,
            )
        original = self.number("rope.scaling.original_context_length", 0)
        return {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": original or None,
            "beta_fast": self.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": self.number("rope.scaling.yarn_beta_slow", 1.0),
        }


def gguf_config(fields: dict, tensors: dict, where: str) -> dict:
    """Write a GGUF file's settings as a config.json."""
    settings = _Settings(fields, where)
    number = settings.number
    n_experts = number("expert_count", 0)
    check(
        not n_experts,
        f"{where}: {n_experts} experts",
        "mixtures of experts are not supported",
        "use a dense model",
    )
    n_head = number("attention.head_count")
    n_embd = number("embedding_length")
    default_dim = number("rope.dimension_count", n_embd // max(n_head, 1))
    vocab_size = None
    if "embed_tokens.weight" in tensors:
        vocab_size = int(tensors["embed_tokens.weight"].shape[-1])
    d = {
        "model_type": settings.arch,
        "hidden_size": n_embd,
        "num_attention_heads": n_head,
        "num_key_value_heads": number("attention.head_count_kv", n_head),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "head_dim": number("attention.key_length", default_dim),
        "rope_theta": number("rope.freq_base", 10000.0),
        # a float32 in the file: 1e-5 again, not 9.999999747378752e-06
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "use_sliding_window": True,
        "sliding_window": number("attention.sliding_window", 0) or None,
        "vocab_size": vocab_size,
        "rope_scaling": settings.rope_scaling(),
    }
    rotated = number("rope.dimension_count", d["head_dim"])
    check(
        rotated == d["head_dim"],
        f"{where}: RoPE on {rotated} dimensions",
        f"all {d['head_dim']} of a head are needed",
        OTHER_MODEL,
    )
    if "rope_freqs.weight" in tensors:
        check(
            d["rope_scaling"] is None,
            f"{where}: RoPE scaling and rope_freqs",
            "only one of them is supported",
            OTHER_MODEL,
        )
        divisors = np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float64).ravel()
        d["rope_scaling"] = _llama3_scaling(divisors, d["head_dim"], d["rope_theta"], where)
    return d


def _llama3_scaling(divisors: np.ndarray, D: int, theta: float, where: str) -> dict:
    """Find the four numbers of Llama 3's RoPE scaling again from its divisors of each frequency,
    (D/2,). Raises ValueError for divisors of another scaling."""
    ok = 2 * divisors.size == D and divisors.min() >= 1
    factor = 1.0
    if ok:
        factor = float(divisors.max())
        turns = 8192 * float(theta) ** (-np.arange(0, D, 2) / D) / (2 * math.pi)
        stay = np.clip((turns - 1) / 3, 0, 1)
        ok = np.allclose(divisors, 1 / (stay + (1 - stay) / factor), rtol=1e-3)
    check(
        bool(ok),
        f"{where}: its rope_freqs",
        "are not those of Llama 3's scaling (1, 4, 8192)",
        "use the model's Hugging Face folder",
    )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
