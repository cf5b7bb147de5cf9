"""sample.py --park and --unpark: a text and a conversation that are put away, and go on in another
process as if they had not been; files that do not fit are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import random_model, run_of
from helpers import error_line
from test_chat import chatting, typed

import runs
import sample
from benchmarks import park as comparison
from loaders import parking
from loaders.export import export
from loaders.runs import load_run
from loaders.tokenizer import TextStream
from model import Transformer
from storage.parked import Parked, park

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jinja2", "tokenizers"))),
    reason="pip install jinja2 tokenizers",
)
SELECT = ("--kv=select", "--kv_keep=0.5", "--kv_tail=4", "--n_groups=2")
GROUPS = ("--kv=value_groups", "--topk_groups=1", "--n_groups=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported model of random weights that chats, and a text to calibrate it on."""
    place = tmp_path_factory.mktemp("parked")
    (place / "corpus.txt").write_text("some words and others, all of them plain. " * 500)
    model = random_model(vocab_size=259, block_size=400, head_dim=8)
    return export(run_of(model, chatting()), place / "model")


def flags_of(folder: Path, n: int, *flags: str) -> list[str]:
    """The flags of a greedy run of n tokens."""
    if any(flag.startswith("--kv=") for flag in flags):
        data = folder.parent / "data"
        flags = (*flags, f"--calibrate=text:{folder.parent}/corpus.txt", f"--data_dir={data}")
    return [f"--init_from={folder}", "--temperature=0", f"--max_new_tokens={n}", *flags]


