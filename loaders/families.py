"""Model families of others: what each does in another way than Llama, how its tensors are named,
and what is not supported, by name. loaders/huggingface.py reads them, loaders/export.py writes
them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from config import check

USE = "use a Llama, Mistral, Qwen2, Qwen3, Phi-3, OPT, Gemma 2 or Gemma 3 (text) model"

# settings with which attention or the MLP is another one than ours, and their only value read here
LLAMA_ONLY = {
    "quantization_config": None,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "hidden_act": "silu",
    "use_mrope": False,
}
OPT_ONLY = {
    "quantization_config": None,
    "activation_function": "relu",
    "do_layer_norm_before": True,  # False: the 350m model, normed after each branch
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
    "enable_bias": True,
}
OPT_NAMES = {
    "final_layer_norm": "norm",
    "layers.self_attn_layer_norm": "input_layernorm",
    "layers.final_layer_norm": "post_attention_layernorm",
    "layers.self_attn.out_proj": "self_attn.o_proj",
    "layers.fc1": "mlp.up_proj",
    "layers.fc2": "mlp.down_proj",
}
OPT_FIXED = dict(
    norm="layer",
    positions="learned",
    activation="relu",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
)


GEMMA_ONLY = {
    "quantization_config": None,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": False,
}
GEMMA_NAMES = {
    "layers.post_attention_layernorm": "attn_out_norm",
    "layers.pre_feedforward_layernorm": "post_attention_layernorm",
    "layers.post_feedforward_layernorm": "mlp_out_norm",
}


class Family(NamedTuple):
    """One model_type of config.json.

    fixed  settings of ModelConfig that every model of the family has
    only   settings of config.json with one value that is read here
    keys   where config.json has another name for a size
    tied   whether the head is the embedding where config.json does not say
    names  our name of a module, by its name there; "layers." stands for "layers.N."
    fused  our names of the projections that one tensor there holds, and the settings whose numbers
           its rows are proportional to
    skip   rows of a tensor that come before those of ours
    norm   what is added to the weights of norms to get ours
    every  every so many-th layer reads everything, the others slide, where config.json does not
           say; 0: no layer slides
    caps   how attention logits and those of the next token are capped where it does not say
    bases  those of RoPE where it does not say: and of layers that slide, 0: the same"""

    architecture: str
    fixed: dict = {}
    only: dict = LLAMA_ONLY
    keys: dict[str, str] = {}
    tied: bool = False
    prefix: str = "model."
    names: dict[str, str] = {}
    fused: dict[str, dict[str, str | None]] = {}
    skip: dict[str, int] = {}
    norm: float = 0.0
    every: int = 0
    caps: tuple[float, float] = (0.0, 0.0)
    bases: tuple[float, float] = (10000.0, 0.0)


GEMMA = Family(
    "Gemma2ForCausalLM",
    dict(post_norms=True, activation="gelu_tanh"),
    GEMMA_ONLY,
    tied=True,
    names=GEMMA_NAMES,
    norm=1.0,
    every=2,
    caps=(50.0, 30.0),
)
FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", dict(qkv_bias=True)),
    "qwen3": Family("Qwen3ForCausalLM", dict(qk_norm=True)),
    "mistral": Family("MistralForCausalLM"),
    "phi3": Family(
        "Phi3ForCausalLM",
        fused={
            "layers.self_attn.qkv_proj": {
                "self_attn.q_proj": "num_attention_heads",
                "self_attn.k_proj": "num_key_value_heads",
                "self_attn.v_proj": "num_key_value_heads",
            },
            "layers.mlp.gate_up_proj": {"mlp.gate_proj": None, "mlp.up_proj": None},
        },
    ),
    "opt": Family(
        "OPTForCausalLM",
        OPT_FIXED,
        OPT_ONLY,
        keys={"intermediate_size": "ffn_dim"},
        tied=True,
        prefix="model.decoder.",
        names=OPT_NAMES,
        skip={"embed_positions": 2},
    ),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA._replace(
        architecture="Gemma3ForCausalLM",
        fixed=GEMMA.fixed | dict(qk_norm=True),
        every=6,
        caps=(0.0, 0.0),
        bases=(1e6, 1e4),
    ),
}


# ----------------------------------------------------------------------------- what is refused


def _layers_of(d: dict, *kinds: str) -> bool:
    """Say whether layer_types of a config.json names one of these."""
    listed = d.get("layer_types") or d.get("layers_block_type") or ()
    return isinstance(listed, list | tuple) and any(k in str(t) for t in listed for k in kinds)


MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")
RECURRENT = (
    "linear_num_key_heads",
    "mamba_d_state",
    "mamba_d_ssm",
    "ssm_cfg",
    "linear_attn_config",
)
# what a config.json says of layers that this trunk does not have
UNSUPPORTED = {
    "multi-head latent attention (MLA)": lambda d: d.get("kv_lora_rank"),
    "layers of linear attention or state-space models": lambda d: (
        any(d.get(key) for key in RECURRENT)
        or _layers_of(d, "linear", "mamba", "conv", "recurrent", "lightning")
    ),
    "a mixture of experts": lambda d: any(d.get(key) for key in MIXTURES),
    "attention sinks as parameters": lambda d: (
        d.get("model_type") == "gpt_oss" or d.get("add_swa_attention_sink_bias")
    ),
}


def check_supported(d: dict, where: str) -> None:
    """Raise ValueError, by name, for what a config.json asks of a trunk and this one is not."""
    kind = d.get("model_type")
    found = [name for name, asks in UNSUPPORTED.items() if asks(d)]
    check(
        not found,
        f"{where}: model_type={kind!r} has {' and '.join(found)}",
        "attention over keys and values of every head, and one MLP a layer, are supported",
        USE,
    )
    check(
        isinstance(kind, str) and kind in FAMILIES,
        f"{where}: model_type={kind!r}",
        f"one of {', '.join(FAMILIES)} is supported",
        USE,
    )
    for key, only in FAMILIES[kind].only.items():
        came = d.get(key, only)
        check(
            came in (only, None),
            f"{where}: {key}={came!r}",
            f"only {only!r} is supported",
            USE,
        )
    width = d.get("word_embed_proj_dim", d.get("hidden_size"))
    check(
        kind != "opt" or width == d.get("hidden_size"),
        f"{where}: word_embed_proj_dim={width!r} with hidden_size={d.get('hidden_size')!r}",
        "embeddings as wide as the model are supported",
        USE,
    )


# ----------------------------------------------------------------------------- names of tensors


def split_name(name: str) -> tuple[str, str, str]:
    """Part a tensor's name into its layer ("layers.3." or ""), its module, and its leaf
    with the dot."""
    module, dot, leaf = name.rpartition(".")
    if module.count(".") < 2 or not module.startswith("layers."):
        return "", module, dot + leaf
    _, number, module = module.split(".", 2)
    return f"layers.{number}.", module, dot + leaf


def our_parts(
    kind: str, config: dict, theirs: str, n_rows: int
) -> dict[str, tuple[int, int] | None]:
    """Return, for a tensor of a model's file, our tensors that it holds, by name, and their rows
    (first, end), or None where it is one of ours as it is. n_rows: the rows it has."""
    family = FAMILIES[kind if isinstance(kind, str) and kind in FAMILIES else "llama"]
    name = theirs
    for part in family.prefix.split(".")[:-1]:  # files that lack the first one exist
        name = name.removeprefix(f"{part}.")
    layer, module, leaf = split_name(name)
    known = f"layers.{module}" if layer else module
    if known in family.skip:
        return {module + leaf: (family.skip[known], n_rows)}
    if known not in family.fused:
        return {layer + family.names.get(known, module) + leaf: None}
    shares = [config.get(key, 1) if key else 1 for key in family.fused[known].values()]
    whole = all(type(n) is int and n > 0 for n in shares) and n_rows % sum(shares) == 0
    check(
        whole,
        f"tensor {theirs} of {n_rows} rows",
        f"they cannot be shared out as {shares}",
        "use the model's own files",
    )
    ends = torch.tensor([0, *shares]).cumsum(0) * (n_rows // sum(shares))
    rows = zip(ends.tolist(), ends.tolist()[1:], strict=False)
    return {layer + ours + leaf: at for ours, at in zip(family.fused[known], rows, strict=True)}


def norm_offset(config: dict, ours: str) -> float:
    """Return what is added to a tensor of a file of that config to get ours of that name."""
    family = FAMILIES.get(str(config.get("model_type")), FAMILIES["llama"])
    return family.norm if ours.removesuffix(".weight").endswith("norm") else 0.0


def their_tensors(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors as the files of a family have them: what our_parts reads. A fused one
    cannot be written."""
    family = FAMILIES[kind]
    theirs = {ours: known for known, ours in family.names.items()}
    out = {}
    for name, t in tensors.items():
        if name.startswith("lm_head"):
            out[name] = t
            continue
        layer, module, leaf = split_name(name)
        module = theirs.get(module, module).removeprefix("layers.")
        rows = family.skip.get(module, 0)
        if rows:
            t = torch.cat((t.new_zeros(rows, t.size(1)), t))
        if family.norm and module.endswith("norm"):
            t = (t.double() - family.norm).to(t.dtype)
        out[family.prefix + layer + module + leaf] = t.contiguous()
    return out
