"""What eval.py answers once it knows its run, and the advice of a refusal: whoever follows it is not
refused again. Runs are stand-ins that have a model's shape and settings, and no weights."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import error_line
from test_docs import BASH, DOCUMENTS, SCRIPTS, commands_of, program_of, shell_of

import bench
import cli
import eval as evaluation
import sample
import train
from config import PREDICTORS, SIGNALS, KVConfig, ModelConfig, SelectConfig
from loaders.compress import storage_of_base, stored_as_asked
from measure_config import EvalConfig, check_eval_flags, check_sample_flags, with_task
from report.plan import plan_of
from report.texts import window_of
from settings import beside, stages
from settings.storing import GROUP_OF, take_kind
from settings.train import DataConfig
from tasks.make import continuation

SHAPE = ModelConfig(n_layer=30, n_head=9, n_kv_head=3, head_dim=64, block_size=8192)
ADAPT = ["--stage=adapt", "--init_from=x"]
CONTINUE = ["--stage=continue", "--init_from=x"]
PRETRAIN = ["--stage=pretrain"]


def run_that(*predictors: str, **kv) -> SimpleNamespace:
    """A run that stores by KVConfig(**kv), and has these predictors."""
    selector = SimpleNamespace(predictors=predictors, set=lambda way: None)
    model = SimpleNamespace(cfg=SHAPE, selector=selector)
    stored = KVConfig(**kv)
    return SimpleNamespace(model=model, kv=stored, select=SelectConfig(), path="run", config={})


RUNS = {
    "base": run_that(kv="dense"),
    "groups": run_that(kv="value_groups"),
    "mlp": run_that(kv="value_groups", reconstructor="mlp"),
    "select": run_that(*PREDICTORS, kv="select"),
    "mixsga": run_that(kv="mixsga"),
    "gqa": run_that(kv="gqa"),
}


def plan(run: SimpleNamespace, *flags: str):
    """Everything that eval.py checks of flags, before and after it knows its run."""
    args = cli.parse_args(evaluation.CONFIGS, flags)
    args.eval = with_task(args.given, args.eval, args.kv.kv)
    check_eval_flags(args.given, args.eval, args.kv.kv)
    return plan_of(run, evaluation.asked_of(run, args))


def as_advised(flags: list[str], line: str) -> list[str]:
    """The flags with what a refusal advises beside leaving one out."""
    for advice in line.rsplit("; leave it out, or ", 1)[1].split(" and "):
        flags = as_one_advises(flags, advice.removeprefix("give "))
    return flags


def as_one_advises(flags: list[str], advice: str) -> list[str]:
    """The flags with one thing that is advised."""
    number = re.search(r"number of less than (\d+) to --(\w+)", advice)
    if number:
        advice = f"add {int(number[1]) / 2} to --{number[2]}"
    added = re.fullmatch(r"add (\S+) to --(\w+)", advice)
    if added:
        value, name = added.groups()
        assert any(flag.startswith(f"--{name}=") for flag in flags)
        return [f"{f},{value}" if f.startswith(f"--{name}=") else f for f in flags]
    bound = re.fullmatch(r"a --(\w+) of (more|less) than (\d+)", advice)
    if bound:
        value = int(bound[3]) + 1 if bound[2] == "more" else int(bound[3]) / 2
        return [*flags, f"--{bound[1]}={value}"]
    more = re.sub(r" or \w+", "", advice).split()
    changed = [flag.split("=")[0] for flag in more]
    return [*(flag for flag in flags if flag.split("=")[0] not in changed), *more]


@pytest.mark.parametrize(
    "flags, advice",
    [
        ([*ADAPT, "--key_block=32"], "give --key_bits=8 --value_bits=8"),
        ([*ADAPT, "--kv_sinks=2"], "give --key_bits=8 --value_bits=8"),
        ([*ADAPT, "--adapter=lora", "--experts=3"], "give --adapter=moe_lora"),
        ([*ADAPT, "--adapter=lora", "--kv_tail_block=4"], "give --kv=value_groups"),
        ([*CONTINUE, "--n_groups=8"], "give a --expert_groups of more than 0"),
        ([*CONTINUE, "--expert_router=random", "--lm_to_experts"], "give --expert_router=learned"),
        ([*CONTINUE, "--kv=mixsga", "--kv_share=0.5"], "give --kv=gqa"),
        ([*PRETRAIN, "--rope_scaling=linear"], "give a --rope_factor of more than 1"),
        ([*PRETRAIN, "--global_every=3"], "give a --sliding_window of more than 0"),
        (["--seeds=1", "--max_minutes=9"], "give a --seeds of more than 1"),
        (["--recon_hidden=9"], "give --reconstructor=mlp"),
        (
            ["--kv=dense", "--key_block=16"],
            "give --kv=value_groups and --key_bits=8 --value_bits=8",
        ),
        (
            [*ADAPT, "--kv=dense", "--kv_sinks=2", "--key_block=16"],
            "give --kv=value_groups and --key_bits=8 --value_bits=8",
        ),
        ([*ADAPT, "--kv=dense", "--key_bits=8", "--value_bits=8"], "give --kv=value_groups"),
        (["--kv=dense", "--recon_hidden=9"], "give --kv=value_groups and --reconstructor=mlp"),
        (["--kv=dense", "--aux_weight=1"], "give --kv=value_groups and --value_router=linear"),
        (["--lm_to_router"], "give --value_router=linear"),
        (
            [*CONTINUE, "--kv=gqa", "--n_groups=8"],
            "give --kv=mixsga and a --expert_groups of more than 0",
        ),
        (
            [*PRETRAIN, "--positions=learned", "--rope_local_theta=9"],
            "give --positions=rope and a --sliding_window of more than 0",
        ),
        ([*ADAPT, "--reconstructor=mlp", "--key_block=32"], ""),
        ([*ADAPT, "--reconstructor=mlp", "--kv_sinks=2"], ""),
        ([*ADAPT, "--prefill=routed", "--key_block=32"], ""),
        ([*ADAPT, "--kv_tail_block=4", "--key_block=32"], ""),
        (["--key_bits=8", "--value_bits=8", "--recon_hidden=9"], ""),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_advice_of_train_is_accepted(flags, advice):
    """What is advised beside leaving a flag out is accepted, and where nothing would be, nothing
    is advised."""

    def check(flags) -> None:
        stages.check_flags(cli.parse_args(train.CONFIGS, flags))

    line = error_line(check, flags)
    assert line.endswith(f"leave it out, or {advice}" if advice else "; leave it out")
    if advice:
        check(as_advised(flags, line))


@pytest.mark.parametrize(
    "on, flags, advice",
    [
        ("select", "--kv_bits=16 --key_block=32", "add 8 to --kv_bits"),
        ("select", "--key_block=32", "give --key_bits=8 --value_bits=8"),
        ("select", "--kv_bits=16 --key_rounding=nearest", "add 8 to --kv_bits"),
        ("base", "--kv_bits=16 --kv=value_groups --kv_sinks=2", "add 8 to --kv_bits"),
        ("base", "--kv_budgets=.5 --kv_sinks=2", "give --key_bits=8 --value_bits=8"),
        ("base", "--relevances=future,random --pool=3", "add observed to --relevances"),
        ("base", "--relevance=random --pool=3", "give --relevance=observed"),
        ("base", "--token_relevances=random --token_budgets=.5 --pool=3", "give --relevance=obs"),
        ("select", "--relevances=uniform --ahead=9", "add future to --relevances"),
        (
            "base",
            "--token_budgets=1 --token_relevance=h2o",
            "add a number of less than 1 to --token_budgets",
        ),
        ("base", "--token_relevance=h2o", "give a --token_keep of less than 1"),
        ("base", "--budgets=.5 --token_relevance=h2o", "give a --token_keep of less than 1"),
        ("base", "--kv_budgets=.5 --refit_ridge=.2", "give --refit=True"),
        ("base", "--kv_keep=1 --sinks=2", "give a --kv_keep of less than 1"),
        ("base", "--kv_keep=1 --refit", "give a --kv_keep of less than 1"),
        (
            "base",
            "--kv_budgets=1 --allocation=head",
            "add a number of less than 1 to --kv_budgets",
        ),
        ("base", "--token_keep=1 --value_keep=1 --hedge=1", "give a --token_keep of less than 1"),
        ("base", "--budgets=1 --past=9", "give a --token_keep of less than 1"),
        ("base", "--kv_keep=.5 --relevance=random --observers=4", "give --relevance=observed"),
        ("select", "--relevances=uniform --observers=4", "add observed to --relevances"),
        ("select", "--relevance=predictor --hedge=.5", "give --relevance=future"),
        ("select", "--relevances=predictor --hedge=.5", "add future to --relevances"),
        ("groups", "--key_block=32", "give --key_bits=8 --value_bits=8"),
        ("groups", "--prefill=routed --key_block=32", ""),
        ("mlp", "--key_block=32", ""),
        ("mlp", "--kv_bits=16 --key_block=32", ""),
        ("base", "--methods=value_groups,select --reconstructor=keys --key_block=32", ""),
        ("mixsga", "--key_block=32", "give --key_bits=8 --value_bits=8"),
        ("base", "--kv_byte_budgets=.1 --kv_bits=16", ""),
        ("select", "--kv_bytes=.1 --key_bits=16 --value_bits=16", ""),
        ("base", "--kv_byte_budgets=.1 --value_bits=16", ""),
        ("base", "--kv_keep=1 --relevance=random", "give a --kv_keep of less than 1"),
        ("select", "--kv_bits=4 --budgets=1 --relevance=random", "give a --token_keep of less"),
        (
            "select",
            "--kv_budgets=1 --relevances=random,observed",
            "add a number of less than 1 to --kv_budgets",
        ),
    ],
)
def test_advice_of_eval_is_accepted(on, flags, advice):
    """The same of eval.py; a list that was given in a setting's place is added to."""
    flags = ["--tasks=perplexity" if on == "mixsga" else "--tasks=continuation", *flags.split()]
    line = error_line(plan, RUNS[on], *flags)
    assert (f"; leave it out, or {advice}" if advice else "; leave it out") in line
    assert bool(advice) == (not line.endswith("leave it out")), line
    if advice:
        plan(RUNS[on], *as_advised(flags, line))


