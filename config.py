"""Every setting of the project, once: frozen, validated dataclasses from which cli.py builds the
command lines.

Nothing heavy is imported here, so `--help` and a wrong flag are answered before torch is loaded.
Letters are those of the README: H heads, Hkv KV heads, D head dimension, S value groups, K groups
kept, rho value budget. Ratios say what is *kept*.

    python train.py --help
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from fractions import Fraction


def opt(default, help, choices=None):
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check(ok: bool, came: str, allowed: str, do: str) -> None:
    """Raise the one-line ValueError every setting uses: what came, what is allowed, what to do."""
    if not ok:
        raise ValueError(f"{came}: {allowed}; {do}")


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed whose products with steps and ranks would leave
    torch.manual_seed's range."""
    check(seed < 2**32, f"seed={seed}", "at most 4294967295", "give a smaller --seed")


def comma_list(text: str) -> list[str]:
    """The entries of a comma-separated flag, without blanks."""
    return [t.strip() for t in text.split(",") if t.strip()]


def count_kept(ratio: float | str | Fraction, n: int, least: int = 0) -> int:
    """floor(ratio * n) in exact arithmetic (0.7 means 7/10, not its binary neighbour). The only
    place a ratio becomes a count.

    ratio: share kept, 0 < ratio <= 1; n: how many there are, >= 1; least: what is kept anyway.
    Raises ValueError outside the range or if nothing is kept."""
    r = ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))
    check(
        0 < r <= 1, f"a budget of {ratio}", "the share kept lies in (0, 1]", "give for example 0.5"
    )
    kept = max(int(r * n), least)
    check(
        kept >= 1,
        f"a budget of {ratio} of {n}",
        "at least one must be kept",
        f"give {float(Fraction(1, n)):.4g} or more",
    )
    return kept


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer (Llama family). Sizes in units of features, tokens or heads."""

    vocab_size: int = opt(257, "size of the vocabulary (set from the tokenizer)")
    block_size: int = opt(256, "longest context in tokens")
    n_layer: int = opt(4, "number of transformer blocks")
    n_embd: int = opt(128, "width of the residual stream")
    n_head: int = opt(8, "query heads H")
    n_kv_head: int = opt(8, "KV heads Hkv; must divide n_head")
    head_dim: int = opt(16, "head dimension D; even, and divisible by the value groups S")
    n_inner: int = opt(344, "width of the SwiGLU MLP")
    rope_theta: float = opt(10000.0, "base of the rotary embedding")
    rope_factor: float = opt(
        1.0, "Llama 3's RoPE scaling: slow rotations are slowed by this factor; 1: none"
    )
    rope_low_freq: float = opt(
        1.0, "rotations that turn less often than this in rope_original tokens are slowed in full"
    )
    rope_high_freq: float = opt(
        4.0, "rotations that turn more often than this in rope_original tokens are left alone"
    )
    rope_original: int = opt(8192, "context the unscaled rotations were trained with")
    norm_eps: float = opt(1e-5, "epsilon of RMSNorm")
    qkv_bias: bool = opt(False, "bias on the q, k and v projections (Qwen2)")
    tie_embeddings: bool = opt(True, "share the token embedding with the output head")

    def __post_init__(self):
        for f in (
            "vocab_size",
            "block_size",
            "n_layer",
            "n_embd",
            "n_head",
            "n_kv_head",
            "head_dim",
            "n_inner",
        ):
            check(
                getattr(self, f) >= 1,
                f"{f}={getattr(self, f)}",
                "at least 1 is needed",
                f"give --{f}=1 or more",
            )
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
            self.rope_theta > 0 and self.norm_eps > 0,
            f"rope_theta={self.rope_theta}, norm_eps={self.norm_eps}",
            "both are positive",
            "give positive values",
        )
        check(
            self.rope_factor >= 1
            and 0 < self.rope_low_freq < self.rope_high_freq
            and self.rope_original >= 1,
            f"rope_factor={self.rope_factor}, rope_low_freq={self.rope_low_freq}, "
            f"rope_high_freq={self.rope_high_freq}, "
            f"rope_original={self.rope_original}",
            "needs a factor of at least 1, 0 < low < high and at least 1 token",
            "give the values of the model's config",
        )


ADAPTERS = ("none", "lora", "moe_lora", "routed")
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (ST 3.1.1). `r` is the rank of one branch: LoRA has one, MoE-LoRA
    `experts`, routed `subspaces`."""

    adapter: str = opt("routed", "which adapter is trained", ADAPTERS)
    r: int = opt(
        0,
        "rank R of one branch (lora: the whole rank); 0: 16 for lora, 4 for moe_lora, 2 for routed",
    )
    alpha: float = opt(
        0.0, "LoRA alpha, the update is scaled by alpha / r; 0: 8 r K for K branches kept per token"
    )
    lora_dropout: float = opt(0.05, "dropout on the adapter's input")
    lora_targets: str = opt("q,k,v,o", "projections that are adapted, of q,k,v,o,gate,up,down")
    subspaces: int = opt(8, "subspaces S of routed subspace LoRA")
    subspace_topk: int = opt(4, "subspaces kept per token")
    experts: int = opt(4, "experts E of MoE-LoRA")
    expert_topk: int = opt(2, "experts kept per token")
    balance_weight: float = opt(0.01, "weight of the load-balance loss")

    def __post_init__(self):
        check(
            self.adapter in ADAPTERS,
            f"adapter={self.adapter!r}",
            f"one of {', '.join(ADAPTERS)}",
            "choose one",
        )
        check(
            self.r >= 0,
            f"r={self.r}",
            "a rank is at least 1",
            "give --r=1 or more, or 0 for the adapter's own default",
        )
        check(
            self.alpha >= 0,
            f"alpha={self.alpha}",
            "is at least 0",
            "give for example 8, or 0 for the adapter's own default",
        )
        check(
            0 <= self.lora_dropout < 1,
            f"lora_dropout={self.lora_dropout}",
            "lies in [0, 1)",
            "give for example 0.05",
        )
        check(
            self.balance_weight >= 0,
            f"balance_weight={self.balance_weight}",
            "is at least 0",
            "give for example 0.01",
        )
        for n, k in (("subspaces", "subspace_topk"), ("experts", "expert_topk")):
            check(
                1 <= getattr(self, k) <= getattr(self, n),
                f"{k}={getattr(self, k)} with {n}={getattr(self, n)}",
                f"needs 1 <= {k} <= {n}",
                f"give a {k} of at most {getattr(self, n)}",
            )
        kept = {"moe_lora": self.expert_topk, "routed": self.subspace_topk}.get(self.adapter, 1)
        if not self.r:
            object.__setattr__(self, "r", {"moe_lora": 4, "routed": 2}.get(self.adapter, 16))
        # gates sum to 1, so K kept branches need K times the scale of plain LoRA
        if not self.alpha:
            object.__setattr__(self, "alpha", 8.0 * self.r * kept)
        bad = [t for t in self.targets if t not in TARGETS]
        check(
            not bad and len(self.targets) > 0,
            f"lora_targets={self.lora_targets!r}",
            f"a list of {','.join(TARGETS)}",
            "separate by commas",
        )

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(comma_list(self.lora_targets))


