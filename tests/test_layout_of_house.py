"""The layout of the house: imports run one way, from the programs down to the ground; rooms have no
code of their own in __init__.py; the ground floor stays small; settings need no torch.

All of it is read from the sources, nothing is imported. Each check is a function that lists
complaints about a folder, so that it can be seen to complain about a bad one."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from sources import ROOT, sources

# A module may import what has a lower rank, and what is in its own place. A place is a file on the
# ground floor, a room, or a module that stands lower than the rest of its room.
RANK = {
    "settings": 0,
    "settings.experts": 2,
    "settings.storing": 2,
    "config": 1,
    "corpora": 1,
    "cli": 2,
    "measure_config": 3,
    "storage": 2,
    "kernels": 2,
    "loaders.tokenizer": 2,
    "loaders.fetch": 3,
    "loaders.examples": 4,
    "loaders.token_files": 4,
    "data": 5,
    "model": 3,
    "generate": 4,
    "lora": 5,
    "reconstruct": 3,
    "routing": 4,
    "kv_router": 5,
    "selection": 5,
    "baselines.pages": 5,
    "baselines.tokens": 6,
    "selector": 7,
    "selection.training": 8,
    "mixsga": 7,
    "baselines": 8,
    "coding": 9,
    "loaders": 9,
    "tasks": 10,
    "report": 11,
    "training": 12,
    "training.loss": 3,
    "benchmarks": 13,
    "train": 14,
    "eval": 14,
    "sample": 14,
    "bench": 14,
}
TOGETHER = {"kernels": "storage"}  # two places that may import one another, without a cycle

# what breaks the rule today: (module, what it imports): why
KNOWN: dict[tuple[str, str], str] = {}  # (file, what it imports): why it still may

MAX_GROUND_FLOOR = 16
WITHOUT_TORCH = (
    "config",
    "cli",
    "measure_config",
    "settings.adapters",
    "settings.base",
    "settings.experts",
    "settings.storing",
    "settings.train",
)
# packages that may be installed beside us: a room of that name would hide them, or they it
PACKAGES = {
    "accelerate",
    "cache",
    "datasets",
    "evaluate",
    "gguf",
    "huggingface_hub",
    "kernels",
    "models",
    "peft",
    "quantize",
    "tiktoken",
    "tokenizers",
    "trainer",
    "transformers",
    "triton",
}


class Import(NamedTuple):
    """One import of one module."""

    name: str
    line: int
    at_load: bool  # runs when the file is loaded, not when a function is called


class House(NamedTuple):
    """The Python files of a folder, without tests."""

    root: Path
    files: dict[str, Path]  # by module name; a room's __init__.py under the room's
    imports: dict[str, list[Import]]


def read_house(root: Path) -> House:
    """Read which module imports which."""
    files = {}
    for path in sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(p for p in parts if p != "__init__")] = path
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    return House(root, files, {name: find_imports(tree, files) for name, tree in trees.items()})


def find_imports(tree: ast.AST, files: dict[str, Path]) -> list[Import]:
    """List a source's imports. `from room import module` is an import of room.module."""
    found = []

    def visit(node: ast.AST, at_load: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(a.name, node.lineno, at_load) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            # a relative import would be read as one of another module
            assert node.level == 0, f"line {node.lineno}: imports here are absolute"
            for a in node.names:
                inside = f"{node.module}.{a.name}"
                name = inside if inside in files else node.module
                found.append(Import(name, node.lineno, at_load))
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_load and not is_function)

    visit(tree, True)
    return found


