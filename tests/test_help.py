"""What --help and refusals say of flags: every field once, those that a choice reads, hints that
help."""

import argparse
import dataclasses
import re
import sys

import pytest
from commands import PROGRAMS, complaint, here, process  # noqa: F401 (fixtures)
from torch.distributed.run import get_args_parser

import bench
import cli
import eval as evaluation
import runs
import sample
import train
from loaders import export
from measure_config import check_eval_flags, methods_named, with_task
from settings import measuring
from settings.storing import storage_flags


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_every_field(name):
    """--help --all of a true process names every dataclass field with its sentence, type and
    default, and answers at once."""
    code, out, err, seconds = process(name, "--help", "--all")
    assert (code, err) == (0, "") and seconds < 3
    squeezed = "".join(out.split())  # argparse wraps lines where it likes
    for cls in PROGRAMS[name][1].values():
        for f in dataclasses.fields(cls):
            assert f"--{f.name}" in out.split() or f"[--{f.name}" in out
            assert (
                "".join(f"{f.metadata['help']} ({f.type}; default {f.default!r}".split())
                in squeezed
            ), f.name


ASKED = [(name, value) for name in measuring.CHOICES for value in measuring.CHOICES[name].values]


@pytest.mark.parametrize("name, value", [*((name, "") for name in measuring.CHOICES), *ASKED])
def test_help_shows_the_flags_of_the_choice(name, value, capsys):
    """--help begins with at most ten lines, whole commands among them, and lists exactly the flags
    that the stage, task, comparison or way to store reads; without a flag those of the usual
    one."""
    module = bench if name == "bench" else PROGRAMS[name][0]
    choice = measuring.CHOICES[name]
    with pytest.raises(SystemExit) as e:
        asked = ["--help", *([f"--{choice.flag}={value}"] if value else [])]
        cli.parse_args(module.CONFIGS, asked, f"{name}.py", module.__doc__)
    out = capsys.readouterr().out
    begin = out[: out.index("\noptions:")].strip().splitlines()
    assert e.value.code == 0 and len(begin) - 2 <= 10  # usage and a blank line before them
    assert any(line.startswith(f"    python {name}.py") for line in begin)
    assert not begin[-3].endswith("\\")
    assert f"--{choice.flag}={value or choice.usual}." in begin[-1] and "--help --all" in begin[-1]
    shown = set(re.findall(r"^  --(\w+)", out, re.MULTILINE))
    assert shown == {
        f.name
        for key, cls in module.CONFIGS.items()
        for f in dataclasses.fields(cls)
        if choice.reads(value or choice.usual, key, f.name)
    }


def test_help_of_sample_says_what_it_does_without_kv(capsys):
    """sample.py --help, which shows the flags of --kv=dense, says that a base without flags is
    dense; and so it is: no flag of a storage is given then."""
    with pytest.raises(SystemExit):
        cli.parse_args(sample.CONFIGS, ["--help"], "sample.py", sample.__doc__)
    said = " ".join(capsys.readouterr().out.split())
    assert "sample.py stores as trained, and a base dense unless another flag of value" in said
    assert storage_flags(cli.parse_args(sample.CONFIGS, ["--init_from=x"]).given) == set()


def test_help_of_export_begins_with_its_command(capsys):
    """python -m loaders.export --help begins with what it does and a whole command."""
    with pytest.raises(SystemExit):
        cli.parse_args(export.CONFIGS, ["--help"], "export", export.__doc__)
    begin = capsys.readouterr().out.split("\noptions:")[0].strip().splitlines()
    assert len(begin) <= 10 and begin[-1].startswith("    python -m loaders.export --init_from=")


def refused(check, *args) -> str:
    """The line with which a check refuses, "" where it does not."""
    try:
        check(*args)
    except ValueError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("task", measuring.TASKS)
