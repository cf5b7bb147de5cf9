"""Checkpoints that survive a kill at any moment, name their own damage, and cannot run code when
they are read.

A stage folder holds checkpoint folders `step-00000200` and perhaps `best`. A checkpoint folder
holds any of `model.safetensors`, `adapter.safetensors`, `config.json`, `tokenizer.json` (where the
model was trained with one) and `state.pt` (optimizer, RNG), and always `manifest.json`:

    {"format": 1, "step": int, "files": {name: {"bytes": int, "sha256": hex}}, "sha256": hex}

The last `sha256` is that of the manifest without it, in the one spelling `manifest_bytes` gives; so
a changed byte in the manifest itself (its step, say) is seen like one in any other file.

Writing: everything goes to a fresh folder `.tmp-NAME-PID-RANDOM`, each file fsynced, the manifest
last, then one rename. Where NAME exists already it becomes `.old-NAME-...` first and is deleted
last, so at every moment a whole checkpoint is on disk. `clean`, at the next start, finishes or
undoes what a kill left. One process writes to a stage folder at a time; any number may read.
Reading: the bytes that were hashed are the bytes that are parsed: safetensors for weights, JSON for
settings, and torch.load with weights_only=True for the state.

    path, why_not = newest("out/run/pretrain")
    copy_tensors(model.state_dict(), load(path).tensors["model"], "model")  # of storage.state
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import signal
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from loaders.fetch import naming

MANIFEST = "manifest.json"
MOST_MANIFEST = 2**20  # bytes
_STEP = re.compile(r"step-([0-9]{8,})")
_LEFTOVER = re.compile(r"\.(tmp|old|del)-(.+)-[0-9]+-[0-9a-f]{8}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STATE_LEAVES = (int, float, bool, str, type(None), Tensor, torch.nn.Parameter)


@dataclass
class Checkpoint:
    """Holds what a checkpoint folder held: `tensors` maps a file's stem ('model', 'adapter') to its
    state dict; `definition` is tokenizer.json, parsed."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    config: dict
    state: dict | None
    definition: dict | None = None


def step_name(step: int) -> str:
    """Return the folder name of a step: 200 -> 'step-00000200'."""
    return f"step-{step:08d}"


def _hidden(kind: str, name: str) -> str:
    """Make a fresh hidden name that `clean` knows again."""
    # not `random`: saving must not move the training's generators
    return f".{kind}-{name}-{os.getpid()}-{secrets.token_hex(4)}"


def _sync_dir(path: Path) -> None:
    """Wait until what was renamed in a folder is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on disk."""
    # our own open: the user's umask decides on permissions (safetensors' writer gives 0600)
    with naming(path), open(path, "xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_plain(x, where: str, state: bool) -> None:
    """Raise ValueError naming the first value that JSON, or with `state`
    torch.load(weights_only=True), could not give back: better at save time than at resume."""
    if type(x) in (dict, OrderedDict) and all(type(k) in (str, int) for k in x):
        for k, v in x.items():
            _check_plain(v, f"{where}.{k}", state)
    elif type(x) in (list, tuple):
        for i, v in enumerate(x):
            _check_plain(v, f"{where}[{i}]", state)
    elif state:
        if type(x) not in _STATE_LEAVES:
            raise _cannot_be_written(x, where, "lists, dicts by name or int and tensors")
    elif isinstance(x, float) and not math.isfinite(x):
        raise ValueError(
            f"{where} is {x}: JSON holds finite numbers only; write None, or find out where it "
            "came from"
        )
    elif x is not None and not isinstance(x, (str, int, float)):
        raise _cannot_be_written(x, where, "lists, dicts by name or int")


def _cannot_be_written(x, where: str, containers: str) -> ValueError:
    keys = " with other keys" if isinstance(x, dict) else ""
    return ValueError(
        f"{where} is a {type(x).__name__}{keys}: numbers, strings, None, {containers} can be "
        "written; convert it"
    )


def _dump(obj, where: str, indent: int | None = 1) -> bytes:
    """Write a value as JSON; `where` names it where JSON cannot hold it."""
    _check_plain(obj, where, state=False)
    return (json.dumps(obj, indent=indent, allow_nan=False) + "\n").encode()


def _parse(data: bytes):
    """Parse JSON bytes. Raises ValueError with a short reason, also for NaN and for nesting too
    deep to be ours."""

    def refuse(word):
        raise ValueError(f"holds {word}")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"is not JSON ({' '.join(str(e).split())})") from None


