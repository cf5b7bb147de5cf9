"""The programs, called in this process or as one of their own, and the one line with which they
refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import eval as evaluation
import runs
import sample
import train
from loaders import checkpoint, export
from settings.begin import program_name

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


def process(name: str, *flags, cwd=None) -> tuple[int, str, str, float]:
    """A true process: (exit code, stdout, stderr, seconds of the processor)."""
    before = os.times()
    p = subprocess.run(
        [sys.executable, *COMMAND[name], *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},  # for -m, which looks in cwd
        capture_output=True,
        text=True,
        timeout=300,
    )
    after = os.times()
    user = after.children_user - before.children_user
    return p.returncode, p.stdout, p.stderr, user + after.children_system - before.children_system


def both(flag: str, value) -> list[list[str]]:
    """The two ways to write a flag."""
    return [[f"--{flag}={value}"], [f"--{flag}", str(value)]]