def test_eval_refuses_exactly_what_help_does_not_show(task):
    """Whatever help shows for a task can be given with it, by some method; whatever it does not
    show is refused by name, but for what says which text calibrates."""
    cfg = argparse.Namespace(tasks=task, methods="")
    for key, cls in evaluation.CONFIGS.items():
        for f in dataclasses.fields(cls):
            line = refused(check_eval_flags, {f.name}, cfg, "value_groups")
            if measuring.read_by_task(task, key, f.name) or f.name in measuring.CORPUS:
                assert line == "", f.name
            elif f.name in measuring.TRAINED:
                assert line.startswith(f"{f.name}: measuring trains nothing; leave it out"), line
            else:
                assert line.startswith(f"{f.name} with tasks={task}: it is not read; leave it out")


@pytest.mark.parametrize(
    "given, tasks, methods, trained, words",
    [
        ("hops", "needle,copy", "", False, "give --tasks=variable_tracking"),
        ("hops", "needle,variable_tracking", "", False, ""),
        ("query", "perplexity", "", False, "query with tasks=perplexity"),
        ("kv_bytes", "perplexity", "", False, "leave it out, or give --tasks=continuation"),
        ("kv_tail", "continuation", "", False, "kv_tail with tasks=continuation"),
        ("groups,bases", "continuation", "dense,kivi", False, "bases, groups with methods=dense,k"),
        ("groups", "continuation", "dense,value_groups", False, ""),
        ("token_budgets", "continuation", "value_groups", False, "give --methods=select"),
        ("token_budgets", "continuation", "quest", False, ""),
        ("quest_whole", "continuation", "select", False, "give --methods=quest"),
        ("kv_bits", "continuation", "dense", False, "kv_bits with methods=dense"),
        ("topk_groups", "continuation", "select", False, "give --methods=value_groups"),
        ("hedge", "continuation", "value_groups", False, "hedge with methods=value_groups"),
        ("readers", "continuation", "select", False, "readers: measuring trains nothing"),
        ("calibrate", "needle", "dense", False, "calibrate with methods=dense"),
        ("dataset", "needle", "value_groups", False, ""),  # calibrated on
        ("dataset,calibrate", "needle", "value_groups", False, "dataset with tasks=needle"),
        ("dataset", "needle", "value_groups", True, "dataset with tasks=needle"),
        ("methods", "mixsga", "dense", False, "methods with tasks=mixsga"),
        ("kv_sinks", "continuation", "mixsga", True, "kv_sinks with methods=mixsga"),
    ],
)
def test_eval_refuses_what_tasks_and_methods_do_not_read(given, tasks, methods, trained, words):
    """A flag that none of the tasks, or of the methods, reads is refused by its name."""
    cfg = argparse.Namespace(tasks=tasks, methods="")
    methods = [m for m in methods.split(",") if m]
    line = refused(check_eval_flags, set(given.split(",")), cfg, "dense", methods, trained)
    assert words in line and bool(words) == bool(line)


