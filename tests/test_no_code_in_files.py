"""Promise 6: no file that is read can run code: hostile pickles, and a scan of every source."""

import ast
import contextlib
import io
import pickle
from pathlib import Path

import pytest
import torch
from helpers import remake

from loaders import checkpoint

ROOT = Path(__file__).resolve().parents[1]


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def bombs(marker: Path) -> dict[str, bytes]:
    buffers = {"pickle": pickle.dumps({"w": Bomb(marker)}, protocol=2)}
    for name, zipped in (("zip", True), ("legacy", False)):
        f = io.BytesIO()
        torch.save(
            {"w": torch.ones(2), "x": Bomb(marker)}, f, _use_new_zipfile_serialization=zipped
        )
        buffers[name] = f.getvalue()
    return buffers


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(
    "file", ["state.pt", "model.safetensors", "adapter.safetensors", "config.json", "manifest.json"]
)
def test_malicious_pickle_never_runs(tmp_path, file, kind):
    """Promise 6: a pickle that would create a marker file, under every name we read and with a
    manifest that matches, is a ValueError naming the file; the marker is never made. (That the bomb
    works is shown first.)"""
    marker = tmp_path / "ran"
    bomb = bombs(marker)[kind]
    # a bare pickle goes off first and is found to be no checkpoint afterwards
    with contextlib.suppress(RuntimeError):
        torch.load(io.BytesIO(bomb), weights_only=False)
    assert marker.exists(), "the bomb must work, or this proves nothing"
    marker.unlink()
    path = remake(
        tmp_path / "s" / "step-00000001", **({file: bomb} if file != "manifest.json" else {})
    )
    if file == "manifest.json":
        (path / file).write_bytes(bomb)
    with pytest.raises(ValueError) as e:
        checkpoint.load(path)
    assert file in str(e.value) and "\n" not in str(e.value)
    checkpoint.newest(path.parent), checkpoint.prune(path.parent, 1), checkpoint.clean(path.parent)
    assert not marker.exists()


@pytest.mark.parametrize(
    "file, data",
    [
        ("config.json", b"[1]"),
        ("config.json", b'{"a": NaN}'),
        ("config.json", b"[" * 100_000),
        ("model.safetensors", b""),
        ("state.pt", b""),
        ("state.pt", b"PK\x03\x04"),
    ],
)
def test_matching_manifest_over_bad_content_is_one_line(tmp_path, file, data):
    """Well-hashed nonsense is refused in one line that names the file."""
    with pytest.raises(ValueError, match=file) as e:
        checkpoint.load(remake(tmp_path / "best", **{file: data}))
    assert "\n" not in str(e.value)


PICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def dangers(source: str) -> list[str]:
    """What in a source text could run code from data: 'line: what'."""
    tree = ast.parse(source)
    out = []
    # names under which each module's load was imported directly
    loads = {"torch": set(), "numpy": set()}
    modules = {"torch": {"torch"}, "numpy": {"numpy"}}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            out += [
                f"{node.lineno}: import {n}"
                for n in names
                if n.split(".")[0] in PICKLERS or n == "builtins"
            ]
            for a in node.names:
                if isinstance(node, ast.Import) and a.name in modules:
                    modules[a.name].add(a.asname or a.name)
                if (
                    isinstance(node, ast.ImportFrom)
                    and (node.module or "").split(".")[0] in loads
                    and a.name == "load"
                ):
                    loads[node.module.split(".")[0]].add(a.asname or "load")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        f = node.func
        kw = {k.arg: getattr(k.value, "value", ...) for k in node.keywords}
        if isinstance(f, ast.Name) and f.id in ("exec", "eval", "compile", "__import__"):
            out.append(f"{node.lineno}: {f.id}()")
        text = ast.unparse(f)
        if text in loads["torch"] or text in {
            f"{m}{s}.load" for m in modules["torch"] for s in ("", ".serialization")
        }:
            out += (
                []
                if kw.get("weights_only") is True
                else [f"{node.lineno}: torch.load without weights_only=True"]
            )
        if text in loads["numpy"] or text in {f"{m}.load" for m in modules["numpy"]}:
            out += (
                []
                if kw.get("allow_pickle", False) is False and None not in kw
                else [f"{node.lineno}: np.load with allow_pickle"]
            )
    return out


def test_sources_hold_nothing_that_runs_code_from_files():
    """Promise 6, by reading every source in the repository root (the tests, which craft hostile
    files, are not among them)."""
    files = sorted(ROOT.glob("*.py"))
    assert ROOT / "checkpoint.py" in files
    assert {f.name: d for f in files if (d := dangers(f.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "bad",
    [
        "exec('1')",
        "x = eval(s)",
        "compile(s, 'f', 'exec')",
        "__import__('pickle')",
        "import pickle",
        "import os, marshal as m",
        "import shelve",
        "from dill import loads",
        "from cloudpickle import load",
        "def f():\n    import _pickle",
        "import builtins",
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=flag)",
        "import torch\ntorch.load(p, **kw)",
        "import torch as t\nt.load(p)",
        "from torch import load as l\nl(p)",
        "import torch\ntorch.serialization.load(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import numpy\nnumpy.load(p, allow_pickle=x)",
        "from numpy import load\nload(p, **kw)",
    ],
)
def test_scanner_sees_planted_danger(bad):
    """The scan itself can fail: each planted line is reported."""
    assert dangers(bad)


def test_scanner_lets_harmless_lookalikes_pass():
    """model.eval(), torch.compile, re.compile, json.load and safe loads are not reported."""
    assert (
        dangers(
            "import torch, numpy as np, json, "
            "re\nm.eval()\ntorch.compile(m)\nre.compile('a')\njson.load(f)\nnp.load(p)\n"
            "np.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\n# exec(1)\ns = "
            "'import pickle'\n"
            "compile: bool = True"
        )
        == []
    )