def entry(data: bytes) -> dict:
    """Make the manifest's entry for a file of these bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def manifest_bytes(step: int, files: dict[str, dict]) -> bytes:
    """Write the manifest of `step` in its one spelling; `files` maps a plain file name to its
    `entry`."""
    body = {"format": 1, "step": step, "files": files}
    digest = hashlib.sha256(_dump(body, MANIFEST)).hexdigest()
    return _dump({**body, "sha256": digest}, MANIFEST)


def _contiguous(sd: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Bring the tensors to the CPU, contiguous, no two in one storage (safetensors refuses
    that)."""
    out = {}
    seen = set()
    for k, t in sd.items():
        if not isinstance(t, Tensor):
            raise ValueError(
                f"{where}.{k} is a {type(t).__name__}: only tensors go into a .safetensors file; "
                "put it into state or config"
            )
        t = t.detach().cpu().contiguous()
        where_stored = t.untyped_storage().data_ptr()
        out[k] = t.clone() if where_stored in seen else t
        seen.add(where_stored)
    return out


def _contents(tensors: dict, config: dict, state: dict | None, definition: dict | None):
    """Yield (file name, bytes), one file in memory at a time."""
    for stem, sd in tensors.items():
        if not _NAME.fullmatch(stem):
            raise ValueError(
                f"a tensor file called {stem!r}: letters, digits, '_', '-' and '.' are allowed; "
                "rename it"
            )
        yield f"{stem}.safetensors", safetensors.torch.save(_contiguous(sd, stem))
    yield "config.json", _dump(config, "config")
    if definition is not None:
        yield "tokenizer.json", _dump(definition, "tokenizer", indent=None)
    if state is not None:
        _check_plain(state, "state", state=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        yield "state.pt", buffer.getvalue()


def save(
    stage_dir,
    name: str,
    *,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    config: dict,
    state: dict | None = None,
    definition: dict | None = None,
) -> Path:
    """Write checkpoint `name` (`step_name(step)` or 'best', say) and return its folder. Killed at
    any moment, the earlier checkpoint of that name or this one is whole on disk (after `clean`).
    Something of that name that is no checkpoint is renamed, not deleted. Raises ValueError for
    names or values that could not be read back; nothing is left then."""
    stage = Path(stage_dir)
    plain = bool(_NAME.fullmatch(name)) and type(step) is int and step >= 0
    if not plain or (name.startswith("step-") and name != step_name(step)):
        raise ValueError(
            f"checkpoint {name!r} with step={step!r}: the step is an int >= 0, the name plain; "
            "use step_name(step) or 'best'"
        )
    stage.mkdir(parents=True, exist_ok=True)
    temp = stage / _hidden("tmp", name)
    final = stage / name
    old = stage / _hidden("old", name)
    temp.mkdir()
    try:
        entries = {}
        for file, data in _contents(tensors, config, state, definition):
            entries[file] = entry(data)
            _write(temp / file, data)
        _write(temp / MANIFEST, manifest_bytes(step, entries))
        _sync_dir(temp)
    # a full disk or a second Ctrl-C: leave nothing behind, and say what happened
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    if _ours(final):
        os.rename(final, old)
    elif os.path.lexists(final):
        _set_aside(final)
    os.rename(temp, final)
    _sync_dir(stage)
    if old.exists():
        _remove(old)
    return final


def _set_aside(path: Path) -> Path:
    """Rename something in our way that we cannot vouch for: it may be the only copy of somebody's
    work."""
    return path.rename(path.with_name(f"aside-{path.name}-{secrets.token_hex(4)}"))


def _manifest(path: Path) -> dict:
    """Read the manifest of a checkpoint folder and check it. Raises ValueError with a short
    reason."""
    if not path.is_dir():
        raise ValueError("is not a folder" if os.path.lexists(path) else "does not exist")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"has no {MANIFEST}" if any(path.iterdir()) else "is an empty folder")
    size = (path / MANIFEST).stat().st_size
    if size > MOST_MANIFEST:
        raise ValueError(f"{MANIFEST} has {size} bytes: a few hundred are ours")
    raw = (path / MANIFEST).read_bytes()
    try:
        m = _parse(raw)
    except ValueError as e:
        raise ValueError(f"{MANIFEST} {e}") from None
    _check_manifest(m)
    if raw != manifest_bytes(m["step"], m["files"]):
        raise ValueError(f"{MANIFEST} was changed: its own sha256 or spelling does not match")
    if path.name.startswith("step-") and path.name != step_name(m["step"]):
        raise ValueError(f"{MANIFEST} says step {m['step']}, which is not this folder's name")
    return m


