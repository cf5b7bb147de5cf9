"""Every command that a script under runs/, README.md or docs/ names can be given as it stands: its
program exists, and the program itself accepts its flags and their values. No torch is loaded.

How a command is found: the script (or all sh blocks of a Markdown file, then its inline commands)
is run by bash with stand-ins for python, torchrun and pip, which note what they were given; so
continuation lines, variables and loops are bash's own. How it is checked: the program is started
with these flags where torch cannot be imported. It reads its flags first, so a wrong one ends it
with a message, and a right one with the failed import."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "docs" / "results.md"
PREPARE = "prepare.sh"  # fetches the model and the texts; makes no table
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")

NOTED = ("python", "python3", "torchrun")
STAND_INS = (*NOTED, "bash", "pip", "ln", "cp")
END = "\x1e"  # after the last argument of a call
STAND_IN = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" "$END" >> "$NOTES"
echo stand-in
"""

# Reads [[module, flags], ...], answers with one message for each: empty if the flags were accepted.
DRIVER = """
import contextlib, io, json, runpy, sys
absent = ("torch", "numpy", "triton")
sys.modules.update(dict.fromkeys(absent))
from report import tables
from settings import places
from tasks import items, questions
from training import lock
# whatever a command names is there, and free
places.check_inputs = places.check_fresh = places.read_prompt = lambda *_: None
places.check_parked = places.check_begun = lambda *_: None
tables.rows_beside = items.read_items = questions.subjects = lambda *_: []
lock.check_run_dir = lambda *_: None
messages = []
for module, flags in json.load(sys.stdin):
    err = io.StringIO()
    sys.argv = [module, *flags]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        messages.append("ended without torch")
    except SystemExit as e:
        messages.append((err.getvalue().strip() or "refused") if e.code else "")
    except ImportError as e:
        messages.append("" if e.name in absent else str(e))
    except Exception as e:
        messages.append(f"{type(e).__name__}: {e}")
print(json.dumps(messages))
"""


def shell_of(markdown: str) -> str:
    """A Markdown file's commands as one script: its sh blocks in order, then inline commands."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python3?|torchrun)\s[^`]+)`", prose)
    return "\n".join([*blocks, *(" ".join(text.split()) for text in inline)]) + "\n"


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """The calls of python and torchrun, each a list of words, that `script` makes when bash runs
    it in `folder` without arguments; the JSONL files that it names lie there. Raises ValueError
    where bash finds an error in it."""
    programs = folder / "programs"
    programs.mkdir()
    for file in re.findall(r"\w+\.jsonl", script):
        (folder / file).touch()
    for name in STAND_INS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    (programs / "mkdir").symlink_to(shutil.which("mkdir"))
    notes = folder / "notes"
    notes.touch()
    (folder / "script.sh").write_text(script)
    done = subprocess.run(
        [BASH, "script.sh"],
        cwd=folder,
        env={"PATH": str(programs), "NOTES": str(notes), "END": END, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "syntax error" in done.stderr or (done.returncode and "set -e" in script):
        raise ValueError(done.stderr)
    words = notes.read_text().split("\0")[:-1]
    calls = [[]]
    for word in words:
        if word == END:
            calls.append([])
        else:
            calls[-1].append(word)
    return [call for call in calls if call and call[0] in NOTED]


def program_of(call: list[str]) -> tuple[str, list[str]]:
    """What a call of python or torchrun runs, and its flags: a module's dotted name; "" where
    there is nothing to run (python -c, python --version). Raises ValueError where it does not
    exist."""
    launcher, *words = call
    if launcher == "torchrun":
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if at is None:
            raise ValueError("torchrun without a program")
        words = words[at:]
    if words[:1] == ["-c"]:
        ast.parse(words[1])
        return "", []
    if words[:1] == ["-m"]:
        name, flags = words[1], words[2:]
        ours = (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
        room = (ROOT / name.split(".")[0]).exists()
        installed = not room and importlib.util.find_spec(name.split(".")[0]) is not None
        if not (ours or installed):
            raise ValueError(f"no module {name}")
        return (name if ours else ""), flags
    if not words or words[0].startswith("-"):
        return "", []
    path = words[0]
    if not (ROOT / path).is_file():
        raise ValueError(f"no program {path}")
    return path.removesuffix(".py").replace("/", "."), words[1:]


def reads_flags(module: str) -> bool:
    """Whether a module of ours makes its command line with cli.parse_args."""
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    return bool(re.search(r"(?<!def )\bparse_args\(", source))


def answers(calls: list[tuple[str, list[str]]]) -> list[str]:
    """What each program says to its flags, "" for nothing."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""},
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def faults(script: str, folder: Path) -> list[str]:
    """What is wrong with the commands of `script`, a line each."""
    said, checked = [], []
    for call in commands_of(script, folder):
        try:
            module, flags = program_of(call)
        except (ValueError, SyntaxError) as e:
            said.append(f"{shlex.join(call)}\n    {e}")
            continue
        if not module:
            continue
        if reads_flags(module):
            checked.append((call, module, flags))
        elif flags:
            said.append(f"{shlex.join(call)}\n    {module} reads no flags")
    if checked:
        messages = answers([(module, flags) for _, module, flags in checked])
        for (call, _, _), message in zip(checked, messages, strict=True):
            if message:
                said.append(f"{shlex.join(call)}\n    {message}")
    return said


