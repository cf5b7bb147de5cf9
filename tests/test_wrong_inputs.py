"""Promises 25, 27 and 30: sixty and more wrong command lines and files, each answered by one line
that says what came, what is allowed and what to do, with exit code 2, and nothing is left behind.

python tests/test_wrong_inputs.py  # prints the table
"""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import json
import os
import re
import struct
import subprocess
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import bench
import cli
import eval as evaluation
import runs
import sample
import train
from loaders import export
from settings.fields import PATHS
from settings.stages import check_flags
from training.lock import owned

PROGRAMS = {"train": train, "eval": evaluation, "sample": sample, "bench": bench, "export": export}
CALLED = {name: f"{name}.py" for name in PROGRAMS} | {"export": "python -m loaders.export"}
# comparisons with a command of their own
COMPARISONS = [
    f"python -m benchmarks.{path.stem}"
    for path in sorted((runs.ROOT / "benchmarks").glob("*.py"))
    if "ARGS = parse_args" in path.read_text()
]
# argparse's, cli.py's, torchrun's; stand-ins for any flag
NOT_OURS = {"help", "all", "nproc_per_node", "key", "flag"}


class Wrong(NamedTuple):
    """A wrong command line: {d} in it is the folder of wrong files; words of the line that answers
    it."""

    program: str
    flags: str
    words: str


