"""GGUF files: written here with the package gguf, tiny and random, and the real SmolLM2 against
transformers."""

from __future__ import annotations

import builtins
import copy
import math
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import (
    SMOL,
    TEXT,
    definition,
    needs_gguf,
    needs_smol,
    random_model,
    smol,
    smol_ids,
    theirs,
)
from helpers import error_line
from test_parity import needs_transformers

import kv_router
from config import KVConfig
from generate import generate
from loaders.runs import is_foreign, load_run
from loaders.tokenizer_json import from_definition
from loaders.weights import load_model_state, model_state
from model import Transformer

# rows of multiples of 32
SHAPES = {
    "llama": dict(n_embd=32, n_head=4, n_kv_head=2, head_dim=16, n_inner=96, vocab_size=263),
    "qwen2": dict(
        n_embd=64,
        n_head=4,
        n_kv_head=2,
        head_dim=16,
        n_inner=32,
        vocab_size=261,
        qkv_bias=True,
        norm_eps=1e-6,
    ),
    "qwen3": dict(n_embd=32, n_head=2, n_kv_head=1, head_dim=32, n_inner=32, vocab_size=261)
    | dict(qk_norm=True),
}
THEIR_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def permute(w, n_head: int):
    """The order of rows that llama.cpp's converter gives q and k."""
    return (
        w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:])
        .swapaxes(1, 2)
        .reshape(w.shape)
    )


def their_name(ours: str) -> str:
    stem, leaf = ours.rsplit(".", 1)
    if stem.startswith("layers."):
        _, i, stem = stem.split(".", 2)
        return f"blk.{i}.{THEIR_NAMES[stem]}.{leaf}"
    return f"{THEIR_NAMES[stem]}.{leaf}"


def tokenizer_fields(**changes) -> dict:
    """The tokenizer.ggml.* metadata of `definition`."""
    vocab = definition()["model"]["vocab"]
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*vocab, "<|endoftext|>"],
        "token_type": [1] * len(vocab) + [3],
        "merges": ["h e", "l l", "he ll", "hell o"],
    } | changes


def settings_of(c) -> dict:
    """The settings of a ModelConfig by their GGUF names, without the architecture's."""
    return {
        "context_length": c.block_size,
        "embedding_length": c.n_embd,
        "block_count": c.n_layer,
        "feed_forward_length": c.n_inner,
        "attention.head_count": c.n_head,
        "attention.head_count_kv": c.n_kv_head,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_theta),
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
    }


def add_field(writer, key: str, value) -> None:
    add = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
        bool: writer.add_bool,
    }
    add[type(value)](key, value)


