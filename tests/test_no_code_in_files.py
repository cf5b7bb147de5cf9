"""Promise 6: no file that is read can run code: hostile pickles, and a scan of every source."""

import ast
import contextlib
import io
import pickle
from pathlib import Path

import pytest
import torch
from helpers import remake
from sources import ROOT, sources

from loaders import checkpoint


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
    files = {} if file == "manifest.json" else {file: bomb}
    path = remake(tmp_path / "s" / "step-00000001", **files)
    if file == "manifest.json":
        (path / file).write_bytes(bomb)
    with pytest.raises(ValueError) as e:
        checkpoint.load(path)
    assert file in str(e.value) and "\n" not in str(e.value)
    checkpoint.newest(path.parent)
    checkpoint.prune(path.parent, 1)
    checkpoint.clean(path.parent)
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
RUNNERS = {"exec", "eval", "compile", "__import__"}


def spelled_loads(tree: ast.AST, package: str, inside: tuple[str, ...]) -> set[str]:
    """Collect the ways in which a source can spell package.load, whatever name it was imported
    under. inside: modules of the package that hold the same function."""
    spelled = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name == package:
                    spelled |= {f"{a.asname or package}{m}.load" for m in ("", *inside)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            spelled |= {a.asname or "load" for a in node.names if a.name == "load"}
    return spelled | {f"{package}{m}.load" for m in ("", *inside)}


def dangers(source: str) -> list[str]:
    """List what in a source text could run code from data: 'line: what'."""
    tree = ast.parse(source)
    torch_loads = spelled_loads(tree, "torch", (".serialization",))
    numpy_loads = spelled_loads(tree, "numpy", ())
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in PICKLERS or name == "builtins":
                out.append(f"{node.lineno}: import {name}")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: getattr(k.value, "value", ...) for k in node.keywords}
        if called in RUNNERS:
            out.append(f"{node.lineno}: {called}()")
        if called in torch_loads and given.get("weights_only") is not True:
            out.append(f"{node.lineno}: torch.load without weights_only=True")
        # None stands for **keywords, which can hold anything
        if called in numpy_loads and (
            given.get("allow_pickle", False) is not False or None in given
        ):
            out.append(f"{node.lineno}: np.load with allow_pickle")
    return out


def test_sources_hold_nothing_that_runs_code_from_files():
    """Promise 6, by reading every source in every folder."""
    files = sources(ROOT)
    assert {ROOT / "train.py", ROOT / "loaders" / "checkpoint.py"} <= set(files)
    assert ROOT / "storage" / "integers" / "format.py" in files
    found = {str(f.relative_to(ROOT)): dangers(f.read_text(encoding="utf-8")) for f in files}
    assert {name: d for name, d in found.items() if d} == {}


def test_scan_covers_every_folder(tmp_path):
    """A planted danger is found however deep it lies, with and without __init__.py; tests, hidden
    folders and virtual environments are left out."""
    for name in ("a.py", "room/b.py", "room/deep/c.py", "tests/d.py", ".ci/e.py", "venv/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import pickle")
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    files = sources(tmp_path)
    assert [f.name for f in files] == ["a.py", "b.py", "c.py"]
    assert all(dangers(f.read_text()) for f in files)


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
    harmless = """
import torch, numpy as np, json, re
m.eval()
torch.compile(m)
re.compile('a')
json.load(f)
np.load(p)
np.load(p, allow_pickle=False)
torch.load(p, weights_only=True)
# exec(1)
s = 'import pickle'
compile: bool = True
"""
    assert dangers(harmless) == []
