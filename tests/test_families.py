"""Model families other than Llama's: tiny random models that transformers made and saved are loaded
here, compute the same, go back, and every method runs on them.

transformers runs once, in a process of its own (see tests/foreign.py), which waits for our exports
half-way."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from foreign import definition, ids, random_model, run_of
from helpers import error_line, read_in_pieces
from safetensors.torch import load_file
from test_parity import needs_transformers

import kv_router
import lora
import mixsga
import selector
from baselines import align, kivi, quest, shared_heads
from config import KVConfig, ModelConfig, SelectConfig
from generate import generate
from loaders.export import export, same_model, shape_json
from loaders.families import FAMILIES, check_supported
from loaders.huggingface import model_config
from loaders.runs import load_run
from loaders.weights import load_model_state, model_state
from model import Transformer
from settings.adapters import AdapterConfig
from settings.experts import MixConfig
from training.loss import lm_loss

pytest.importorskip("tokenizers", reason="pretrained models' tokenizers run in it")
ROOT = Path(__file__).resolve().parents[1]
T = 43
NEW = 9
WINDOW = 7  # of sliding layers
SHAPE = dict(
    vocab_size=263,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_hidden_layers=2,
    intermediate_size=37,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
NO_TOKENS = dict(pad_token_id=None, bos_token_id=260, eos_token_id=260)
OPT = dict(
    vocab_size=263,
    hidden_size=32,
    word_embed_proj_dim=32,
    num_attention_heads=2,
    num_hidden_layers=2,
    ffn_dim=37,
    max_position_embeddings=64,
)
MODELS = {
    "qwen3": SHAPE | dict(rope_theta=500.0, rms_norm_eps=1e-5),
    "opt": OPT,
    "phi3": SHAPE | dict(rope_theta=500.0, rms_norm_eps=1e-5, sliding_window=None),
}
GEMMA = SHAPE | dict(
    tie_word_embeddings=True, query_pre_attn_scalar=9, sliding_window=WINDOW, rms_norm_eps=1e-5
)
MODELS |= {
    "gemma2": GEMMA
    | dict(
        num_hidden_layers=4,
        rope_theta=500.0,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=4.0,
    ),
    "gemma3_text": GEMMA
    | dict(
        num_hidden_layers=5,
        sliding_window_pattern=3,
        rope_theta=500.0,
        rope_local_base_freq=30.0,
        rope_scaling=dict(rope_type="linear", factor=3.0),
    ),
}
CLASSES = {
    "qwen3": "Qwen3Config",
    "opt": "OPTConfig",
    "phi3": "Phi3Config",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
}
SCRIPT = """
import json, sys
import torch, transformers
from pathlib import Path
from safetensors.torch import save_file
transformers.logging.set_verbosity_error()
jobs, out = json.load(open("jobs.json")), {}

@torch.no_grad()
def record(name, model, idx, more):
    model = model.float().eval()
    out[name] = model(input_ids=idx).logits.contiguous()
    how = dict(max_new_tokens=more, do_sample=False, eos_token_id=None, pad_token_id=0)
    out[name + " greedy"] = model.generate(idx, attention_mask=torch.ones_like(idx), **how)

def load(name):
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(Path(name).resolve()), attn_implementation="eager", dtype=torch.float32)