def tables_of(markdown: str) -> list[tuple[str, str]]:
    """(heading, text from that heading to the table's first row) of every table."""
    heading, since, inside, out = "", "", False, []
    for line in markdown.splitlines():
        if line.startswith("#"):
            heading, since = line, ""
        row = line.startswith("|")
        if row and not inside:
            out.append((heading, since))
        inside = row
        since += line + "\n"
    return out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_commands_are_accepted(script, tmp_path):
    """A script parses, can be run, needs no variable from elsewhere, and the programs that it
    names accept its flags."""
    parsed = subprocess.run([BASH, "-n", script], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK), "not executable"
    assert commands_of(text, tmp_path), "no command"
    shutil.rmtree(tmp_path / "programs")
    (tmp_path / "notes").unlink()
    found = faults(text, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_document_commands_are_accepted(document, tmp_path):
    """The programs that a document's code blocks and inline commands name exist and accept their
    flags."""
    found = faults(shell_of(document.read_text()), tmp_path)
    assert not found, "\n".join(found)


def test_results_tables_name_their_scripts():
    """Every table of docs/results.md is preceded, in its section, by the script that makes it;
    every script belongs to a table."""
    text = RESULTS.read_text()
    for heading, before in tables_of(text):
        assert re.search(r"runs/\w+\.sh", before), f"no script before a table of {heading!r}"
    named = set(re.findall(r"runs/(\w+\.sh)", text))
    there = {script.name for script in SCRIPTS}
    assert named <= there, f"no such scripts: {sorted(named - there)}"
    assert there <= named, f"scripts without a table: {sorted(there - named)}"
    assert PREPARE in there


PROGRAMS = [
    name
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("loaders/*.py")])
    if reads_flags(name := ".".join(path.relative_to(ROOT).with_suffix("").parts))
]


@pytest.mark.parametrize("module", PROGRAMS)
def test_program_refuses_unknown_flag_before_torch(module):
    """What the checks above rest on: flags are read before torch is imported."""
    assert "unknown flag" in answers([(module, ["--no_such_flag=1"])])[0]


