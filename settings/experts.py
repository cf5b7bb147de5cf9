"""How KV heads, or layers, share what is stored: the experts of mixsga.py and their baselines."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from config import ModelConfig
from settings.fields import check, check_fields, comma_list, opt


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
        least=0,
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
        0,
        "mixsga: value groups kept of --n_groups in each expert's cache, by norm; 0: all",
        least=0,
    )
    kv_share: float = opt(0.5, "gqa, cla: share of keys and values kept", above=0, most=1)

    def __post_init__(self):
        check_fields(self)
        sizes = comma_list(self.group_sizes)
        shares = self.expert_ratios.split(":")
        check(
            bool(sizes) and all(s.isdigit() and int(s) >= 1 for s in sizes),
            f"group_sizes={self.group_sizes!r}",
            "a list of head counts",
            "give for example 1,2,4",
        )
        check(
            all(s.isdigit() for s in shares) and any(int(s) for s in shares),
            f"expert_ratios={self.expert_ratios!r}",
            "whole numbers, not all 0, between colons",
            "give for example 3:1:6",
        )
        check(
            sorted(set(self.sizes)) == list(self.sizes),
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
        dividing = [str(g) for g in range(1, m.n_kv_head + 1) if m.n_kv_head % g == 0]
        check(
            all(m.n_kv_head % g == 0 for g in self.sizes),
            f"group_sizes={self.group_sizes} with n_kv_head={m.n_kv_head}",
            "every size must divide the KV heads",
            f"give --group_sizes of {', '.join(dividing)}",
        )
