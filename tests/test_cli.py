"""Promise 9, and 4, 5, 10 at the command line: whatever is given wrong is answered by one line,
exit code 2, and nothing is left behind."""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import bench
import cli
import data
import eval as evaluation
import runs
import sample
import train
from loaders import checkpoint, export, token_files
from loaders.tokenizer import get_tokenizer
from measure_config import check_eval_flags, storage_flags
from settings import measuring, stages
from settings.begin import program_name
from settings.train import DataConfig

PROGRAMS = {
    "train": (train, train.CONFIGS),
    "sample": (sample, sample.CONFIGS),
    "eval": (evaluation, evaluation.CONFIGS),
    "export": (export, export.CONFIGS),
}
COMMAND = {name: [str(runs.ROOT / f"{name}.py")] for name in ("train", "sample", "eval")}
COMMAND["export"] = ["-m", "loaders.export"]
CALLED = {name: f"{name}.py" for name in COMMAND} | {"export": "python -m loaders.export"}
PRETRAIN = [*runs.TINY, "--stage=pretrain", "--pretrain_steps=2"]
ADAPT = [*runs.TINY, "--stage=adapt", "--adapt_steps=2"]
STORED_CONTEXT = [
    "--stage=adapt",
    "--init_from=x",
    "--kv=select",
    "--kv_from=x",
    "--adapter=lora",
    "--objective=distill",
]
TINY = [*runs.TABLE, "--pretrain_steps=2", "--adapt_steps=2", "--seeds=1"]
NEEDED = {"train": [], "eval": ["--out_dir=x"], "sample": ["--out_dir=x"], "export": ["--to=x"]}


@pytest.fixture(autouse=True)
def here(own_cache, monkeypatch, tmp_path) -> Path:
    """Every test works in an empty folder; token files go beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text) -> Path:
    """A run folder with stages pretrain and routed-s0."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for flags in (
            [*PRETRAIN, f"--out_dir={folder / 'a'}"],
            [*ADAPT, f"--init_from={folder / 'a'}", f"--out_dir={folder / 'b'}"],
        ):
            train.run(cli.parse_args(train.CONFIGS, [*flags, f"--dataset={text}"]))
    shutil.move(folder / "a" / "pretrain", folder / "run" / "pretrain")
    shutil.move(folder / "b" / "routed-s0", folder / "run" / "routed-s0")
    adapter = checkpoint.newest(folder / "run" / "routed-s0")[0]
    c = checkpoint.load(adapter)
    checkpoint.save(
        adapter.parent,
        adapter.name,
        step=c.step,
        tensors=c.tensors,
        state=c.state,
        config=c.config | {"base": f"../../pretrain/{checkpoint.step_name(2)}"},
    )
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the trained run that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: path -> content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def complaint(capsys, program: str, *flags, code: int = 2) -> str:
    """Run the program's main in this process; assert exit code 2 and exactly one line on stderr,
    after those that say what is done, nothing on stdout; return the line."""
    module, configs = PROGRAMS[program]
    capsys.readouterr()

    def main():
        args = cli.parse_args(configs, list(map(str, flags)), prog=CALLED[program])
        if program == "train":
            train.run(args)
        else:
            runs.call_main(module, args)

    with pytest.raises(SystemExit) as e:
        cli.exit_on_bad_input(main)
    io = capsys.readouterr()
    assert e.value.code == code, io.err
    assert io.out == "" and io.err.endswith("\n") and "Traceback" not in io.err, io
    names = (f"{CALLED[program]}: ", f"{program_name()}: ")
    *before, line = io.err.splitlines()
    assert line.startswith(names) and not [told for told in before if told.startswith(names)], io
    assert len(line) > 20
    return line


def program(name: str, *flags, cwd=None) -> tuple[int, str, str, float]:
    """A true process: (exit code, stdout, stderr, seconds of the processor)."""
    before = os.times()
    p = subprocess.run(
        [sys.executable, *COMMAND[name], *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},  # for -m, which looks in cwd
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = os.times()
    user = after.children_user - before.children_user
    return p.returncode, p.stdout, p.stderr, user + after.children_system - before.children_system


def both(flag: str, value) -> list[list[str]]:
    """The two ways to write a flag."""
    return [[f"--{flag}={value}"], [f"--{flag}", str(value)]]


# -- flags


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_every_field(name):
    """--help --all of a true process names every dataclass field with its sentence, type and
    default, and answers at once."""
    code, out, err, seconds = program(name, "--help", "--all")
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


@pytest.mark.parametrize("task", measuring.TASKS)
def test_eval_refuses_exactly_what_help_does_not_show(task):
    """Whatever help shows for a task can be given with it, by some method; whatever it does not
    show is refused by name, but for what says which text calibrates."""
    cfg = argparse.Namespace(tasks=task, methods="")
    for key, cls in evaluation.CONFIGS.items():
        for f in dataclasses.fields(cls):
            line = refused(check_eval_flags, {f.name}, cfg)
            if measuring.read_by_task(task, key, f.name) or f.name in measuring.CORPUS:
                assert line == "", f.name
            elif f.name in measuring.TRAINED:
                assert line.startswith(f"{f.name}: measuring trains nothing; leave it out"), line
            else:
                assert line.startswith(f"{f.name} with tasks={task}: it is not read; leave it out")


def refused(check, *args) -> str:
    """The line with which a check refuses, "" where it does not."""
    try:
        check(*args)
    except ValueError as e:
        return str(e)
    return ""


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
    ],
)
def test_eval_refuses_what_tasks_and_methods_do_not_read(given, tasks, methods, trained, words):
    """A flag that none of the tasks, or of the methods, reads is refused by its name."""
    cfg = argparse.Namespace(tasks=tasks, methods="")
    methods = [m for m in methods.split(",") if m]
    line = refused(check_eval_flags, set(given.split(",")), cfg, methods, trained)
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
            ["--init_from=x", "--kv_bytes=0.125"],
            "--kv_bytes with kv=value_groups: it is ",
        ),
        ("sample", ["--init_from=x", "--kv_bytes=0.125"], "; give --kv=select, or leave it out"),
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


