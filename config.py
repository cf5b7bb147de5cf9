"""What a model is, how it stores keys and values, and what it keeps of a prompt: frozen, validated
dataclasses from which cli.py builds command lines. Those of adapters, of experts and of the base
that is adapted are in settings/, as are those of training; of measuring in measure_config.py.

Nothing heavy is imported here, so `--help` and a wrong flag are answered before torch is loaded.
A field's declaration says which values it may have; `__post_init__` holds the rules between fields.
Letters: H heads, Hkv KV heads, D head dimension, S value groups, K groups kept, rho value budget.
Ratios say what is *kept*.

    python train.py --help
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from settings.beside import INTEGERS_NEED
from settings.fields import check, check_choice, check_fields, comma_list, count_kept, opt

LONGEST_CONTEXT = 2**21  # tokens that the table of rotations may have
ROPE_SCALINGS = ("llama3", "linear", "yarn")
NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu_tanh", "relu")
POSITIONS = ("rope", "learned")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer: Llama's, and what other families do otherwise (docs/models.md).
    Sizes in units of features, tokens or heads."""

    vocab_size: int = opt(257, "size of the vocabulary (set from the tokenizer)", least=1)
    block_size: int = opt(256, "longest context in tokens", least=1, most=LONGEST_CONTEXT)
    n_layer: int = opt(4, "number of transformer blocks", least=1)
    n_embd: int = opt(128, "width of the residual stream", least=1)
    n_head: int = opt(8, "query heads H", least=1)
    n_kv_head: int = opt(8, "KV heads Hkv; must divide n_head", least=1)
    head_dim: int = opt(16, "head dimension D; even, and divisible by the value groups S", least=1)
    n_inner: int = opt(344, "width of the MLP", least=1)
    rope_theta: float = opt(10000.0, "base of the rotary embedding", above=0)
    rope_scaling: str = opt(
        "llama3",
        "which rotations rope_factor slows: linear all of them, llama3 and yarn the slow ones "
        "(blended by turns, by dimension)",
        ROPE_SCALINGS,
    )
    rope_factor: float = opt(
        1.0, "RoPE scaling: rotations are slowed by this factor; 1: none", least=1
    )
    rope_low_freq: float = opt(
        1.0,
        "rotations that turn less often than this in rope_original tokens are slowed in full",
        above=0,
    )
    rope_high_freq: float = opt(
        4.0, "rotations that turn more often than this in rope_original tokens are left alone"
    )
    rope_original: int = opt(8192, "context the unscaled rotations were trained with", least=1)
    rope_attention: float = opt(
        1.0, "YaRN: queries and keys are both multiplied by this before attention", above=0
    )
    norm_eps: float = opt(1e-5, "epsilon of the norms", above=0)
    qkv_bias: bool = opt(False, "bias on the q, k and v projections (Qwen2)")
    qk_norm: bool = opt(False, "normalise every query and key of a head before RoPE (Qwen3)")
    norm: str = opt("rms", "rms: RMSNorm; layer: LayerNorm with a bias (OPT)", NORMS)
    activation: str = opt("silu", "nonlinearity of the MLP", ACTIVATIONS)
    gated_mlp: bool = opt(True, "the MLP multiplies two branches (SwiGLU); False: has one (OPT)")
    out_bias: bool = opt(False, "bias on the output projection and in the MLP (OPT)")
    positions: str = opt("rope", "rope: rotations; learned: added to the embedding", POSITIONS)
    post_norms: bool = opt(False, "normalise what attention and the MLP write, too (Gemma 2 and 3)")
    embedding_scale: float = opt(1.0, "embeddings are multiplied by this", above=0)
    query_scale: float = opt(0.0, "q . k is multiplied by this; 0: 1 / sqrt(D)", least=0)
    attention_cap: float = opt(
        0.0, "an attention logit s becomes cap * tanh(s / cap); 0: as it is", least=0
    )
    logit_cap: float = opt(0.0, "the same for the logits of the next token", least=0)
    sliding_window: int = opt(
        0,
        "tokens that a sliding layer reads, and keeps, its own included; 0: no layer slides",
        least=0,
    )
    global_every: int = opt(
        2,
        "with a sliding window: every so many-th layer reads everything, the others slide",
        least=1,
    )
    rope_local_theta: float = opt(
        0.0, "base of the rotary embedding in sliding layers, unscaled; 0: --rope_theta", least=0
    )
    tie_embeddings: bool = opt(True, "share the token embedding with the output head")

    def __post_init__(self):
        check_fields(self)
        check(
            self.n_head % self.n_kv_head == 0,
            f"n_head={self.n_head} with n_kv_head={self.n_kv_head}",
            "KV heads must divide the query heads",
            f"give an n_kv_head that divides {self.n_head}",
        )
        check(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim}",
            "RoPE turns pairs, so it must be even",
            "give an even --head_dim",
        )
        check(
            self.rope_low_freq < self.rope_high_freq,
            f"rope_low_freq={self.rope_low_freq}, rope_high_freq={self.rope_high_freq}",
            "needs low < high",
            "give the values of the model's config",
        )
        check(
            self.rope_scaling != "yarn" or self.rope_theta > 1,
            f"rope_scaling=yarn with rope_theta={self.rope_theta}",
            "a base above 1 is needed",
            "give for example --rope_theta=10000",
        )

    def slides(self, layer: int) -> bool:
        """Say whether a layer reads and keeps the newest sliding_window tokens only."""
        return self.sliding_window > 0 and (layer + 1) % self.global_every > 0

    @property
    def global_layers(self) -> list[int]:
        """The layers that read everything, ascending."""
        return [i for i in range(self.n_layer) if not self.slides(i)]