def write(
    path: Path,
    model: Transformer,
    kind: str = "F32",
    *,
    fields: dict | None = None,
    drop: str = "",
    tensors: dict | None = None,
    arch: str = "",
    tokenizer: dict | None = None,
    part: int = 0,
) -> dict[str, torch.Tensor]:
    """A GGUF file of `model`, its matrices stored as `kind`; returns the numbers that the file
    holds, under our names.

    fields: settings added or, with None, left out; drop: a tensor left out; tensors: more tensors,
    by their GGUF names; part: split it, so many tensors to a file, as llama.cpp does."""
    import gguf

    c = model.cfg
    named = {(True, False): "qwen2", (False, True): "qwen3"}
    arch = arch or named.get((c.qkv_bias, c.qk_norm), "llama")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=part)
    for key, value in (settings_of(c) | (fields or {})).items():
        if value is not None:
            add_field(writer, f"{arch}.{key}", value)
    for key, value in (tokenizer_fields() if tokenizer is None else tokenizer).items():
        add_field(writer, f"tokenizer.ggml.{key}", value)
    permuted = {"q_proj": c.n_head, "k_proj": c.n_kv_head} if arch == "llama" else {}
    held = {}
    for name, t in model_state(model).items():
        dtype = gguf.GGMLQuantizationType["F32" if t.ndim == 1 else kind]
        w = t.detach().numpy()
        held[name] = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(w, dtype), dtype))
        n_head = permuted.get(name.split(".")[-2])
        if n_head:
            w = permute(w, n_head)
        if name != drop:
            stored = gguf.quants.quantize(w, dtype)
            writer.add_tensor(their_name(name), stored, raw_dtype=dtype)
    for name, a in (tensors or {}).items():
        writer.add_tensor(name, a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def logits(model: Transformer, T: int = 53) -> torch.Tensor:
    x = torch.randint(255, (2, T), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(x)


def llama3_divisors(theta: float, D: int, factor: float, original: int = 8192) -> np.ndarray:
    """rope_freqs as llama.cpp's converter computes it, wavelength by wavelength."""
    out = []
    for i in range(0, D, 2):
        wavelength = 2 * math.pi * theta ** (i / D)
        if wavelength < original / 4:
            out.append(1.0)
        elif wavelength > original:
            out.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@needs_gguf
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", SHAPES)
def test_gguf_logits_equal_the_numbers_in_the_file(tmp_path, arch, tied, kind):
    """A model filled by hand with the (de)quantised numbers and the model read from the file have
    bit-equal weights and logits: names, the order of q and k rows (llama permuted, Qwen not),
    biases, tied head, tokenizer."""
    model = random_model(sum(map(ord, arch + kind)), **SHAPES[arch], tie_embeddings=tied)
    held = write(tmp_path / "m.gguf", model, kind)
    run = load_run(tmp_path / "m.gguf")
    assert run.model.cfg == model.cfg and run.tokenizer.encode(TEXT) == from_definition(
        definition(), "tiny"
    ).encode(TEXT)
    load_model_state(model, held, "test")
    got = model_state(run.model)
    assert got.keys() == held.keys() and all(torch.equal(got[k], held[k]) for k in held)
    assert torch.equal(logits(run.model), logits(model)) and run.base == str(
        (tmp_path / "m.gguf").resolve()
    )


@needs_gguf
def test_gguf_settings_left_out_take_llama_cpps_defaults(tmp_path):
    """Without rope.freq_base 10000, without head_count_kv as many as heads, without key_length
    n_embd / n_head."""
    model = random_model(n_embd=32, n_head=4, n_kv_head=4, head_dim=8, n_inner=32, vocab_size=261)
    left_out = dict.fromkeys(
        (
            "rope.freq_base",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.value_length",
            "rope.dimension_count",
        )
    )
    write(tmp_path / "m.gguf", model, fields=left_out)
    run = load_run(tmp_path / "m.gguf")
    assert (
        run.model.cfg == model.cfg
        and run.model.cfg.rope_theta == 10000
        and torch.equal(logits(run.model), logits(model))
    )


@needs_gguf
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_scaling_is_recognised_from_rope_freqs(tmp_path, factor):
    """From the divisors that llama.cpp stores the scaling is found again, and the logits are those
    of a model with it, not of one without."""
    scaled = random_model(7, **SHAPES["llama"], rope_factor=factor, rope_original=8192)
    write(
        tmp_path / "m.gguf", scaled, tensors={"rope_freqs.weight": llama3_divisors(1e4, 16, factor)}
    )
    run = load_run(tmp_path / "m.gguf")
    assert run.model.cfg == scaled.cfg and torch.equal(logits(run.model), logits(scaled))
    assert (logits(scaled) - logits(random_model(7, **SHAPES["llama"]))).abs().max() > 0.01


ROPES = {  # GGUF's settings, and ModelConfig's
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        dict(rope_scaling="linear", rope_factor=4.0),
    ),
    "linear, unnamed": ({"rope.scaling.factor": 4.0}, dict(rope_scaling="linear", rope_factor=4.0)),
    "linear of old": ({"rope.scale_linear": 4.0}, dict(rope_scaling="linear", rope_factor=4.0)),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "yarn": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 8.0,
        },
        dict(
            rope_scaling="yarn",
            rope_factor=4.0,
            rope_original=32,
            rope_low_freq=1.0,
            rope_high_freq=8.0,
            rope_attention=1 + 0.1 * math.log(4),
        ),
    ),
}


@needs_gguf
@pytest.mark.parametrize("name", ROPES)
def test_gguf_rope_scaling_is_the_models(tmp_path, name):
    """Linear and YaRN scaling in GGUF's settings, old ones too, give the model that ModelConfig's
    settings of them give."""
    fields, settings = ROPES[name]
    # YaRN's context is what it reaches, as in a folder
    model = random_model(7, **SHAPES["llama"], **settings, block_size=128)
    write(tmp_path / "m.gguf", model, fields=fields)
    run = load_run(tmp_path / "m.gguf")
    assert run.model.cfg == model.cfg and torch.equal(logits(run.model), logits(model))


