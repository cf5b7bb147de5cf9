"""Promises 1, 4, 5 and 8: killed savers, damaged files, foreign folders, signals."""

import json
import os
import random
import signal
import stat
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import remake

from loaders import checkpoint
from storage.state import copy_tensors

# fork with threads about: the children touch only tiny tensors
forks = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FILE_CALLS = {
    "open",
    "write",
    "flush",
    "fsync",
    "truncate",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "remove",
    "rmdir",
}


def content(step: int) -> dict:
    """What a checkpoint of `step` must hold: computed, not remembered."""
    x = torch.arange(15, dtype=torch.float32).reshape(3, 5) * step
    return dict(
        tensors={"model": {"w": x, "b": x[0] + 0.5}, "adapter": {"lora_A": x.T}},
        config={"step_told": step, "name": "kill"},
        state={"step": step, "momentum": [x + 1], "rng": torch.tensor([step])},
    )


def save(stage: Path, step: int, name: str | None = None) -> Path:
    return checkpoint.save(stage, name or checkpoint.step_name(step), step=step, **content(step))


def assert_holds(path: Path, step: int) -> None:
    """The folder loads and every tensor, setting and state entry is that of `step`."""
    c = checkpoint.load(path)
    want = content(step)
    assert (
        c.step == step and c.config == want["config"] and c.tensors.keys() == want["tensors"].keys()
    )
    for stem, sd in want["tensors"].items():
        assert c.tensors[stem].keys() == sd.keys()
        assert all(torch.equal(c.tensors[stem][k], t) for k, t in sd.items())
    assert c.state["step"] == step and torch.equal(
        c.state["momentum"][0], want["state"]["momentum"][0]
    )


def hidden(stage: Path) -> list[str]:
    return sorted(p.name for p in stage.iterdir() if p.name.startswith("."))