KVS = ("dense", "value_groups", "select", "mixsga", "gqa", "cla")
# KV heads, or layers, share what is stored; the whole model is trained on with it.
SHARED = ("mixsga", "gqa", "cla")
GROUPS = (2, 4, 8, 16, 32, 64)
BASES = ("native", "random", "pca", "output")
ROUTERS = ("linear", "norm", "static")
SCOPES = ("shared", "layer", "head")
RECONSTRUCTORS = ("zero", "mlp", "keys", "own_keys")
PREFILLS = ("exact", "routed")
INT_BITS = (16, 8, 4, 3, 2)
KEY_BLOCKS = (16, 32, 64, 128)
# What --key_block and --kv_sinks usually are where they are left open; where a budget of bytes
# picks the bits, it picks them, too (selection/budgets.py).
KEY_BLOCK = 64
KV_SINKS = 4


@dataclass(frozen=True)
class KVConfig:
    """How keys and values are stored (ST 3.1.2 and this project's additions)."""

    kv: str = opt(
        "value_groups",
        "how keys and values are stored; not given: train.py's stages select and continue take "
        "select and mixsga, sample.py stores as trained, and a base dense unless another flag of "
        "value groups, or of a selection, is given",
        KVS,
    )
    n_groups: int = opt(4, "value groups S per head", GROUPS)
    topk_groups: int = opt(
        2, "groups K kept per token; 0 where keys tell values: keys alone", least=0
    )
    value_basis: str = opt(
        "output", "basis in which values are cut into groups, folded into W_v and W_o", BASES
    )
    learn_basis: bool = opt(
        False, "train the maps into and out of the value basis, each for itself; they still fold"
    )
    value_router: str = opt(
        "norm",
        "linear: learned on the layer's input (the paper); norm: largest group norms; static: the "
        "first K groups",
        ROUTERS,
    )
    mask_scope: str = opt(
        "head",
        "head: one mask per KV head; layer: one for all heads of a layer; shared: one for all "
        "layers (select only)",
        SCOPES,
    )
    reconstructor: str = opt(
        "zero",
        "what stands for a dropped group when it is read; keys: what a linear map makes of the "
        "token's keys, all of the layer's (kv=select: the head's own), and groups hold the rest; "
        "own_keys: the same of the head's own, which attention reads faster and which tell less",
        RECONSTRUCTORS,
    )
    recon_hidden: int = opt(0, "hidden width of the MLP reconstructor; 0 means Hkv * D", least=0)
    aux_weight: float = opt(0.1, "weight of the reconstruction loss L_aux", least=0)
    lm_to_router: bool = opt(
        False, "let the language-model loss train value router and reconstructor too"
    )
    kv_warmup: float = opt(
        0.0, "share of the adaptation steps during which values stay whole", least=0, most=1
    )
    kv_layers: str = opt(
        "all", "layers compressed: all, deepest:SHARE, from:LAYER, or a list such as 2,3"
    )
    prefill: str = opt(
        "exact",
        "exact: the prompt attends to whole values; routed: to routed ones (the paper)",
        PREFILLS,
    )
    kv_tail: int = opt(4, "window: newest tokens whose values stay whole, at least", least=0)
    kv_tail_block: int = opt(
        1, "tokens of the window compressed at a time when it overflows", least=1
    )
    key_bits: int = opt(
        16,
        "bits of a stored number of a key, one step per channel and block of tokens; 16: as "
        "computed, unless --kv_bytes picks fewer",
        INT_BITS,
    )
    value_bits: int = opt(
        16,
        "bits of a stored number of a value, one step per token and head; 16: as computed; 0: "
        "--kv_bytes routes them",
        (*INT_BITS, 0),
    )
    key_block: int = opt(
        0,
        "fewer than 16 bits: tokens whose keys share steps, and that leave the window together; 0: "
        f"{KEY_BLOCK}, or where --kv_bytes picks the bits what goes with them",
        (*KEY_BLOCKS, 0),
    )
    kv_sinks: int = opt(
        -1,
        f"fewer than 16 bits, values told by keys: first tokens that stay whole; -1: {KV_SINKS}, "
        "or 1 where --kv_bytes picks the bits",
        least=-1,
    )
    # see settings.fields.from_dict
    USUAL_IN_FORMAT_1 = {"key_block": 64, "kv_sinks": 4}

    def __post_init__(self):
        check_fields(self)
        check(
            self.topk_groups <= self.n_groups,
            f"topk_groups={self.topk_groups} with n_groups={self.n_groups}",
            "needs 1 <= K <= S",
            f"give --topk_groups of at most {self.n_groups}",
        )
        check(
            self.topk_groups > 0 or self.told_by_keys,
            f"topk_groups=0 with reconstructor={self.reconstructor}",
            "nothing would tell a value",
            "give --topk_groups=1 or more, or --reconstructor=keys",
        )
        check(
            self.kv != "select" or (self.reconstructor != "mlp" and self.value_router == "norm"),
            f"kv=select with reconstructor={self.reconstructor}, value_router={self.value_router}",
            "relevance and norms choose, no network rebuilds",
            "leave both out, or give --reconstructor=keys",
        )
        told = self.kv == "select" and self.told_by_keys
        check(
            not told or (self.prefill == "exact" and self.mask_scope != "shared"),
            f"kv=select with reconstructor={self.reconstructor}, prefill={self.prefill}, "
            f"mask_scope={self.mask_scope}",
            "a head's own keys tell its values, after an exact prefill",
            "leave out --prefill, and give --mask_scope=head or layer",
        )
        self.check_bits()
        self.layers(10**4)  # whether it can be read; models have fewer

    def check_bits(self) -> None:
        """Raise ValueError where integers do not go with the other settings."""
        check(
            (self.key_bits < 16) == (self.value_bits < 16),
            f"key_bits={self.key_bits} with value_bits={self.value_bits}",
            "both are integers or neither",
            "give both of fewer than 16 bits, or neither",
        )
        check(
            not self.ints or all(need.holds(vars(self)) for need in INTEGERS_NEED),
            f"key_bits={self.key_bits} with reconstructor={self.reconstructor}, "
            f"prefill={self.prefill}, kv_tail_block={self.kv_tail_block}",
            "integers are read as they are, after an exact prefill, and leave the window by "
            "--key_block",
            "leave those out",
        )
        check(
            self.value_bits > 0 or self.n_groups <= 32,
            f"value_bits=0 with n_groups={self.n_groups}",
            "a token's levels take 2 S of 64 bits",
            "give --n_groups=32 or less",
        )
        check(
            self.value_bits > 0 or (self.kv == "select" and self.mask_scope != "shared"),
            f"value_bits=0 with kv={self.kv}, mask_scope={self.mask_scope}",
            "only kv=select routes bits, by layer or head",
            "give --kv=select --kv_bytes=0.15"
            + (" --mask_scope=head" if self.mask_scope == "shared" else ""),
        )

    @cached_property
    def ints(self) -> bool:
        """Whether keys and values are stored as integers."""
        return self.key_bits < 16

    @property
    def told_by_keys(self) -> bool:
        """Whether keys tell what stands for a dropped group."""
        return self.reconstructor in ("keys", "own_keys")

    @property
    def tail_leaves(self) -> int:
        """Tokens that leave the window at a time."""
        return self.block if self.ints else self.kv_tail_block

    @property
    def block(self) -> int:
        """Tokens whose keys share steps, of integers: as given, or usual where left open."""
        return self.key_block or KEY_BLOCK

    @property
    def first_whole(self) -> int:
        """First tokens that stay whole, where any do: as given, or usual where left open."""
        return KV_SINKS if self.kv_sinks < 0 else self.kv_sinks

    def layers(self, n_layer: int) -> list[int]:
        """Return the compressed layers' indices, ascending. ValueError for a malformed or empty
        choice."""
        text = self.kv_layers
        do = "give all, deepest:0.22, from:22 or a list such as 2,3"
        try:
            if text == "all":
                picked = list(range(n_layer))
            elif text.startswith("deepest:"):
                n_compressed = count_kept(text.removeprefix("deepest:"), n_layer)
                picked = list(range(n_layer - n_compressed, n_layer))
            elif text.startswith("from:"):
                picked = list(range(int(text.removeprefix("from:")), n_layer))
            else:
                picked = sorted({int(t) for t in text.split(",")})
        except ValueError as e:
            raise ValueError(f"kv_layers={text!r}: {e}; {do}") from None
        check(
            bool(picked) and picked[0] >= 0 and picked[-1] < n_layer,
            f"kv_layers={text!r}",
            f"layers are 0..{n_layer - 1}",
            do,
        )
        return picked

    def layers_of(self, m: ModelConfig) -> list[int]:
        """Return the compressed layers' indices in a model, ascending: those chosen that do not
        slide. ValueError where there is none."""
        picked = [i for i in self.layers(m.n_layer) if not m.slides(i)]
        check(
            bool(picked),
            f"kv_layers={self.kv_layers} with global_every={m.global_every}",
            "all of these slide, and only layers that read everything are compressed",
            f"choose layer {m.global_every - 1} or leave it out",
        )
        return picked

    def check_model(self, m: ModelConfig) -> None:
        """Raise ValueError where this storage does not fit the model's shape."""
        if self.kv not in ("value_groups", "select"):
            return
        dividing = [str(s) for s in GROUPS if m.head_dim % s == 0]
        check(
            m.head_dim % self.n_groups == 0,
            f"n_groups={self.n_groups} with head_dim={m.head_dim}",
            "S must divide D",
            "give --n_groups of " + " or ".join(dividing),
        )
        for name, n, bits in (
            ("key_bits", m.head_dim, self.key_bits),
            ("value_bits", m.head_dim // self.n_groups, self.value_bits or 2),
        ):
            check(
                n * bits % 8 == 0 and (bits != 3 or n % 8 == 0),
                f"{name}={bits} with head_dim={m.head_dim}, n_groups={self.n_groups}",
                "a row must fill bytes",
                "give more bits or fewer groups",
            )
        check(
            self.kv == "select" or self.mask_scope != "shared",
            f"mask_scope=shared with kv={self.kv}",
            "a fixed K is routed in every layer",
            "give layer or head, or --kv=select",
        )
        self.layers_of(m)


# What says how relevant a token is for what follows.
SIGNALS = ("oracle", "observed", "future", "predictor", "predictor_query", "uniform", "random")
PREDICTORS = ("predictor", "expected_attention", "predictor_query")  # the signals that are trained
ALLOCATIONS = ("head", "layer", "global")


class Published(NamedTuple):
    """What a method that drops tokens was published with, where flags do not say otherwise."""

    allocation: str  # what shares one budget
    sinks: int  # first tokens that are kept before any other


PUBLISHED = {
    "h2o": Published("head", 0),
    "streaming": Published("head", 4),
    "snapkv": Published("head", 0),
    "tova": Published("layer", 0),
    "keydiff": Published("head", 0),
    "expected_attention_closed": Published("head", 4),
}
# expected_attention is a trained network of this project, not the published closed form
TOKEN_SIGNALS = (*SIGNALS, "expected_attention", "quest", *PUBLISHED)
ROUNDINGS = ("queries", "nearest")
# First tokens that stay whole where a budget of bytes picks the bits, and no flag says how many:
# more take too much of a short prompt's, and a long one does not miss them (docs/log.md).
PLANNED_SINKS = 1


@dataclass(frozen=True)
class SelectConfig:
    """What kv=select keeps of a prompt (ST 3.2, equations 8-13, and this project's additions).
    Shares are of the compressed layers."""

    relevance: str = opt("future", "what says how much a token will be read", SIGNALS)
    token_relevance: str = opt(
        "", f"what tokens are kept by, of {', '.join(TOKEN_SIGNALS)} (empty: --relevance)"
    )
    kv_bytes: float = opt(
        0.0,
        "bytes that compressed layers hold of a prompt, all counted, as a share of 16 bits a "
        "number: tokens, groups and bits are routed; 0: off",
        least=0,
        most=1,
    )
    kv_keep: float = opt(
        0.0,
        "share of keys and values kept, tokens and groups chosen together under one budget; 0: "
        "the two shares below",
        least=0,
        most=1,
    )
    token_keep: float = opt(
        1.0, "share of the context's tokens kept, key and value", above=0, most=1
    )
    value_keep: float = opt(
        0.5,
        "value budget rho: share of the kept tokens' (token, group) pairs kept",
        above=0,
        most=1,
    )
    fixed_k: bool = opt(False, "every kept token keeps the same number of groups")
    allocation: str = opt(
        "global",
        "what shares one budget: every head for itself, the heads of a layer, or everything "
        "(eval.py's rows of a published method, where this is not given: as it was published)",
        ALLOCATIONS,
    )
    hedge: float = opt(
        0.75,
        "exponent on relevance where groups are scored: 1: the paper's rule, 0: norms alone; "
        "predictor has none",
        least=0,
        most=1,
    )
    sinks: int = opt(
        4,
        "first tokens that are kept before any other, as far as the budget goes (eval.py's rows of "
        "a published method, where this is not given: as it was published)",
        least=0,
    )
    observers: int = opt(
        16,
        "a prompt's last tokens whose attention is observed (0: those that stay whole, --kv_tail)",
        least=0,
    )
    pool: int = opt(5, "observed: tokens over which attention is max-pooled (1: none)", least=1)
    past: int = opt(
        64,
        "future: earlier queries, spread over the last 1,024 context tokens, that stand for those "
        "to come",
        least=1,
    )
    ahead: int = opt(64, "future: how many tokens after the prompt they are moved", least=0)
    key_rounding: str = opt(
        "queries",
        "integers: keys are rounded so that queries to come see least of it, or each number to "
        "the nearest",
        ROUNDINGS,
    )
    refit: bool = opt(
        False,
        "values of kept tokens are refitted, before they are rounded, so that the prompt's last "
        "queries, moved ahead, read of them what they read of the whole context",
    )
    refit_ridge: float = opt(
        0.3, "refit: its ridge, in units of the mean squared weight of a token", least=1e-3
    )
    predictors: str = opt(
        "",
        f"what --stage=select trains, of {', '.join(PREDICTORS)} (empty: those named as relevance)",
        each_of=PREDICTORS,
    )
    readers: int = opt(
        128, "training a predictor: last tokens of a window, whose attention is the target", least=1
    )
    UNNAMED = {"recall": 0.0, "shortest": 0}  # see settings.fields.from_dict
    recall: float = opt(
        0.75,
        "training a predictor: share of windows that repeat their own passages, shuffled, or whose "
        "query region asks for one, instead of going on",
        least=0,
        most=1,
    )
    shortest: int = opt(
        512,
        "training a predictor: windows are cut into halves, quarters, ... by chance, down to this "
        "many tokens, so that it sees contexts of many lengths (0: never)",
        least=0,
    )
    predictor_loss: str = opt(
        "mse",
        "predictor and expected_attention: mse on scores normalised per group (the paper), or kl "
        "on their shares",
        ("mse", "kl"),
    )

    def __post_init__(self):
        check_fields(self)
        check_choice("token_relevance", self.token_relevance, ("", *TOKEN_SIGNALS))
        apart = self.fixed_k or self.tokens_by != self.relevance
        check(
            not (self.kv_bytes and (self.kv_keep or apart)),
            f"kv_bytes={self.kv_bytes} with kv_keep, fixed_k or a token_relevance",
            "one budget decides on everything",
            "leave those out",
        )
        check(
            not (self.kv_keep and apart),
            f"kv_keep={self.kv_keep} with fixed_k or a token_relevance",
            "tokens and groups are chosen together",
            "give --token_keep and --value_keep instead",
        )
        check(self.pool % 2 == 1, f"pool={self.pool}", "an odd number", "give for example 5")

    def described(self) -> str:
        """Return the rule in a few words: signals, budget, exponent."""
        words = [self.relevance]
        if self.tokens_by != self.relevance and self.token_keep < 1:
            words = [f"{self.tokens_by}/{self.relevance}"]
        if self.kv_bytes:
            words.append(f"bytes={self.kv_bytes:g}")
        elif self.kv_keep:
            words.append(f"kv={self.kv_keep:g}")
        else:
            words += [f"tokens={self.token_keep:g}", f"groups={self.value_keep:g}"]
            if self.fixed_k:
                words.append("fixed")
        if self.relevance != "predictor":
            words.append(f"hedge={self.hedge:g}")
        if self.refit:
            words.append(f"refit={self.refit_ridge:g}")
        return " ".join(words)

    @property
    def trained(self) -> list[str]:
        """The predictors that are trained."""
        named = (self.relevance, self.tokens_by)
        return comma_list(self.predictors) or [p for p in PREDICTORS if p in named]

    @cached_property
    def tokens_by(self) -> str:
        """The signal that tokens are kept by."""
        return self.token_relevance or self.relevance

    def everything(self) -> SelectConfig:
        """Return these settings, but everything is kept."""
        return replace(self, kv_bytes=0.0, kv_keep=1.0, fixed_k=False, token_relevance="")

    @cached_property
    def whole(self) -> bool:
        """Whether everything is kept."""
        return not self.kv_bytes and (self.kv_keep or self.token_keep * self.value_keep) == 1