def sampled(*flags: str) -> KVConfig:
    """Everything that sample.py checks of flags on a base; how it stores then."""
    args = cli.parse_args(sample.CONFIGS, ["--init_from=x", *flags])
    take_kind(args)
    check_sample_flags(args.given, args.sample, args.kv.kv)
    return storage_of_base(RUNS["base"], args.given, args.kv, args.select)


@pytest.mark.parametrize(
    "flags, advice",
    [
        ("--methods=kivi --kv_sinks=4", "give --methods=value_groups and --key_bits=8 --value_bi"),
        ("--methods=kivi --kv_bits=4 --kv_sinks=4", "give --methods=value_groups"),
        ("--kv=dense --key_block=16", "give --kv=value_groups and --key_bits=8 --value_bits=8"),
        ("--kv=dense --kv_bytes=.25 --calibration=4", "give --kv=select"),
        ("--kv=dense --topk_groups=2 --calibration=4", "give --kv=value_groups"),
        ("--methods=value_groups --kv_bytes=.25", "give --methods=select"),
        ("--methods=value_groups --kv_bytes=.25 --calibration=4", "give --methods=select"),
        ("--kv=value_groups --pool=3", "give --kv=select and --relevance=observed"),
        ("--tasks=perplexity --pool=3", "give --tasks=continuation and --relevance=observed"),
        (
            "--tasks=perplexity --kv=value_groups --kv_bytes=.25",
            "give --kv=select and --tasks=continuation",
        ),
        ("--methods=value_groups --token_relevance=h2o", "give --methods=select and a --token_ke"),
    ],
)
def test_advice_of_a_way_to_store_is_accepted(flags, advice):
    """What eval.py advises where no method or task that was named reads a flag is read, with all
    that it needs."""
    flags = flags.split()
    line = error_line(plan, RUNS["base"], *flags)
    assert f"; leave it out, or {advice}" in line
    plan(RUNS["base"], *as_advised(flags, line))


