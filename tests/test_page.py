"""docs/results.md is rebuilt from results files: marks, made-up results, runs/all.sh, made.json."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import error_line

import bench
import cli
import eval as evaluation
from report import made, page
from runs import call

ROOT = Path(__file__).resolve().parents[1]
CODE = "c0de" * 16
ALL = (ROOT / "runs" / "all.sh").read_text()
# name, folder and needs of each script that runs/all.sh runs, in order
LISTED = re.findall(r'^table (\w+) (\S+) (?:"([^"]+)"|(\w+)) "[^"]+"$', ALL, re.MULTILINE)
# the files that choices.sh needs, and those that scripts need
(ITEMS,) = re.findall(r'^ITEMS="([^"]+)"$', ALL, re.MULTILINE)
FILES = ("SmolLM2-135M-Instruct.Q4_1.gguf", *re.findall(r"\w+\.jsonl", ALL))
ROW = dict(task="t", method="value_groups", metric="loss", n_groups=4, setting="a|b S=4 K=2")
STORED = dict(kv_kept_model=0.75, cache_bytes=78, dense_bytes=100, value_keep=0.5)
BEFORE = """# Results

<!-- table made: runs/a.sh out/a -->

| old |
|---|

(not run again on this code)

<!-- end -->
between
<!-- table absent: runs/b.sh out/a/y out/b -->
| kept |
|---|
<!-- end -->
<!-- table by_hand: runs/b.sh out/b -->

| kept |
|---|

(Measured by hand.)

<!-- end -->
<!-- table nothing: runs/b.sh out/b -->

(not measured yet)

<!-- end -->
"""
AFTER = """# Results

<!-- table made: runs/a.sh out/a -->

| run | row | whole model KV kept | of dense | loss | seeds | over whole |
| --- | --- | --- | --- | --- | --- | --- |
| x | value_groups a\\|b S=4 K=2 | 75.0% | 78.00% | 3.0000 +- 1.4142 | 2 | +1.0000 |
| y | dense | 100.0% | 100.00% | 2.0000 | 1 |  |

(Made by runs/a.sh: a card; Python 3.1, torch 2.1, triton unknown; code c0dec0dec0de; commit \
abcdefabcd with changes; seeds 0, 1; texts t0 123456789abc; 5 s)

<!-- end -->
between
<!-- table absent: runs/b.sh out/a/y out/b -->

| kept |
|---|

(not run again on this code)

<!-- end -->
<!-- table by_hand: runs/b.sh out/b -->

| kept |
|---|

(Measured by hand.)

(not run again on this code)

<!-- end -->
<!-- table nothing: runs/b.sh out/b -->

(not measured yet)

<!-- end -->
"""


def leave(folder: Path, rows: list[dict], **changes) -> None:
    """A results file, and a record of it as a program would leave it, some of it changed."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows).encode()
    (folder / "results.json").write_bytes(text)
    record = {
        "code": CODE,
        "commit": "abcdef" * 6,
        "changed": True,
        "device": "a card",
        "python": "3.1",
        "torch": "2.1",
        "triton": None,
        "seeds": [r["seed"] for r in rows],
        "texts": [{"corpus": "t0", "sha256": "123456789abcdef"}],
        "seconds": 1.5,
        "results": hashlib.sha256(text).hexdigest(),
    }
    (folder / "made.json").write_text(json.dumps(record | changes))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with BEFORE as its page, and results of two runs for its first table, one of them
    with two seeds in folders of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "code_version", lambda: CODE)
    monkeypatch.setattr(sys, "argv", ["page.py"])
    (tmp_path / "docs").mkdir()
    page.PAGE.write_text(BEFORE)
    for seed, value in ((0, 2.0), (1, 4.0)):
        leave(
            Path(f"out/a/x-{seed}"), [ROW | STORED | dict(value=value, dense_value=2.0, seed=seed)]
        )
    whole = dict(kv_kept_model=1.0, cache_bytes=100, method="dense", setting="")
    leave(
        Path("out/a/y"),
        [ROW | STORED | whole | dict(value=2.0, dense_value=2.0, seed=0)],
        seconds=2,
    )
    return tmp_path