def _check_manifest(m: object) -> None:
    """Raise ValueError unless a manifest has its entries, of their types, and plain file names."""
    entries = {"format", "step", "files", "sha256"}
    if not (isinstance(m, dict) and set(m) == entries and isinstance(m["files"], dict)):
        raise ValueError(f"{MANIFEST} has not the entries format, step, files, sha256")
    if m["format"] != 1 or type(m["step"]) is not int or m["step"] < 0:
        raise ValueError(
            f"{MANIFEST} has format {m['format']!r} and step {m['step']!r}: format 1 and a step "
            ">= 0 can be read"
        )
    for name, e in m["files"].items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{MANIFEST} lists {name!r}, which is not a plain file name")
        has_both = isinstance(e, dict) and set(e) == {"bytes", "sha256"}
        if not (has_both and type(e["bytes"]) is int and isinstance(e["sha256"], str)):
            raise ValueError(f"{MANIFEST} has no bytes and sha256 for {name}")


def _ours(path: Path) -> bool:
    """Say whether this is a checkpoint folder, whole or not, and so may be replaced or deleted."""
    try:
        return bool(_manifest(path)) and not path.is_symlink()
    except (ValueError, OSError):
        return False


def _checked(path: Path, name: str, e: dict, keep: bool) -> bytes | None:
    """Compare a file with its manifest entry; `keep` returns the very bytes that were hashed.
    Raises ValueError with a short reason."""
    if not (path / name).is_file():
        raise ValueError(f"{name} is missing")
    with open(path / name, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size != e["bytes"]:
            raise ValueError(f"{name} has {size} bytes, its manifest says {e['bytes']}")
        data = f.read() if keep else None
        digest = hashlib.sha256(data) if keep else hashlib.file_digest(f, "sha256")
    if digest.hexdigest() != e["sha256"]:
        raise ValueError(f"{name} is damaged: its sha256 is not the manifest's")
    return data


def verify(ckpt_dir) -> str | None:
    """Return None if the checkpoint is whole; else one line saying what is wrong with which
    file."""
    path = Path(ckpt_dir)
    try:
        for name, e in _manifest(path)["files"].items():
            _checked(path, name, e, keep=False)
    except (ValueError, OSError) as e:
        return " ".join(str(e).split())
    return None


def _decode(name: str, data: bytes, device: str):
    """Parse one checked file without running anything in it. Raises ValueError with a short
    reason."""
    try:
        if name.endswith(".json"):
            value = _parse(data)
        elif name == "state.pt":
            # CPU: generators take their states from there
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            value = {k: t.to(device) for k, t in safetensors.torch.load(data).items()}
    # on foreign bytes the parsers raise many kinds: none of them may pass as anything but bad input
    except Exception as e:
        raise ValueError(
            f"{name} cannot be read safely ({type(e).__name__}: {' '.join(str(e).split())[:160]})"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}, not a dict")
    return value


def _is_read(name: str) -> bool:
    """Say whether `load` parses a file of this name; others are only verified."""
    return name in ("config.json", "tokenizer.json", "state.pt") or name.endswith(".safetensors")


def load(ckpt_dir, *, device: str = "cpu") -> Checkpoint:
    """Verify a checkpoint and read it; tensors go to `device`, the state stays on the CPU. Raises
    ValueError, one line: path, what is wrong, what to do. Files the manifest does not list are not
    read."""
    path = Path(ckpt_dir)
    try:
        m = _manifest(path)
        known = [n for n in m["files"] if _is_read(n)]
        raw = {n: _checked(path, n, e, keep=n in known) for n, e in m["files"].items()}
        values = {n: _decode(n, raw.pop(n), device) for n in known}
    except (ValueError, OSError, MemoryError) as e:
        why = " ".join(str(e).split()) or "its files do not fit into memory"
        raise ValueError(
            f"{path}: {why}; restore it from a copy, or use another checkpoint of the run"
        ) from None
    tensors = {
        n.removesuffix(".safetensors"): v for n, v in values.items() if n.endswith(".safetensors")
    }
    return Checkpoint(
        path=path,
        step=m["step"],
        tensors=tensors,
        config=values.get("config.json", {}),
        state=values.get("state.pt"),
        definition=values.get("tokenizer.json"),
    )


def _steps(stage: Path) -> list[tuple[int, Path]]:
    """List the step checkpoints of a stage, valid or not, the newest first."""
    if not stage.is_dir():
        return []
    found = [(int(m[1]), p) for p in stage.iterdir() if (m := _STEP.fullmatch(p.name))]
    return sorted(found, reverse=True)


def newest(stage_dir) -> tuple[Path | None, list[str]]:
    """Find the newest valid `step-*` checkpoint by step, or None, and write one line for each that
    came before it and was passed over, and for anything else whose name begins with 'step-'."""
    stage = Path(stage_dir)
    why = []
    if stage.is_dir():
        foreign = (p for p in sorted(stage.glob("step-*")) if not _STEP.fullmatch(p.name))
        why = [f"{p}: passed over, its name is not step- and eight digits" for p in foreign]
    for _, path in _steps(stage):
        wrong = verify(path)
        if wrong is None:
            return path, why
        why.append(f"{path}: passed over, {wrong}")
    return None, why


def prune(stage_dir, keep: int) -> list[Path]:
    """Delete the step checkpoints older than the newest `keep` valid ones and return their folders.
    `best`, folders without our manifest, and, where fewer than `keep` are valid, everything stay.
    Raises ValueError for keep < 1."""
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint is kept; give 1 or more")
    valid = 0
    gone = []
    for _, path in _steps(Path(stage_dir)):
        if valid < keep:
            valid += verify(path) is None
        elif _ours(path):
            # renamed first: a kill never leaves half a checkpoint under its name
            doomed = path.with_name(_hidden("del", path.name))
            os.rename(path, doomed)
            _remove(doomed)
            gone.append(path)
    return gone


def clean(stage_dir) -> list[str]:
    """At start, before anything is read: finish or undo what a killed save or prune left, and
    return a line for each thing done. Where a checkpoint is missing or damaged and a whole `.tmp-`
    or `.old-` copy exists, the newest by step takes its place (a tie goes to the one being saved);
    all other leftovers are deleted. Only for the process that writes to the folder."""
    stage = Path(stage_dir)
    done = []
    for name, left in _leftovers(stage).items():
        final = stage / name
        source = None if verify(final) is None else _newest_copy(name, left)
        if source is not None:
            if os.path.lexists(final):
                done.append(f"{final}: damaged, renamed to {_set_aside(final).name}")
            os.rename(source, final)
            _sync_dir(stage)
            done.append(f"{final}: restored from {source.name}, left by a run that was killed")
        for _, path in left:
            if os.path.lexists(path):
                _remove(path)
                done.append(f"{path}: deleted, left by a run that was killed")
    return done


def _leftovers(stage: Path) -> dict[str, list[tuple[str, Path]]]:
    """Map each checkpoint's name to what saves and prunes left of it: (tmp, old or del; path)."""
    groups = {}
    if stage.is_dir():
        for path in sorted(stage.iterdir()):
            if m := _LEFTOVER.fullmatch(path.name):
                groups.setdefault(m[2], []).append((m[1], path))
    return groups


def _newest_copy(name: str, left: list[tuple[str, Path]]) -> Path | None:
    """Choose among the leftovers of a checkpoint the whole copy with the highest step, of two with
    the same step the one being saved; None where no copy is whole."""
    copies = []
    for kind, path in left:
        if kind != "del" and verify(path) is None:
            step = _manifest(path)["step"]
            if not name.startswith("step-") or name == step_name(step):
                copies.append((step, kind == "tmp", path))
    return max(copies)[2] if copies else None


def _replace(path: Path, data: bytes) -> None:
    """Put `data` in the place of a file, whole or not at all."""
    temp = path.with_name(_hidden("tmp", path.name))
    try:
        _write(temp, data)
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    _sync_dir(path.parent)


def write_json(path, obj) -> None:
    """Replace `path` by `obj` as JSON, whole or not at all. Raises ValueError naming the key of a
    value JSON cannot hold (NaN, inf)."""
    path = Path(path)
    _replace(path, _dump(obj, path.name))


def write_jsonl(path, objs: list) -> None:
    """Replace `path` by one line of JSON for each of objs, whole or not at all."""
    path = Path(path)
    _replace(path, b"".join(_dump(obj, path.name, indent=None) for obj in objs))


def append_jsonl(path, obj) -> None:
    """Append `obj` as one line of JSON. A last line without its newline was torn by a kill and is
    cut off first."""
    line = _dump(obj, Path(path).name, indent=None)
    with naming(path), open(path, "a+b") as f:
        end = f.seek(0, os.SEEK_END)
        f.seek(max(0, end - 1))
        if f.read(1) not in (b"", b"\n"):
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)
        f.write(line)