@pytest.mark.parametrize("name", PROGRAMS)
def test_defaults_exist_once(name):
    """Without flags, parse_args gives the dataclasses' own defaults; no field is defined twice,
    each has type, default and help."""
    configs = PROGRAMS[name][1]
    args = cli.parse_args(configs, NEEDED[name])
    for key, cls in configs.items():
        first = key == next(iter(configs))  # the group of the program's own flags
        assert getattr(args, key) == cls(
            **(dict(f[2:].split("=") for f in NEEDED[name]) if first else {})
        )
        assert all(
            f.metadata["help"] and str(f.type) in ("int", "float", "str", "bool")
            for f in dataclasses.fields(cls)
        )
    assert args.given == {n.split("=")[0][2:] for n in NEEDED[name]}


def test_both_syntaxes_give_the_same(here):
    """--key=value and --key value are one thing, for each type; a bare boolean means true; negative
    and last values are read."""
    for flags in (
        [["--n_layer=3"], ["--n_layer", "3"]],
        [["--adapt_lr=1e-3"], ["--adapt_lr", "1e-3"]],
        [["--dataset=pycode"], ["--dataset", "pycode"]],
        [["--compile"], ["--compile=true"], ["--compile", "yes"], ["--compile=0", "--compile=1"]],
    ):
        parsed = [cli.parse_args(train.CONFIGS, f) for f in flags]
        assert all(p == parsed[0] for p in parsed[1:]) and parsed[0] != cli.parse_args(
            train.CONFIGS, []
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_unknown_flag_is_answered_by_the_nearest(name, capsys, here):
    """A misspelt flag gets the nearest real one; foreign flags, in both syntaxes and mixed with
    good ones, are refused."""
    typos = {
        "train": ("n_layr", "n_layer"),
        "eval": ("budget", "budgets"),
        "sample": ("temprature", "temperature"),
        "export": ("init_form", "init_from"),
    }
    wrong, right = typos[name]
    for flags in both(wrong, 3):
        assert f"unknown flag --{wrong}: did you mean --{right}?" in complaint(
            capsys, name, *NEEDED[name], *flags
        )
    for foreign in ("--xyzzy", "--wandb_log", "--lang=en"):  # like none of ours
        said = complaint(capsys, name, *NEEDED[name], foreign)
        assert f"unknown flag {foreign.split('=')[0]}: --help --all lists all flags" in said
    assert "unexpected argument 'config/a.py'" in complaint(
        capsys, name, *NEEDED[name], "config/a.py"
    )
    assert complaint(capsys, name, *NEEDED[name], "--two\nlines=1\n2")
    assert tree(here) == {}


@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_flag_of_a_process(name, here):
    """True processes: one line, exit 2, before torch is loaded, nothing left behind."""
    wrong = {
        "train": ["--seed", "many"],
        "eval": ["--sequences", "many"],
        "sample": ["--top_k", "many"],
        "export": ["--weights", "int8"],
    }[name]
    for flags in (["--no_such_flag=1"], wrong, ["--revision=main", "--init_from=x"]):
        code, out, err, seconds = program(name, *NEEDED[name], *flags, cwd=here)
        assert (
            (code, out, err.count("\n")) == (2, "", 1)
            and err.startswith(f"{CALLED[name]}: ")
            and seconds < 3
        ), err
    assert tree(here) == {}


def every_field(kinds: tuple[str, ...]) -> list:
    return [
        pytest.param(name, f, id=f"{name}-{f.name}")
        for name, (_, configs) in PROGRAMS.items()
        for cls in configs.values()
        for f in dataclasses.fields(cls)
        if str(f.type) in kinds
    ]


@pytest.mark.parametrize("name, f", every_field(("int", "float", "bool")))
def test_wrong_type(name, f, capsys):
    """Words, empty text, NaN, infinity and, for integers, fractions are refused for every number
    and boolean, in both syntaxes."""
    for value in {
        "int": ("two", "1.5", "", "nan"),
        "float": ("two", "", "nan", "inf"),
        "bool": ("maybe", "2"),
    }[str(f.type)]:
        for flags in both(f.name, value):
            line = complaint(capsys, name, *NEEDED[name], *flags)
            assert f"--{f.name}" in line and repr(value) in line


OUT_OF_RANGE = {  # every numeric field, and values just outside its range
    "vocab_size": [0],
    "block_size": [0, -1, 10**12],
    "n_layer": [0],
    "n_embd": [0],
    "n_head": [0],
    "n_kv_head": [0, 3],
    "head_dim": [0, 15],
    "n_inner": [0],
    "rope_theta": [0, -1],
    "norm_eps": [0, -1],
    "r": [-1],
    "alpha": [-1],
    "lora_dropout": [-0.1, 1],
    "subspaces": [0, 3],
    "subspace_topk": [0, 9],
    "experts": [0, 1],
    "expert_topk": [0, 5],
    "balance_weight": [-0.1],
    "n_groups": [0, 1, 3, 128],
    "topk_groups": [0, 5],
    "recon_hidden": [-1],
    "aux_weight": [-0.1],
    "kv_warmup": [-0.1, 1.1],
    "kv_tail": [-1],
    "kv_tail_block": [0],
    "val_fraction": [0, 1],
    "context": [0, 1],
    "seed": [-1, 2**32],
    "seeds": [0, 10**7],
    "max_minutes": [0],
    "pretrain_steps": [0],
    "adapt_steps": [0],
    "pretrain_batch_size": [0],
    "adapt_batch_size": [0],
    "accumulation": [0],
    "select_steps": [0],
    "select_batch_size": [0],
    "select_lr": [0, -1],
    "kv_keep": [-0.1, 1.1],
    "token_keep": [0, 1.1],
    "value_keep": [0, 1.1],
    "hedge": [-0.1, 1.1],
    "refit_ridge": [0, -0.1],
    "sinks": [-1],
    "ahead": [-1],
    "pool": [0, 4],
    "past": [0],
    "readers": [0],
    "observers": [-1],
    "recall": [-0.1, 1.1],
    "shortest": [-1],
    "pretrain_lr": [0, -1],
    "adapt_lr": [0, -1],
    "warmup": [-0.1, 1.1],
    "weight_decay": [-0.1],
    "beta1": [-0.1, 1],
    "beta2": [-0.1, 1],
    "distill_lr": [0, -1],
    "distill_steps": [-1],
    "rope_factor": [0.5],
    "rope_low_freq": [0, 4],
    "rope_high_freq": [1],
    "rope_original": [0],
    "rope_attention": [0, -1],
    "embedding_scale": [0, -1],
    "query_scale": [-1],
    "attention_cap": [-1],
    "logit_cap": [-1],
    "sliding_window": [-1],
    "global_every": [0],
    "rope_local_theta": [-1],
    "test_sequences": [0],
    "calibration": [0],
    "query": [-1],
    "continuation": [1, -1],
    "distractors": [-1, 32],
    "chains": [0, 101],
    "hops": [0, 101],
    "answer_tokens": [0],
    "needles": [0, 33],
    "quest_whole": [-1],
    "shots": [-1, 101],
    "grad_clip": [-1],
    "eval_interval": [-1],
    "eval_sequences": [0],
    "sample_interval": [-1],
    "save_interval": [0],
    "keep_checkpoints": [0],
    "sequences": [0],
    "batch_size": [0],
    "max_new_tokens": [0],
    "num_samples": [0],
    "temperature": [-0.1],
    "top_k": [-1],
    "top_p": [0, 1.1],
    "key_bits": [0, 5],
    "value_bits": [1, 5],
    "key_block": [0, 48],
    "kv_sinks": [-1],
    "kv_bytes": [-0.1, 1.1],
    "prefill_tokens": [-1],
    "consistency_weight": [-0.1],
    "expert_groups": [-1],
    "kv_share": [0, 1.1],
    "steps": [0],
    "lr": [0, -1],
}


@pytest.mark.parametrize("name, f", every_field(("int", "float")))
def test_out_of_range(name, f, capsys, here):
    """Every numeric field, without exception, refuses what lies outside its range and names itself
    and the value."""
    values = {"block_size": [-1]}.get(f.name) if name == "eval" else None  # 0: the model's context
    for value in values or OUT_OF_RANGE[f.name]:
        for flags in both(f.name, value):
            line = complaint(capsys, name, *NEEDED[name], *flags)
            assert (
                f"{f.name}={value}"
                in line.replace(".0 ", " ").replace(".0:", ":").replace(".0,", ",")
                and ";" in line
            ), line
    assert tree(here) == {}


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--stage=finetune"], "stage='finetune'"),
        (["--adapter=dora"], "one of none, lora"),
        (["--kv=int4"], "one of dense, value_groups"),
        (["--lora_targets=q,z"], "lora_targets='q,z'"),
        (["--lora_targets="], "a list of q,k,v"),
        (["--value_basis=svd"], "native, random"),
        (["--reconstructor=linear"], "one of zero, mlp, keys"),
        (["--kv_layers=2,x"], "kv_layers='2,x'"),
        (["--kv_layers=deepest:0"], "(0, 1]"),
        (["--kv_layers=deepest:1.5"], "(0, 1]"),
        (["--kv_layers="], "kv_layers=''"),
        (["--kv_layers=-1"], "layers are"),
        (["--dataset=imagenet"], "text:PATH"),
        (["--dataset=text:"], "text:PATH"),
        (["--adapt_dataset=x"], "text:PATH"),
        (["--tokenizer=bpe"], "byte, gpt2"),
        (["--init_from=x", "--stage=pretrain"], "give --stage=adapt or all"),
        (["--init_from="], "an empty init_from"),
        (["--revision=v1"], "only models of the hub have revisions"),
        (["--revision=v1", "--init_from=some/folder"], "give --init_from=hf:ORG/NAME"),
        (["--weights=float16"], "one of float32, bfloat16"),
        (["--weights=bfloat16", "--dtype=float32"], "they need computing in bfloat16"),
        (["--weights=bfloat16", "--stage=adapt", "--init_from=x"], "give --dtype=bfloat16"),
        (["--objective=mse"], "objective='mse'"),
        (["--objective=distill"], "distill_steps=N"),
        (["--objective=distill", "--stage=pretrain"], "stage=pretrain"),
        (["--test_dataset=c4"], "test_dataset='c4'"),
        (["--test_dataset=text:missing.txt"], "no such file"),
        (["--distill_steps=3"], "give --learn_basis"),
        (["--distill_steps=3", "--learn_basis", "--stage=pretrain"], "give --stage=all"),
        (["--kv_from=x"], "one stage starts from it"),
        (["--stage=adapt", "--init_from=no.gguf"], "no.gguf"),
        (["--stage=adapt", "--init_from=hf:name"], "hf:ORG/NAME"),
        (["--detokenize=perhaps"], "neither true nor false"),
        (["--resume"], "resume without out_dir"),
        (["--init_from=x"], "no such folder"),
        (["--dtype=float64"], "dtype='float64'"),
        (["--preset=big"], "preset='big'"),
        (["--topk_groups=3", "--n_groups=2"], "1 <= K <= S"),
        (["--n_head=6", "--n_kv_head=4"], "divide the query heads"),
        (["--n_layer"], "expected one argument"),
        (["--stage=adapt"], "init_from=scratch"),
        (["--device=cuda:99"], "device='cuda:99'"),
        (["--device=tpu"], "device='tpu'"),
        (["--device=meta"], "device='meta'"),
        (["--head_dim=6", "--n_groups=4"], "S must divide D"),
        (["--n_groups=16", "--head_dim=8"], "S must divide D"),
        (["--kv_layers=7"], "layers are 0..3"),
        (["--stage=adapt", "--init_from=no/where"], "no such folder"),
        (["--stage=adapt", "--init_from=."], "no usable checkpoint"),
        (["--resume", "--out_dir=nowhere"], "there is no checkpoint in it"),
        (["--resume", "--out_dir=."], "there is no checkpoint in it"),
        (["--dataset=text:missing.txt"], "no such file"),
        (["--adapt_dataset=text:missing.txt"], "no such file"),
        (["--stage=select"], "init_from=scratch"),
        (["--stage=select", "--init_from=no/where"], "no such folder"),
        (["--kv=select"], "give --stage=select"),
        (["--kv=select", "--stage=adapt", "--init_from=x"], "give --kv_from=RUN"),
        ([*STORED_CONTEXT, "--objective=lm"], "objective=lm with kv=select"),
        ([*STORED_CONTEXT, "--adapter=none"], "adapter=none with kv=select"),
        ([*STORED_CONTEXT, "--compile"], "compile with kv=select"),
        ([*STORED_CONTEXT, "--shard"], "shard with kv=select"),
        ([*STORED_CONTEXT, "--kv_byte_budgets=0.1,1"], "a list of shares above 0 and below 1"),
        ([*STORED_CONTEXT, "--kv_byte_budgets="], "a list of shares above 0 and below 1"),
        ([*STORED_CONTEXT, "--context=1"], "context=1"),
        (["--stage=adapt", "--init_from=x", "--context=0.5"], "or give --kv=select"),
        (
            ["--stage=select", "--init_from=x", "--objective=distill"],
            "objective=distill with stage=select",
        ),
        (
            ["--stage=select", "--init_from=x", "--adapter=lora", "--compile"],
            "compile, adapter with stage=select",
        ),
        (
            ["--stage=select", "--init_from=x", "--kv=dense"],
            "kv=dense with stage=select: it stores by select",
        ),
        (
            ["--stage=select", "--init_from=x", "--learn_basis"],
            "learn_basis with stage=select",
        ),
        (["--stage=pretrain", "--n_groups=8"], "n_groups with stage=pretrain"),
        (["--stage=pretrain", "--seeds=2", "--r=3"], "seeds, r with stage=pretrain"),
        (["--vocab_size=300"], "the byte tokenizer sets it"),
        (["--stage=pretrain", "--weights=bfloat16"], "weights with stage=pretrain"),
        (["--adapter=routed"], "adapter with stage=all"),
        (["--distill_lr=0.1"], "give --distill_steps=N"),
        (
            ["--stage=adapt", "--init_from=x", "--adapter=lora", "--experts=3"],
            "experts with adapter=lora: it is not read then; leave it out, or give "
            "--adapter=moe_lora",
        ),
        (
            ["--stage=adapt", "--init_from=x", "--adapter=lora", "--n_groups=8"],
            "n_groups with kv=dense: it is not read then; leave it out, or give --kv=value_groups",
        ),
        (["--recon_hidden=9"], "or give --reconstructor=mlp"),
        (
            ["--stage=select", "--init_from=x", "--predictors=observed"],
            "predictor, expected_attention, predictor_query",
        ),
        (["--relevance=quest"], "relevance='quest'"),
        (["--token_relevance=norm"], "token_relevance='norm'"),
        (["--allocation=token"], "head, layer, global"),
        (["--predictor_loss=ce"], "one of mse, kl"),
        (["--kv_keep=0.5", "--fixed_k"], "give --token_keep"),
        (["--kv_keep=0.5", "--token_relevance=h2o"], "give --token_keep"),
        (["--kv=select", "--reconstructor=mlp"], "leave both out"),
        (["--kv=select", "--value_router=linear"], "leave both out"),
        (["--mask_scope=shared"], "or --kv=select"),
        (["--out_dir=/dev/null"], "is a file"),
        (["--out_dir=/dev/null/x"], "dev/null"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_train_refuses(flags, why, capsys, here):
    """Choices, combinations, devices, folders and corpora that cannot be: said in one line, and no
    folder appears, out/ included."""
    assert why in complaint(capsys, "train", *flags)
    assert tree(here) == {}


STAGES = {
    "all": [],
    "pretrain": ["--stage=pretrain"],
    "adapt": ["--stage=adapt", "--init_from=x"],
    "select": ["--stage=select", "--init_from=x"],
    "continue": ["--stage=continue", "--init_from=x"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_unread_flags_are_refused_by_name(stage, capsys):
    """Every flag, given its default, is either accepted by a stage or refused by its name; every
    flag is accepted by some stage, and a lone --stage is accepted."""
    refused = []
    for group, cls in train.CONFIGS.items():
        for f in dataclasses.fields(cls):
            if f.name in ("stage", "init_from", "resume", "kv", "vocab_size", "revision"):
                continue
            args = cli.parse_args(train.CONFIGS, [*STAGES[stage], f"--{f.name}={f.default}"])
            if not stages.is_read(stage, group, f.name):
                with pytest.raises(ValueError, match=f"^{f.name} with stage={stage}: "):
                    stages.check_flags(args)
                refused.append(f.name)
                continue
            try:
                stages.check_flags(args)
            except ValueError as e:  # read, but not with what else is the default
                assert f.name in stages.READ_WITH or f.name == "distill_lr", e
                assert str(e).startswith(f.name), e
            assert any(stages.is_read(s, group, f.name) for s in STAGES)
    assert len(refused) > 20
    stages.check_flags(cli.parse_args(train.CONFIGS, STAGES[stage]))


def test_table_of_stages_names_settings():
    """Every name in the table of what stages read is a setting, each once."""
    known = {f.name for cls in train.CONFIGS.values() for f in dataclasses.fields(cls)}
    for reads in stages.READS.values():
        names = [*reads.besides, *reads.never]
        assert {*names} <= known and len({*names}) == len(names)
        assert {*reads.groups} <= {*train.CONFIGS}
    assert {*stages.READ_WITH} <= known and set(stages.GROUPS) == set(train.CONFIGS)


def test_lora_alone_adapts_over_whole_values():
    """--stage=adapt --adapter=lora stores whole values unless --kv is given; other adapters and
    other stages keep the default."""

    def stored(*flags) -> str:
        return cli.parse_args(train.CONFIGS, ["--init_from=x", *flags]).kv.kv

    assert stored("--stage=adapt", "--adapter=lora") == "dense"
    assert stored("--stage=adapt", "--adapter=lora", "--kv=value_groups") == "value_groups"
    assert stored("--stage=adapt", "--adapter=routed") == "value_groups"
    assert stored("--stage=adapt") == stored() == "value_groups"


def test_a_pretrained_model_is_adapted_at_a_rate_of_its_own(tmp_path):
    """Without --adapt_lr a model of another project is trained at 1e-3, all of its weights at 1e-4;
    one of ours, and what somebody or a preset says, stays as it is."""

    def rate(*flags) -> float:
        return cli.parse_args(train.CONFIGS, [*flags]).train.adapt_lr

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "config.json").write_text('{"train": {}}')
    for where in ("hf:a/b", "x.GGUF", tmp_path):
        assert rate(f"--init_from={where}") == rate(f"--init_from={where}", "--stage=adapt") == 1e-3
        assert rate(f"--init_from={where}", "--stage=continue") == 1e-4
        assert rate(f"--init_from={where}", "--adapt_lr=0.5", "--stage=continue") == 0.5
        assert rate(f"--init_from={where}", "--preset=paper") == 5e-4
    assert rate(f"--init_from={ours}") == rate("--init_from=missing") == rate() == 5e-3


@pytest.mark.parametrize(
    "flags, why",
    [
        ([], "no out_dir"),
        (["--budgets=0"], "(0, 1]"),
        (["--budgets=0.5,1.01"], "(0, 1]"),
        (["--budgets=-0.5"], "(0, 1]"),
        (["--budgets=half"], "(0, 1]"),
        (["--budgets=nan"], "(0, 1]"),
        (["--budgets=1/0"], "(0, 1]"),
        (["--methods=h2o"], "dense, value_groups"),
        (["--tasks="], "name one at least"),
        (["--split=half"], "val, train, test"),
        (["--bases=svd"], "native, random"),
        (["--groups=3"], "a list of 2, 4, 8, 16"),
        (["--groups=4,x"], "groups='4,x'"),
        (["--calibrate=c4"], "calibrate='c4'"),
        (["--revision=v1"], "only models of the hub"),
        (["--weights=bfloat16", "--dtype=float32"], "they need computing in bfloat16"),
        (["--weights=bfloat16"], "give --dtype=bfloat16"),
        (["--weights=int8"], "one of float32, bfloat16"),
        (["--init_from="], "an empty init_from"),
        (["--tasks=haystack"], "perplexity"),
        (["--dataset=c4"], "text:PATH"),
        (["--tasks=needle,multiple_choice"], "give --questions=PATH"),
        (["--shots_from=dev"], "give --questions=PATH"),
        (["--kv_budgets=0"], "(0, 1]"),
        (["--kv_budgets=0.5,2"], "(0, 1]"),
        (["--token_budgets=0.5,x"], "(0, 1]"),
        (["--relevances=h2o"], "relevances='h2o'"),
        (["--token_relevances=norm"], "quest, h2o, streaming, snapkv"),
        (["--splits=-1"], "a list of layers"),
        (["--splits=0,x"], "a list of layers"),
        (["--tasks=needle_reuse"], "give --distractors"),
        (["--methods=select,snapkv"], "dense, value_groups, select"),
        (["--dtype=int8"], "dtype='int8'"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) and v else "",
)
def test_eval_refuses(flags, why, capsys, here):
    """Budgets outside (0, 1], unknown methods, tasks and corpora, and no folder."""
    assert why in complaint(
        capsys, "eval", "--device=cpu", *(["--out_dir=x"] if flags else []), *flags
    )
    assert tree(here) == {}


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--to="], "no folder to export to"),
        (["--to=x"], "no out_dir"),
        (["--to=x", "--init_from=no/where"], "no such folder"),
        (["--to=x", "--out_dir=no/where"], "no such folder"),
        (["--to=x", "--revision=v1"], "only models of the hub"),
    ],
    ids=lambda v: v[-1] if v else "",
)
def test_export_refuses(flags, why, capsys, here):
    """No folder to write to, no model to export."""
    assert why in complaint(capsys, "export", *flags)
    assert tree(here) == {}


# -- what is found only when files are read


def test_corpus_that_cannot_be_trained_on(capsys, here, text):
    """An empty corpus, one file too short for the context in either split, for either stage, is
    refused before anything is trained."""
    (here / "empty.txt").write_text("")
    (here / "short").mkdir()
    for i, n in enumerate((500, 500, 20)):
        (here / "short" / f"{i}.txt").write_text(f"{i}" * n)
    before = tree(here)
    for flag in ("dataset", "adapt_dataset"):
        other = [f"--dataset={text}"] if flag == "adapt_dataset" else []
        assert (
            "empty"
            in complaint(
                capsys, "train", *TINY, *other, f"--{flag}=text:empty.txt", "--out_dir=run"
            ).lower()
        )
        line = complaint(
            capsys,
            "train",
            *TINY,
            *other,
            f"--{flag}=text:short",
            "--out_dir=deep/run",
            "--block_size=600",
        )
        assert "block_size=600" in line and "601 are needed" in line
        for i in (1, 2):  # 20 letters or, where the hash of the content says so, 500, are held out
            line = complaint(
                capsys,
                "train",
                *TINY,
                *other,
                f"--{flag}=text:short",
                f"--val_fraction=0.{i}",
                "--block_size=510",
            )
            assert "val: " in line and "511 are needed" in line
        assert tree(here) == before


def test_token_id_out_of_range(capsys, here, text, tmp_path):
    """A token file with an id past the vocabulary, though its sha256 is right, and one with a wrong
    sha256, are named before step 0."""
    flags = [*PRETRAIN, f"--dataset={text}", "--out_dir=run"]
    tokens = data.prepare(text, DataConfig(), get_tokenizer("byte")).train
    raw = bytearray(tokens.path.read_bytes())
    payload = raw[token_files.HEADER_BYTES :]
    payload[10:12] = (300).to_bytes(2, "little")  # ids of the byte tokenizer end at 256
    header = json.loads(bytes(raw[len(token_files.MAGIC) : token_files.HEADER_BYTES]))
    tokens.path.write_bytes(bytes(raw[: token_files.HEADER_BYTES]) + bytes(payload))
    line = complaint(capsys, "train", *flags)
    assert str(tokens.path) in line and "sha256" in line
    header["sha256"] = hashlib.sha256(payload).hexdigest()
    head = (token_files.MAGIC + json.dumps(header).encode()).ljust(token_files.HEADER_BYTES)
    tokens.path.write_bytes(head + bytes(payload))
    line = complaint(capsys, "train", *flags)
    assert str(tokens.path) in line and "token id 300" in line and "0..256" in line
    assert tree(here) == {}


def test_out_dir_must_be_empty(capsys, here, text):
    """A named folder with something in it is left alone without --resume, and a failed start leaves
    an empty folder empty."""
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    (here / "bare").mkdir()
    before = tree(here)
    assert "is not empty; give --resume" in complaint(
        capsys, "train", *TINY, f"--dataset={text}", "--out_dir=full"
    )
    assert "is a file" in complaint(
        capsys, "train", *TINY, f"--dataset={text}", "--out_dir=full/notes.txt"
    )
    assert "no such file" in complaint(
        capsys, "train", *TINY, "--dataset=text:gone", "--out_dir=bare"
    )
    assert tree(here) == before


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "flipped":
        i = len(raw) * 2 // 3
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
    elif how == "truncated":
        path.write_bytes(raw[:-7])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
@pytest.mark.parametrize(
    "file",
    [
        "pretrain/model.safetensors",
        "pretrain/config.json",
        "pretrain/manifest.json",
        "routed-s0/adapter.safetensors",
        "routed-s0/config.json",
    ],
)
def test_damaged_checkpoint_is_named(file, how, run, capsys, here):
    """eval.py, sample.py and train.py --stage=adapt name a damaged checkpoint, the base of an
    adapter included, and change nothing."""
    stage, name = file.split("/")
    where = run / stage / "step-00000002"
    damage(where / name, how)
    before = tree(run)
    for program, flags in (("eval", ["--sequences=2"]), ("sample", ["--max_new_tokens=2"])):
        for out in {run / stage, run / "routed-s0", where}:
            line = complaint(capsys, program, f"--out_dir={out}", "--device=cpu", *flags)
            assert stage in line and any(
                w in line for w in (name, "no usable checkpoint", "that is gone", "manifest")
            ), line
    if stage == "pretrain":
        assert stage in complaint(
            capsys,
            "train",
            "--stage=adapt",
            f"--init_from={run / 'pretrain'}",
            "--out_dir=new",
            "--device=cpu",
        )
    assert tree(run) == before and tree(here) == {}


@pytest.mark.parametrize(
    "stage, key, field, value",
    [
        ("pretrain", "model", "n_embd", 40),
        ("pretrain", "model", "n_layer", 3),
        ("routed-s0", "adapter", "r", 5),
        ("routed-s0", "kv", "kv_layers", "1"),
        ("routed-s0", "adapter", "adapter", "moe_lora"),
    ],
)
def test_checkpoint_of_another_shape(stage, key, field, value, run, capsys):
    """A config.json that says another shape, with a manifest that fits it, is refused by names and
    shapes, not by a crash."""
    path = run / stage / "step-00000002"
    c = checkpoint.load(path)
    c.config[key][field] = value
    checkpoint.save(
        path.parent, path.name, step=c.step, tensors=c.tensors, config=c.config, state=c.state
    )
    before = tree(run)
    for program in ("eval", "sample"):
        line = complaint(capsys, program, f"--out_dir={path}", "--device=cpu")
        assert "does not fit" in line or "value-group state" in line, line
        assert any(w in line for w in ("of another shape", "missing", "unexpected")), line
    assert tree(run) == before


def test_adapter_without_its_base(run, capsys):
    """An adapter whose base was replaced by another, whole one, or moved away, is refused."""
    base = run / "pretrain" / "step-00000002"
    c = checkpoint.load(base)
    c.tensors["model"]["norm.weight"] += 1
    checkpoint.save(
        base.parent, base.name, step=c.step, tensors=c.tensors, config=c.config, state=c.state
    )
    assert "give the base it was trained on" in complaint(
        capsys, "sample", f"--out_dir={run / 'routed-s0'}", "--device=cpu"
    )
    shutil.rmtree(run / "pretrain")
    assert "that is gone; move base and adapter together" in complaint(
        capsys, "sample", f"--out_dir={run / 'routed-s0'}", "--device=cpu"
    )


def test_damaged_checkpoint_of_a_process(run, here):
    """A true process of sample.py on a flipped byte: one line after that of loading, exit 2."""
    damage(run / "pretrain" / "step-00000002" / "model.safetensors", "flipped")
    code, out, err, _ = program("sample", f"--out_dir={run / 'pretrain'}", cwd=here)
    assert (code, out, err.count("\n")) == (2, "", 2), err
    assert err.startswith("loading ")
    assert "model.safetensors is damaged" in err, err
    assert tree(here) == {}


@pytest.mark.parametrize(
    "program, flags, why",
    [
        ("sample", ["--prompt="], "an empty prompt"),
        ("sample", ["--prompt=" + "x" * 31], "the context is 32"),
        ("sample", ["--max_new_tokens=32"], "the context is 32"),
        ("sample", ["--device=cuda:99"], "device='cuda:99'"),
        ("eval", ["--device=tpu"], "device='tpu'"),
        ("eval", ["--block_size=33"], "context is 32"),
        ("eval", ["--methods=value_groups", "--budgets=0.1"], "at least one"),
        ("eval", ["--dataset=text:gone"], "no such file"),
        ("eval", ["--block_size=100000"], "the model's context is 32"),
        ("eval", ["--split=test"], "it has train, val, all"),
        (
            "eval",
            ["--tasks=continuation", "--query=20", "--continuation=12"],
            "some context must be left",
        ),
        ("eval", ["--tasks=continuation"], "32 tokens"),
        ("eval", ["--tasks=needle"], "22 tokens for a prompt"),
        ("eval", ["--tasks=variable_tracking", "--hops=3"], "4 tokens for a prompt"),
        ("eval", ["--tasks=multiple_choice", "--questions=gone.csv"], "no such file or folder"),
        ("eval", ["--sequences=2", "--results=/dev/null/x"], "dev/null"),
        ("eval", ["--results=/dev/null"], "is a file"),
    ],
)
def test_requests_the_model_cannot_meet(program, flags, why, run, capsys, here):
    """Prompts, contexts, budgets, devices and corpora that do not go with a whole checkpoint."""
    before = tree(run)
    for stage in ("pretrain", "routed-s0"):
        assert why in complaint(capsys, program, f"--out_dir={run / stage}", *flags)
    assert tree(run) == before and tree(here) == {}


@pytest.mark.parametrize("task", ["perplexity", "mixsga"])
def test_eval_refuses_a_base_beside_a_base(task, run, capsys):
    """--init_from beside --out_dir names the moved base of an adapter, and is refused where the
    run is a base itself."""
    flags = [f"--init_from={run / 'pretrain'}", f"--tasks={task}", "--sequences=2", "--device=cpu"]
    line = complaint(capsys, "eval", f"--out_dir={run / 'pretrain'}", *flags)
    assert f"init_from={run / 'pretrain'} with out_dir=" in line and "leave one of them out" in line


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--n_groups=16", "--kv_layers=2"], "layers are 0..1"),
        (["--adapter=none", "--kv=dense"], "give --kv=value_groups with --learn_basis"),
        (["--n_layer=3"], "the base has 2"),
        (["--block_size=33"], "the base knows 32"),
        (["--preset=paper"], "the base knows 32"),
        (["--tokenizer=gpt2"], "tokenizer"),
        (["--objective=distill"], "give --adapter=none and --learn_basis"),
        (["--objective=distill", "--adapter=moe_lora"], "give --adapter=none and --learn_basis"),
        (["--objective=distill", "--adapter=none"], "give --learn_basis, --value_router=linear or"),
        (["--adapter=none", "--learn_basis", "--kv_warmup=0.5"], "kv_warmup"),
        (["--adapter=none", "--learn_basis", "--topk_groups=4"], "topk_groups"),
        (["--kv_from=no/where"], "no such folder"),
    ],
)
def test_adapt_refuses_what_the_base_cannot(flags, why, run, capsys, here, text):
    """Layers, groups, contexts, shapes and tokenizers that do not go with the base, and a choice
    that trains nothing."""
    common = ["--stage=adapt", f"--dataset={text}", "--device=cpu"]
    assert why in complaint(
        capsys, "train", *common, f"--init_from={run / 'pretrain'}", "--out_dir=new", *flags
    )
    assert "an adapter" in complaint(capsys, "train", *common, f"--init_from={run / 'routed-s0'}")
    assert tree(here) == {}


def test_resume_when_every_checkpoint_is_foreign(capsys, run, here, text):
    """--resume with a checkpoint of another model says which setting differs and leaves the folder
    alone."""
    before = tree(run)
    line = complaint(
        capsys,
        "train",
        *PRETRAIN,
        "--n_inner=56",
        f"--dataset={text}",
        f"--out_dir={run}",
        "--resume",
    )
    assert "was trained with model=" in line and re.search("same flags", line)
    assert tree(run) == before


def test_ctrl_c_is_one_line(capsys):
    """Ctrl-C outside of training ends with one line and exit 130."""

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        cli.exit_on_bad_input(main)
    assert e.value.code == 130 and capsys.readouterr().err.count("\n") == 1