def body(name: str) -> str:
    """What stands between a table's marks on the page."""
    return next(m["body"] for m in page.TABLE.finditer(page.PAGE.read_text()) if m["name"] == name)


def test_every_table_of_results_is_between_marks():
    """No table stands outside of them; a mark names a script and folders that runs/all.sh knows,
    and no other table has its name; a script that makes a table is run by runs/all.sh."""
    text = (ROOT / page.PAGE).read_text()
    assert re.findall(r"^\|.*", page.TABLE.sub("", text), re.MULTILINE) == []
    marks = list(page.TABLE.finditer(text))
    assert len({m["name"] for m in marks}) == len(marks) == text.count("<!-- table ")
    folders = [folder for _, folder, *_ in LISTED]
    for m in marks:
        assert (ROOT / m["script"]).is_file()
        for word in m["words"].split():
            assert "=" in word or any(f"{word}/".startswith(f"{f}/") for f in folders), word
    scripts = {path.stem for path in (ROOT / "runs").glob("*.sh")} - {"all", "prepare"}
    assert {name for name, *_ in LISTED} == scripts and len(LISTED) == len(scripts)
    by_table = {Path(m["script"]).stem for m in marks}
    assert scripts - by_table == {"trained_basis"}  # a row of value_groups.sh's


def test_folders_of_all_are_those_that_scripts_fill():
    """The folder that runs/all.sh names is the script's own by default."""
    for name, folder, *_ in LISTED:
        (own,) = re.findall(
            r'^OUT="\$\{\d:-(\S+)\}"$', (ROOT / f"runs/{name}.sh").read_text(), re.M
        )
        assert own == folder


def test_page_takes_up_results_and_leaves_the_rest(place):
    """Means over seeds, what each run is called, the record, and the note, as written down by hand;
    a second time changes nothing."""
    page.main()
    assert page.PAGE.read_text() == AFTER
    page.main()
    assert page.PAGE.read_text() == AFTER
    assert os.listdir("docs") == ["results.md"]


def test_page_shows_a_measured_zero():
    """An agreement of 0 and no trainable parameters are numbers; what some rows lack is none."""
    row = ROW | STORED | dict(value=1.0, agreement=0.0, trainable_parameters=0, kl=0.0)
    cells = page.cells_of([row, row | dict(kl=None)])
    assert (cells["agreement"], cells["trainable"], cells["KL"]) == ("0.0%", "0", "")


def test_page_shows_rouge_l_beside_perplexity():
    """A row of mixSGA's table that answered instructions, too: both means, with their spread."""
    row = {"task": "mixsga", "method": "gqa", "name": "GQA 50%", "metric": "perplexity"}
    bytes_held = {"cache_bytes": 50, "dense_bytes": 100, "of_dense": 0.5}
    same = [row | bytes_held | {"value": v, "rouge_l": r} for v, r in ((8.0, 0.2), (9.0, 0.3))]
    cells = page.cells_of(same)
    assert cells["perplexity"].startswith("8.5000 +- ")
    assert cells["ROUGE-L"].startswith("0.2500 +- ")


def test_page_joins_the_seeds_of_a_budget_of_bytes(tmp_path):
    """Seeds of one budget are one line, though each keeps another share of the values."""
    mark = page.Mark("x", "runs/a.sh", [tmp_path / "a"], {})
    paths = []
    for seed in (0, 1):
        path = tmp_path / "a" / f"run-{seed}" / "results.json"
        path.parent.mkdir(parents=True)
        kept = STORED | dict(value_keep=0.5 + seed / 100)
        path.write_text(json.dumps([ROW | kept | dict(select={}, seed=seed, value=seed)]))
        paths.append(path)
    (line,) = page.lines_of(paths, mark)
    assert line["seeds"] == "2"