def read_jsonl(path) -> list:
    """Read the lines of a .jsonl file. A last line without its newline (torn by a kill) is left
    out; any other bad line: ValueError."""
    out = []
    for i, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            out.append(_parse(line))
        except ValueError as e:
            raise ValueError(
                f"{path}: line {i} {e}; every line is one JSON value: was the file edited?"
            ) from None
    return out


def tensor_hash(ckpt_dir, file: str = "model.safetensors") -> str:
    """Return the sha256 of one of a checkpoint's files, as its manifest has it. Raises ValueError
    where the manifest lacks it."""
    files = _manifest(Path(ckpt_dir))["files"]
    if file not in files:
        raise ValueError(f"{ckpt_dir}: no {file} in its manifest; give a checkpoint that holds one")
    return files[file]["sha256"]


class GracefulStop:
    """Lets a step end before a signal does. In `with GracefulStop() as stop`, the first SIGINT or
    SIGTERM is answered by a line and sets `stop.signal`, so that the trainer saves once at the next
    step boundary and exits with `stop.exit_code`; the second raises KeyboardInterrupt. Of several
    ranks each names itself, but at SIGINT, which a terminal sends to all, only rank 0. Handlers are
    put back at the end. Outside the main thread, where Python allows no handlers, it does
    nothing."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """Return 0, or 128 + the signal that came."""
        return 0 if self.signal is None else 128 + self.signal

    def _handle(self, signum, frame):
        if self.signal is not None:
            raise KeyboardInterrupt(f"signal {signum} after signal {self.signal}")
        self.signal = int(signum)
        rank = os.environ.get("RANK", "0")
        if rank == "0" or signum == signal.SIGTERM:
            who = f"rank {rank}: {signal.Signals(signum).name}, " if "RANK" in os.environ else ""
            with contextlib.suppress(OSError):  # not print: that may be what was interrupted
                os.write(2, f"\n{who}stopping after this step\n".encode())

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                self._previous[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for s, handler in self._previous.items():
            # None: was installed from outside Python
            signal.signal(s, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