@pytest.mark.parametrize(
    "flags, accepted, words",
    [
        ("--kv=dense --reconstructor=keys", False, "reconstructor with kv=dense"),
        ("--kv=dense --topk_groups=1", False, "give --kv=value_groups"),
        ("--kv=dense --kv_bytes=0.5", False, "kv_bytes with kv=dense"),
        ("--kv=dense --kv_bits=8", False, "kv_bits with kv=dense"),
        ("--kv=value_groups --kv_byte_budgets=0.5", False, "leave it out, or give --kv=select"),
        ("--kv=value_groups --relevances=observed", False, "relevances with kv=value_groups"),
        ("--kv=select --topk_groups=1", False, "topk_groups with kv=select"),
        (
            "--kv=select --quest_whole=1",
            False,
            "quest_whole with kv=select: it is not read; leave it out",
        ),
        (
            "--kv=value_groups --quest_whole=1",
            False,
            "out, or give --methods=quest instead of --kv",
        ),
        ("--methods=quest --quest_whole=1", True, "quest"),
        (
            "--kv=select --methods=dense,value_groups",
            False,
            "kv=select with methods=dense,value_groups",
        ),
        ("--kv=dense", True, "dense"),
        ("--kv=value_groups --topk_groups=1", True, "dense,value_groups"),
        ("--kv=select --kv_bytes=0.5", True, "dense,select"),
        ("--kv=select --methods=select", True, "select"),
    ],
)
def test_eval_measures_the_kv_that_is_given(flags, accepted, words):
    """--kv of a base names what is measured beside dense; a flag that belongs to another method is
    refused, and measures nothing unasked."""
    args = cli.parse_args(evaluation.CONFIGS, ["--init_from=x", *flags.split()])
    cfg = with_task(args.given, args.eval, args.kv.kv)
    line = refused(check_eval_flags, args.given, cfg, args.kv.kv)
    assert accepted == (not line), line
    if accepted:
        assert methods_named(args.given, cfg, args.kv.kv) == words.split(",")
    assert accepted or words in line


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--bases=pca --value_basis=native", "value_basis with bases=pca: the list is measured; l"),
        ("--groups=4 --n_groups=8", "n_groups with groups=4"),
        ("--groups=4 --n_groups=8 --topk_groups=4", ""),  # half of the groups
        ("--groups=4 --n_groups=8 --topk_groups=4 --budgets=0.5", "topk_groups with budgets=0.5"),
        ("--splits=1 --kv_layers=2", "kv_layers with splits=1"),
        ("--budgets=0.5 --topk_groups=1", "topk_groups with budgets=0.5"),
        ("--kv=select --budgets=0.5 --value_keep=1", "value_keep with budgets=0.5"),
        ("--kv=select --token_budgets=0.5 --token_keep=1", "token_keep with token_budgets=0.5"),
        ("--kv_budgets=0.5 --kv_keep=1", "kv_keep with kv_budgets=0.5: the list is measured; leav"),
        ("--kv_byte_budgets=0.5 --kv_keep=1", "leave it or the list out, or give --kv_budgets"),
        ("--budgets=0.5 --kv_keep=1", "kv_keep with budgets=0.5"),
        ("--kv_byte_budgets=0.5 --kv_bytes=1", "kv_bytes with kv_byte_budgets=0.5"),
        ("--token_budgets=0.5 --kv_bytes=1", "leave it or the list out, or give --kv_byte_"),
        ("--kv_bits=8 --key_bits=4 --value_bits=4", "key_bits, value_bits with kv_bits=8"),
        ("--relevances=random --relevance=uniform", "relevance with relevances=random"),
        ("--token_relevances=h2o --token_relevance=tova", "token_relevance with token_relevances"),
        ("--kv_byte_budgets=0.5 --kv_budgets=1 --relevances=random", ""),
    ],
)
def test_eval_refuses_what_a_list_overrules(flags, words):
    """One value beside the list that is measured in its place, or beside a list of other budgets,
    is refused by its name; lists are read beside each other."""
    args = cli.parse_args(evaluation.CONFIGS, ["--init_from=x", *flags.split()])
    cfg = with_task(args.given, args.eval, args.kv.kv)
    line = refused(check_eval_flags, args.given, cfg, args.kv.kv)
    assert words in line and bool(words) == bool(line)


