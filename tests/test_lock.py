"""Promise 30: one run owns a folder."""

import signal

import pytest
from helpers import error_line

import runs
import train
from training.lock import owned

HOLD = """
import sys, time
from pathlib import Path
from training.lock import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_folder_is_owned_by_one_living_process(tmp_path):
    """While one process owns a folder another is refused, and nothing is left in it; killed, it
    owns nothing."""
    (tmp_path / "a").mkdir()
    p = runs.python("-c", HOLD, tmp_path / "a", wait=None)
    try:
        assert p.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match="another run is at work in it"), owned(tmp_path / "a"):
            pass
        assert list((tmp_path / "a").iterdir()) == []
    finally:
        p.send_signal(signal.SIGKILL)
        p.communicate()
    for _ in range(2):
        with owned(tmp_path / "a"):
            pass


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_second_run_is_refused_by_the_owner(tmp_path, own_cache, text, flags):
    """A run that starts or resumes in the folder of a living one says so and writes nothing."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    args = runs.arguments("--stage=pretrain", f"--dataset={text}", f"--out_dir={out}")
    object.__setattr__(args.train, "resume", bool(flags))
    with owned(out):
        line = error_line(train.run, args)
    assert "another run is at work in it" in line
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "{}"