def in_child(work, delay: float | None = None, reports: int = 0) -> tuple[bytes, int]:
    """Fork, run work(report) there, SIGKILL it `delay` seconds after so many reports (None: let it
    end; counting reports makes a slow machine only slower), return what it reported and its wait
    status."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(r)
            work(lambda n: os.write(w, struct.pack("<q", n)))
            code = 0
        finally:
            os._exit(code)  # never back into pytest
    os.close(w)
    try:
        with os.fdopen(r, "rb") as f:
            told = f.read(8 * reports)
            if delay is not None:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
            told += f.read()
    finally:
        status = os.waitpid(pid, 0)[1]
    return told, status


def die_before(n: int) -> None:
    """In this process: SIGKILL itself just before its n-th file operation (a call into C of one of
    FILE_CALLS) from here on."""
    left = [n]

    def hook(frame, event, called):
        if event == "c_call" and called.__name__ in FILE_CALLS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(hook)


# -- killed while saving
# --------------------


@forks
@pytest.mark.parametrize("best", [False, True], ids=["steps", "best"])
def test_random_sigkill_leaves_newest_loadable_and_never_goes_back(tmp_path, best):
    """Promise 1: a process that saves in a loop is SIGKILLed 25 times; each time the checkpoint
    found after clean() is whole, holds what its step must hold, is no older than the last save that
    returned, and no temporary folder is left."""
    rng = random.Random(11 + best)
    at_least = 0
    for _ in range(25):

        def saver(report, first=at_least + 1):
            for step in range(first, first + 10**6):
                save(tmp_path, step, "best" if best else None)
                report(step)
                if not best:
                    checkpoint.prune(tmp_path, 2)

        told, status = in_child(saver, rng.uniform(0, 0.03), reports=rng.randrange(4))
        assert os.WIFSIGNALED(status), "the saver must have been killed, not have ended by itself"
        if told:
            at_least = struct.unpack("<q", told[-8:])[0]
        checkpoint.clean(tmp_path)
        assert hidden(tmp_path) == []
        if best:
            path = tmp_path / "best" if (tmp_path / "best").exists() else None
        else:
            path, why = checkpoint.newest(tmp_path)
            assert why == []
        if path is None:
            assert at_least == 0
            continue
        found = checkpoint.load(path).step
        assert found >= at_least
        assert_holds(path, found)
        at_least = found
    assert at_least > 25, (
        "the savers must get through some saves between kills for this test to say anything"
    )


@forks
@pytest.mark.parametrize("case", ["first", "again", "best", "prune", "clean"])
def test_kill_before_every_single_file_operation_loses_nothing(tmp_path, case):
    """Promise 1 without luck: the process dies before its 1st, 2nd, 3rd ... open, rename, remove;
    then clean() must leave a whole checkpoint of the old step or the new one (the new one wherever
    save had returned) and nothing hidden."""
    name = {"again": checkpoint.step_name(7), "first": checkpoint.step_name(8)}.get(case, "best")
    new = 7 if case == "again" else 8
    for n in range(200):
        stage = tmp_path / str(n)
        save(stage, 7, "best" if name == "best" else None)
        if case == "prune":
            save(stage, 5)
            save(stage, 6)
        # killed between the two renames, and again while that is being repaired
        if case == "clean":
            (stage / "best").rename(stage / ".old-best-1-00000000")
            save(stage, 8, "best").rename(stage / ".tmp-best-1-00000000")

        def work(report, n=n, stage=stage):
            die_before(n)
            if case == "prune":
                checkpoint.prune(stage, 1)
            elif case == "clean":
                checkpoint.clean(stage)
            else:
                save(stage, new, name)

        _, status = in_child(work)
        checkpoint.clean(stage)
        assert hidden(stage) == [] and not list(stage.glob("aside-*")), (
            "nothing of ours was ever half there under its own name"
        )
        if case == "prune":
            assert checkpoint.newest(stage) == (stage / checkpoint.step_name(6), [])
            assert_holds(stage / "best", 7)
            assert all(checkpoint.verify(p) is None for p in stage.iterdir())
        elif case == "first":
            path, why = checkpoint.newest(stage)
            assert why == []
            assert_holds(path, int(path.name[5:]))
        else:
            assert_holds(stage / name, checkpoint.load(stage / name).step)
        if case == "clean":
            assert checkpoint.load(stage / "best").step == 8
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
    assert status == 0 and n >= (8 if case in ("prune", "clean") else 25), f"only {n} kill points"
    if case != "prune":
        assert checkpoint.load(stage / name).step == new


def test_clean_restores_old_and_keeps_what_it_does_not_know(tmp_path):
    """Killed between the two renames with the new folder torn: the old one comes back. Files that
    only look hidden stay."""
    save(tmp_path, 3, "best").rename(tmp_path / ".old-best-12-0123abcd")
    torn = save(tmp_path, 4, "best").rename(tmp_path / ".tmp-best-12-0123abce")
    (torn / "manifest.json").unlink()
    (tmp_path / ".tmp-metrics.json-12-0123abcd").write_text("{")
    (tmp_path / ".tmpfoo").write_text("mine")
    lines = checkpoint.clean(tmp_path)
    assert_holds(tmp_path / "best", 3)
    assert hidden(tmp_path) == [".tmpfoo"] and len(lines) == 3 and all("\n" not in x for x in lines)
    assert checkpoint.clean(tmp_path) == [] and checkpoint.clean(tmp_path / "nowhere") == []


def test_failed_save_leaves_nothing_and_old_checkpoint_whole(tmp_path):
    """A value that could not be read back, or a full disk, stops the save with its name; the
    earlier checkpoint stays."""
    save(tmp_path, 1, "best")
    for bad, at in (
        ({"config": {"lr": float("inf")}}, r"config\.lr is inf"),
        ({"config": {"a": [1, {2}]}}, r"config\.a\[1\] is a set"),
        ({"state": {"f": {"g": Path("x")}}}, r"state\.f\.g is a PosixPath"),
        ({"state": {(1, 2): 3}}, "state is a dict with"),
        ({"tensors": {"model": {"w": 3}}}, r"model\.w is a int"),
        ({"tensors": {"../m": {}}}, r"'\.\./m'"),
    ):
        with pytest.raises(ValueError, match=at):
            checkpoint.save(tmp_path, "best", step=2, **{**content(2), **bad})
    for name, step in (
        ("step-2", 2),
        ("step-00000003", 2),
        ("../best", 2),
        (".best", 2),
        ("best", -1),
        ("best", True),
    ):
        with pytest.raises(ValueError, match="step_name"):
            checkpoint.save(tmp_path, name, step=step, **content(2))
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert_holds(tmp_path / "best", 1)


# -- what is written
# --------------------


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=["umask022", "umask077"])
def test_permissions_follow_the_umask(tmp_path, mask):
    """Files and folders get what the umask allows, not the 0600 of safetensors' own writer."""
    old = os.umask(mask)
    try:
        p = save(tmp_path, 1)
        checkpoint.write_json(tmp_path / "r.json", {})
    finally:
        os.umask(old)
    assert all(
        stat.S_IMODE(f.stat().st_mode) == 0o666 & ~mask for f in [*p.iterdir(), tmp_path / "r.json"]
    )
    assert stat.S_IMODE(p.stat().st_mode) == 0o777 & ~mask