OTHER = {
    "key_bits": "--key_bits=8 --value_bits=8",
    "value_bits": "--key_bits=4 --value_bits=2",
    "relevance": "--relevance=random",
    "key_rounding": "--key_rounding=nearest",
    "token_relevance": "--token_relevance=h2o",
    "allocation": "--allocation=head",
    "refit": "--refit",
    "fixed_k": "--fixed_k",
    "hedge": "--hedge=1",
    "token_keep": "--token_keep=0.5",
    "value_keep": "--value_keep=0.25",
    "refit_ridge": "--refit_ridge=0.1",
    "key_block": "--key_block=32",
}


@pytest.mark.parametrize("name", sorted({*beside.STORED_WITH} & {*GROUP_OF}))
def test_advice_of_sample_is_accepted(name):
    """Of every flag that is read beside some others alone, given with whole storage."""
    flags = ["--kv=dense", *OTHER.get(name, f"--{name}=3").split()]
    line = error_line(sampled, *flags)
    assert sampled(*as_advised(flags, line)).kv != "dense"


def test_flags_that_are_unread_alike_are_named_at_once():
    """And left out at once, which is accepted."""
    budget = "--kv_bytes=.25"
    bits = ["--key_bits=16", "--value_bits=16"]
    select = ["--stage=select", "--init_from=x"]

    def trained(*flags: str) -> None:
        stages.check_flags(cli.parse_args(train.CONFIGS, [*select, *flags]))

    for call in (sampled, partial(plan, RUNS["base"], "--tasks=continuation"), trained):
        line = error_line(call, budget, *bits)
        assert line.startswith("key_bits, value_bits with kv_bytes=0.25: it is not read then; leav")
        call(budget)
    line = error_line(sampled, "--kv=dense", "--kv_sinks=2", "--key_block=32")
    assert line.startswith("--key_block, --kv_sinks with kv=dense: it is not read; leave it out")