def test_page_tells_results_of_other_code_and_without_a_record(place):
    """Both have the note; it goes when the code has run, and comes when a page is rebuilt where the
    results are not, by other code."""
    leave(Path("out/a/y"), json.loads(Path("out/a/y/results.json").read_text()), code="other")
    page.main()
    assert "code c0dec0dec0de, other;" in body("made") and page.OLD in body("made")
    leave(Path("out/a/y"), json.loads(Path("out/a/y/results.json").read_text()))
    page.main()
    assert page.OLD not in body("made")
    Path("out/a/y/results.json").write_text(Path("out/a/y/results.json").read_text() + " ")
    page.main()
    assert "code c0dec0dec0de, unknown;" in body("made") and page.OLD in body("made")
    page.PAGE.write_text(AFTER)
    shutil.rmtree("out")
    page.main()
    assert page.PAGE.read_text() == AFTER
    page.PAGE.write_text(AFTER.replace("code c0dec0dec0de", "code c1dec0dec0de"))
    page.main()
    assert body("made").count(page.OLD) == 1 and "78.00%" in body("made")
    page.PAGE.write_text(page.PAGE.read_text().replace("code c1dec0", "code c0dec0"))
    page.main()
    assert page.PAGE.read_text() == AFTER


@pytest.mark.parametrize("damage", ["[{", "{}", "[1]", '[{"method": "dense", "metric": "loss"}]'])
def test_page_names_a_damaged_file_and_does_the_rest(place, damage, capsys):
    """One line, exit code 2; its table stays, others are made."""
    page.PAGE.write_text(BEFORE + BEFORE.replace(" made:", " other:").replace("out/a", "out/a/y"))
    Path("out/a/x-0/results.json").write_text(damage)
    with pytest.raises(SystemExit) as e:
        page.exit_on_bad_input(page.main)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1
    assert "table made" in said and "out/a/x-0/results.json" in said
    assert "| old |" in body("made") and "| dense | 100.0% |" in body("other")


