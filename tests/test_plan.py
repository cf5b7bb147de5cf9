"""What eval.py answers once it knows its run, and the advice of a refusal: whoever follows it is not
refused again. Runs are stand-ins that have a model's shape and settings, and no weights."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import error_line
from test_docs import BASH, DOCUMENTS, SCRIPTS, commands_of, program_of, shell_of

import cli
import eval as evaluation
import train
from config import PREDICTORS, SIGNALS, KVConfig, ModelConfig, SelectConfig
from measure_config import check_eval_flags, with_task
from report.plan import plan_of
from settings import beside, stages

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
    advice = line.rsplit("; leave it out, or ", 1)[1]
    number = re.search(r"number of less than (\d+) to --(\w+)", advice)
    if number:
        advice = f"add {int(number[1]) / 2} to --{number[2]}"
    added = re.fullmatch(r"add (\S+) to --(\w+)", advice)
    if added:
        value, name = added.groups()
        assert any(flag.startswith(f"--{name}=") for flag in flags)
        return [f"{f},{value}" if f.startswith(f"--{name}=") else f for f in flags]
    bound = re.fullmatch(r"give a --(\w+) of (more|less) than (\d+)", advice)
    if bound:
        value = int(bound[3]) + 1 if bound[2] == "more" else int(bound[3]) / 2
        return [*flags, f"--{bound[1]}={value}"]
    more = advice.removeprefix("give ").split()
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
