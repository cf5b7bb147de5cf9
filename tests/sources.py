"""The project's source files, for tests that read them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources(root: Path) -> list[Path]:
    """List every Python file under a folder, however deep, except tests (which craft hostile files)
    and what is not the project's: hidden folders, virtual environments, what programs wrote."""
    found = []
    for path in sorted(root.iterdir()):
        left_out = path.name.startswith(".") or path.name in ("tests", "out")
        if path.is_file() and path.suffix == ".py":
            found.append(path)
        elif path.is_dir() and not left_out and not (path / "pyvenv.cfg").exists():
            found += sources(path)
    return found