def test_page_is_whole_when_interrupted(place, monkeypatch):
    """A kill before the page is replaced leaves it as it was, and no other file."""

    def killed(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(made.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        page.main()
    assert page.PAGE.read_text() == BEFORE and os.listdir("docs") == ["results.md"]


def test_page_leaves_out_what_is_begun_and_rows_without_a_field(place):
    """Results of a script that has begun and not ended, and rows whose field is another; a row that
    is there twice with one seed is two lines."""
    Path("out/a.state").write_text("begun\n")
    page.main()
    assert "| old |" in body("made")
    Path("out/a.state").write_text("a key\n")
    page.PAGE.write_text(BEFORE.replace(" out/a ", " out/a method=dense "))
    page.main()
    assert "| dense | 100.0% |" in body("made") and "value_groups" not in body("made")
    leave(Path("out/a/y"), 2 * json.loads(Path("out/a/y/results.json").read_text()))
    page.main()
    assert body("made").count("| dense | 100.0% | 100.00% | 2.0000 | 1 |") == 2  # no two seeds


def test_page_has_a_table_across_shares_of_the_bytes(place):
    """A line for each way to store and text, KL and loss over dense where the nearest share's column
    is, bytes beside it that are others, means of seeds; dense rows and other numbers are none."""
    page.PAGE.write_text(BEFORE.replace("out/a -->", "out/a across=bytes -->"))
    row = ROW | STORED | dict(method="select", relevance="future bytes=0.5", dense_value=2.0)
    row |= dict(setting="output S=8 keys:4 values:routed", select={})
    texts = [dict(text={"corpus": name, "sha256": name}) for name in "uv"]
    rows = [
        row | texts[0] | dict(value=2.125, kl=0.01, of_dense=0.124, seed=0),
        row | texts[0] | dict(value=2.375, kl=0.03, of_dense=0.126, seed=1),
        row | texts[0] | dict(value=2.5, kl=0.4, of_dense=0.03, seed=0),
        row | texts[1] | dict(value=2.0, kl=0.2, of_dense=0.52, seed=0),
        row | texts[1] | dict(value=2.0, of_dense=0.22, seed=0),
        row | texts[1] | dict(method="dense", setting="", value=2.0, kl=0, of_dense=1.0, seed=0),
    ]
    shutil.rmtree("out/a/x-1")
    shutil.rmtree("out/a/y")
    leave(Path("out/a/x-0"), rows)
    page.main()
    series = "tokens and groups, routed bits, future"
    assert body("made").splitlines()[1:5] == [
        "| what is stored | text | 50 % | 12.5 % | 4 % |",
        "| --- | --- | --- | --- | --- |",
        f"| {series} | u |  | 0.0200 / +0.2500 | 0.4000 / +0.5000 (3.0%) |",
        f"| {series} | v | 0.2000 / +0.0000 (52.0%) |  |  |",
    ]


@pytest.mark.parametrize(
    "word, says",
    [
        ("across=byte", "across=byte: columns are shares"),
        ("acros=bytes", "acros in its first mark"),
    ],
)
def test_page_refuses_a_word_that_says_nothing(place, word, says):
    """A mark whose columns there are none of, or that asks for a field that no row has: one line,
    and the table stays."""
    page.PAGE.write_text(BEFORE.replace("out/a -->", f"out/a {word} -->"))
    assert says in error_line(page.main)
    assert "| old |" in body("made")


@pytest.mark.parametrize("page_text", ["<!-- end -->\n", BEFORE.replace("<!-- end -->", "", 1)])
def test_page_refuses_marks_that_are_no_pairs(place, page_text):
    """Nothing is replaced between the first mark of one table and the last of another."""
    page.PAGE.write_text(page_text)
    with pytest.raises(ValueError, match="marks are pairs"):
        page.main()
    assert page.PAGE.read_text() == page_text


# -- runs/all.sh


@pytest.fixture
def scripts(tmp_path):
    """(folder, run): a folder with stand-ins for every script, each of which notes its name and
    makes its folder; run(**environment) runs all.sh there and returns what ended, and the notes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "runs").mkdir()
    keys = "\n".join(f"echo {name}.sh key-$CODE-{name}" for name, *_ in sorted(LISTED))
    stands = {
        "bin/nvidia-smi": "echo GPU 0\necho GPU 1",
        "bin/python": f'[ "$2" = report.page ] && echo page >> notes && exit\n{keys}',
        **{f"runs/{n}.sh": f"echo {n} >> notes\nmkdir {f} && touch {f}/x" for n, f, *_ in LISTED},
    }
    for name, text in stands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "runs" / "all.sh", tmp_path / "runs")
    for file in FILES:
        (tmp_path / file).touch()

    def run(**environment) -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "notes").write_text("")
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        environment = {"PATH": path, "CODE": "1"} | environment
        done = subprocess.run(
            ["bash", "runs/all.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, (tmp_path / "notes").read_text().split()

    return tmp_path, run


def test_all_runs_each_script_once_for_each_code(scripts):
    """All in order and then the page; nothing again but what other code, FORCE=1, a lost folder or
    a script that failed ask for; results of before are moved aside."""
    folder, run = scripts
    names = [name for name, *_ in LISTED]
    assert run()[1] == [*names, "page"]
    for name, filled in (("adapters", "adapters"), ("trained_basis", "basis")):
        assert (folder / "out" / f"{filled}.state").read_text() == f"key-1-{name}\n"
    assert run()[1] == ["page"]
    shutil.rmtree(folder / "out" / "recall")
    assert run()[1] == ["recall", "page"]
    (folder / "out" / "bits" / "x").write_text("of before")
    (folder / "runs" / "bits.sh").write_text("mkdir out/bits\nexit 3\n")
    done, notes = run(CODE="2")
    assert notes == [*(name for name in names if name != "bits"), "page"]
    assert done.returncode == 1 and done.stderr.endswith("failed: bits\n")
    assert (folder / "out" / "bits.state").read_text() == "begun\n"
    assert (folder / "out" / "bits.before-1" / "x").read_text() == "of before"
    assert run(CODE="2")[0].returncode == 1  # tried again, alone
    assert (folder / "out" / "bits.before-2").is_dir() and not (
        folder / "out/published.before-2"
    ).exists()
    assert len(run(CODE="2", FORCE="1")[1]) == len(names)


def test_all_knows_the_files_that_scripts_read():
    """Files of questions and instructions that a script reads by default are its needs."""
    for name, _, *needs in LISTED:
        lines = (ROOT / "runs" / f"{name}.sh").read_text().splitlines()
        code = "\n".join(line for line in lines if not line.startswith("#"))
        read = re.findall(r"(?<![\w/])\w+\.jsonl", code)
        known = re.findall(r"\w+\.jsonl", "".join(needs).replace("$ITEMS", ITEMS))
        assert set(read) == set(known), name


@pytest.mark.parametrize("script", sorted((ROOT / "runs").glob("*.sh")), ids=lambda p: p.stem)
def test_scripts_say_what_can_be_set(script):
    """The usage names every variable that a script has a default for; lines have 100 columns."""
    lines = script.read_text().splitlines()
    assert [line for line in lines if len(line) > 100] == []
    usage = "\n".join(line for line in lines if line.startswith("#")).partition("# usage: ")[2]
    settable = re.findall(r"\$\{([A-Z_]+):-", "\n".join(lines))
    assert [name for name in settable if f"[{name}=" not in usage] == []


def test_all_leaves_out_what_it_cannot_run(scripts):
    """Without a GPU and without the model: scripts for a CPU alone, a line for each. With one GPU,
    what takes two is left out, and what lacks one of its files."""
    folder, run = scripts
    (folder / "bin" / "nvidia-smi").write_text("#!/bin/bash\necho GPU 0\n")
    for file in ("lambada.jsonl", "test.jsonl"):  # the last of each script
        (folder / file).unlink()
    assert {name for name, *_ in LISTED} - set(run(FORCE="1")[1]) == {
        "two_gpus",
        "choices",
        "instruct",
    }
    (folder / "bin" / "nvidia-smi").unlink()
    (folder / FILES[0]).unlink()
    done, notes = run(FORCE="1")
    assert done.returncode == 0
    assert notes == [*(name for name, _, _, needs in LISTED if needs == "CPU"), "page"]
    assert done.stdout.count("left out: no") == len(LISTED) - len(notes) + 1


def test_a_missing_file_ends_choices_before_anything_is_trained(scripts):
    """One line that names the file and what to do, exit code 2, and nothing has run or is made."""
    folder, _ = scripts
    shutil.copy(ROOT / "runs" / "choices.sh", folder / "runs")
    (folder / "bin" / "python").write_text("#!/bin/bash\necho ran >> ran\n")
    done = subprocess.run(
        ["bash", "runs/choices.sh", "lambada.jsonl,absent.jsonl"],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    said = "runs/choices.sh: absent.jsonl: there is no such file; give files that are there\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert not (folder / "ran").exists() and not (folder / "out").exists()


# -- made.json


@pytest.mark.parametrize(
    "word, cut",
    [
        ("/a/b/eval.py", "eval.py"),
        ("--out_dir=/a/b/", "--out_dir=b"),
        ("--dataset=text:/a/x.txt,text:y/z.txt,pycode", "--dataset=text:x.txt,text:y/z.txt,pycode"),
        ("--beside=~/a/b,/c", "--beside=b,c"),
        ("--mixes=2-4@1:4", "--mixes=2-4@1:4"),
        ("out/a", "out/a"),
    ],
)
def test_record_names_no_folders_of_the_machine(word, cut):
    """Absolute paths are cut to their last part, wherever they stand in a word."""
    assert made.without_folders(word) == cut


def test_bench_leaves_rows_and_how_they_were_made(tmp_path, monkeypatch, capsys):
    """The record's fields, beside the rows that are printed; of other rows it says nothing."""
    folder = tmp_path / "results"
    shape = ("--n_head=2", "--n_kv_head=1", "--head_dim=16", "--block_size=64", "--batch_size=1")
    flags = ("--what=decode", *shape, "--steps=1", "--cases=4:0.5", f"--results={folder}")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench.py"), *flags])
    call(bench, *flags, "--device=cpu")
    rows = json.loads((folder / "results.json").read_text())
    assert rows == json.loads(capsys.readouterr().out.splitlines()[-1])
    record = made.read_record(folder / "results.json")
    assert record["argv"] == ["bench.py", *flags[:-1], "--results=results"]
    assert record["code"] == made.code_version() and record["device"] == rows[0]["device"]
    assert (record["seeds"], record["texts"]) == ([], []) and 0 < record["seconds"] < 60
    (folder / "results.json").write_text("[]")
    assert made.read_record(folder / "results.json") == {}
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    with pytest.raises(ValueError, match="is a file"):
        call(bench, "--what=decode", f"--results={folder / 'made.json'}")


def test_record_tells_texts_of_one_name_apart(tmp_path, monkeypatch):
    """Every file and folder of texts that a flag names has its flag, its own name and a sha256,
    of a folder one that changes with its files' contents and names; no folder of the machine is
    in the record, and corpora without a file have no entry."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a/t.txt", "b/t.txt", "c/t/one.txt", "d/t/one.txt", "e/t/two.txt", "q.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"of {name[0]}" if name[0] != "e" else "of d")
    (tmp_path / "d/t/.hidden").write_text("no text")
    texts = ",".join(f"text:{tmp_path / at}" for at in ("a/t.txt", "b/t.txt", "c/t", "d/t", "e/t"))
    flags = [f"--dataset={texts}", "--calibrate=pydocs,text:~/a/t.txt", "--tasks=zero_shot"]
    flags.append(f"--items={tmp_path / 'q.jsonl'}")
    args = cli.parse_args(evaluation.CONFIGS, flags)
    (tmp_path / "results.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
    made.write_record(tmp_path, "cpu", 0.0, args)
    assert str(tmp_path) not in (tmp_path / "made.json").read_text()
    files = made.read_record(tmp_path / "results.json")["files"]
    told = [(f["flag"], f["name"]) for f in files]
    names = ["t.txt", "t.txt", "t", "t", "t"]
    assert told == [*(("dataset", n) for n in names), ("calibrate", "t.txt"), ("items", "q.jsonl")]
    sha256 = [f["sha256"] for f in files]
    assert sha256[0] == sha256[5] == hashlib.sha256(b"of a").hexdigest()
    assert len(set(sha256)) == 6
    one = hashlib.sha256(b"of c").hexdigest()
    assert sha256[2] == hashlib.sha256(f"one.txt {one}\n".encode()).hexdigest()


def test_code_version_is_of_the_sources_alone(tmp_path, monkeypatch):
    """It changes with a source and a source's name; not with tests, pages or what programs left."""
    monkeypatch.setattr(made, "ROOT", tmp_path)
    for name in ("a.py", "room/__init__.py", "room/b.py", "tests/t.py", "out/x.py", "page.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    first = made.code_version()
    for name in ("tests/t.py", "out/x.py", "page.md"):
        (tmp_path / name).write_text("2")
    assert made.code_version() == first
    (tmp_path / "room" / "b.py").write_text("2")
    second = made.code_version()
    (tmp_path / "room" / "b.py").rename(tmp_path / "room" / "c.py")
    assert len({first, second, made.code_version()}) == 3
    assert made.commit() == {"commit": None, "changed": None}