KVS = ("dense", "value_groups", "select", "mixsga", "gqa", "cla")
# KV heads, or layers, share what is stored; the whole model is trained on with it
SHARED = ("mixsga", "gqa", "cla")
GROUPS = (2, 4, 8, 16, 32, 64)
BASES = ("native", "random", "pca", "output")
ROUTERS = ("linear", "norm", "static")
SCOPES = ("shared", "layer", "head")
RECONSTRUCTORS = ("zero", "linear", "pairwise", "mlp")
PREFILLS = ("exact", "routed")
INT_BITS = (16, 8, 4, 3, 2)
KEY_BLOCKS = (16, 32, 64, 128)
# C(8, 4): above this a matrix per mask pattern is refused in favour of the pairwise form
MAX_PATTERNS = 70


@dataclass(frozen=True)
class KVConfig:
    """How keys and values are stored (ST 3.1.2 and this project's additions)."""

    kv: str = opt("value_groups", "the KV path", KVS)
    n_groups: int = opt(4, "value groups S per head", GROUPS)
    topk_groups: int = opt(2, "groups K kept per token")
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
        "zero", "what stands for a dropped group when it is read", RECONSTRUCTORS
    )
    recon_hidden: int = opt(0, "hidden width of the MLP reconstructor; 0 means Hkv * D")
    aux_weight: float = opt(0.1, "weight of the reconstruction loss L_aux")
    lm_to_router: bool = opt(
        False, "let the language-model loss train value router and reconstructor too"
    )
    kv_warmup: float = opt(0.0, "share of the adaptation steps during which values stay whole")
    kv_layers: str = opt(
        "all", "layers compressed: all, deepest:SHARE, from:LAYER, or a list such as 2,3"
    )
    prefill: str = opt(
        "exact",
        "exact: the prompt attends to whole values; routed: to routed ones (the paper)",
        PREFILLS,
    )
    kv_tail: int = opt(4, "newest tokens whose values stay whole (a dense tail), at least")
    kv_tail_block: int = opt(1, "tokens of the tail compressed at a time when it overflows")
    key_bits: int = opt(
        16,
        "bits of a stored number of a key, one step per channel and block of tokens; 16: as "
        "computed",
        INT_BITS,
    )
    value_bits: int = opt(
        16,
        "bits of a stored number of a value, one step per token and head; 16: as computed; 0: "
        "--kv_bytes routes them",
        (*INT_BITS, 0),
    )
    key_block: int = opt(
        64,
        "fewer than 16 bits: tokens whose keys share steps, and that leave the tail together; "
        "--kv_bytes that picks "
        "the bits takes what goes with them for 64",
        KEY_BLOCKS,
    )
    kv_sinks: int = opt(4, "fewer than 16 bits: first tokens that stay whole")

    def __post_init__(self):
        for name, allowed in (
            ("kv", KVS),
            ("value_basis", BASES),
            ("value_router", ROUTERS),
            ("mask_scope", SCOPES),
            ("reconstructor", RECONSTRUCTORS),
            ("prefill", PREFILLS),
            ("n_groups", GROUPS),
            ("key_bits", INT_BITS),
            ("value_bits", (*INT_BITS, 0)),
            ("key_block", KEY_BLOCKS),
        ):
            check(
                getattr(self, name) in allowed,
                f"{name}={getattr(self, name)!r}",
                f"one of {', '.join(map(str, allowed))}",
                "choose one",
            )
        check(
            1 <= self.topk_groups <= self.n_groups,
            f"topk_groups={self.topk_groups} with n_groups={self.n_groups}",
            "needs 1 <= K <= S",
            f"give --topk_groups of at most {self.n_groups}",
        )
        check(
            self.aux_weight >= 0,
            f"aux_weight={self.aux_weight}",
            "is at least 0",
            "give for example 0.1",
        )
        check(
            0 <= self.kv_warmup <= 1,
            f"kv_warmup={self.kv_warmup}",
            "a share in [0, 1]",
            "give for example 0.5",
        )
        check(
            self.recon_hidden >= 0,
            f"recon_hidden={self.recon_hidden}",
            "is at least 0",
            "give 0 for Hkv * D",
        )
        check(
            self.kv_tail >= 0 and self.kv_tail_block >= 1,
            f"kv_tail={self.kv_tail}, kv_tail_block={self.kv_tail_block}",
            "the tail is at least 0 and its block at least 1 token",
            "give for example --kv_tail=64 --kv_tail_block=16",
        )
        check(
            self.kv_sinks >= 0,
            f"kv_sinks={self.kv_sinks}",
            "at least 0",
            "give for example --kv_sinks=4",
        )
        check(
            (self.key_bits < 16) == (self.value_bits < 16),
            f"key_bits={self.key_bits} with value_bits={self.value_bits}",
            "both are integers or neither",
            "give both",
        )
        check(
            not self.ints
            or (
                self.reconstructor == "zero" and self.prefill == "exact" and self.kv_tail_block == 1
            ),
            f"key_bits={self.key_bits} with reconstructor={self.reconstructor}, "
            f"prefill={self.prefill}, kv_tail_block={self.kv_tail_block}",
            "integers are read as they are, after an exact prefill, and leave the tail by "
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
            "give --kv=select --kv_bytes=0.15",
        )
        n_patterns = _binomial(self.n_groups, self.topk_groups)
        check(
            self.reconstructor != "linear" or (n_patterns <= MAX_PATTERNS and self.n_groups <= 16),
            f"reconstructor=linear with S={self.n_groups}, K={self.topk_groups} ({n_patterns} "
            "mask patterns)",
            f"one matrix per pattern is allowed up to {MAX_PATTERNS} patterns and S = 16",
            "use --reconstructor=pairwise",
        )
        check(
            self.kv != "select" or (self.reconstructor == "zero" and self.value_router == "norm"),
            f"kv=select with reconstructor={self.reconstructor}, value_router={self.value_router}",
            "relevance and norms choose, nothing is rebuilt",
            "leave both out",
        )
        self.layers(10**4)  # whether it can be read; models have fewer

    @property
    def ints(self) -> bool:
        """Whether keys and values are stored as integers."""
        return self.key_bits < 16

    @property
    def tail_leaves(self) -> int:
        """Tokens that leave the tail at a time."""
        return self.key_block if self.ints else self.kv_tail_block

    def layers(self, n_layer: int) -> list[int]:
        """The compressed layers' indices, ascending. Raises ValueError for a malformed or empty
        choice."""
        text = self.kv_layers
        do = "give all, deepest:0.22, from:22 or a list such as 2,3"
        try:
            if text == "all":
                return list(range(n_layer))
            if text.startswith("deepest:"):
                return list(range(n_layer - count_kept(text.split(":", 1)[1], n_layer), n_layer))
            picked = (
                list(range(int(text[5:]), n_layer))
                if text.startswith("from:")
                else sorted({int(t) for t in text.split(",")})
            )
        except ValueError as e:
            raise ValueError(f"kv_layers={text!r}: {e}; {do}") from None
        check(
            bool(picked) and picked[0] >= 0 and picked[-1] < n_layer,
            f"kv_layers={text!r}",
            f"layers are 0..{n_layer - 1}",
            do,
        )
        return picked

    def check_model(self, m: ModelConfig) -> None:
        """Raise ValueError where this storage does not fit the model's shape."""
        if self.kv in ("value_groups", "select"):
            check(
                m.head_dim % self.n_groups == 0,
                f"n_groups={self.n_groups} with head_dim={m.head_dim}",
                "S must divide D",
                "give --n_groups of " + " or ".join(str(s) for s in GROUPS if m.head_dim % s == 0),
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
            self.layers(m.n_layer)


@dataclass(frozen=True)
class MixConfig:
    """mixSGA's experts of grouped KV heads, and its baselines GQA and CLA (SGA 3)."""

    group_sizes: str = opt(
        "1,2,4",
        "mixsga: KV heads that each expert averages into one, a list; each must divide n_kv_head",
    )
    expert_ratios: str = opt(
        "3:1:6", "mixsga: shares of the tokens that the experts take, such as 3:1:6"
    )
    expert_router: str = opt(
        "learned",
        "mixsga: learned on the layer's input, or random (the ablation)",
        ("learned", "random"),
    )
    consistency_weight: float = opt(
        1.0,
        "mixsga: weight of the cross-entropy between the router's scores and the experts' choice",
    )
    lm_to_experts: bool = opt(
        False,
        "mixsga: let the language-model loss train the router, too, straight through the choice",
    )
    calibrate_experts: bool = opt(
        True,
        "mixsga: start the router from what averaging a token would cost (False: at random, the "
        "paper)",
    )
    align_heads: bool = opt(
        True,
        "mixsga, gqa: first reorder and turn heads, exactly, so that those averaged are alike "
        "(False: the paper)",
    )
    expert_groups: int = opt(
        0, "mixsga: value groups kept of --n_groups in each expert's cache, by norm; 0: all"
    )
    kv_share: float = opt(0.5, "gqa, cla: share of keys and values kept")

    def __post_init__(self):
        sizes = comma_list(self.group_sizes)
        shares = self.expert_ratios.split(":")
        check(
            bool(sizes) and all(s.isdigit() and int(s) >= 1 for s in sizes),
            f"group_sizes={self.group_sizes!r}",
            "a list of head counts",
            "give for example 1,2,4",
        )
        check(
            all(s.isdigit() for s in shares) and any(int(s) for s in shares if s.isdigit()),
            f"expert_ratios={self.expert_ratios!r}",
            "whole numbers, not all 0, between colons",
            "give for example 3:1:6",
        )
        check(
            sorted({int(s) for s in sizes}) == [int(s) for s in sizes],
            f"group_sizes={self.group_sizes}",
            "they ascend",
            "give the sizes from few heads to many, each once",
        )
        check(
            len(sizes) == len(shares),
            f"expert_ratios={self.expert_ratios} with group_sizes={self.group_sizes}",
            "one share for each expert",
            f"give {len(sizes)} numbers",
        )
        check(
            self.expert_router in ("learned", "random"),
            f"expert_router={self.expert_router!r}",
            "one of learned, random",
            "choose one",
        )
        check(
            self.consistency_weight >= 0,
            f"consistency_weight={self.consistency_weight}",
            "is at least 0",
            "give for example 0.1",
        )
        check(
            self.expert_groups >= 0,
            f"expert_groups={self.expert_groups}",
            "is at least 0",
            "give 0 for all",
        )
        check(
            0 < self.kv_share <= 1,
            f"kv_share={self.kv_share}",
            "a share in (0, 1]",
            "give for example 0.5",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """KV heads averaged by each expert."""
        return tuple(int(s) for s in comma_list(self.group_sizes))

    @property
    def ratios(self) -> tuple[Fraction, ...]:
        """Share of the tokens of each expert, exact; they sum to 1."""
        parts = [int(s) for s in self.expert_ratios.split(":")]
        return tuple(Fraction(p, sum(parts)) for p in parts)

    def check_model(self, m: ModelConfig) -> None:
        """Raise ValueError where the experts do not fit the model's heads."""
        bad = [g for g in self.sizes if m.n_kv_head % g]
        check(
            not bad,
            f"group_sizes={self.group_sizes} with n_kv_head={m.n_kv_head}",
            "every size must divide the KV heads",
            "give --group_sizes of "
            + ", ".join(str(g) for g in range(1, m.n_kv_head + 1) if m.n_kv_head % g == 0),
        )


# relevance of a token for what follows
SIGNALS = ("oracle", "observed", "future", "predictor", "predictor_query", "uniform", "random")
TOKEN_SIGNALS = (*SIGNALS, "expected_attention", "quest", "h2o", "streaming", "snapkv")
PREDICTORS = ("predictor", "expected_attention", "predictor_query")  # the signals that are trained
ALLOCATIONS = ("head", "layer", "global")
ROUNDINGS = ("queries", "nearest")


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
        "bytes held of a prompt, all counted, as a share of 16 bits a number: tokens, groups and "
        "bits are routed; 0: off",
    )
    kv_keep: float = opt(
        0.0,
        "share of keys and values kept, tokens and groups chosen together under one budget; 0: "
        "the two shares below",
    )
    token_keep: float = opt(1.0, "share of the context's tokens kept, key and value")
    value_keep: float = opt(
        0.5, "value budget rho: share of the kept tokens' (token, group) pairs kept"
    )
    fixed_k: bool = opt(False, "every kept token keeps the same number of groups")
    allocation: str = opt(
        "global",
        "what shares one budget: every head for itself, the heads of a layer, or everything",
        ALLOCATIONS,
    )
    hedge: float = opt(
        0.75,
        "exponent on relevance where groups are scored: 1: the paper's rule, 0: norms alone; "
        "predictor has none",
    )
    sinks: int = opt(4, "first tokens that are kept before any other, as far as the budget goes")
    pool: int = opt(5, "observed: tokens over which attention is max-pooled (1: none)")
    past: int = opt(
        64,
        "future: earlier queries, spread over the last 1,024 context tokens, that stand for those "
        "to come",
    )
    ahead: int = opt(64, "future: how many tokens after the prompt they are moved")
    key_rounding: str = opt(
        "queries",
        "integers: keys are rounded so that queries to come see least of it, or each number to "
        "the nearest",
        ROUNDINGS,
    )
    predictors: str = opt(
        "",
        f"what --stage=select trains, of {', '.join(PREDICTORS)} (empty: those named as relevance)",
    )
    readers: int = opt(
        128, "training a predictor: last tokens of a window, whose attention is the target"
    )
    predictor_loss: str = opt(
        "mse",
        "predictor and expected_attention: mse on scores normalised per group (the paper), or kl "
        "on their shares",
        ("mse", "kl"),
    )

    def __post_init__(self):
        for name, allowed in (
            ("relevance", SIGNALS),
            ("token_relevance", ("", *TOKEN_SIGNALS)),
            ("allocation", ALLOCATIONS),
            ("predictor_loss", ("mse", "kl")),
            ("key_rounding", ROUNDINGS),
        ):
            check(
                getattr(self, name) in allowed,
                f"{name}={getattr(self, name)!r}",
                f"one of {', '.join(filter(None, allowed))}",
                "choose one",
            )
        bad = [p for p in comma_list(self.predictors) if p not in PREDICTORS]
        check(
            not bad,
            f"predictors={self.predictors!r}",
            f"a list of {', '.join(PREDICTORS)}",
            "separate by commas",
        )
        for name in ("token_keep", "value_keep"):
            check(
                0 < getattr(self, name) <= 1,
                f"{name}={getattr(self, name)}",
                "a share kept, in (0, 1]",
                "give for example 0.5",
            )
        check(
            0 <= self.kv_keep <= 1,
            f"kv_keep={self.kv_keep}",
            "a share kept, in (0, 1], or 0",
            "give for example 0.25",
        )
        check(
            0 <= self.kv_bytes <= 1,
            f"kv_bytes={self.kv_bytes}",
            "a share of the bytes, in (0, 1], or 0",
            "give for example 0.125",
        )
        check(
            not (
                self.kv_bytes and (self.kv_keep or self.fixed_k or self.tokens_by != self.relevance)
            ),
            f"kv_bytes={self.kv_bytes} with kv_keep, fixed_k or a token_relevance",
            "one budget decides on everything",
            "leave those out",
        )
        check(0 <= self.hedge <= 1, f"hedge={self.hedge}", "lies in [0, 1]", "give for example 0.5")
        check(
            self.sinks >= 0 and self.ahead >= 0,
            f"sinks={self.sinks}, ahead={self.ahead}",
            "at least 0",
            "give 0 or more",
        )
        check(
            self.pool >= 1 and self.pool % 2 == 1,
            f"pool={self.pool}",
            "an odd number",
            "give for example 5",
        )
        check(
            self.past >= 1 and self.readers >= 1,
            f"past={self.past}, readers={self.readers}",
            "at least 1",
            "give 1 or more",
        )
        check(
            not (self.kv_keep and (self.fixed_k or self.tokens_by != self.relevance)),
            f"kv_keep={self.kv_keep} with fixed_k or a token_relevance",
            "tokens and groups are chosen together",
            "give --token_keep and --value_keep instead",
        )

    def described(self) -> str:
        """The rule in a few words: signals, budget, exponent."""
        shares = f"tokens={self.token_keep:g} groups={self.value_keep:g}" + " fixed" * self.fixed_k
        budget = (
            f"bytes={self.kv_bytes:g}"
            if self.kv_bytes
            else f"kv={self.kv_keep:g}"
            if self.kv_keep
            else shares
        )
        by = (
            self.relevance
            if self.tokens_by == self.relevance or self.token_keep == 1
            else f"{self.tokens_by}/{self.relevance}"
        )
        return f"{by} {budget}" + (
            "" if self.relevance == "predictor" else f" hedge={self.hedge:g}"
        )

    @property
    def trained(self) -> list[str]:
        """The predictors that are trained."""
        return comma_list(self.predictors) or [
            p for p in PREDICTORS if p in (self.relevance, self.tokens_by)
        ]

    @property
    def tokens_by(self) -> str:
        """The signal that tokens are kept by."""
        return self.token_relevance or self.relevance

    def everything(self) -> SelectConfig:
        """These settings, but everything is kept."""
        return dataclasses.replace(
            self, kv_bytes=0.0, kv_keep=1.0, fixed_k=False, token_relevance=""
        )

    @property
    def whole(self) -> bool:
        """Whether everything is kept."""
        return not self.kv_bytes and (self.kv_keep or self.token_keep * self.value_keep) == 1


def _binomial(n: int, k: int) -> int:
    out = 1
    for i in range(k):
        out = out * (n - i) // (i + 1)
    return out


CORPORA = ("pydocs", "pycode", "shakespeare", "wikitext2", "wikitext103")
TOKENIZERS = ("byte", "gpt2")
STAGES = ("all", "pretrain", "adapt", "select", "continue")
OBJECTIVES = ("lm", "distill")


def check_corpus(name: str, flag: str = "dataset") -> None:
    """Raise ValueError unless `name` is a known corpus or text:PATH (the path itself is checked
    when it is read)."""
    check(
        name in CORPORA or (name.startswith("text:") and len(name) > 5),
        f"{flag}={name!r}",
        f"one of {', '.join(CORPORA)} or text:PATH",
        "choose one",
    )


@dataclass(frozen=True)
class DataConfig:
    """Text and its tokens."""

    tokenizer: str = opt("byte", "tokenizer", TOKENIZERS)
    val_fraction: float = opt(0.1, "share of the text, by document, held out for validation")
    detokenize: bool = opt(
        False, "undo WikiText's spacing (' @-@ ', ' ,' ...) before text becomes tokens"
    )
    data_dir: str = opt(
        "", "where token files and downloads are kept; empty: the user's cache folder"
    )

    def __post_init__(self):
        check(
            self.tokenizer in TOKENIZERS,
            f"tokenizer={self.tokenizer!r}",
            f"one of {', '.join(TOKENIZERS)}",
            "choose one",
        )
        check(
            0 < self.val_fraction < 1,
            f"val_fraction={self.val_fraction}",
            "lies in (0, 1)",
            "give for example 0.1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """What train.py does. Steps are optimizer steps; batch sizes are sequences of the *global*
    batch, whatever the rank count."""

    stage: str = opt(
        "all",
        "all: pretrain, then every adapter, then the table; or one stage (select: predictors of "
        "relevance; continue: all "
        "weights of a base, with --kv=mixsga, gqa, cla or dense)",
        STAGES,
    )
    out_dir: str = opt("", "folder for everything the run leaves; empty: a fresh one under out/")
    resume: bool = opt(False, "continue the run in --out_dir from its newest valid checkpoint")
    preset: str = opt(
        "default",
        "paper: the sub-token paper's settings for the adapt stage (explicit flags still win)",
        ("default", "paper"),
    )
    dataset: str = opt(
        "",
        "corpus of the stage; with stage=all the pretraining one (empty: pydocs, or pycode to "
        "adapt); or text:PATH",
    )
    adapt_dataset: str = opt(
        "", "corpus for adaptation, where it differs from --dataset (empty: pycode)"
    )
    test_dataset: str = opt(
        "",
        "stage=all: corpus that gives the table's numbers, all of it or WikiText's test split "
        "(empty: the adaptation "
        "corpus's validation split)",
    )
    test_sequences: int = opt(192, "stage=all: sequences behind each number of the table")
    distill_steps: int = opt(
        0,
        "stage=all with --learn_basis: steps that distil the value basis on the frozen base "
        "before the table's adaptations",
    )
    distill_lr: float = opt(3e-3, "peak learning rate of those steps")
    kv_from: str = opt(
        "",
        "adapt, select: run whose trained value groups (same base and settings) are started from, "
        "instead of calibrating",
    )
    objective: str = opt(
        "lm",
        "adapt: lm: next-token loss; distill: KL to the same model reading whole values (needs "
        "--adapter=none)",
        OBJECTIVES,
    )
    seed: int = opt(0, "seed of initialisation, batches and dropout")
    seeds: int = opt(
        3, "stage=all: adaptation seeds per row, fewer when --max_minutes would be passed"
    )
    max_minutes: float = opt(
        3.7, "stage=all: start no further seed that would end after this many minutes"
    )
    device: str = opt("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = opt(
        "auto",
        "compute type; auto: bfloat16 autocast on a GPU that has it, else float32",
        ("auto", "float32", "bfloat16"),
    )
    compile: bool = opt(False, "torch.compile the model")
    pretrain_steps: int = opt(500, "steps of pretraining")
    adapt_steps: int = opt(60, "steps of adaptation")
    pretrain_batch_size: int = opt(8, "sequences in a pretraining step")
    adapt_batch_size: int = opt(8, "sequences in an adaptation step")
    select_steps: int = opt(400, "steps of training predictors")
    select_batch_size: int = opt(4, "sequences in such a step")
    select_lr: float = opt(
        1e-2, "its peak learning rate (a tenth of it for the paper's predictors)"
    )
    accumulation: int = opt(1, "micro-steps a rank splits its share of the batch into")
    pretrain_lr: float = opt(3e-3, "peak learning rate of pretraining")
    adapt_lr: float = opt(5e-3, "peak learning rate of adaptation")
    warmup: float = opt(
        0.1, "share of the steps spent warming up linearly; cosine to zero after it"
    )
    weight_decay: float = opt(0.01, "AdamW weight decay (matrices only)")
    beta1: float = opt(0.9, "AdamW beta1")
    beta2: float = opt(0.99, "AdamW beta2")
    grad_clip: float = opt(1.0, "largest global gradient norm; 0 means no clipping")
    eval_interval: int = opt(0, "steps between validation losses; 0: only at the end")
    eval_sequences: int = opt(48, "validation sequences per evaluation while training")
    sample_interval: int = opt(0, "steps between sampled texts; 0: only at the end of pretraining")
    save_interval: int = opt(200, "steps between checkpoints")
    keep_checkpoints: int = opt(
        2, "newest checkpoints kept per stage (the best by validation loss is kept besides)"
    )

    def __post_init__(self):
        for name, allowed in (
            ("stage", STAGES),
            ("preset", ("default", "paper")),
            ("objective", OBJECTIVES),
            ("dtype", ("auto", "float32", "bfloat16")),
        ):
            check(
                getattr(self, name) in allowed,
                f"{name}={getattr(self, name)!r}",
                f"one of {', '.join(allowed)}",
                "choose one",
            )
        for name in ("dataset", "adapt_dataset", "test_dataset"):
            if getattr(self, name):
                check_corpus(getattr(self, name), name)
        for name in (
            "pretrain_steps",
            "adapt_steps",
            "select_steps",
            "pretrain_batch_size",
            "adapt_batch_size",
            "select_batch_size",
            "accumulation",
            "seeds",
            "eval_sequences",
            "test_sequences",
            "save_interval",
            "keep_checkpoints",
        ):
            check(
                getattr(self, name) >= 1,
                f"{name}={getattr(self, name)}",
                "at least 1",
                f"give --{name}=1 or more",
            )
        for name in (
            "eval_interval",
            "sample_interval",
            "seed",
            "grad_clip",
            "weight_decay",
            "distill_steps",
        ):
            check(
                getattr(self, name) >= 0,
                f"{name}={getattr(self, name)}",
                "at least 0",
                f"give --{name}=0 or more",
            )
        check_seed(self.seed)
        check(self.seeds <= 10**6, f"seeds={self.seeds}", "at most a million", "give fewer")
        for name in ("pretrain_lr", "adapt_lr", "distill_lr", "select_lr", "max_minutes"):
            check(
                getattr(self, name) > 0,
                f"{name}={getattr(self, name)}",
                "must be positive",
                "give for example 0.001",
            )
        check(
            0 <= self.warmup <= 1,
            f"warmup={self.warmup}",
            "a share in [0, 1]",
            "give for example 0.1",
        )
        for name in ("beta1", "beta2"):
            check(
                0 <= getattr(self, name) < 1,
                f"{name}={getattr(self, name)}",
                "lies in [0, 1)",
                "give for example 0.9",
            )
        check(
            self.stage in ("adapt", "select") or not self.kv_from,
            f"kv_from={self.kv_from!r} with stage={self.stage}",
            "one stage starts from it",
            "give --stage=adapt, or --distill_steps=N for the table",
        )
        check(
            self.stage == "all" or not self.distill_steps,
            f"distill_steps={self.distill_steps} with stage={self.stage}",
            "the table's rows use it",
            "give --stage=all, or --objective=distill",
        )
        check(
            not self.resume or bool(self.out_dir),
            "resume without out_dir",
            "a run to continue is needed",
            "give --out_dir=DIR",
        )

    def corpus(self, stage: str) -> str:
        """Corpus of `stage` ('pretrain' or 'adapt')."""
        if stage == "pretrain":
            return self.dataset or "pydocs"
        return (
            self.adapt_dataset
            or (self.dataset if self.stage in ("adapt", "select", "continue") else "")
            or "pycode"
        )


@dataclass(frozen=True)
class BaseConfig:
    """The pretrained model that is adapted, measured or exported."""

    init_from: str = opt(
        "scratch",
        "a Hugging Face folder, a .gguf file, hf:ORG/NAME, or a run that train.py left; with "
        "--out_dir of an adapter: "
        "where its base lies now; scratch: none",
    )
    revision: str = opt("", "branch, tag or commit of an hf: model; empty: main")
    weights: str = opt(
        "float32",
        "dtype in which a base's weights are held (bfloat16 needs computing in bfloat16)",
        ("float32", "bfloat16"),
    )

    def __post_init__(self):
        check(
            self.weights in ("float32", "bfloat16"),
            f"weights={self.weights!r}",
            "one of float32, bfloat16",
            "choose one",
        )
        check(
            bool(self.init_from),
            "an empty init_from",
            "scratch or a place",
            "leave --init_from out or give a path",
        )
        check(
            not self.revision or self.init_from.startswith("hf:"),
            f"revision={self.revision!r} with init_from={self.init_from!r}",
            "only models of the hub have revisions",
            "give --init_from=hf:ORG/NAME",
        )

    def place(self, out_dir: str) -> str:
        """The folder or model meant by --out_dir and --init_from. Raises ValueError where neither
        is given."""
        check(
            bool(out_dir) or self.init_from != "scratch",
            "no out_dir",
            "a trained run or a pretrained model is needed",
            "give --out_dir=DIR or --init_from=PATH",
        )
        return out_dir or self.init_from

    def options(self, out_dir: str) -> dict:
        """Keyword arguments of loaders.runs.load_run for place(out_dir)."""
        moved = self.init_from if out_dir and self.init_from != "scratch" else ""
        return dict(base=moved, weights=self.weights, revision=self.revision)


@dataclass(frozen=True)
class ExportConfig:
    """Where a model is exported to."""

    out_dir: str = opt("", "run, stage or checkpoint folder to export")
    to: str = opt("", "folder to write, for transformers to load")

    def __post_init__(self):
        check(bool(self.to), "no folder to export to", "one is needed", "give --to=DIR")


PAPER = dict(  # ST 4.1 and 3.1; the rest of the paper's settings are the defaults above
    adapter="routed",
    r=4,
    alpha=8.0,
    lora_dropout=0.05,
    subspaces=4,
    subspace_topk=2,
    balance_weight=0.01,
    n_groups=4,
    topk_groups=2,
    value_basis="native",
    value_router="linear",
    mask_scope="layer",
    reconstructor="mlp",
    aux_weight=0.1,
    lm_to_router=False,
    prefill="routed",
    kv_tail=0,
    adapt_lr=5e-4,
    weight_decay=0.01,
    beta1=0.9,
    beta2=0.999,
    adapt_batch_size=8,
    block_size=512,
)


def to_dict(cfg) -> dict:
    """A dataclass as plain JSON types."""
    return dataclasses.asdict(cfg)


def from_dict(cls: type, d: dict):
    """The dataclass `cls` from a dict read from a file; what an older file lacks takes its default.
    Raises ValueError naming unknown or mistyped entries."""
    names = {f.name: f for f in fields(cls)}
    unknown = sorted(set(d) - set(names))
    check(
        not unknown,
        f"{cls.__name__} in a file",
        f"unknown entries {unknown}",
        "was it written by another version?",
    )
    for k, v in d.items():
        kind = str(names[k].type)
        ok = isinstance(
            v, {"int": int, "float": (int, float), "str": str, "bool": bool}[kind]
        ) and (kind == "bool" or not isinstance(v, bool))
        check(
            ok, f"{cls.__name__}.{k}={v!r} in a file", f"should be {kind}", "was the file edited?"
        )
    return cls(**d)
