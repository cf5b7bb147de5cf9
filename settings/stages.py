"""Which settings each stage of train.py reads, in one table, and which do not go together. By it
flags are refused, and --help shows what a stage understands."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from settings.beside import BY_KEYS, OWN_BITS, With, integers, refuse_alike, why_unread
from settings.fields import check, to_dict
from settings.train import TrainConfig, check_text_flags


class Choice(NamedTuple):
    """The flag by which a program is told what to do: its name, what it is for --help where it is
    not given, its values, and reads(value, group, name), whether a value reads a setting."""

    flag: str
    usual: str
    values: tuple[str, ...]
    reads: Callable[[str, str, str], bool]


# -- the table

RUN = ("stage", "out_dir", "resume", "preset", "seed", "device", "dtype", "dataset", "init_from")
LOOP = (
    "accumulation",
    "warmup",
    "weight_decay",
    "beta1",
    "beta2",
    "grad_clip",
    "eval_interval",
    "eval_sequences",
    "sample_interval",
    "save_interval",
    "keep_checkpoints",
)
PRETRAIN = ("pretrain_steps", "pretrain_batch_size", "pretrain_lr")
ADAPT = ("adapt_dataset", "adapt_steps", "adapt_batch_size", "adapt_lr")
SELECT = ("adapt_dataset", "select_steps", "select_batch_size", "select_lr")
STORED_CONTEXT = ("kv_byte_budgets", "context")
TABLE = (
    "test_dataset",
    "test_sequences",
    "distill_steps",
    "distill_lr",
    "adapt_rates",
    "seeds",
    "max_minutes",
)
FIXED_K = ("topk_groups", "recon_hidden", "aux_weight", "lm_to_router", "kv_warmup")
BY_EXPERTS = (
    "value_basis",
    "learn_basis",
    "value_router",
    "mask_scope",
    "reconstructor",
    "kv_layers",
    "prefill",
)


# Of integers; stage continue trains on 16 bits, and eval.py stores in fewer what it trained.
IN_BITS = ("key_bits", "value_bits", "key_block", "kv_sinks")


class Reads(NamedTuple):
    """What a stage reads: groups of settings, by their name among train.py's, single settings
    besides, and those of the groups that it does not read."""

    groups: tuple[str, ...]
    besides: tuple[str, ...]
    never: tuple[str, ...] = ()


READS = {
    "pretrain": Reads(
        ("model", "data"),
        (*RUN, *LOOP, *PRETRAIN, "compile", "capture", "shard"),
        ("vocab_size",),
    ),
    "adapt": Reads(
        ("model", "data", "base", "adapter", "kv"),
        (
            *RUN,
            *LOOP,
            *ADAPT,
            *STORED_CONTEXT,
            "compile",
            "capture",
            "shard",
            "kv_from",
            "objective",
        ),
    ),
    "select": Reads(
        ("model", "data", "base", "kv", "select"),
        (*RUN, *LOOP, *SELECT, "kv_from"),
        (*FIXED_K, "kv_tail_block"),
    ),
    "continue": Reads(
        ("model", "data", "base", "kv", "mix"),
        (*RUN, *LOOP, *ADAPT, "compile", "capture", "shard"),
        (*FIXED_K, *BY_EXPERTS, *IN_BITS, "kv_tail_block"),
    ),
    "all": Reads(
        ("model", "data", "base", "adapter", "kv"),
        (*RUN, *LOOP, *PRETRAIN, *ADAPT, *TABLE, "compile", "capture"),
        ("adapter", "vocab_size", "template"),
    ),
}


# A flag, and with what alone it is read, where the stage reads that flag.
GROUPED = With("kv", ("value_groups", "select"))
ROUTED_K = With("kv", ("value_groups",))
STORED_PARTLY = With("kv", ("value_groups", "select", "mixsga", "gqa", "cla"))
ADAPTED = With("adapter", ("lora", "moe_lora", "routed"))
SELECTING = With("kv", ("select",))  # whose budgets of bytes pick the bits later
EXPERTS = With("kv", ("mixsga",))
NO_INTEGERS = With("key_bits", (16,))
LEARNED = With("expert_router", ("learned",))
# Where a router or a reconstructor learns.
ROUTER_LEARNED = With(
    "value_router", ("linear",), others=(With("reconstructor", ("mlp", "keys", "own_keys")),)
)
ROTATED = With("positions", ("rope",))
SCALED = With("rope_factor", above=1)
BY_TURNS = With("rope_scaling", ("llama3", "yarn"))
SLIDING = With("sliding_window", above=0)
READ_WITH = {
    **dict.fromkeys(("r", "alpha", "lora_dropout", "lora_targets"), (ADAPTED,)),
    **dict.fromkeys(("subspaces", "subspace_topk"), (With("adapter", ("routed",)),)),
    **dict.fromkeys(("experts", "expert_topk"), (With("adapter", ("moe_lora",)),)),
    "balance_weight": (With("adapter", ("moe_lora", "routed")),),
    "n_groups": (
        With("kv", ("value_groups", "select", "mixsga")),
        With("expert_groups", above=0),
    ),
    **dict.fromkeys(
        ("value_basis", "learn_basis", "mask_scope", "reconstructor", "kv_layers", "prefill"),
        (GROUPED,),
    ),
    **dict.fromkeys(("topk_groups", "value_router", "kv_warmup"), (ROUTED_K,)),
    **dict.fromkeys(("aux_weight", "lm_to_router"), (ROUTED_K, ROUTER_LEARNED)),
    "recon_hidden": (ROUTED_K, With("reconstructor", ("mlp",), needs=(NO_INTEGERS,))),
    "kv_tail": (STORED_PARTLY,),
    **dict.fromkeys(("key_bits", "value_bits"), (GROUPED, OWN_BITS)),
    "key_block": (GROUPED, integers(SELECTING)),
    "kv_sinks": (GROUPED, integers(SELECTING, BY_KEYS)),
    "kv_tail_block": (ROUTED_K,),
    **dict.fromkeys(("group_sizes", "expert_ratios", "expert_router"), (EXPERTS,)),
    **dict.fromkeys(
        ("consistency_weight", "lm_to_experts", "calibrate_experts"), (EXPERTS, LEARNED)
    ),
    "align_heads": (With("kv", ("mixsga", "gqa")),),
    "expert_groups": (EXPERTS,),
    "kv_share": (With("kv", ("gqa", "cla")),),
    **dict.fromkeys(("kv_byte_budgets", "context"), (SELECTING,)),
    **dict.fromkeys(("rope_theta", "rope_factor"), (ROTATED,)),
    "rope_scaling": (ROTATED, SCALED),
    **dict.fromkeys(
        ("rope_low_freq", "rope_high_freq", "rope_original"), (ROTATED, SCALED, BY_TURNS)
    ),
    "global_every": (SLIDING,),
    "rope_local_theta": (ROTATED, SLIDING),
    "max_minutes": (With("seeds", above=1),),
}
# Said to who trains something else, and wants to select.
AS_IT_IS = "; to select with a model as it is, give --kv=select to sample.py or eval.py"
ASKED_LATER = f" to train predictors of relevance{AS_IT_IS}"
# What --kv may be, the first where it is not given.
STORED = {
    "all": ("value_groups", "dense"),
    "select": ("select",),
    "adapt": ("value_groups", "dense", "select"),
    "continue": ("mixsga", "gqa", "cla", "dense"),
}
GROUPS = ("train", "model", "adapter", "kv", "select", "data", "base", "mix")
# The prefixes of a stage's own steps, batch size and rate.
OWN = {
    "pretrain": ("pretrain",),
    "adapt": ("adapt",),
    "select": ("select",),
    "continue": ("adapt",),
    "all": ("pretrain", "adapt"),
}


def is_read(stage: str, group: str, name: str) -> bool:
    """Whether a stage reads a setting of a group."""
    reads = READS[stage]
    return name in reads.besides or (group in reads.groups and name not in reads.never)


CHOICE = Choice("stage", "all", tuple(READS), is_read)


# -- flags that do not go together


def check_flags(args) -> None:
    """Raise ValueError for flags that contradict each other, and for those that the stage does not
    read. args: cli.parse_args of train.py's settings."""
    check_base_flags(args)
    check_storage_flags(args)
    check_stored_context_flags(args)
    check_objective_flags(args)
    check_read(args)
    check_unread_beside(args)
    fresh = args.train.stage == "all" and args.base.init_from == "scratch"
    if fresh and args.kv.kv == "value_groups":
        args.kv.check_model(args.model)  # of another base the shape is not known yet