@needs_gguf
def test_gguf_in_parts_is_one_model(tmp_path):
    """A split file, named by any of its parts, in capitals too, gives the model of the whole one; a
    part that is missing is named, and one under another name says what it is."""
    model = random_model(**SHAPES["llama"])
    held = write(tmp_path / "m.gguf", model, "Q8_0", part=5)
    parts = sorted(tmp_path.iterdir())
    assert [p.name for p in parts] == [f"m-{i:05d}-of-00005.gguf" for i in range(1, 6)]
    runs = [load_run(p) for p in parts]
    for run in runs:
        got = model_state(run.model)
        assert got.keys() == held.keys() and all(torch.equal(got[k], held[k]) for k in held)
        assert run.tokenizer.name == runs[0].tokenizer.name
        assert run.base_sha256 == runs[0].base_sha256
    parts[2].rename(tmp_path / "elsewhere")
    assert "of its 5 parts lacks m-00003-of-00005.gguf" in error_line(load_run, parts[0])
    (tmp_path / "elsewhere").rename(parts[2])
    alone = parts[0].rename(tmp_path / "first.gguf")
    assert "is one of 5 parts" in error_line(load_run, alone)
    alone.rename(parts[0])
    for part in parts:
        part.rename(part.with_suffix(".GGUF"))
    capitals = parts[1].with_suffix(".GGUF")
    assert is_foreign(capitals) and load_run(capitals).base_sha256 == runs[0].base_sha256
    shutil.copy(capitals, tmp_path / "m-00003-of-00005.GGUF")
    assert "is in another part too" in error_line(load_run, capitals)


def header(*values: tuple[str, int | bytes]) -> bytes:
    """Bytes of a GGUF header: each value by its kind, I or Q, a text with its length before it."""
    out = b"GGUF" + struct.pack("<I", 3)
    for kind, value in values:
        if kind == "text":
            out += struct.pack("<Q", len(value)) + value
        else:
            out += struct.pack(f"<{kind}", value)
    return out


ONE = [("Q", 0), ("Q", 1), ("text", b"a")]  # a header of one setting, its value still to come
N = 10**12
ABSURD = {
    "tensors": header(("Q", N), ("Q", 0)),
    "settings": header(("Q", 0), ("Q", N)),
    "length of a name": header(("Q", 0), ("Q", 1), ("Q", N)),
    "length past every number": header(("Q", 0), ("Q", 1), ("Q", 2**64 - 1)),
    "numbers of an array": header(*ONE, ("I", 9), ("I", 4), ("Q", N)),
    "texts of an array": header(*ONE, ("I", 9), ("I", 8), ("Q", N)),
    "array past the end": header(*ONE, ("I", 9), ("I", 12), ("Q", 10**7)),
    "arrays in arrays": header(*ONE, ("I", 9), *[("I", 9), ("Q", 1)] * 20000),
    "kind of value": header(*ONE, ("I", 77)),
    "dimensions": header(("Q", 1), ("Q", 0), ("text", b"t"), ("I", 2**31)),
    "sizes": header(
        *[("Q", 1), ("Q", 0), ("text", b"t"), ("I", 4)], *[("Q", N)] * 4, ("I", 0), ("Q", 0)
    ),
}


@needs_gguf
@pytest.mark.parametrize("name", ABSURD)
def test_gguf_of_absurd_counts_is_refused_at_once(tmp_path, name, monkeypatch):
    """A header that counts 10^12 of anything, or nests, is one line; the package gguf, which would
    count all of it, is not asked but for a tensor's sizes."""
    path = tmp_path / "m.gguf"
    path.write_bytes(ABSURD[name] + bytes(4096))
    if name != "sizes":
        monkeypatch.setattr("gguf.GGUFReader", None)
    line = error_line(load_run, path)
    assert f"{path} cannot be read as GGUF" in line and "NoneType" not in line
    assert name != "arrays in arrays" or "an array of arrays in its header" in line


@needs_gguf
def test_gguf_bos_follows_the_file_and_llama_cpps_default(tmp_path):
    """bos_token_id begins a text where add_bos_token says so, and for Llama 3's pre-tokenizer also
    where that is left out."""
    model = random_model(**SHAPES["llama"])
    for pre, more, want in (
        ("gpt-2", {"bos_token_id": 260}, None),
        ("gpt-2", {"bos_token_id": 260, "add_bos_token": True}, 260),
        ("llama-bpe", {"bos_token_id": 260}, 260),
        ("llama-bpe", {"bos_token_id": 260, "add_bos_token": False}, None),
        ("llama-bpe", {}, None),
    ):
        write(tmp_path / "m.gguf", model, tokenizer=tokenizer_fields(pre=pre, **more))
        assert load_run(tmp_path / "m.gguf").tokenizer.bos == want, (pre, more)


