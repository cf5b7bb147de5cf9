"""What is trained into a base by itself: the low-rank adapters of lora.py."""

from __future__ import annotations

from dataclasses import dataclass

from settings.fields import check, check_fields, comma_list, opt

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
        least=0,
    )
    alpha: float = opt(
        0.0,
        "LoRA alpha, the update is scaled by alpha / r; 0: 8 r K for K branches kept per token",
        least=0,
    )
    lora_dropout: float = opt(0.05, "dropout on the adapter's input", least=0, below=1)
    lora_targets: str = opt("q,k,v,o", "projections that are adapted, of q,k,v,o,gate,up,down")
    subspaces: int = opt(8, "subspaces S of routed subspace LoRA", least=1)
    subspace_topk: int = opt(4, "subspaces kept per token", least=1)
    experts: int = opt(4, "experts E of MoE-LoRA", least=1)
    expert_topk: int = opt(2, "experts kept per token", least=1)
    balance_weight: float = opt(0.01, "weight of the load-balance loss", least=0)

    def __post_init__(self):
        check_fields(self)
        for n, k in (("subspaces", "subspace_topk"), ("experts", "expert_topk")):
            check(
                getattr(self, k) <= getattr(self, n),
                f"{k}={getattr(self, k)} with {n}={getattr(self, n)}",
                f"needs 1 <= {k} <= {n}",
                f"give a {k} of at most {getattr(self, n)}",
            )
        check(
            bool(self.targets) and all(t in TARGETS for t in self.targets),
            f"lora_targets={self.lora_targets!r}",
            f"a list of {','.join(TARGETS)}",
            "separate by commas",
        )
        if not self.r:
            default = {"moe_lora": 4, "routed": 2}.get(self.adapter, 16)
            object.__setattr__(self, "r", default)
        if not self.alpha:
            # Gates sum to 1, so K kept branches need K times the scale of plain LoRA.
            kept = {"moe_lora": self.expert_topk, "routed": self.subspace_topk}
            object.__setattr__(self, "alpha", 8.0 * self.r * kept.get(self.adapter, 1))

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(comma_list(self.lora_targets))