def check_base_flags(args) -> None:
    """Whether there is a base, and the stage trains on one."""
    cfg: TrainConfig = args.train
    where = args.base.init_from
    check(
        cfg.stage not in ("adapt", "select", "continue") or where != "scratch",
        f"stage={cfg.stage} with init_from=scratch",
        "a pretrained base is needed",
        "give --init_from=out/RUN/pretrain, or a .gguf file or another model",
    )
    check(
        cfg.stage != "pretrain" or where == "scratch",
        f"init_from={where!r} with stage=pretrain",
        "pretrained weights are adapted",
        "give --stage=adapt or all",
    )
    given = args.given_now
    pretraining = sorted(f for f in given if f == "dataset" or f.startswith("pretrain_"))
    check(
        cfg.stage != "all" or where == "scratch" or not pretraining,
        f"{', '.join(pretraining)} with init_from={where!r}",
        "nothing is pretrained",
        "leave it out; --adapt_dataset names the corpus of the adaptation",
    )


def check_storage_flags(args) -> None:
    """Whether the stage trains with this kind of storage."""
    cfg: TrainConfig = args.train
    kv = args.kv
    stores = STORED.get(cfg.stage, ())
    others = [stage for stage, kinds in STORED.items() if kv.kv in kinds and stage != "all"]
    check(
        "kv" not in args.given_now or not stores or kv.kv in stores,
        f"kv={kv.kv} with stage={cfg.stage}",
        f"it stores by {' or '.join(stores)}",
        f"give --stage={others[0]}{ASKED_LATER if kv.kv == 'select' else ''}",
    )
    check(
        not (cfg.stage == "select" and kv.learn_basis and not cfg.kv_from),
        "learn_basis with stage=select",
        "it trains predictors alone",
        "leave it out, or give --kv_from=RUN with a trained basis",
    )
    check(
        not (cfg.kv_from and stored_by(args) == "dense"),
        f"kv_from={cfg.kv_from!r} with kv=dense",
        "there are no value groups",
        "leave one out, or give --kv=value_groups",
    )