LLAMA = SHAPES["llama"]
WRONG = {
    "architecture": (dict(arch="gemma2"), "architecture 'gemma2'"),
    "experts": (dict(fields={"expert_count": 8}), "8 experts"),
    "longrope": (dict(fields={"rope.scaling.type": "longrope"}), "RoPE scaling 'longrope'"),
    "scaling is a number": (dict(fields={"rope.scaling.type": 3}), "RoPE scaling 3"),
    "linear without a factor": (
        dict(fields={"rope.scaling.type": "linear"}),
        "rope.scaling.factor: is not in the file",
    ),
    "yarn of another kind": (
        dict(
            fields={
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.yarn_log_multiplier": 0.1,
            }
        ),
        "rope.scaling.yarn_log_multiplier=",
    ),
    "half rope": (dict(fields={"rope.dimension_count": 8}), "RoPE on 8 dimensions"),
    "no layers": (dict(fields={"block_count": None}), "llama.block_count: is not in the file"),
    "too many layers": (dict(fields={"block_count": 9999}), "missing: layers.9998"),
    "too few layers": (dict(fields={"block_count": 1}), "unexpected: layers.1"),
    "heads per layer": (
        dict(fields={"attention.head_count_kv": [2, 2]}),
        "attention.head_count_kv=[2, 2]",
    ),
    "no heads": (dict(fields={"attention.head_count": 0}), "num_attention_heads=0"),
    "text for a number": (dict(fields={"embedding_length": "32"}), "embedding_length='32'"),
    "huge context": (dict(fields={"context_length": 2**31}), "max_position_embeddings=2147483648"),
    "a tensor missing": (
        dict(drop="layers.1.mlp.up_proj.weight"),
        "missing: layers.1.mlp.up_proj.weight",
    ),
    "no embedding": (dict(drop="embed_tokens.weight"), "lacks 'vocab_size'"),
    "unknown tensor": (
        dict(tensors={"blk.0.attn_sinks.weight": np.ones(16, np.float32)}),
        "unexpected: blk.0.attn_sinks.weight",
    ),
    "bias": (
        dict(tensors={"blk.0.attn_q.bias": np.ones(64, np.float32)}),
        "unexpected: layers.0.self_attn.q_proj.bias",
    ),
    "integers": (
        dict(drop="norm.weight", tensors={"output_norm.weight": np.ones(32, np.int8)}),
        "output_norm.weight is I8",
    ),
    "inf": (
        dict(drop="norm.weight", tensors={"output_norm.weight": np.full(32, np.inf, np.float32)}),
        "norm.weight: not all finite",
    ),
    "other rope_freqs": (
        dict(tensors={"rope_freqs.weight": llama3_divisors(1e4, 16, 8.0, 4096)}),
        "rope_freqs",
    ),
    "short rope_freqs": (dict(tensors={"rope_freqs.weight": np.ones(4, np.float32)}), "rope_freqs"),
    "zero rope_freqs": (dict(tensors={"rope_freqs.weight": np.zeros(8, np.float32)}), "rope_freqs"),
    "sentencepiece": (
        dict(tokenizer={"model": "llama", "tokens": ["a"], "merges": ["a"], "token_type": [1]}),
        "lacks 'scores'",
    ),
    "wordpiece": (
        dict(tokenizer={"model": "bert", "tokens": ["a"], "token_type": [1]}),
        "model 'bert'",
    ),
    "no tokens": (dict(tokenizer={"model": "gpt2"}), "lacks 'tokens'"),
    "no tokenizer": (dict(tokenizer={}), "no tokenizer.json in it"),
    "damaged tokenizer": (
        dict(
            tokenizer={
                "model": "gpt2",
                "tokens": 5,
                "merges": ["a b"],
                "token_type": [1],
                "pre": "gpt-2",
            }
        ),
        "tokenizer is damaged",
    ),
}


@needs_gguf
@pytest.mark.parametrize("name", WRONG)
def test_gguf_refusals_name_what_is_wrong(tmp_path, name):
    """What this trunk cannot be, or a file that does not fit itself, is one line that names the
    setting or the tensor."""
    how, words = WRONG[name]
    write(tmp_path / "m.gguf", random_model(**LLAMA), **how)
    assert words in error_line(load_run, tmp_path / "m.gguf")