BASE = "--stage=adapt --init_from={d}/run "
TABLE = (
    # flags
    Wrong("train", "--no_such=1", "unknown flag --no_such"),
    Wrong("train", "--n_layr=3", "did you mean --n_layer"),
    Wrong("train", "config/a.py", "unexpected argument 'config/a.py'"),
    Wrong("train", "--adapt_lr=fast", "'fast' is not a finite number"),
    Wrong("train", "--adapt_lr=nan", "'nan' is not a finite number"),
    Wrong("train", "--compile=maybe", "'maybe' is neither true nor false"),
    Wrong("train", "--adapt_steps=0", "adapt_steps=0: at least 1"),
    Wrong("train", "--adapt_steps=1.5", "--adapt_steps: invalid int value"),
    Wrong("train", "--seed=-1", "seed=-1"),
    Wrong("train", "--block_size=1000000000000", "block_size=1000000000000"),
    Wrong("train", "--val_fraction=1", "val_fraction=1"),
    Wrong("train", "--dtype=int8", "dtype='int8': one of auto"),
    Wrong("train", "--device=gpu", "device='gpu': auto, cpu"),
    Wrong("train", "--n_head=8 --n_kv_head=3", "KV heads must divide"),
    Wrong("train", "--n_groups=4 --topk_groups=9", "topk_groups=9"),
    Wrong("train", "--dataset=nonsense", "dataset='nonsense': one of pydocs"),
    Wrong("train", "--dataset=pydocs,pydocs", "pydocs is named twice"),
    Wrong("train", "--stage=adapt", "a pretrained base is needed"),
    Wrong("train", "--stage=pretrain --n_groups=8", "n_groups with stage=pretrain"),
    Wrong("train", BASE + "--adapter=lora --experts=4", "experts with adapter=lora"),
    Wrong("train", BASE + "--kv=select", "kv=select with stage=adapt"),
    Wrong("train", "--stage=pretrain --objective=distill", "objective=distill with stage=pretrain"),
    Wrong("train", "--resume", "resume without out_dir"),
    Wrong("eval", "--out_dir={d}/run --tasks=nonsense", "tasks='nonsense'"),
    Wrong("eval", "--out_dir={d}/run --methods=best", "methods='best'"),
    Wrong("eval", "--out_dir={d}/run --budgets=2", "budgets='2': every budget is a share"),
    Wrong("eval", "--out_dir={d}/run --tasks=multiple_choice", "multiple_choice without questions"),
    Wrong("eval", "--out_dir={d}/run --shots=3", "shots with tasks=perplexity: it is not read"),
    Wrong("eval", "--init_from={d}/run --methods=dense --groups=4", "give --methods=value_groups"),
    Wrong("eval", "--out_dir={d}/run --readers=3", "readers: measuring trains nothing"),
    Wrong(
        "eval", "--out_dir={d}/run --tasks=mixsga --kv_budgets=1", "kv_budgets with tasks=mixsga"
    ),
    Wrong(
        "eval", "--tasks=mixsga --n_groups=8", "n_groups with mixes=3:1:6,1:1:8: no value groups"
    ),
    Wrong("eval", "--tasks=mixsga --key_block=32", "key_block with key_bits=16: it is not read"),
    Wrong("eval", "--tasks=mixsga --value_basis=pca", "value_basis with tasks=mixsga"),
    Wrong("sample", "--out_dir={d}/run --temperature=-1", "temperature=-1"),
    Wrong("sample", "--out_dir={d}/run --temperature=0 --top_k=9", "top_k with temperature=0"),
    Wrong("sample", "--out_dir={d}/run --calibration=9", "calibration without a way to store"),
    Wrong("sample", "--out_dir={d}/run --top_p=0", "top_p=0"),
    Wrong("sample", "--out_dir={d}/run --max_new_tokens=1000", "context is 32"),
    Wrong("sample", "--out_dir={d}/run --prompt=", "an empty prompt"),
    Wrong("sample", "--out_dir={d}/run --chat --prompt=hi", "no chat template"),
    Wrong("sample", "--init_from={d}/run --revision=main", "revision='main'"),
    Wrong(
        "sample", "--out_dir={d}/run --init_from={d}/run", "only an adapter has a base elsewhere"
    ),
    Wrong("export", "--out_dir={d}/run --init_from={d}/run --to={d}/a", "leave one of them out"),
    Wrong("bench", "select --out_dir={d}/run --init_from={d}/run", "leave one of them out"),
    Wrong("bench", "nonsense", "what='nonsense'"),
    Wrong("bench", "train --out_dir={d}/run", "out_dir with train: it is not read"),
    Wrong("bench", "decode --n_layer=9", "n_layer with decode: it is not read"),
    Wrong("bench", "select --out_dir={d}/run --n_layer=9", "n_layer with a model that is loaded"),
    Wrong("bench", "generate --out_dir={d}/run --n_groups=8", "it stores as it was trained to"),
    Wrong("bench", "generate --kv=dense --n_groups=8", "--n_groups with kv=dense"),
    Wrong("bench", "train --n_head=3 --n_kv_head=2", "n_head=3"),
    Wrong("bench", "train --rope_scaling=linear", "give a --rope_factor of more than 1"),
    Wrong("bench", "adapter --rope_low_freq=2", "rope_low_freq with rope_factor=1.0"),
    Wrong("bench", "generate --global_every=3", "global_every with sliding_window=0"),
    Wrong("bench", "train --positions=learned --rope_factor=2", "or give --positions=rope"),
    Wrong("bench", "generate --init_from={d}/run --rope_scaling=yarn", "a model that is loaded"),
    Wrong("bench", "generate --kv=select --refit_ridge=1", "refit_ridge with refit=False"),
    Wrong("bench", "generate --kv=select --kv_bytes=0.1 --sinks=2", "sinks with kv_bytes=0.1"),
    Wrong("bench", "generate --kv=select --kv_bytes=0.1 --key_bits=16", "key_bits with kv_bytes"),
    Wrong("bench", "generate --key_block=32", "key_block with key_bits=16: it is not read then"),
    Wrong("export", "--out_dir={d}/run", "give --to=DIR"),
    # places that are missing, taken or of another kind
    Wrong("train", "--resume --out_dir={d}/missing", "no checkpoint in it"),
    Wrong("train", "--stage=pretrain --out_dir={d}/note.txt", "note.txt: is a file"),
    Wrong(
        "train",
        "--stage=pretrain --out_dir={d}/note.txt/a",
        "note.txt/a: nothing can be written in {d}/note.txt",
    ),
    Wrong("train", "--stage=pretrain --out_dir={d}/texts", "is not empty"),
    Wrong("train", "--stage=pretrain --out_dir={d}/busy", "another run is at work in it"),
    Wrong("train", "--stage=adapt --init_from={d}/missing", "{d}/missing: no such folder"),
    Wrong("train", "--stage=adapt --init_from={d}/note.txt", "note.txt: a file, but no .gguf file"),
    Wrong("train", "--stage=pretrain --data_dir={d}/note.txt", "give --data_dir=DIR"),
    Wrong("eval", "--out_dir={d}/missing", "{d}/missing: no such folder"),
    Wrong("eval", "--out_dir={d}/run --results={d}/note.txt", "note.txt: is a file"),
    Wrong("eval", "--out_dir={d}/run --beside={d}/missing", "beside={d}/missing"),
    Wrong("eval", "--out_dir={d}/run --tasks=multiple_choice --questions={d}/no.csv", "no.csv"),
    Wrong("sample", "--init_from=HuggingFaceTB/SmolLM2-135M", "hf:HuggingFaceTB/SmolLM2-135M"),
    Wrong("sample", "--init_from=hf:SmolLM2", "hf:ORG/NAME"),
    Wrong("sample", "--out_dir={d}/run --prompt_file={d}/missing", "prompt_file={d}/missing"),
    Wrong("sample", "--out_dir=~/missing", "{d}/missing"),
    Wrong("bench", "memory --results={d}/note.txt", "note.txt: is a file"),
    Wrong("export", "--out_dir={d}/run --to={d}/texts", "is not an empty folder"),
    # files that are not what they should be
    Wrong("train", "--stage=pretrain --dataset=text:{d}/missing", "no such file or folder"),
    Wrong("train", "--stage=pretrain --dataset=text:{d}/empty", "holds no text"),
    Wrong("train", "--stage=pretrain --dataset=text:{d}/latin", "cannot be read as UTF-8 text"),
    Wrong("train", "--stage=pretrain --dataset=text:{d}/note.txt", "give more files"),
    Wrong("train", "--stage=pretrain --dataset=text:{d}/bad.jsonl", "bad.jsonl, line 2"),
    Wrong("train", "--stage=pretrain --dataset=text:{d}/deep.jsonl", "deep.jsonl, line 1"),
    Wrong("train", "--stage=pretrain --dataset=text:{d}/body.jsonl", "--text_field"),
    Wrong("sample", "--out_dir={d}/run --prompt_file={d}/latin", "prompt_file={d}/latin"),
    Wrong("train", "--stage=pretrain --dataset=text:{d}/mixed", "mixed/b.txt: a Git LFS pointer"),
    Wrong(
        "export", "--init_from={d}/pointer_template --to={d}/a", "chat_template.jinja: a Git LFS"
    ),
    Wrong("sample", "--init_from={d}/begun", "begun: a run of train.py that has no checkpoint yet"),
    Wrong("sample", "--init_from={d}/cut.gguf", "cut.gguf cannot be read as GGUF"),
    Wrong("sample", "--init_from={d}/absurd.gguf", "absurd.gguf cannot be read as GGUF"),
    Wrong("sample", "--init_from={d}/pointer.gguf", "pointer.gguf: a Git LFS pointer"),
    Wrong("export", "--init_from={d}/pointers --to={d}/a", "pointers/model.safetensors: a Git LFS"),
    Wrong("sample", "--out_dir={d}/pointer_run", "run git lfs pull in {d}/pointer_run"),
    Wrong("sample", "--init_from={d}/weights.bin", "weights.bin: pickled weights can run code"),
    Wrong("sample", "--init_from={d}/no_config/model.safetensors", "safetensors: weights alone"),
    Wrong("sample", "--init_from={d}/no_config", "no_config: weights without a config.json"),
    Wrong("sample", "--init_from={d}/tokenizer", "tokenizer: a tokenizer without a model"),
    Wrong("sample", "--init_from={d}/pickled", "pickled: pickled weights can run code"),
    Wrong("sample", "--init_from={d}/untyped", "untyped: its config.json names no model_type"),
    Wrong("sample", "--init_from={d}/bad_config", "bad_config/config.json cannot be read as JSON"),
    Wrong(
        "sample", "--init_from={d}/deep_config", "deep_config/config.json cannot be read as JSON"
    ),
    Wrong("sample", "--init_from={d}/other_model", "bert"),
    Wrong("sample", "--init_from={d}/huge_model", "huge_model"),
    Wrong("eval", "--out_dir={d}/cut_run", "model.safetensors has 500 bytes"),
    Wrong("eval", "--out_dir={d}/edited_run", "model.safetensors is damaged"),
    Wrong("export", "--out_dir={d}/empty_run --to={d}/exported", "empty_run: an empty folder"),
)