def check_stored_context_flags(args) -> None:
    """Whether an adaptation over a selection has one, and learns from what that stores."""
    cfg: TrainConfig = args.train
    if cfg.stage != "adapt" or args.kv.kv != "select":
        return
    check(
        bool(cfg.kv_from),
        "kv=select with stage=adapt",
        "its predictors are trained before",
        f"give --kv_from=RUN of train.py --stage=select{AS_IT_IS}",
    )
    check(
        cfg.objective == "distill",
        f"objective={cfg.objective} with kv=select",
        "it reads everything whole",
        "give --objective=distill",
    )
    check(
        args.adapter.adapter != "none" or args.kv.learn_basis,
        "adapter=none with kv=select",
        "nothing is left to train",
        "give --adapter=lora or --learn_basis",
    )
    for name in ("compile", "shard"):
        check(
            not getattr(cfg, name),
            f"{name} with kv=select",
            "a step goes through a cache",
            "leave it out",
        )


def check_objective_flags(args) -> None:
    """Whether there is something to distil."""
    cfg: TrainConfig = args.train
    check(
        cfg.stage == "adapt" or cfg.objective == "lm",
        f"objective={cfg.objective} with stage={cfg.stage}",
        "one adaptation is trained by it",
        "give --stage=adapt, or --distill_steps=N for the table",
    )
    check(
        not cfg.distill_steps or args.kv.learn_basis,
        f"distill_steps={cfg.distill_steps}",
        "there is no basis to train",
        "give --learn_basis",
    )
    check(
        "distill_lr" not in args.given_now or bool(cfg.distill_steps) or cfg.stage != "all",
        f"distill_lr={cfg.distill_lr} without distill_steps",
        "nothing is distilled",
        "give --distill_steps=N",
    )