@needs_gguf
def test_damaged_gguf_is_one_line_or_loads(tmp_path):
    """Cut anywhere in its header or data a file is refused in one line; with a byte of its header
    changed it is refused so, or loads."""
    path = tmp_path / "m.gguf"
    write(path, random_model(**LLAMA))
    whole = path.read_bytes()
    rng = random.Random(0)
    assert len(whole) > 20000
    for n in [0, 3, 4, 20, *rng.sample(range(len(whole) - 40), 40)]:
        path.write_bytes(whole[:n])
        assert str(path) in error_line(load_run, path), n
    refused = 0
    for _ in range(150):
        at = rng.choice([rng.randrange(900), rng.randrange(len(whole) // 2)])
        path.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            load_run(path)
        except ValueError as e:
            refused += 1
            assert "\n" not in str(e), e
    assert refused > 20
    for text in (b"GGUF", b"not a model", b"\x80\x04cos\nsystem\n"):
        path.write_bytes(text)
        assert str(path) in error_line(load_run, path)
    assert "no such file" in error_line(load_run, tmp_path / "absent.gguf")


def test_gguf_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    """gguf is an optional extra: without it one line says pip install gguf."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError("no module named gguf")
        return real(name, *args, **kwargs)

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install gguf" in error_line(load_run, tmp_path / "m.gguf")


# ----------------------------------------------------------------------------- the real thing


@needs_smol
def test_smollm2_knows_the_capital_of_france():
    """The real weights, read from Q4_1, and the real tokenizer continue 'The capital of France is'
    with ' Paris'."""
    rows, _ = generate(smol().model, [smol().tokenizer.encode("The capital of France is")], 3)
    assert smol().tokenizer.decode(rows[0]).startswith(" Paris")


@needs_smol
@needs_transformers
def test_smollm2_equals_transformers(tmp_path_factory):
    """Logits of 300 tokens equal transformers' reading of the same file to 1e-3 (they are of order
    7); an exported tokenizer gives AutoTokenizer our ids, blanks before digits included, and the
    text comes back."""
    _, out, said = theirs(tmp_path_factory)
    with torch.no_grad():
        got = smol().model(smol_ids())
    assert got.shape == (1, 300, 49152) and out["smol"].std() > 3
    assert (got - out["smol"]).abs().max() < 1e-3
    assert smol().tokenizer.encode(TEXT) == said["smol"]["tokens"] and said["smol"]["text"] == TEXT


@needs_smol
def test_smollm2_cached_decoding_equals_the_whole_forward():
    """A few tokens one by one, a chunk past three 64-token tiles, and some one by one again give
    the uncached logits to 1e-3, from the dense cache and, in decode mode, from the packed one (S =
    16, K = 8, calibrated output basis, folded, tail 4), which stores less."""
    x = smol_ids()
    packed = copy.deepcopy(smol().model)
    kv_router.attach(
        packed,
        KVConfig(n_groups=16, topk_groups=8, value_basis="output", kv_tail=4, prefill="routed"),
        [x[:, 200:]],
    )
    kv_router.fold(packed)
    x = x[:, :206]
    sizes = {}
    whole = {}
    with torch.no_grad():
        for name, model in (("dense", smol().model), ("packed", packed)):
            cache = model.new_cache(1, 206)
            out = []
            for piece in (*x[:, :3].split(1, 1), x[:, 3:200], *x[:, 200:].split(1, 1)):
                out.append(model.prefill(piece, cache, last_only=False))
            whole[name] = model(x)
            sizes[name] = cache.nbytes()
            assert (torch.cat(out, 1) - whole[name]).abs().max() < 1e-3
    assert (whole["dense"] - whole["packed"]).abs().mean() > 0.1 and sizes["packed"] < 0.8 * sizes[
        "dense"
    ]


@needs_smol
def test_smollm2_settings_are_those_of_its_config():
    """The shape that Hugging Face's config.json of SmolLM2-135M states, read from GGUF keys."""
    c = smol().model.cfg
    assert (
        c.vocab_size,
        c.block_size,
        c.n_layer,
        c.n_embd,
        c.n_head,
        c.n_kv_head,
        c.head_dim,
        c.n_inner,
    ) == (49152, 8192, 30, 576, 9, 3, 64, 1536)
    assert (c.rope_theta, c.norm_eps, c.tie_embeddings, c.qkv_bias, c.rope_factor) == (
        100000,
        1e-5,
        True,
        False,
        1,
    )
    assert smol().tokenizer.vocab_size == 49152 and is_foreign(SMOL)