def test_rows_are_json_where_asked_or_piped(monkeypatch, capsys):
    """On a terminal rows are printed as JSON with --json only; to another program always."""
    for terminal, asked, printed in (
        (True, False, ""),
        (True, True, "[1]\n"),
        (False, False, "[1]\n"),
    ):
        with monkeypatch.context() as m:
            m.setattr(sys.stdout, "isatty", lambda t=terminal: t)
            cli.print_rows([1], asked)
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "flags, meant",
    [
        (["--lr=1"], "--pretrain_lr or --adapt_lr?"),
        (["--stage=pretrain", "--lr=1"], "--pretrain_lr?"),
        (["--stage", "adapt", "--steps=1"], "--adapt_steps?"),
        (["--stage=select", "--batch_size=1"], "--select_batch_size?"),
        (["--stage=continue", "--lr=1"], "--adapt_lr?"),
    ],
)
def test_hints_name_the_flags_of_the_stage(flags, meant, capsys):
    """--lr, --steps and --batch_size are answered by the flags of the chosen stage."""
    assert f"did you mean {meant} " in complaint(capsys, "train", *flags)


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("sample", ["--model=x"], "unknown flag --model: did you mean --init_from?"),
        ("eval", ["--checkpoint", "x"], "did you mean --init_from?"),
        ("eval", ["--prompt=hi"], "unknown flag --prompt: --help --all lists all flags"),
        ("train", ["--learning_rate=1"], "did you mean --pretrain_lr or --adapt_lr?"),
        ("train", ["--n-layer=2"], "did you mean --n_layer?"),
        ("sample", ["a.gguf"], "unexpected argument 'a.gguf': give --init_from=a.gguf"),
        ("sample", ["org/SmolLM2-1.7B"], "give --init_from=hf:org/SmolLM2-1.7B"),
        ("sample", ["."], "give --init_from=."),
        (
            "sample",
            ["--init_from=x", "--kv=dense", "--kv_bytes=0.125"],
            "--kv_bytes with kv=dense: it is not read; leave it out, or give --kv=select",
        ),
        ("sample", ["--init_from=x", "--kv=dense", "--n_groups=4"], "--kv=value_groups or select"),
        ("sample", ["--kv_bytes=1.5"], "kv_bytes=1.5: lies in [0, 1]; give for example 0.125"),
        (
            "train",
            ["--stage=adapt", "--init_from=x", "--kv_bytes=0.1"],
            "give --kv=select to sampl",
        ),
        (
            "train",
            ["--stage=adapt", "--init_from=x", "--kv=select"],
            "give --kv=select to sample.p",
        ),
        ("train", ["--stage=adapt"], "give --init_from=out/RUN/pretrain, or a .gguf file"),
        ("train", ["--dataset=a/b.txt"], "give --dataset=text:a/b.txt"),
        ("train", ["--dataset=mine.txt"], "give --dataset=text:mine.txt"),  # which is there
        ("train", ["--dataset=none.txt"], "text:PATH or instruct:PATH; choose one"),
    ],
)
def test_hints_say_what_helps(program, flags, words, capsys, here):
    """What a new user tries is answered by what is meant: a model by the flag that takes it, a
    flag of a storage by that storage, a text by text:; what is like nothing, by no guess."""
    (here / "mine.txt").touch()
    assert words in complaint(capsys, program, *flags)


def test_flags_that_torchrun_takes_for_its_own_are_noted():
    """Of train.py's flags torchrun reads r alone as the beginning of one of its own, which the
    README says beside the command; after -- it leaves all to the program."""
    parser = get_args_parser()
    theirs = [option for option in parser._option_string_actions if option.startswith("--")]
    ours = {f.name for cls in train.CONFIGS.values() for f in dataclasses.fields(cls)}
    taken = [name for name in ours if any(option.startswith(f"--{name}") for option in theirs)]
    assert taken == ["r"]
    readme = (runs.ROOT / "README.md").read_text()
    (command,) = re.findall(r"`torchrun ([^`]+)` \(the `--` keeps `--r` ours\)", readme)
    read = parser.parse_args([*command.split(), "--r=4"])
    assert (read.nproc_per_node, read.training_script) == ("2", "train.py")
    assert read.training_script_args[-1] == "--r=4"


def test_flags_of_benchmarks_are_not_those_of_eval(capsys):
    """What only bench.py does is no flag of eval.py, which would do nothing with it."""
    assert "parts" in complaint(capsys, "eval", "--init_from=x", "--parts")