def test_tied_duplicated_and_strided_tensors_round_trip(tmp_path):
    """Two names for one storage, views of it, strided, empty, scalar, integer and bf16 tensors come
    back equal."""
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    sd = {
        "a": x,
        "tied": x,
        "view": x[2:4],
        "t": x.t(),
        "stride": x[::2, ::3],
        "empty": torch.empty(0, 3),
        "empty2": torch.empty(0),
        "s": torch.tensor(3),
        "h": x.bfloat16(),
        "p": torch.nn.Parameter(x),
    }
    c = checkpoint.load(
        checkpoint.save(tmp_path, "best", step=0, tensors={"model": sd}, config={}, state=None)
    )
    assert c.state is None and c.tensors["model"].keys() == sd.keys()
    assert all(
        torch.equal(c.tensors["model"][k], t) and c.tensors["model"][k].dtype == t.dtype
        for k, t in sd.items()
    )


def test_saving_moves_no_random_generator(tmp_path):
    """Promise 3's share: a save draws from neither Python's nor torch's generator."""
    before = random.getstate(), torch.get_rng_state()
    save(tmp_path, 1)
    assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())


def test_optimizer_and_generator_state_round_trip(tmp_path):
    """What a resume needs survives weights_only: an AdamW state after a step, and the generator's
    state."""
    lin = torch.nn.Linear(3, 5)
    opt = torch.optim.AdamW(lin.parameters())
    lin(torch.ones(1, 3)).sum().backward()
    opt.step()
    state = {"opt": opt.state_dict(), "rng": torch.get_rng_state(), "python": random.getstate()}
    back = checkpoint.load(
        checkpoint.save(tmp_path, "best", step=1, tensors={}, config={}, state=state)
    ).state
    assert torch.equal(back["opt"]["state"][0]["exp_avg"], opt.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(back["rng"], state["rng"]) and back["python"] == state["python"]


# -- damage
# --------------------


def assert_refused(path: Path, file: str) -> None:
    wrong = checkpoint.verify(path)
    assert wrong and file in wrong and "\n" not in wrong
    with pytest.raises(ValueError) as e:
        checkpoint.load(path)
    assert str(path) in str(e.value) and file in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "adapter.safetensors", "config.json", "state.pt", "manifest.json"]
)
def test_flipped_or_cut_anywhere_is_named_and_refused(tmp_path, file):
    """Promise 4: one bit changed at any of many offsets, the file cut at any of many lengths, or
    grown: verify names the file, load refuses. The manifest guards itself too."""
    path = save(tmp_path, 3)
    whole = (path / file).read_bytes()
    rng = random.Random(file)
    offsets = (
        range(len(whole))
        if len(whole) <= 150
        else sorted({0, 1, 7, 8, 9, len(whole) - 1, *rng.sample(range(len(whole)), 150)})
    )
    for i in offsets:
        (path / file).write_bytes(
            whole[:i] + bytes([whole[i] ^ (1 << rng.randrange(8))]) + whole[i + 1 :]
        )
        assert_refused(path, file)
        (path / file).write_bytes(whole[:i])
        assert_refused(path, file)
    (path / file).write_bytes(whole + b"\n")
    assert_refused(path, file)
    (path / file).unlink()
    assert_refused(path, file)
    (path / file).write_bytes(whole)
    assert checkpoint.verify(path) is None
    assert_holds(path, 3)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/hostname", "a/b.safetensors", "..", "", ".hidden", "a\\b"],
)
def test_manifest_names_must_be_plain(tmp_path, name):
    """A manifest cannot point outside its folder, even where the file it points to exists and
    matches."""
    (tmp_path / "model.safetensors").write_bytes(b"x")
    path = remake(tmp_path / "best")
    (path / "manifest.json").write_bytes(
        checkpoint.manifest_bytes(1, {name: checkpoint.entry(b"x")})
    )
    assert "plain file name" in checkpoint.verify(path)
    assert_refused(path, "manifest.json")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"format": 1}', '{"format": NaN}', "[" * 100_000, "\xff"],
    ids=["empty", "list", "null", "dict", "partial", "nan", "deep", "latin1"],
)
def test_manifest_of_other_kind_is_refused(tmp_path, text):
    """Any other JSON, or none, is one line and no traceback of another kind."""
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text, encoding="latin1")
    assert_refused(path, "manifest.json")