@pytest.mark.parametrize("bits", [(8, 16), (16, 8), (16, 0)])
def test_bits_are_advised_that_are_accepted(bits):
    """Where one of the two was given with 16, giving both is no advice."""
    line = error_line(KVConfig, key_bits=bits[0], value_bits=bits[1])
    assert line.endswith(
        "both are integers or neither; give both of fewer than 16 bits, or neither"
    )
    levels = dict(kv="select", key_bits=4, value_bits=0, mask_scope="shared")
    assert "--mask_scope=head" in error_line(KVConfig, **levels)
    assert KVConfig(**levels | {"mask_scope": "head"})


@pytest.mark.parametrize(
    "flags, kind",
    [
        ("--kv_bytes=.25", "select"),
        ("--relevance=random --n_groups=8", "select"),
        ("--n_groups=8", "value_groups"),
        ("--kv=value_groups", "value_groups"),
    ],
)
def test_a_flag_of_a_selection_asks_sample_for_one(flags, kind):
    """As it does eval.py, where --kv is not given."""
    assert sampled(*flags.split()).kv == kind
    methods = plan(RUNS["base"], "--tasks=continuation", *flags.split())[0]
    assert methods == ["dense", kind]


def test_a_run_with_groups_is_not_told_to_select():
    """It keeps how it was trained to store, and what cannot be changed is named at once."""
    how = dict(corpus="", sequences=1, seed=0, data=DataConfig())
    given = {"kv_bytes", "hedge"}
    args = (RUNS["groups"], given, KVConfig(kv="select"), SelectConfig(kv_bytes=0.25))
    line = error_line(stored_as_asked, *args, **how)
    assert line.startswith("--hedge, --kv_bytes for a run trained with kv=value_groups: ")
    assert "--kv=" not in line
    args = (RUNS["select"], {"kv_tail_block"}, KVConfig(kv_tail_block=4), SelectConfig())
    line = error_line(stored_as_asked, *args, **how)
    assert line == "--kv_tail_block with kv=select: it is not read; leave it out"


