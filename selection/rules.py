"""What a selection and the way its context is stored cannot do together. Each rule is one line of
refusal."""

from __future__ import annotations

from config import KVConfig, SelectConfig, check


def check_together(kv: KVConfig, cfg: SelectConfig) -> None:
    """Raise ValueError where a context that is stored by kv cannot be chosen by cfg."""
    waits = kv.prefill == "routed" and kv.mask_scope != "shared"
    check(
        not (waits and cfg.allocation == "global"),
        "allocation=global with prefill=routed",
        "a layer cannot wait for those after it",
        "give --allocation=layer, --mask_scope=shared or --prefill=exact",
    )
    check(
        not cfg.refit or kv.prefill == "exact",
        "refit with prefill=routed",
        "a context is refitted once all layers have seen it whole",
        "leave out --refit or --prefill",
    )
    check(
        not cfg.kv_bytes or kv.mask_scope != "shared",
        f"kv_bytes={cfg.kv_bytes:g} with mask_scope=shared",
        "bytes are counted by layer or head",
        "give --mask_scope=head",
    )
    check(
        kv.value_bits or cfg.kv_bytes,
        "value_bits=0 without kv_bytes",
        "levels need a budget of bytes",
        "give --kv_bytes=0.125",
    )
    check(
        not kv.told_by_keys or "predictor" not in (cfg.relevance, cfg.tokens_by),
        f"relevance=predictor with reconstructor={kv.reconstructor}",
        "it scores groups of whole values, and what keys leave of them is stored",
        "give --relevance=predictor_query",
    )