def test_manifest_of_other_format_or_types_is_refused(tmp_path):
    """A later format, a negative step, a boolean size: refused, though the manifest's own hash
    matches."""
    path = save(tmp_path, 1, "best")
    for step, files in (
        (-1, {}),
        (True, {}),
        ("1", {}),
        (1, []),
        (1, {"config.json": None}),
        (1, {"config.json": {"bytes": True, "sha256": ""}}),
    ):
        (path / "manifest.json").write_bytes(checkpoint.manifest_bytes(step, files))
        assert_refused(path, "manifest.json")


# -- which one is resumed
# --------------------


def test_newest_passes_over_torn_empty_and_foreign_with_reasons(tmp_path):
    """Promise 5: of a torn, an empty, a foreign folder, a file, a renamed folder and an odd name,
    none is taken, each is named with its reason; what is older than the one taken is not
    mentioned."""
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000001" / "config.json").unlink()
    with open(tmp_path / "step-00000003" / "state.pt", "r+b") as f:
        f.truncate(100)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000006").mkdir()
    (tmp_path / "step-00000006" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000007").write_text("a file")
    save(tmp_path, 8).rename(tmp_path / "step-00000009")
    (tmp_path / "step-final").mkdir()
    save(tmp_path, 50, "best")
    path, why = checkpoint.newest(tmp_path)
    assert path == tmp_path / "step-00000002"
    for n, (name, reason) in enumerate(
        [
            ("step-final", "name is not"),
            ("step-00000009", "says step 8"),
            ("step-00000007", "not a folder"),
            ("step-00000006", "has no manifest.json"),
            ("step-00000005", "empty folder"),
            ("step-00000004", "has no manifest.json"),
            ("step-00000003", "state.pt has 100 bytes"),
        ]
    ):
        assert name in why[n] and reason in why[n] and "\n" not in why[n]
    assert len(why) == 7


def test_prune_keeps_newest_valid_best_and_foreign(tmp_path):
    """Torn newer ones do not count as kept, the only valid one survives, nothing that is not ours
    is touched."""
    for step in range(1, 7):
        save(tmp_path, step)
    save(tmp_path, 1, "best")
    (tmp_path / "step-00000006" / "state.pt").write_bytes(b"")
    foreign = tmp_path / "step-00000000"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"another": "tool"}')
    assert [p.name for p in checkpoint.prune(tmp_path, 2)] == [
        "step-00000003",
        "step-00000002",
        "step-00000001",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best",
        foreign.name,
        "step-00000004",
        "step-00000005",
        "step-00000006",
    ]
    (tmp_path / "step-00000005" / "state.pt").write_bytes(b"")
    assert checkpoint.prune(tmp_path, 2) == [] and checkpoint.prune(tmp_path, 1) == []
    assert checkpoint.newest(tmp_path)[0].name == "step-00000004"
    with pytest.raises(ValueError, match="at least one"):
        checkpoint.prune(tmp_path, 0)