@pytest.mark.parametrize(
    "flags, refused",
    [
        ("--kv_bytes=.25", ""),
        ("--kv=value_groups --kv_bytes=.25", "leave it out, or give --kv=select"),
        ("--kv=gqa --kv_sinks=2", "give --out_dir of a run of train.py --stage=continue"),
    ],
)
def test_bench_takes_a_base_as_sample_does(flags, refused, monkeypatch):
    """A flag of a selection asks for one, and shared heads are refused before what stands beside
    them."""
    asked = []
    args = cli.parse_args(bench.CONFIGS, ["--what=generate", *flags.split()])
    monkeypatch.setattr(bench, "ARGS", args, raising=False)
    monkeypatch.setattr(bench, "measure", lambda args: asked.append(args.kv.kv) or [])
    monkeypatch.setattr(bench, "print_rows", lambda *_: None)
    if refused:
        assert error_line(bench.main).endswith(refused)
    else:
        bench.main()
        assert asked == ["select"]


@pytest.mark.parametrize("block_size", [128, 64])
def test_contexts_too_short_are_not_told_to_grow_beyond_the_model(block_size):
    """A larger --block_size is advised where the model can read more, and what is advised otherwise
    leaves a context."""
    cfg = EvalConfig(continuation=block_size, block_size=block_size)
    line = error_line(continuation, cfg, block_size, None, 128)
    assert "give a smaller --continuation or --query" in line
    assert ("--block_size" in line) == (block_size < 128)
    run = SimpleNamespace(model=SimpleNamespace(cfg=replace(SHAPE, block_size=128)), path="run")
    line = error_line(window_of, run, EvalConfig(block_size=256))
    assert "give --block_size=128 or less, or a model of a longer context" in line


def test_tokens_that_stay_whole_are_advised_to_be_fewer(capsys):
    """The first ones where these are the larger part, else the newest, unless both are few."""
    task = SimpleNamespace(name="continuation", stored=SimpleNamespace(size=lambda _: 512))
    for kv, kv_bytes, advice in (
        (KVConfig(kv_tail=16, kv_sinks=500), 0.25, "give --kv_sinks=1, or longer contexts"),
        (KVConfig(kv_tail=16, kv_sinks=500), 0.0, ""),
        (KVConfig(kv_tail=200), 0.25, "give --query=4, or longer contexts"),
        (KVConfig(kv_tail=4), 0.01, "give a larger share, or longer contexts"),
        (KVConfig(kv_tail=0), 0.001, "give a larger share, or longer contexts"),
    ):
        evaluation.say_where_whole(task, kv, [SelectConfig(kv_bytes=kv_bytes)])
        err = capsys.readouterr().err
        assert advice in err and bool(advice) == bool(err)


@pytest.mark.parametrize(
    "on, flags",
    [
        ("base", "--kv_budgets=1,.5 --sinks=2 --allocation=head"),
        ("base", "--token_budgets=.5 --budgets=1 --allocation=head --observers=4"),
        ("base", "--kv_bytes=.5 --relevance=uniform --observers=4 --allocation=head"),
        ("select", "--relevances=predictor,random --hedge=1"),
        ("select", "--kv_bytes=.5 --relevance=predictor --hedge=1"),
        ("base", "--kv_byte_budgets=.1 --kv_budgets=.5 --kv_bits=16,4"),
        ("base", "--kv_byte_budgets=.1 --kv_bits=16,4"),
        ("base", "--methods=value_groups,select --kv_bytes=.1 --key_bits=16 --value_bits=16"),
        ("groups", "--key_bits=16 --value_bits=16"),
        ("base", "--kv_budgets=1,.5 --relevances=random,observed"),
        ("base", "--kv_bytes=1 --relevance=random"),
    ],
)
def test_what_one_of_the_settings_reads_is_accepted(on, flags):
    """A flag that some of the settings tried leave unread, and another one reads."""
    assert plan(RUNS[on], "--tasks=continuation", *flags.split())