def elsewhere(folder: Path, n: int, *flags: str) -> tuple[str, str]:
    """What a process of its own writes: its text, without the line below it, and what it says."""
    command = [sys.executable, str(runs.ROOT / "sample.py"), *flags_of(folder, n, *flags)]
    done = subprocess.run(
        [*command, "--device=cpu"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("-" * 20 + "\n").removesuffix("\n"), done.stderr


@pytest.mark.parametrize("kv", [(), GROUPS, SELECT], ids=["dense", "value groups", "selection"])
def test_a_fresh_process_goes_on_with_the_same_tokens(folder, kv, tmp_path):
    """A text of 24 tokens in one process, and 10 in one, then 14 in another from its file: the same
    characters, and none of the prompt read again; then a prompt of its own follows."""
    file = tmp_path / "text.parked"
    prompt = "--prompt=" + "some words and others " * 3
    whole, _ = elsewhere(folder, 24, prompt, *kv)
    first, said = elsewhere(folder, 10, prompt, f"--park={file}", *kv)
    assert f"parked in {file}: {file.stat().st_size:,} bytes" in said
    rest, _ = elsewhere(folder, 14, f"--unpark={file}", f"--park={file}", *kv)
    assert first + rest == whole
    more, _ = elsewhere(folder, 3, f"--unpark={file}", "--prompt= and so", *kv)
    assert more.startswith(" and so")
    assert [path.name for path in tmp_path.iterdir()] == ["text.parked"]


def interrupted(real, steps: list):
    """A decoding step that notes itself in steps, and gets Ctrl-C the third time."""

    def step(*args, **kwargs):
        steps.append(None)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    return step


def test_ctrl_c_ends_the_line_of_a_text(folder, monkeypatch, capsys):
    """A text that is not put away stops at once, at the end of a line."""
    step = interrupted(Transformer.decode_step, [])
    monkeypatch.setattr(Transformer, "decode_step", step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        runs.call(sample, *flags_of(folder, 9, "--prompt=some words"))
    signal.signal(signal.SIGINT, before)
    out = capsys.readouterr().out
    assert out.startswith("some words") and out.endswith("\n")


def test_a_text_that_ctrl_c_ends_is_put_away(folder, tmp_path, monkeypatch, capsys):
    """A first Ctrl-C ends a text that is to be put away between two tokens: what was shown is in
    the file, and goes on from there as if nothing had been."""
    file = tmp_path / "text.parked"
    prompt = "--prompt=some words"

    def written(*flags: str) -> str:
        runs.call(sample, *flags)
        return capsys.readouterr().out.removesuffix("\n" + "-" * 20 + "\n")

    whole = written(*flags_of(folder, 9, prompt))
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(Transformer, "decode_step", interrupted(Transformer.decode_step, steps))
        first = written(*flags_of(folder, 9, prompt, f"--park={file}"))
    assert len(steps) == 3 and len(first) < len(whole)
    assert first + written(*flags_of(folder, 5, f"--unpark={file}")) == whole


def test_a_text_that_has_ended_wants_a_prompt(folder, tmp_path, monkeypatch):
    """Of a text whose last token ended it nothing is left to continue: one line says so."""
    file = tmp_path / "text.parked"
    with monkeypatch.context() as patched:
        patched.setattr(sample, "end_tokens", lambda _: set(range(259)))
        runs.call(sample, *flags_of(folder, 3, "--prompt=hello", f"--park={file}"))
    line = error_line(runs.call, sample, *flags_of(folder, 3, f"--unpark={file}"))
    assert f"{file} holds a text that has ended" in line and "--prompt=TEXT" in line


@pytest.mark.parametrize("kv", [(), SELECT], ids=["dense", "selection"])
def test_a_conversation_goes_on(folder, kv, tmp_path, monkeypatch, capsys):
    """Three turns in one run, and one in one, then two from its file: the same answers, and the
    same seeds, turn by turn."""
    file = tmp_path / "chat.parked"

    def chat(*messages: str, flags: tuple[str, ...] = ()) -> str:
        typed(monkeypatch, *messages)
        given = flags_of(folder, 6, "--chat", *flags, *kv)
        given[1] = "--temperature=1"
        runs.call(sample, *given)
        return capsys.readouterr().out.rstrip("\n")

    whole = chat("hello there, all of you", "and then?", "so?")
    first = chat("hello there, all of you", flags=(f"--park={file}",))
    rest = chat("and then?", "so?", flags=(f"--unpark={file}",))
    assert first + "\n" + rest == whole
    chat(flags=(f"--park={tmp_path}/none",))
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_is_refused(folder, tmp_path, capsys):
    """A conversation for a text and the other way round, another way of storing, a file that is
    none, places that are not there: one line that names it."""
    file = tmp_path / "text.parked"
    runs.call(sample, *flags_of(folder, 3, "--prompt=hello", f"--park={file}"))
    bad = tmp_path / "bad.parked"
    bad.write_bytes(file.read_bytes()[:-1])
    for flags, word in (
        ((f"--unpark={file}", "--chat"), "holds a text"),
        ((f"--unpark={file}", *GROUPS), "kind"),
        ((f"--unpark={bad}",), "cut or damaged"),
        ((f"--unpark={tmp_path}/none",), "no such file"),
        ((f"--park={tmp_path}",), "is a folder"),
        ((f"--park={file}/in/it",), "nothing can be written"),
        ((f"--park={file}", "--num_samples=2"), "one text is put away"),
        ((f"--unpark={file}", "--devices=cpu,cpu"), "a cache goes to one device"),
    ):
        with pytest.raises((ValueError, SystemExit)) as e:
            given = flags_of(folder, 3, *flags)
            sample.check_places(sample.parse_args(sample.CONFIGS, given))
            runs.call(sample, *given)
        line = str(e.value) + capsys.readouterr().err
        assert word in line and "Traceback" not in line


def test_a_file_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """Where writing fails half-way, the file of before stays, and nothing lies beside it."""
    file = tmp_path / "text.parked"
    flags = flags_of(folder, 3, "--prompt=hello", f"--park={file}")
    runs.call(sample, *flags)
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        runs.call(sample, *flags)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["text.parked"]


def test_a_cache_without_its_text_is_refused(folder, tmp_path):
    """A string that was parked without the tokens it has read: one line."""
    model = load_run(folder).model
    cache = model.new_cache(1, 9)
    path = tmp_path / "cache"
    path.write_bytes(park(cache, model, {"ids": [], "messages": []}))
    assert parking.take_up(str(path), model, chat=False).ids == []
    model.prefill(torch.tensor([[1, 2, 3]]), cache)
    path.write_bytes(park(cache, model))
    assert "no text beside" in error_line(parking.take_up, str(path), model, False)


def test_what_parking_takes_is_measured(folder, tmp_path, monkeypatch, capsys):
    """benchmarks/park.py leaves a row for each way to store: the medians of what each prompt's
    cache took, and refuses one that does not come back."""
    text = f"--dataset=text:{folder.parent}/corpus.txt"
    flags = [f"--init_from={folder}", text, f"--data_dir={tmp_path}", f"--results={tmp_path}"]
    flags += ["--block_size=300", "--sequences=3"]
    monkeypatch.setattr(comparison, "WAYS", comparison.WAYS[:1])
    runs.call(comparison, *flags)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == [row]
    model = load_run(folder, weights="bfloat16").model
    assert row["bytes"] == model.new_cache(1, 300).nbytes()
    assert row["ratio"] == row["parked_bytes"] / row["bytes"] < 1 and row["prompts"] == 3
    assert all(row[name] > 0 for name in ("park_ms", "unpark_ms", "prefill_ms", "deflate_ms"))

    def another(data: bytes, model) -> Parked:
        return Parked(model.new_cache(1, 300), {})

    monkeypatch.setattr(comparison, "unpark", another)
    assert "another cache" in error_line(runs.call, comparison, *flags)


@pytest.mark.parametrize("kv", [(), GROUPS, SELECT], ids=["dense", "value groups", "selection"])
@pytest.mark.parametrize("where", ["between steps", "in a step"])
def test_a_turn_that_fails_leaves_the_conversation_as_it_was(
    folder, kv, where, tmp_path, monkeypatch, capsys
):
    """Where the second answer is broken off, between two steps of it or in the middle of one, what
    is put away is the conversation up to there, and goes on as if that turn had not been."""

    def chat(*messages: str, flags: tuple[str, ...] = ()) -> str:
        typed(monkeypatch, *messages)
        runs.call(sample, *flags_of(folder, 6, "--chat", *flags, *kv))
        return capsys.readouterr().out.rstrip("\n")

    whole = tmp_path / "whole.parked"
    first = chat("hello there", flags=(f"--park={whole}",))
    broken = tmp_path / "broken.parked"
    count = []

    def broken_off(real):
        def run(*args, **kwargs):
            out = real(*args, **kwargs)
            count.append(None)
            if len(count) == 9:  # of the second answer
                raise KeyboardInterrupt
            return out

        return run

    place, name = (Transformer, "decode_step") if where == "in a step" else (TextStream, "add")
    with monkeypatch.context() as patched:
        patched.setattr(place, name, broken_off(getattr(place, name)))
        said = chat("hello there", "and then?", "so?", flags=(f"--park={broken}",))
    assert said.startswith(first) and len(count) == 9
    assert broken.read_bytes() == whole.read_bytes()
    chat("so?", flags=(f"--unpark={broken}",))


def test_a_conversation_that_fills_the_context_is_put_away(folder, tmp_path, monkeypatch, capsys):
    """Where there is no room for the next message, all that was said before it is in the file."""
    file = tmp_path / "chat.parked"
    typed(monkeypatch, *["hello there, all of you"] * 9)
    line = error_line(runs.call, sample, *flags_of(folder, 6, "--chat", f"--park={file}"))
    assert "the context is 400" in line
    n_answers = capsys.readouterr().err.count("tokens/s")
    held = parking.take_up(str(file), load_run(folder, device="cpu").model, chat=True)
    assert len(held.messages) == 2 * n_answers > 2