@pytest.mark.parametrize("kind", ["file", "empty", "foreign", "torn"])
def test_save_over_something_else_replaces_it_and_deletes_nothing_foreign(tmp_path, kind):
    """A resumed run reaches the step whose folder was passed over: it can save there; somebody's
    own files are renamed, not deleted."""
    at = tmp_path / checkpoint.step_name(4)
    if kind == "file":
        at.write_text("mine")
    elif kind == "torn":
        save(tmp_path, 4)
        (at / "state.pt").write_bytes(b"")
    else:
        at.mkdir()
        if kind == "foreign":
            (at / "notes.txt").write_text("mine")
    assert_holds(save(tmp_path, 4), 4)
    aside = [p for p in tmp_path.iterdir() if p != at]
    assert len(aside) == (kind != "torn") and hidden(tmp_path) == []
    assert (
        kind not in ("file", "foreign")
        or (aside[0] if kind == "file" else aside[0] / "notes.txt").read_text() == "mine"
    )


# -- json and jsonl
# --------------------


def test_write_json_is_whole_or_not_at_all(tmp_path):
    """NaN and inf are refused by key, the old file stays, no temporary file is left; plain values
    round trip."""
    path = tmp_path / "results.json"
    checkpoint.write_json(path, {"a": [1, 2.5, None, True, "é"]})
    for bad, at in (
        ({"loss": {"val": float("nan")}}, r"results\.json\.loss\.val is nan"),
        ([1, -float("inf")], r"\[1\] is -inf"),
        ({"t": torch.ones(1)}, r"\.t is a Tensor"),
    ):
        with pytest.raises(ValueError, match=at):
            checkpoint.write_json(path, bad)
    assert (
        json.loads(path.read_text()) == {"a": [1, 2.5, None, True, "é"]} and hidden(tmp_path) == []
    )


@forks
def test_write_json_killed_before_every_file_operation_is_old_or_new(tmp_path):
    """The reader sees the old value or the new one, never half; clean() removes what was left."""
    path = tmp_path / "r.json"
    for n in range(50):
        checkpoint.write_json(path, "old")

        def work(report, n=n):
            die_before(n)
            checkpoint.write_json(path, "new")

        _, status = in_child(work)
        assert json.loads(path.read_text()) in ("old", "new")
        checkpoint.clean(tmp_path)
        assert hidden(tmp_path) == []
        if status == 0:
            break
    assert status == 0 and n >= 5 and json.loads(path.read_text()) == "new"


@pytest.mark.parametrize("cut", [1, 2, 5, 11, 5000])
def test_jsonl_parses_after_a_torn_tail(tmp_path, cut):
    """Promise 20's share: whatever a kill left of the last line, reading gives the whole lines, and
    appending goes on behind them."""
    path = tmp_path / "m.jsonl"
    rows = [{"step": i, "loss": i / 7} for i in range(5)] + [{"step": 5, "text": "x\n" * 3000}]
    for row in rows:
        checkpoint.append_jsonl(path, row)
    assert checkpoint.read_jsonl(path) == rows and path.read_bytes().count(b"\n") == 6
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size - cut)
    assert checkpoint.read_jsonl(path) == rows[:5]
    checkpoint.append_jsonl(path, {"step": 6})
    assert checkpoint.read_jsonl(path) == [*rows[:5], {"step": 6}]
    path.write_bytes(b'{"st')  # the very first line torn
    checkpoint.append_jsonl(path, 1)
    assert checkpoint.read_jsonl(path) == [1]