@pytest.mark.parametrize(
    "script, fault",
    [
        ("python train.py --lerning_rate=1\n", "unknown flag --lerning_rate"),
        ("python train.py --seed=1 \\\n  --nope\n", "unknown flag --nope"),
        ("for F in --seed=1 --sead=1; do python train.py $F; done\n", "unknown flag --sead"),
        ("python eval.py --out_dir=x --tasks=continuatoin\n", "tasks='continuatoin'"),
        ("python train.py --kv=values\n", "kv='values'"),
        ("python bench.py decoed\n", "what='decoed'"),
        ("torchrun --nproc_per_node=2 train.py --seads=1\n", "unknown flag --seads"),
        ("python trian.py --seed=1\n", "no program trian.py"),
        ("python -m loaders.nowhere --to=x\n", "no module loaders.nowhere"),
        ("python -m no_such_package\n", "no module no_such_package"),
        ("python -c 'print('\n", "never closed"),
        ("python data.py --seed=1\n", "reads no flags"),
        (shell_of("see `python train.py\n--sed=1`, or\n"), "unknown flag --sed"),
        (shell_of("```sh\nA=--sed=1\n```\n```sh\npython train.py $A\n```\n"), "unknown flag --sed"),
    ],
)
def test_checker_finds_what_is_wrong(script, fault, tmp_path):
    """The checks above fail where they should."""
    (found,) = faults(script, tmp_path)
    assert fault in found


def test_checker_accepts_what_is_right(tmp_path):
    """The checks above pass where they should."""
    script = (
        'python train.py --stage=pretrain \\\n  --out_dir="out/a b"\npython eval.py --out_dir=x\n'
        "python bench.py decode --cases=4:0.5 && python sample.py --out_dir x --prompt='def '\n"
        "torchrun --nproc_per_node=2 train.py\npython -m pytest\npython -c 'x = 1'\n"
    )
    assert len(commands_of(script, tmp_path)) == 7
    (tmp_path / "programs").rename(tmp_path / "before")
    assert faults(script, tmp_path) == []


def test_checker_sees_a_variable_from_elsewhere(tmp_path):
    """A script that is not self-contained stops, and is refused."""
    with pytest.raises(ValueError, match="unbound variable"):
        commands_of("set -euo pipefail\npython train.py $FLAGS\n", tmp_path)


def test_checker_sees_a_table_without_script():
    """A table's script is looked for in its own section only."""
    text = "# a\nruns/x.sh\n| 1 |\n|---|\ntext\n| 2 |\n# b\n| 3 |\n"
    assert [bool(re.search(r"runs/\w+\.sh", t)) for _, t in tables_of(text)] == [True, True, False]


def test_texts_that_a_script_cannot_have_end_it_by_one_line(tmp_path):
    """A script's own Python that reads texts, run where they cannot be had: one line, exit code 2."""
    codes = {}
    for script in SCRIPTS:
        for code in re.findall(r'python -c "\n(.*?)\n"', script.read_text(), re.DOTALL):
            if "documents(" in code:
                codes[script.name] = code.replace('\\"', '"')
    assert {"prepare.sh", "paper_table1.sh"} <= set(codes)
    refuse = "import data\ndef documents(*_):\n    raise ValueError('no text; bring one')\n"
    for name, code in codes.items():
        command = [
            sys.executable,
            "-c",
            f"{refuse}data.documents = documents\n{code}",
            str(tmp_path),
        ]
        job = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (job.returncode, job.stderr) == (2, "python: no text; bring one\n"), name
    assert not list(tmp_path.iterdir())


def test_a_script_without_its_files_ends_before_it_begins(tmp_path):
    """runs/instruct.sh asks for its instructions first of all."""
    command = ["bash", str(ROOT / "runs/instruct.sh"), "absent.jsonl"]
    job = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = "runs/instruct.sh: absent.jsonl: there is no such file; give JSONL of instructions\n"
    assert (job.returncode, job.stderr) == (2, said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_python_in_scripts_names_what_there_is(script):
    """What a script's own Python takes from modules is there."""
    for code in re.findall(r'python -c "\n(.*?)\n"', script.read_text(), re.DOTALL):
        tree = ast.parse(code.replace('\\"', '"'))
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {a.asname or a.name: importlib.import_module(a.name) for a in node.names}
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = modules.get(node.value.id)
                assert module is None or hasattr(module, node.attr), ast.unparse(node)