ITEMS = "--init_from={d}/run --tasks=zero_shot --items="
QUESTIONS = "--init_from={d}/run --tasks=multiple_choice --shots=0 --questions="
# What is answered before torch is loaded.
EARLY = (
    Wrong("train", BASE.replace("run", "missing"), "{d}/missing: no such folder"),
    Wrong("train", BASE + "--kv_from={d}/missing", "{d}/missing: no such folder"),
    Wrong("train", BASE + "--dataset=text:{d}/missing", "no such file or folder"),
    Wrong("train", BASE + "--dataset=instruct:{d}/texts", "there is no such file"),
    Wrong("train", "--test_dataset=text:{d}/missing", "no such file or folder"),
    Wrong("train", BASE + "--dataset=text:{d}/latin", "cannot be read as UTF-8 text"),
    Wrong("sample", "--init_from={d}/run --kv=select --calibrate=text:{d}/empty", "holds no text"),
    Wrong("train", "--out_dir={d}/texts", "is not empty; give --resume"),
    Wrong("train", "--out_dir={d}/busy", "another run is at work in it"),
    Wrong("train", "--resume --out_dir={d}/texts", "there is no checkpoint in it"),
    Wrong("eval", "--tasks=perplexity", "give --out_dir=DIR or --init_from=PATH"),
    Wrong("eval", "--out_dir={d}/missing", "{d}/missing: no such folder"),
    Wrong("eval", "--out_dir={d}/run --dataset=text:{d}/missing", "no such file or folder"),
    Wrong("eval", "--init_from=HuggingFaceTB/SmolLM2-1.7B", "or hf:HuggingFaceTB/SmolLM2-1.7B"),
    Wrong("sample", "--prompt=hi", "give --out_dir=DIR or --init_from=PATH"),
    Wrong("sample", "--init_from={d}/missing.gguf", "missing.gguf: no such file"),
    Wrong("sample", "--out_dir={d}/run --init_from=nothere.gguf", "nothere.gguf: no such file"),
    Wrong("sample", "--init_from={d}/run --prompt_file={d}/missing", "prompt_file={d}/missing"),
    Wrong("sample", "--init_from={d}/run --prompt_file={d}/empty", "prompt_file={d}/empty: it h"),
    Wrong(
        "sample", "--init_from={d}/run --unpark={d}/missing", "unpark={d}/missing: there is no s"
    ),
    Wrong("sample", "--init_from={d}/run --park={d}/texts", "park={d}/texts: is a folder"),
    Wrong("sample", "--init_from={d}/run --park={d}/note.txt/a", "nothing can be written in {d}/n"),
    Wrong("export", "--to={d}/new", "give --out_dir=DIR or --init_from=PATH"),
    Wrong("export", "--init_from={d}/missing --to={d}/new", "{d}/missing: no such folder"),
    Wrong("export", "--out_dir={d}/run --to={d}/texts", "is not an empty folder"),
    Wrong("train", "--data_dir={d}/note.txt", "data_dir={d}/note.txt: is a file; give --data_dir"),
    Wrong("train", "--out_dir={d}/note.txt/a", "nothing can be written in {d}/note.txt"),
    Wrong("train", BASE + "--dataset=text:{d}/hidden", "hidden: it holds no text"),
    Wrong("train", BASE + "--dataset=text:{d}/body.jsonl", "has 'body': a text in 'text' is"),
    Wrong("train", BASE + "--dataset=text:{d}/pointer.gguf", "pointer.gguf: a Git LFS pointer"),
    Wrong("train", BASE + "--dataset=text:{d}/mixed", "mixed/b.txt: a Git LFS pointer"),
    Wrong("train", BASE + "--dataset=instruct:{d}/deep.jsonl", "deep.jsonl, line 1: "),
    Wrong("train", BASE + "--dataset=instruct:{d}/pointer.gguf", "run git lfs pull in {d}, or"),
    Wrong("sample", "--init_from={d}/run --prompt=", "an empty prompt: a text to continue"),
    Wrong("sample", "--init_from={d}/run --prompt_file={d}/pointer.gguf", "a Git LFS pointer"),
    Wrong("sample", "--init_from={d}/pointer.gguf", "{d}/pointer.gguf: a Git LFS pointer"),
    Wrong("eval", "--init_from={d}/run --results={d}/note.txt", "results={d}/note.txt: is a file"),
    Wrong("eval", "--init_from={d}/run --beside={d}/missing", "beside={d}/missing: "),
    Wrong("eval", ITEMS + "{d}/missing", "{d}/missing: no such file; give JSONL of HellaSwag"),
    Wrong("eval", ITEMS + "{d}/body.jsonl", "line 1, has 'body': no known data set has these"),
    Wrong("eval", ITEMS + "{d}/pointer.gguf", "{d}/pointer.gguf: a Git LFS pointer"),
    Wrong("eval", QUESTIONS + "{d}/missing", "{d}/missing: no such file or folder"),
    Wrong("eval", QUESTIONS + "{d}/note.txt", "note.txt, line 1: 1 fields where 6 are needed"),
    Wrong("eval", QUESTIONS + "{d}/pointer.gguf", "{d}/pointer.gguf: a Git LFS pointer"),
    Wrong(
        "eval",
        "--tasks=mixsga --dataset=instruct:{d}/told.jsonl --answered={d}/deep.jsonl",
        "deep.jsonl, line 1: ",
    ),
    Wrong("bench", "memory --results={d}/note.txt", "results={d}/note.txt: is a file"),
    Wrong("bench", "generate --init_from={d}/missing", "{d}/missing: no such folder"),
)