def test_a_signal_that_drops_no_token_reads_nothing():
    """A run may have a token relevance, and keep every token: nobody pools by it then."""
    select = SelectConfig(token_relevance="observed", pool=3)
    by_tokens = replace(select, token_keep=0.5)
    beside.check_storing({"pool"}, KVConfig(kv="select"), by_tokens)
    line = error_line(beside.check_storing, {"pool"}, KVConfig(kv="select"), select)
    assert line.startswith("pool with relevance=future: it is not read then")


def test_every_signal_but_one_has_an_exponent():
    """--hedge is read beside every signal but `predictor`."""
    assert {*beside.BY_SIGNAL} == {*SIGNALS} - {"predictor"}


@pytest.mark.parametrize(
    "on, flags, says",
    [
        ("mixsga", "--kv_bits=8 --kv_sinks=2", "kv_sinks with methods=mixsga: it is not read; le"),
        ("mixsga", "--methods=value_groups", "it was trained for mixsga; leave it out, or give"),
        ("mixsga", "--relevances=random", "only kv=select chooses; leave them out"),
        ("groups", "--methods=select", "it was trained for value_groups; name that, or give its"),
        ("groups", "--kv_budgets=.5", "only kv=select chooses; leave them out"),
        ("groups", "--quest_whole=1", "quest_whole with methods=value_groups: it is not read; lea"),
        ("base", "--quest_whole=1 --groups=4", "leave it out, or give --methods=quest"),
    ],
)
def test_no_method_is_advised_that_the_run_has_not(on, flags, says):
    """A trained run has its own method: each is named once, and no other one advised."""
    line = error_line(plan, RUNS[on], "--tasks=continuation", *flags.split())
    assert says in line
    assert on == "base" or "give --methods" not in line


def refusals(script: str, folder: Path) -> list[str]:
    """What eval.py answers to each of its commands in a script that no run of RUNS can be asked; of
    one that names no folder of a run, a base."""
    said = []
    for call in commands_of(script, folder):
        module, flags = program_of(call)
        if module != "eval" or "--tasks=mixsga" in flags or {"--help", "-h"} & {*flags}:
            continue
        folders = [flag for flag in flags if flag.startswith("--out_dir")]
        lines = []
        for run in RUNS.values() if folders else [RUNS["base"]]:
            try:
                plan(run, *flags)
            except ValueError as e:
                lines.append(str(e))
                continue
            break
        else:
            said.append(f"{shlex.join(call)}\n    {lines[0]}")
    return said


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("source", [*DOCUMENTS, *SCRIPTS], ids=lambda path: path.name)
def test_commands_can_be_asked_of_a_run(source, tmp_path):
    """Every command of eval.py in documents and scripts passes what is checked once a run is
    known."""
    text = source.read_text()
    found = refusals(shell_of(text) if source.suffix == ".md" else text, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    "flags, fault",
    [
        ("--init_from=x --kv_budgets=1 --sinks=2", "sinks with kv_budgets=1.0"),
        ("--init_from=x --relevances=predictor --kv_budgets=.5", "has not been trained"),
        ("--out_dir=x --kv_bits=16 --key_block=32", "key_block with kv_bits=16"),
        ("--out_dir=x --kv_budgets=.5 --hedge=1", ""),
    ],
)
def test_a_command_that_no_run_can_be_asked_is_found(flags, fault, tmp_path):
    """The check above fails where it should."""
    found = refusals(f"python eval.py --tasks=continuation {flags}\n", tmp_path)
    assert len(found) == bool(fault) and all(fault in line for line in found)