def check_unread_beside(args) -> None:
    """Raise ValueError for flags that the values of several others leave unread."""
    cfg: TrainConfig = args.train
    given = args.given_now
    beside = {"adapt_lr": "adapt_rates"}
    if cfg.stage != "all":
        beside["dataset"] = "adapt_dataset"
    for name, other in beside.items():
        check(
            name not in given or not getattr(cfg, other),
            f"{name} with {other}={getattr(cfg, other)}",
            "it is not read then",
            "leave one of them out",
        )
    trained = {"predictor", "expected_attention"} & {*args.select.trained}
    check(
        "predictor_loss" not in given or bool(trained),
        f"predictor_loss with predictors={','.join(args.select.trained)}",
        "it is not read then",
        "leave it out, or give --predictors=predictor or expected_attention",
    )
    check(
        "weights" not in given or cfg.stage != "all" or args.base.init_from != "scratch",
        f"weights={args.base.weights} with init_from=scratch",
        "there is no base whose weights are held",
        "leave it out",
    )
    read = [cfg.corpus("adapt" if cfg.stage != "pretrain" else "pretrain"), cfg.test_dataset]
    if cfg.stage == "all" and args.base.init_from == "scratch":
        read.append(cfg.corpus("pretrain"))
    check_text_flags(given, ",".join(read))


def stored_by(args) -> str:
    """The kind of storage that the stage trains with: --kv, or the stage's own."""
    stage = args.train.stage
    if "kv" in args.given or stage not in ("select", "continue"):
        return args.kv.kv
    return STORED[stage][0]


def check_read(args) -> None:
    """Raise ValueError for flags that the stage does not read, all of them by name, and for the
    first one that another flag's value leaves unread, with those that it leaves unread alike."""
    stage = args.train.stage
    group_of = {}
    has = {}
    for group in GROUPS:
        settings = to_dict(getattr(args, group))
        group_of |= dict.fromkeys(settings, group)
        has |= settings
    has["kv"] = stored_by(args)
    given = [name for name in group_of if name in args.given_now]
    if stage in ("pretrain", "all") and args.base.init_from == "scratch":
        check(
            "vocab_size" not in given,
            "vocab_size with a model from scratch",
            f"the {args.data.tokenizer} tokenizer sets it",
            "leave it out",
        )
    unread = [name for name in given if not is_read(stage, group_of[name], name)]
    check(
        not unread,
        f"{', '.join(unread)} with stage={stage}",
        "it does not read that",
        f"leave it out{instead(unread, stage, group_of)}",
    )
    reasons = {}
    for name in given:
        unmet = []
        for other in READ_WITH.get(name, ()):
            group = group_of[other.flag]
            own = group == "model" and args.base.init_from != "scratch"  # has to be the base's
            if is_read(stage, group, other.flag) and not own and not other.holds(has):
                unmet.append(other)
        if unmet:
            reasons[name] = why_unread(unmet, [has], allowed=STORED.get(stage))
    refuse_alike(reasons)


def instead(unread: list[str], stage: str, group_of: dict[str, str]) -> str:
    """Which stages read all of these settings, in words; while a model is adapted, for those of a
    selection, who else reads them."""
    if stage in ("adapt", "all") and {group_of[name] for name in unread} == {"select"}:
        return f", or give --stage=select{ASKED_LATER}"
    stages = [s for s in READS if all(is_read(s, group_of[name], name) for name in unread)]
    return f", or give --stage={' or '.join(stages)}" if stages else ""