def make_files(d: Path) -> None:
    """Lay out the folder of wrong files, and in run a run that is right."""
    corpus = d / "texts"
    corpus.mkdir()
    for i in range(9):
        (corpus / f"{i}.txt").write_text(f"document {i} of a small text, " * 9)
    flags = ["--stage=pretrain", "--pretrain_steps=1", "--eval_sequences=1"]
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        runs.pretrain(d / "run", f"text:{corpus}", *flags)
    for name in ("cut_run", "edited_run", "pointer_run"):
        subprocess.run(["cp", "-r", d / "run", d / name], check=True)
    weights = next((d / "cut_run").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    weights = next((d / "edited_run").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    next((d / "pointer_run").rglob("model.safetensors")).write_text(pointer)
    for name in ("hidden", "mixed", "pointer_template"):
        (d / name).mkdir()
    (d / "hidden" / ".a.txt").write_text("no document")
    (d / "mixed" / "a.txt").write_text("a document")
    (d / "mixed" / "b.txt").write_text(pointer)
    for name in ("busy", "empty_run", "no_config", "pickled", "pointers", "tokenizer", "untyped"):
        (d / name).mkdir()
    save_file({"a": torch.zeros(1)}, d / "no_config" / "model.safetensors")
    (d / "weights.bin").write_bytes(b"PK")
    (d / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    (d / "pointers" / "model.safetensors").write_text(pointer)
    (d / "pointers" / "config.json").write_text('{"model_type": "llama"}')
    (d / "pointer_template" / "config.json").write_text('{"model_type": "llama"}')
    (d / "pointer_template" / "chat_template.jinja").write_text(pointer)
    (d / "tokenizer" / "tokenizer.json").write_text("{}")
    (d / "untyped" / "config.json").write_text("{}")
    (d / "begun").mkdir()
    (d / "begun" / "config.json").write_text('{"train": {}, "given": []}')
    deep = "[" * 10**5
    (d / "note.txt").write_text("one document only")
    (d / "empty").touch()
    (d / "latin").write_bytes(b"caf\xe9")
    (d / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    (d / "deep.jsonl").write_text(deep)
    (d / "told.jsonl").write_text('{"instruction": "a", "output": "b"}')
    (d / "body.jsonl").write_text('{"body": "a"}\n{"body": "b"}')
    (d / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    (d / "absurd.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10**12, 10**12) + bytes(64))
    (d / "pointer.gguf").write_text(pointer)
    huge = {
        "model_type": "llama",
        "hidden_size": 10**12,
        "num_hidden_layers": 10**9,
        "num_attention_heads": 4,
        "intermediate_size": 10**12,
        "vocab_size": 10**12,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    configs = {
        "bad_config": "{",
        "deep_config": deep,
        "other_model": json.dumps({"model_type": "bert"}),
        "huge_model": json.dumps(huge),
    }
    for name, text in configs.items():
        (d / name).mkdir()
        (d / name / "config.json").write_text(text)
        save_file({"a": torch.zeros(1)}, d / name / "model.safetensors")


def tree(d: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: path -> (size, time of change)."""
    found = {}
    for p in d.rglob("*"):
        found[str(p.relative_to(d))] = (p.stat().st_size, p.stat().st_mtime_ns)
    return found


def answer(wrong: Wrong, d: Path) -> tuple[int, str, str]:
    """Run a program's main in this process: (exit code, stdout, stderr without the lines that say
    what is loaded, read or calibrated)."""
    module = PROGRAMS[wrong.program]
    argv = wrong.flags.format(d=d).split()
    if wrong.program == "bench":
        argv = bench.flags(argv)

    def main() -> None:
        args = cli.parse_args(module.CONFIGS, argv, prog=CALLED[wrong.program])
        if module is train:
            check_flags(args)
            train.run(args)
        else:
            runs.call_main(module, args)

    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.exit_on_bad_input(main)
        except SystemExit as e:
            code = e.code
    said = [line for line in err.getvalue().splitlines(keepends=True) if not waits(line)]
    return code, out.getvalue(), "".join(said)


def waits(line: str) -> bool:
    """Whether a line says what takes a while now."""
    return line.endswith(" ...\n")


def flags_of(program: str) -> set[str]:
    """The names of a program's flags."""
    return {f.name for cls in PROGRAMS[program].CONFIGS.values() for f in fields(cls)}


@contextlib.contextmanager
def wrong_files():
    """A folder of wrong files that is the working folder and the user's home; one of its folders
    has an owner. Token files go elsewhere."""
    with (
        tempfile.TemporaryDirectory() as d,
        tempfile.TemporaryDirectory() as cache,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setenv("XDG_CACHE_HOME", cache)
        m.setenv("HOME", d)
        m.chdir(d)
        make_files(Path(d))
        with owned(Path(d) / "busy"):
            yield Path(d)


@pytest.fixture(scope="module")
def files():
    with wrong_files() as d:
        yield d


def test_table_is_long_enough():
    """Sixty rows and more, none twice, of every program."""
    assert len({(w.program, w.flags) for w in TABLE}) == len(TABLE) >= 60
    assert {w.program for w in TABLE} == set(PROGRAMS)


@pytest.mark.parametrize("wrong", TABLE, ids=lambda w: f"{w.program} {w.flags}")
def test_wrong_input_is_answered_by_one_line(files, wrong):
    """One line on stderr with the words that belong to it, exit code 2, nothing on stdout,
    nothing left behind; every flag that the line names is one of the program's."""
    before = tree(files)
    code, out, err = answer(wrong, files)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.endswith("\n") and 30 < len(err) < 900
    assert wrong.words.format(d=files) in err
    assert "Traceback" not in err and "Error(" not in err
    advised = set(re.findall(r"--([a-z]\w*)", err.replace("unknown flag --", "")))
    assert advised <= flags_of(wrong.program) | NOT_OURS, err
    assert tree(files) == before


@pytest.mark.parametrize("wrong", EARLY, ids=lambda w: f"{w.program} {w.flags}")
def test_wrong_place_is_answered_before_torch_is_loaded(files, tmp_path, wrong):
    """A true process in which torch cannot be loaded answers what is not there, or is in the way,
    by the same one line, and writes nothing."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    before = tree(files)
    command = CALLED[wrong.program].removeprefix("python ").split()
    argv = wrong.flags.format(d=files).split()
    p = runs.python(*command, *argv, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (p.returncode, p.out, p.err.count("\n")) == (2, "", 1), p.err
    assert wrong.words.format(d=files) in p.err
    assert tree(files) == before


def test_every_flag_that_a_message_advises_exists():
    """No message in the code (a text with a blank, no docstring) names a flag that no program has.
    (The table holds each line against its own program.)"""
    known = set(NOT_OURS).union(*map(flags_of, PROGRAMS))
    unknown = []
    for path in runs.ROOT.rglob("*.py"):
        part = path.relative_to(runs.ROOT)
        if part.parts[0] in ("tests", "out") or any(p.startswith(".") for p in part.parts):
            continue
        source = path.read_text()
        own = set(re.findall(r"""add_argument\(\s*"--(\w+)""", source))
        own.update(re.findall(r"^    (\w+): .+ = opt\(", source, re.MULTILINE))
        messages = [text for text in texts(ast.parse(source)) if " " in text.strip()]
        for text in messages:
            named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", text))
            unknown += [f"{part}: --{flag}" for flag in named - known - own]
    assert unknown == []


def texts(module: ast.Module) -> list[str]:
    """The string constants of a module without its docstrings."""
    docs = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.add(id(node.value))
    constants = [n for n in ast.walk(module) if isinstance(n, ast.Constant) and id(n) not in docs]
    return [n.value for n in constants if isinstance(n.value, str)]


def test_every_flag_of_a_path_expands_home(monkeypatch):
    """Each flag whose help speaks of files, folders or corpora is in PATHS, and no other; ~ means
    the user's home at the beginning, after text: and after a comma, nowhere else."""
    told = {
        f.name
        for program in PROGRAMS.values()
        for cls in program.CONFIGS.values()
        for f in fields(cls)
        if str(f.type) == "str"
        and re.search(r"\b(folders?|files?|corp(us|ora)|run)[ ,]", f.metadata["help"])
    }
    assert set(PATHS) == told
    monkeypatch.setenv("HOME", "/home/me")
    for given, meant in (
        ("~/a", "/home/me/a"),
        ("~", "/home/me"),
        ("text:~/a,pydocs,text:~/b", "text:/home/me/a,pydocs,text:/home/me/b"),
        ("a~b/~", "a~b/~"),
        ("hf:a/b", "hf:a/b"),
    ):
        argv = [f"--dataset={given}"] if "text" in given else [f"--out_dir={given}"]
        args = cli.parse_args(train.CONFIGS, argv)
        assert (args.train.dataset or args.train.out_dir) == meant


def test_interrupted_while_loading_ends_by_one_line(tmp_path):
    """Ctrl-C while modules are loaded, here a torch of the test's, which sends it: one line, exit
    130, no traceback."""
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(source)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    p = runs.python("sample.py", "--out_dir=.", env=env, wait=None)
    out, err = p.communicate(timeout=60)
    assert (p.returncode, out, err) == (130, "", "sample.py: interrupted\n")


@pytest.mark.parametrize("called", [*CALLED.values(), *COMPARISONS])
def test_interrupted_at_its_first_import_ends_by_one_line(called, tmp_path):
    """Ctrl-C while the first module that a program imports is loaded, here an argparse of the
    test's, which sends it: one line, exit 130, no traceback."""
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "argparse.py").write_text(source)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = called.removeprefix("python ").split()
    p = runs.python(*command, "--help", env=env, wait=30)
    assert (p.returncode, p.out, p.err) == (130, "", f"{called}: interrupted\n")


@pytest.mark.parametrize(
    "given, want",
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["none given", "spins", "policy"],
)
def test_a_program_shares_its_cores(given, want):
    """Threads that wait sleep soon, unless the user said how they wait, and what says so stands
    before torch is loaded, which reads it."""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (
        "import os, sys; from settings.begin import begin_program; begin_program();"
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    p = runs.python("-c", code, env=env | given, wait=30)
    assert p.out == f"{want} False\n"


def test_rank_that_is_told_to_end_while_loading_says_so(tmp_path):
    """SIGTERM to one of torchrun's processes while the first module is loaded: one line with its
    number, exit 143."""
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n"
    (tmp_path / "argparse.py").write_text(source)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "RANK": "1", "WORLD_SIZE": "2"}
    p = runs.python("train.py", "--help", env=env, wait=30)
    assert (p.returncode, p.out, p.err) == (143, "", "rank 1 of 2: ended by SIGTERM\n")


@pytest.mark.parametrize("rank", [{}, {"RANK": "1"}])
@pytest.mark.parametrize(("main", "code"), [("print('done')", 0), ("exit(3)", 3), ("int('x')", 2)])
def test_rank_ends_before_python_is_taken_down(rank, main, code):
    """exit_after gives main's exit code, its output and its line, of a rank without the taking down
    of Python, in which a thread of a process group that lives on would abort it."""
    lines = ["import atexit, cli", "atexit.register(print, 'taken down')"]
    lines += [f"cli.exit_after(lambda: {main})"]
    env = {k: v for k, v in os.environ.items() if k != "RANK"} | rank
    p = runs.python("-c", "\n".join(lines), env=env)
    assert (p.returncode, p.err.count("\n")) == (code, 1 if code == 2 else 0), p.err
    want = "done\n" if code == 0 else ""
    assert p.out == want + ("" if rank else "taken down\n")


def test_output_survives_a_terminal_of_ascii():
    """What an ASCII terminal cannot show of a line is replaced."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    p = runs.python("sample.py", "--out_dir=x", "--dtype=größe", env=env)
    assert (p.returncode, p.out, p.err.count("\n")) == (2, "", 1), p.err
    assert "dtype='gr??e': one of auto" in p.err


def test_full_disk_names_the_file(files, monkeypatch):
    """The system's error for a full disk names no file: the line does, and what was made for the
    run is taken back."""

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    before = tree(files)
    wrong = Wrong("train", "--stage=pretrain --out_dir={d}/full", "")
    code, out, err = answer(wrong, files)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(r"full/\S*config.json\S*: no space left on device; mend the path", err)
    assert tree(files) == before


def main() -> None:
    """Print the table: what was given, and what was answered."""
    with wrong_files() as d:
        good = 0
        for n, wrong in enumerate(TABLE, 1):
            code, out, err = answer(wrong, d)
            fine = code == 2 and not out and err.count("\n") == 1 and wrong.words.format(d=d) in err
            good += fine
            mark = "ok" if fine else "WRONG"
            print(f"{n:3} {mark} {wrong.program} {wrong.flags}\n        {code}: {err.strip()}")
    print(f"{good} of {len(TABLE)}")


if __name__ == "__main__":
    main()
