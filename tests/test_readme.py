"""The README's Python runs as it stands, and the page is short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from runs import pretrain

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


def test_the_lines_for_a_model_of_ones_own_run(text, tmp_path, capsys, own_cache):
    """With a small trained run in place of the model: they generate, and say the bytes held."""
    sizes = ("--pretrain_steps=1", "--block_size=520", "--pretrain_batch_size=1")
    base = pretrain(tmp_path / "run", text, *sizes)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    words = tmp_path / "text"
    words.write_text("some words of a text to calibrate with. " * 40)
    code = code.replace("path/to/model", str(base)).replace("path/to/text", str(words))
    script = tmp_path / "own_model.py"
    script.write_text(code)
    scope = runpy.run_path(str(script))
    held = scope["cache"].nbytes()
    assert (
        held > 0 and f"{held} bytes held, {scope['share']:.0%} of dense" in capsys.readouterr().out
    )
    assert len(scope["rows"][0]) == 100


def test_the_page_is_short():
    """At most 160 lines, and the first screen says what it is, how to run it and how to use it."""
    lines = README.splitlines()
    assert len(lines) <= 160