def place_of(module: str) -> str | None:
    """Return the place of RANK that a module is in, the narrowest; None where it has none."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((n for n in names if n in RANK), None)


def wrong_way(house: House) -> list[tuple[str, str, int]]:
    """List the imports that do not lead down: (module, what it imports, line)."""
    found = []
    for module, imports in house.imports.items():
        here = place_of(module)
        for name, line, _ in imports:
            there = place_of(name)
            if name not in house.files or here is None or there is None:
                continue
            same = TOGETHER.get(here, here) == TOGETHER.get(there, there)
            if not same and RANK[there] >= RANK[here]:
                found.append((module, name, line))
    return found


def cycles(house: House) -> list[list[str]]:
    """List the rings of files in which each imports the next while it is loaded itself."""
    leads_to = {
        module: sorted({i.name for i in imports if i.at_load and i.name in house.files} - {module})
        for module, imports in house.imports.items()
    }
    found = []
    done = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for name in leads_to[module]:
                walk(name, [*path, module])
            done.add(module)

    for module in leads_to:
        walk(module, [])
    return found


def rooms(house: House) -> list[Path]:
    """List the folders with Python files, rooms of rooms too."""
    return sorted({path.parent for path in house.files.values()} - {house.root})


def rooms_with_code(house: House) -> list[str]:
    """List the rooms whose __init__.py is missing or not empty."""
    bad = []
    for room in rooms(house):
        init = room / "__init__.py"
        if not init.is_file() or init.read_text(encoding="utf-8").strip():
            bad.append(str(room.relative_to(house.root)))
    return bad


def rooms_named_as_packages(house: House) -> list[str]:
    """List the rooms that have the name of a package, or of a module of the standard library."""
    names = [room.name for room in rooms(house) if room.parent == house.root]
    return [name for name in names if name in PACKAGES or name in sys.stdlib_module_names]


def ground_floor(house: House) -> list[str]:
    """List the modules on the ground floor."""
    return [name for name, path in house.files.items() if path.parent == house.root]


def needs_more_than_python(house: House, module: str) -> list[str]:
    """List what a module imports, through other modules too, beyond the standard library."""
    found = []
    seen = set()
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name, line, _ in house.imports[module]:
            if name in house.files:
                waiting.append(name)
            elif name.split(".")[0] not in sys.stdlib_module_names:
                found.append(f"{module}:{line}: {name}")
    return found


# ----------------------------------------------------------------------------- this house


@pytest.fixture(scope="module")
def house() -> House:
    return read_house(ROOT)


def test_every_module_has_a_rank(house):
    """Each file on the ground floor and each room is in the table: a new one is given its rank."""
    assert [m for m in house.files if place_of(m) is None] == []
    assert "loaders.checkpoint" in house.files and "storage.integers.format" in house.files


def test_imports_run_one_way(house):
    """Every import, in functions too, leads to a lower rank or stays in its place."""
    bad = [f"{m}:{line}: {name}" for m, name, line in wrong_way(house) if (m, name) not in KNOWN]
    assert bad == []


def test_no_file_needs_itself_while_it_is_loaded(house):
    """File-level imports make no ring."""
    assert cycles(house) == []


def test_rooms_hold_no_code_of_their_own(house):
    """Every room has an __init__.py, and it is empty."""
    assert rooms_with_code(house) == []


def test_rooms_bear_no_name_of_a_package(house):
    """No room hides, or is hidden by, a package that may be installed."""
    assert rooms_named_as_packages(house) == []


def test_ground_floor_stays_small(house):
    """The chapters and the programs, and little else."""
    assert len(ground_floor(house)) <= MAX_GROUND_FLOOR


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_settings_need_no_torch(house, module):
    """Settings and command line need the standard library alone: --help and a bad flag are answered
    before torch is loaded."""
    assert needs_more_than_python(house, module) == []


# ----------------------------------------------------------------------------- houses out of order


def build_house(root: Path, **texts: str) -> House:
    """Write files, room__module for room/module.py, with the rooms' empty __init__.py, and read
    them."""
    for name, text in texts.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != root:
            (path.parent / "__init__.py").touch()
        path.write_text(text)
    return read_house(root)


@pytest.mark.parametrize(
    "module, text, imported",
    [
        ("config", "import cli", "cli"),
        ("model", "import lora", "lora"),
        ("model", "from lora import attach", "lora"),
        ("lora", "def f():\n    from loaders.checkpoint import few", "loaders.checkpoint"),
        (
            "lora",
            "class A:\n    def f(self):\n        import loaders.checkpoint",
            "loaders.checkpoint",
        ),
        ("lora", "from loaders import checkpoint", "loaders.checkpoint"),
        ("lora", "try:\n    import kv_router as k\nexcept ImportError:\n    pass", "kv_router"),
        ("storage__packed", "import model", "model"),
        ("kernels", "import model", "model"),
        ("loaders__tokenizer", "import loaders.checkpoint", "loaders.checkpoint"),
        ("training__loop", "if True:\n    import train", "train"),
        ("sample", "import train", "train"),
    ],
)
def test_import_that_leads_up_is_seen(tmp_path, module, text, imported):
    """An import of a higher or the same rank is found, wherever in the file it stands."""
    others = dict(cli="", lora="", model="", train="", kv_router="", loaders__checkpoint="")
    house = build_house(tmp_path, **{**others, module: text})
    assert [(m, name) for m, name, _ in wrong_way(house)] == [(module.replace("__", "."), imported)]


def test_imports_that_lead_down_are_let_pass(tmp_path):
    """Lower ranks, the same room, storage and kernels in either direction, and packages."""
    house = build_house(
        tmp_path,
        config="import os",
        kernels="from storage.layout import mask\nimport torch",
        storage__layout="import config",
        storage__packed="from kernels import attention\nfrom storage import layout",
        model="import kernels",
        loaders__tokenizer="from config import check",
        loaders__runs="from loaders import tokenizer\nimport model",
        data="from loaders.tokenizer import encoded",
        train="def f():\n    import loaders.runs, data, model",
    )
    assert wrong_way(house) == [] and cycles(house) == []
    assert [len(house.imports[m]) for m in ("train", "storage.packed", "kernels")] == [3, 2, 2]


def test_ring_of_files_is_seen(tmp_path):
    """A ring of two or three files is found; one that is closed within a function is none."""
    two = build_house(
        tmp_path / "two", kernels="import storage.views", storage__views="from kernels import f"
    )
    assert [set(ring) for ring in cycles(two)] == [{"kernels", "storage.views"}]
    three = build_house(
        tmp_path / "three",
        a="import b",
        b="if True:\n    from c import d",
        c="class A:\n    import a",
    )
    assert [set(ring) for ring in cycles(three)] == [{"a", "b", "c"}]
    late = build_house(tmp_path / "late", a="import b", b="def f():\n    import a")
    assert cycles(late) == []


def test_room_with_code_or_without_init_is_seen(tmp_path):
    """Code in an __init__.py, a comment too, and a room without one are found, however deep."""
    house = build_house(tmp_path, a="", good__b="", bad__c="", deep__er__d="", bare__e="")
    (tmp_path / "bad" / "__init__.py").write_text("# nothing\n")
    (tmp_path / "deep" / "er" / "__init__.py").write_text("import os\n")
    (tmp_path / "bare" / "__init__.py").unlink()
    assert rooms_with_code(house) == ["bad", "bare", "deep/er"]


def test_room_named_as_a_package_is_seen(tmp_path):
    """A room called tokenizers, and one called statistics; not a file inside a room."""
    house = build_house(tmp_path, tokenizers__a="", statistics__b="", loaders__gguf="")
    assert rooms_named_as_packages(house) == ["statistics", "tokenizers"]


def test_crowded_ground_floor_is_seen(tmp_path):
    """Files in rooms do not count, the seventeenth file outside of them does."""
    house = build_house(tmp_path, **{f"a{i}": "" for i in range(17)}, room__b="")
    assert len(ground_floor(house)) == 17 > MAX_GROUND_FLOOR


def test_torch_behind_other_modules_is_seen(tmp_path):
    """torch is found through another module, in a function, and as a package that brings it."""
    house = build_house(
        tmp_path,
        config="import json, dataclasses\nfrom os import path",
        cli="import config, loaders.few",
        loaders__few="def f():\n    import torch.nn",
        measure_config="from safetensors.torch import save_file",
    )
    assert needs_more_than_python(house, "config") == []
    assert needs_more_than_python(house, "cli") == ["loaders.few:2: torch.nn"]
    assert needs_more_than_python(house, "measure_config") == [
        "measure_config:1: safetensors.torch"
    ]


def test_module_without_a_rank_is_seen():
    """The narrowest place counts, and an unknown file or room has none."""
    assert place_of("loaders.tokenizer") == "loaders.tokenizer"
    assert place_of("loaders.tokenizer_json") == "loaders"
    assert place_of("storage.integers.format") == "storage"
    assert place_of("helpers") is None and place_of("rooms.new") is None


def test_relative_import_is_refused(tmp_path):
    """A relative import is not silently overlooked."""
    with pytest.raises(AssertionError, match="absolute"):
        build_house(tmp_path, storage__a="from . import b")