for i, (kind, settings) in enumerate(jobs["models"].items()):
    config = getattr(transformers, jobs["classes"][kind])(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    torch.manual_seed(i)
    with torch.no_grad():
        for name, p in model.named_parameters():
            at = 0.0 if "norm" not in name or "bias" in name or "gemma" in kind else 1.0
            p.copy_((0.3 if "norm" in name else 0.2) * torch.randn(p.shape) + at)
    model.save_pretrained(kind)
    Path(kind, "tokenizer.json").write_text(json.dumps(jobs["definition"]))
    record(kind, load(kind), torch.tensor(jobs["ids"][kind]), jobs["new"])
print("saved", flush=True)
input()
for kind in jobs["models"]:
    idx = torch.tensor(jobs["ids"][kind])
    record(kind + " exported", load(kind + "-exported"), idx, jobs["new"])
save_file(out, "out.safetensors")
"""


def tokens_of(kind: str) -> torch.Tensor:
    """Random ids (2, T) for a family."""
    return ids(kind, 263, 2, T)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder with the models that transformers saved, and its tensors by name."""
    at = tmp_path_factory.mktemp("families")
    jobs = {
        "models": {kind: shape | NO_TOKENS for kind, shape in MODELS.items()},
        "classes": CLASSES,
        "definition": definition(),
        "new": NEW,
        "ids": {kind: tokens_of(kind).tolist() for kind in MODELS},
    }
    (at / "jobs.json").write_text(json.dumps(jobs))
    (at / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child = subprocess.Popen(
        [sys.executable, "-P", "script.py"], cwd=at, env=env, text=True, **pipes
    )
    said = child.stdout.readline()
    if said == "saved\n":
        for kind in MODELS:
            export(load_run(at / kind), at / f"{kind}-exported")
    _, faults = child.communicate("go on\n", timeout=300)
    assert child.returncode == 0, faults[-3000:]
    return at, load_file(at / "out.safetensors")


@functools.cache
def loaded_from(folder: str) -> Transformer:
    return load_run(folder).model.double()


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, theirs):
    """A family's model in float64, as transformers saved it; a fresh one for every test."""
    return load_run(theirs[0] / kind).model.double()


@pytest.fixture
def dense(kind, theirs) -> torch.Tensor:
    """Its logits without a cache, padding in the second row, (2, T, vocab)."""
    with torch.no_grad():
        return loaded_from(str(theirs[0] / kind))(tokens_of(kind), pad=PAD)


PAD = torch.tensor([0, 6])
PIECES = (17, 1, 1, 9, 1, 14)  # past every window below


def farthest(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference of two logits (2, T, vocab) where there is no padding."""
    return max(float((got[b, p:] - want[b, p:]).abs().max()) for b, p in enumerate(PAD.tolist()))


def through_cache(model: Transformer, x: torch.Tensor, pieces=PIECES) -> torch.Tensor:
    """Logits (2, T, vocab) of tokens read into a fresh cache in pieces."""
    return read_in_pieces(model, x, model.new_cache(2, T), pieces, PAD)


# -------------------- against transformers


@needs_transformers
def test_logits_equal_transformers(kind, theirs):
    """Loaded from what transformers saved, logits to 1e-4 where they are of order 1."""
    at, out = theirs
    with torch.no_grad():
        got = load_run(at / kind).model(tokens_of(kind))
    assert (got - out[kind]).abs().max() < 1e-4 < 0.3 < out[kind].std()


@needs_transformers
def test_greedy_tokens_equal_transformers(kind, theirs):
    """Greedy decoding through our cache gives the tokens of transformers' generate."""
    at, out = theirs
    rows, _ = generate(load_run(at / kind).model, tokens_of(kind).tolist(), NEW)
    assert rows == out[f"{kind} greedy"][:, T:].tolist()
    assert rows[0] != rows[1]


@needs_transformers
def test_exported_folder_computes_the_same_there(kind, theirs):
    """What export writes, transformers loads, with the logits and tokens of the model it came
    from."""
    _, out = theirs
    assert (out[f"{kind} exported"] - out[kind]).abs().max() < 1e-4
    assert torch.equal(out[f"{kind} exported greedy"], out[f"{kind} greedy"])


# -------------------- every method on every family


@needs_transformers
def test_cached_equals_uncached(kind, model, dense):
    """In pieces and token by token, with padding: the logits without a cache."""
    for pieces in (PIECES, (1,) * T):
        assert farthest(through_cache(model, tokens_of(kind), pieces), dense) < 1e-9


GROUPS = dict(n_groups=4, topk_groups=2, kv_tail=3)


@needs_transformers
def test_value_groups_packed_equal_masked(kind, model, dense):
    """Half of every value: through the packed cache as without one, and not the dense model's
    logits; every group: the dense model's."""
    x = tokens_of(kind)
    kv_router.attach(model, KVConfig(prefill="routed", **GROUPS), [x])
    kv_router.fold(model)
    with torch.no_grad():
        masked = model(x, pad=PAD)
    assert farthest(through_cache(model, x), masked) < 1e-9
    assert farthest(masked, dense) > 1e-3
    kv_router.set_kept(model, 4)
    with torch.no_grad():
        assert farthest(model(x, pad=PAD), dense) < 1e-9
    assert farthest(through_cache(model, x), dense) < 1e-9


@needs_transformers
def test_selection_packed_equals_masked(kind, model, dense):
    """A third of keys and values, chosen by attention and by queries moved ahead: prompt and
    continuation as the masked pass reads them; everything: the dense model's logits."""
    x = tokens_of(kind)
    P = 35  # tokens of the prompt, 5 of them its query region
    kv = KVConfig(kv="select", n_groups=4, kv_tail=5)
    cfg = SelectConfig(kv_keep=0.3, sinks=1, relevance="future", past=8)
    selector.attach(model, kv, cfg, [x])
    kv_router.fold(model)
    model.selector.keeps_choice = True
    with torch.no_grad():
        got = read_in_pieces(model, x, model.new_cache(2, T), (P, 1, 7), PAD)
        with selector.masked_replay(model, model.selector.chosen, P - 5):
            masked = model(x, pad=PAD)
    assert farthest(got, masked) < 1e-9
    assert farthest(masked, dense) > 1e-3
    model.selector.set(cfg.everything())
    assert farthest(through_cache(model, x, (P, 1, 7)), dense) < 1e-9


@needs_transformers
@pytest.mark.parametrize("kept", [4, 2])
def test_integers_cached_equal_uncached(kind, kept, model, dense):
    """4 bits of keys and values, of all or half of the groups: token by token as without a cache,
    and near the dense model's logits, not at them."""
    x = tokens_of(kind)
    bits = dict(key_bits=4, value_bits=4, key_block=16, kv_sinks=2)
    kv_router.attach(model, KVConfig(**GROUPS | dict(topk_groups=kept), **bits), [x])
    kv_router.fold(model)
    with torch.no_grad():
        uncached = model(x, pad=PAD)
    assert farthest(through_cache(model, x, (1,) * T), uncached) < 1e-9
    assert farthest(uncached, dense) > 1e-3


@needs_transformers
def test_mixsga_cached_equals_uncached(kind, model, dense):
    """Two experts over aligned heads, a window of 3: through the cache as without one; every token
    to single heads: the dense model's logits."""
    x = tokens_of(kind)
    kv = KVConfig(kv="mixsga", kv_tail=3)
    torch.manual_seed(0)
    mixsga.attach(model, kv, MixConfig(group_sizes="1,2", expert_ratios="1:2"))
    align.fit(model, [(x, x.roll(-1, 1))])  # turns heads, exactly
    with torch.no_grad(), shared_heads.routing(model, "score"):
        masked = model(x, pad=PAD)
        assert farthest(through_cache(model, x), masked) < 1e-9
    assert farthest(masked, dense) > 1e-3
    mixsga.attach(model, kv, MixConfig(group_sizes="1,2", expert_ratios="1:0"))
    assert farthest(through_cache(model, x), dense) < 1e-9


@needs_transformers
@pytest.mark.parametrize("adapter", ["lora", "moe_lora", "routed"])
def test_adapters_learn_and_merge(kind, adapter, model, dense):
    """On every projection that a family has: nothing changes before a step, one step lowers the
    loss, and plain LoRA merges into equal logits. A gate is refused where there is none."""
    x = tokens_of(kind)
    targets = "q,k,v,o,up,down"
    if kind == "opt":
        cfg = AdapterConfig(adapter=adapter, lora_targets="q,gate")
        assert "MLP has no gate" in error_line(lora.attach, loaded_copy(model), cfg)
    cfg = AdapterConfig(adapter=adapter, lora_targets=targets, lora_dropout=0.0)
    torch.manual_seed(0)
    lora.attach(model, cfg).double()
    assert farthest(model(x, pad=PAD).detach(), dense) == 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = lm_loss(model(x[:, :-1]), x[:, 1:])
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert lm_loss(model(x[:, :-1]), x[:, 1:]) < before
        want = model(x)
        if adapter == "lora":
            assert (lora.merge(model)(x) - want).abs().max() < 1e-9


def loaded_copy(model: Transformer) -> Transformer:
    """Another model of the same numbers."""
    other = Transformer(model.cfg).double()
    load_model_state(other, model_state(model), "test")
    return other


@needs_transformers
def test_rivals_read_capped_logits(theirs):
    """Gemma 2: Quest that reads every page, and H2O that evicts nothing, are the dense model; KIVI
    through a cache is KIVI without one."""
    x = tokens_of("gemma2")
    folder = theirs[0] / "gemma2"
    with torch.no_grad():
        dense = loaded_from(str(folder))(x, pad=PAD)
        picking = load_run(folder).model.double()
        quest.attach(picking, KVConfig(topk_groups=4), read_tokens=64, whole_layers=0)
        assert farthest(picking(x, pad=PAD), dense) < 1e-9
        evicting = load_run(folder).model.double()
        shared_heads.attach(evicting, KVConfig(kv="gqa", kv_tail=3), MixConfig(kv_share=1.0))
        with shared_heads.routing(evicting, h2o=0.999):  # 43 of 43 tokens
            assert farthest(evicting(x, pad=PAD), dense) < 1e-9
        coded = kivi.attach(load_run(folder).model.double(), kivi.Format(4, 16, 16))
        uncached = coded(x, pad=PAD)
    assert farthest(through_cache(picking, x), dense) < 1e-9
    assert farthest(through_cache(coded, x, (1,) * T), uncached) < 1e-9
    assert farthest(uncached, dense) > 1e-3


# -------------------- settings of published models

# what the config.json of each says, but for what is Llama's too
PUBLISHED = {
    "Qwen3-0.6B": (
        dict(
            model_type="qwen3",
            attention_bias=False,
            head_dim=128,
            hidden_act="silu",
            hidden_size=1024,
            intermediate_size=3072,
            max_position_embeddings=40960,
            max_window_layers=28,
            num_attention_heads=16,
            num_hidden_layers=28,
            num_key_value_heads=8,
            rms_norm_eps=1e-6,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=None,
            tie_word_embeddings=True,
            use_sliding_window=False,
            vocab_size=151936,
        ),
        dict(qk_norm=True, head_dim=128, rope_theta=1e6, block_size=40960, tie_embeddings=True),
    ),
    "opt-125m": (
        dict(
            model_type="opt",
            _remove_final_layer_norm=False,
            activation_function="relu",
            do_layer_norm_before=True,
            ffn_dim=3072,
            hidden_size=768,
            max_position_embeddings=2048,
            num_attention_heads=12,
            num_hidden_layers=12,
            vocab_size=50272,
            word_embed_proj_dim=768,
        ),
        dict(positions="learned", norm="layer", n_inner=3072, head_dim=64, tie_embeddings=True),
    ),
    "Phi-3-mini-4k": (
        dict(
            model_type="phi3",
            attention_bias=False,
            hidden_act="silu",
            hidden_size=3072,
            intermediate_size=8192,
            max_position_embeddings=4096,
            num_attention_heads=32,
            num_hidden_layers=32,
            num_key_value_heads=32,
            original_max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            rope_theta=10000.0,
            sliding_window=2047,
            tie_word_embeddings=False,
            vocab_size=32064,
        ),
        dict(block_size=2047, head_dim=96, tie_embeddings=False),
    ),
    "gemma-2-2b": (
        dict(
            model_type="gemma2",
            attention_bias=False,
            attn_logit_softcapping=50.0,
            cache_implementation="hybrid",
            final_logit_softcapping=30.0,
            head_dim=256,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            hidden_size=2304,
            intermediate_size=9216,
            max_position_embeddings=8192,
            num_attention_heads=8,
            num_hidden_layers=26,
            num_key_value_heads=4,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            sliding_window=4096,
            vocab_size=256000,
        ),
        dict(
            attention_cap=50.0,
            logit_cap=30.0,
            query_scale=1 / 16,
            embedding_scale=48.0,
            sliding_window=4096,
            global_every=2,
            rope_local_theta=0.0,
            tie_embeddings=True,
        ),
    ),
    "gemma-3-1b": (
        dict(
            model_type="gemma3_text",
            attention_bias=False,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            hidden_size=1152,
            intermediate_size=6912,
            max_position_embeddings=32768,
            num_attention_heads=4,
            num_hidden_layers=26,
            num_key_value_heads=1,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
            rope_local_base_freq=10000,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=512,
            sliding_window_pattern=6,
            vocab_size=262144,
        ),
        dict(
            attention_cap=0.0,
            logit_cap=0.0,
            qk_norm=True,
            post_norms=True,
            sliding_window=512,
            global_every=6,
            rope_theta=1e6,
            rope_local_theta=1e4,
            tie_embeddings=True,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_published_models_are_read(name):
    """Keys as transformers 4 wrote them, with what they leave out: the settings they mean."""
    config, want = PUBLISHED[name]
    cfg = model_config(config, name)
    assert {key: getattr(cfg, key) for key in want} == want
    assert same_model(model_config(shape_json(cfg, config["model_type"]), name), cfg)


def test_what_no_family_has_is_not_exported(tmp_path):
    """A Llama with one setting of another family: one line that names the setting."""
    for setting in (dict(attention_cap=3.0), dict(norm="layer"), dict(qk_norm=True, out_bias=True)):
        run = run_of(random_model(**setting))
        line = error_line(export, run, tmp_path / "x")
        assert all(f"{name}={value}" in line for name, value in setting.items())
        assert "block_size" not in line and not (tmp_path / "x").exists()


def test_layers_that_slide_in_another_order_are_refused():
    """layer_types whose full ones are not every n-th, or of another kind: one line."""
    config = PUBLISHED["gemma-3-1b"][0]
    for kinds in (["full_attention", "sliding_attention"] * 2, ["chunked_attention"], "full"):
        line = error_line(model_config, config | dict(layer_types=kinds), "here")
        assert "here: layer_types=" in line
    sliding = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
    rope = dict(full_attention=dict(rope_type="default", rope_theta=1e6), sliding_attention=sliding)
    line = error_line(model_config, config | dict(rope_parameters=rope), "here")
    assert "of layers that slide" in line


# -------------------- what is refused, by name

REFUSED = {
    "multi-head latent attention": dict(model_type="deepseek_v2", kv_lora_rank=512),
    "linear attention": dict(model_type="qwen3_next", linear_num_key_heads=16),
    "state-space": dict(model_type="jamba", mamba_d_state=16),
    "layers of linear": dict(model_type="lfm2", layer_types=["conv", "full_attention"]),
    "a mixture of experts": dict(model_type="qwen3_moe", num_experts=128),
    "attention sinks as parameters": dict(model_type="gpt_oss", num_local_experts=32),
    "model_type='gpt2'": dict(model_type="gpt2"),
    "do_layer_norm_before=False": OPT | dict(model_type="opt", do_layer_norm_before=False),
    "word_embed_proj_dim=16": OPT | dict(model_type="opt", word_embed_proj_dim=16),
    "RoPE scaling 'longrope'": SHAPE
    | dict(model_type="phi3", rope_scaling=dict(type="longrope", short_factor=[1.0])),
    "partial_rotary_factor=0.75": SHAPE | dict(model_type="phi3", partial_rotary_factor=0.75),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_supported_is_refused_by_name(words):
    """One line that says which property of the model it is."""
    assert words in error_line(model_config, REFUSED[words], "here")


def test_several_refused_properties_are_all_named():
    """A mixture of experts with MLA and sinks: all three."""
    d = dict(model_type="gpt_oss", kv_lora_rank=8, num_experts=4)
    line = error_line(check_supported, d, "here")
    assert all(w in line for w in ("(MLA)", "mixture of experts", "sinks as parameters"))


def test_the_page_of_models_names_what_there_is():
    """docs/models.md: its tests are here, its settings are ModelConfig's, its families all of
    them."""
    page = (ROOT / "docs" / "models.md").read_text()
    tests = set(re.findall("`(test_[a-z_]+)`", page))
    assert tests and tests <= set(globals())
    rows = [row.split("|") for row in page.splitlines() if row.startswith("| ")][1:8]
    named = {word for row in rows for word in re.findall("`(\\w+)`", row[3])}
    assert named <= {field.name for field in fields(ModelConfig)}
    assert {kind.strip() for row in rows for kind in row[2].split(",")} == set(FAMILIES)


def test_every_family_is_tested():
    """Those that have no test here are Llama's own, in test_parity and test_pretrained."""
    assert set(FAMILIES) - set(MODELS) == {"llama", "qwen2", "mistral"}