@pytest.mark.parametrize(
    "bad", ["x", "", "{", '{"a": NaN}', "\xff"], ids=["word", "empty", "open", "nan", "latin1"]
)
def test_jsonl_bad_line_in_the_middle_is_named(tmp_path, bad):
    """Only a torn last line is left out: any other bad line is an error with its number. A NaN is
    not written in the first place."""
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"{}\n" + bad.encode("latin1") + b"\n{}\n")
    with pytest.raises(ValueError, match="line 2 ") as e:
        checkpoint.read_jsonl(path)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="loss is nan"):
        checkpoint.append_jsonl(path, {"loss": float("nan")})


# -- loading into a module
# --------------------


def test_copy_tensors_is_strict_finite_and_all_or_nothing():
    """Missing, unexpected, wrong-shaped and non-finite entries are named in one line and nothing
    has been copied; a fit copies all."""
    torch.manual_seed(0)
    a = torch.nn.Linear(3, 5)
    b = torch.nn.Linear(3, 5)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    good = a.state_dict()
    for bad, at in (
        ({"weight": good["weight"]}, "missing: bias"),
        ({**good, "c": good["bias"]}, "unexpected: c"),
        ({**good, "bias": torch.ones(1)}, r"bias \(1,\) for \(5,\)"),
        ({**good, "bias": good["bias"] / 0}, "not finite: bias"),
        (
            {
                **good,
                "weight": good["weight"].clone().index_fill_(0, torch.tensor([4]), float("nan")),
            },
            "not finite: weight",
        ),
    ):
        with pytest.raises(ValueError, match=at) as e:
            copy_tensors(b.state_dict(), bad, "the adapter")
        assert "the adapter" in str(e.value) and "\n" not in str(e.value)
        assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    copy_tensors(b.state_dict(), good, "the adapter")
    assert all(torch.equal(v, good[k]) for k, v in b.state_dict().items())
    with pytest.raises(ValueError, match=r"unexpected: x0, x1, x2, x3, x4, x5, x6, x7 and 3 more;"):
        copy_tensors(
            b.state_dict(), {**good, **{f"x{i}": good["bias"] for i in range(11)}}, "model"
        )


# -- signals
# --------------------


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_graceful_stop_first_signal_waits_second_raises(first, second):
    """Promise 8: the first signal only sets a mark (exit code 128 + signum); the second, of either
    kind, raises at once; the former handlers are back afterwards."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), checkpoint.GracefulStop() as stop:
        assert stop.signal is None and stop.exit_code == 0
        os.kill(os.getpid(), first)
        assert stop.signal == first and stop.exit_code == 128 + first
        os.kill(os.getpid(), second)
        time.sleep(60)
        pytest.fail("the second signal must raise")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_graceful_stop_outside_the_main_thread_does_nothing():
    """Python allows no handlers there: entering must not fail nor change any."""
    seen = []
    before = signal.getsignal(signal.SIGINT)

    def work():
        with checkpoint.GracefulStop() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGINT)))

    t = threading.Thread(target=work)
    t.start()
    t.join()
    assert seen == [(None, before)]


@forks
def test_graceful_stop_saves_once_and_ends_with_128_plus_signum(tmp_path):
    """The trainer's use of it: SIGTERM in the middle of a loop ends with one save at a step
    boundary and status 143."""

    def work(report):
        with checkpoint.GracefulStop() as stop:
            for step in range(1, 10**6):
                report(step)
                time.sleep(0.002)
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.signal:
                    save(tmp_path, step)
                    os._exit(stop.exit_code)

    told, status = in_child(work)
    assert os.WEXITSTATUS(status) == 143 and struct.unpack("<q", told[-8:])[0] == 3
    assert checkpoint.newest(tmp_path) == (tmp_path / checkpoint.step_name(3), [])
