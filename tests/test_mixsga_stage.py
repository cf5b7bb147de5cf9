"""train.py --stage=continue and eval.py --tasks=mixsga as a user runs them: what is left behind,
resumed, measured and refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from foreign import TEXT, config_json, write_folder
from helpers import error_line, remake

import cli
import eval as evaluation
import mixsga
import sample
import train
from config import KVConfig
from data import prepare, sequential
from generate import generate
from loaders import checkpoint
from loaders.export import export
from loaders.runs import find_checkpoint, load_run
from report.made import read_record
from runs import arguments, assert_equal, before_step, call, losses, pretrain, tensors
from settings.experts import MixConfig
from settings.train import DataConfig
from tasks.text import mean_loss
from training import loop as trainer
from training import mixsga_table

pytestmark = pytest.mark.usefixtures("own_cache")
SMALL = [
    "--adapt_steps=6",
    "--adapt_batch_size=4",
]
EXPERTS = ["--group_sizes=1,2", "--expert_ratios=1:3"]
OWN = {  # what a kind of storage reads
    "mixsga": ["--kv_tail=5", *EXPERTS],
    "gqa": ["--kv_tail=5", "--kv_share=0.5"],
    "cla": ["--kv_tail=5", "--kv_share=0.5"],
    "dense": [],
}


def go_on(out: Path, text: str, base: Path, *flags) -> Path:
    """Run the stage; its folder."""
    kind = next((flag[5:] for flag in flags if flag.startswith("--kv=")), "mixsga")
    args = arguments(
        "--stage=continue",
        f"--dataset={text}",
        f"--out_dir={out}",
        f"--init_from={base}",
        *SMALL,
        *OWN.get(kind, []),
        *flags,
    )
    train.run(args)
    return out / f"{kind}-s{args.train.seed}"


@pytest.mark.parametrize("kv", ["mixsga", "gqa", "cla", "dense"])
def test_continue_leaves_a_run_that_loads_samples_and_is_measured(
    kv, tmp_path, text, base, monkeypatch, capsys
):
    """The trained model, read back, gives the same logits; eval.py's row has its perplexity,
    method, share and a smaller cache; sample.py decodes through it and says what it held."""
    made = []
    keep = trainer.Trainer.__init__
    monkeypatch.setattr(
        trainer.Trainer,
        "__init__",
        lambda self, stage, *a: (made.append(stage), keep(self, stage, *a))[1],
    )
    stage = go_on(tmp_path / "run", text, base, f"--kv={kv}")
    model = made[0].model.eval()
    run = load_run(stage)
    x, y = sequential(prepare(text, DataConfig(), run.tokenizer).val, 6, 32)
    with torch.no_grad():
        assert torch.equal(run.model(x), model(x))
    weight = "layers.0.self_attn.v_proj.weight"
    assert not torch.equal(
        run.model.state_dict()[weight], load_run(base).model.state_dict()[weight]
    )
    assert all(p.router is None or p.router.weight.grad is not None for p in mixsga.experts(model))
    capsys.readouterr()
    call(evaluation, f"--out_dir={stage}", "--sequences=6")
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["method"] == kv and row["value"] == pytest.approx(
        math.exp(mean_loss(model, x, y, 6))
    )
    assert (
        (row["kv_kept_model"] < 1) == (row["cache_bytes"] < row["dense_bytes"]) == (kv != "dense")
    )
    call(
        sample,
        f"--out_dir={stage}",
        "--prompt=abc abc",
        "--max_new_tokens=9",
        "--temperature=0",
        "--num_samples=1",
    )
    out, err = capsys.readouterr()
    want = generate(model, [run.tokenizer.encode("abc abc")], 9, temperature=0.0)[0][0]
    assert run.tokenizer.decode(want) in out and "of a dense one" in err
    if kv == "mixsga":  # integers are compared with 16 bits
        call(
            evaluation,
            f"--out_dir={stage}",
            "--tasks=continuation",
            "--sequences=6",
            "--query=5",
            "--continuation=8",
            "--kv_bits=16,8",
            "--key_block=16",
        )
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [(r["key_bits"], "kl" in r) for r in rows] == [(16, False), (8, True)] and {
            r["dense_value"] for r in rows
        } == {rows[0]["value"]}
    if kv != "dense":
        with pytest.raises(ValueError, match=f"kv={kv}"):
            export(run, tmp_path / "their")


def test_continue_starts_aligned_and_calibrated(tmp_path, text, base, monkeypatch):
    """Before its first step the dense logits are the base's, heads are others, and routers are not
    random; with the flags off all is as it was."""
    first = {}
    monkeypatch.setattr(train, "train", lambda stage, *a: first.setdefault("stage", stage))
    go_on(tmp_path / "a", text, base)
    go_on(tmp_path / "a2", text, base)
    model = first.pop("stage").model
    dense = load_run(base).model
    x = torch.arange(32)[None] % 50
    assert not torch.allclose(
        model.layers[0].self_attn.v_proj.weight, dense.layers[0].self_attn.v_proj.weight, atol=1e-3
    )
    assert all(p.offset.abs().max() > 0 for p in mixsga.experts(model))
    plain = type(dense)(dense.cfg)
    plain.load_state_dict({k: t for k, t in model.state_dict().items() if ".kv_path." not in k})
    assert (plain.eval()(x) - dense(x)).abs().max() < 1e-4
    go_on(tmp_path / "b", text, base, "--align_heads=False", "--calibrate_experts=False")
    model = first["stage"].model
    assert torch.equal(
        model.layers[0].self_attn.v_proj.weight, dense.layers[0].self_attn.v_proj.weight
    )
    assert all(p.offset.abs().max() == 0 for p in mixsga.experts(model))


def test_continue_resumes_bitwise(tmp_path, text, base, monkeypatch):
    """Stopped after step 3 and resumed, it ends with the losses and tensors of the unbroken run;
    other experts are refused by name."""
    whole = go_on(tmp_path / "whole", text, base, "--save_interval=3")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        before_step(m, 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        go_on(tmp_path / "half", text, base, "--save_interval=3")
    with pytest.raises(SystemExit):
        go_on(tmp_path / "half", text, base, "--save_interval=3", "--resume", "--expert_ratios=1:1")
    half = go_on(tmp_path / "half", text, base, "--save_interval=3", "--resume")
    assert losses(half) == losses(whole)
    assert_equal(tensors(find_checkpoint(half)), tensors(find_checkpoint(whole)))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--group_sizes=1,2,4", "--expert_ratios=3:1:6"], "n_kv_head=2"),
        (["--kv=value_groups"], "stage=continue"),
        (["--kv_tail=31"], "kv_tail=31"),
        (["--kv_tail_block=2"], "kv_tail_block with stage=continue"),
        (["--init_from=scratch"], "init_from=scratch"),
        (["--stage=adapt"], "group_sizes"),
        (["--kv=dense", *EXPERTS], "group_sizes, expert_ratios with kv=dense"),
        (["--kv=mixsga", "--kv_share=0.5"], "give --kv=gqa"),
        (["--stage=adapt", "--kv=gqa"], "--stage=continue"),
        (["--kv=gqa", "--kv_share=0.2"], "kv_share=0.2"),
    ],
)
def test_wrong_flags_of_the_stage_get_one_line(flags, said, tmp_path, text, base):
    """What came, what is allowed and what to do, in one line; nothing is left behind."""
    with pytest.raises(ValueError) as e:
        go_on(tmp_path / "run", text, base, *flags)
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A model of others: a folder with a tokenizer of 261 ids, a chat template and end tokens."""
    folder = write_folder(tmp_path_factory.mktemp("theirs") / "model", config_json())
    about = {"chat_template": "{{ messages[0].content }}!", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 260]}')
    return folder


def train_theirs(text: str, *flags) -> None:
    """Train on a text with these flags."""
    own = ["--device=cpu", "--eval_sequences=3", "--adapt_batch_size=2", f"--dataset={text}"]
    train.run(cli.parse_args(train.CONFIGS, [*own, *map(str, flags)]))


@pytest.mark.parametrize("kv", ["dense", "mixsga"])
def test_a_continued_model_of_others_keeps_its_tokenizer(
    kv, tmp_path, text, theirs, trainers, capsys
):
    """The run alone, its base gone, loads with the ids, end tokens and chat template that it was
    trained with and gives the trained model's logits; it is resumed, sampled from, measured,
    adapted in windows of its own length, and exported with its tokenizer."""
    copy = shutil.copytree(theirs, tmp_path / "copy" / "model")
    its = load_run(theirs).tokenizer
    flags = ["--stage=continue", f"--init_from={copy}", f"--kv={kv}", "--block_size=16"]
    flags += [f"--out_dir={tmp_path / 'run'}", *(EXPERTS if kv == "mixsga" else [])]
    flags += ["--kv_tail=3"] if kv == "mixsga" else []
    train_theirs(text, *flags, "--adapt_steps=2")
    train_theirs(text, *flags, "--adapt_steps=3", "--resume")
    assert [trainer.first for trainer in trainers] == [0, 2]
    shutil.rmtree(copy)
    stage = tmp_path / "run" / f"{kv}-s0"
    run = load_run(stage)
    assert run.tokenizer.name == its.name and run.tokenizer.encode(TEXT) == its.encode(TEXT)
    assert run.tokenizer.ends == its.ends == (257, 260) and run.tokenizer.chat == its.chat
    x = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(run.model(x), trainers[-1].s.model.eval()(x))
    call(sample, f"--out_dir={stage}", "--prompt=hello", "--max_new_tokens=4", "--temperature=0")
    out = capsys.readouterr().out
    assert (
        out.startswith("hello")
        and "hello"
        + run.tokenizer.decode(generate(run.model, [its.encode("hello")], 4, stop=[257, 260])[0][0])
        in out
    )
    call(evaluation, f"--out_dir={stage}", "--sequences=2", f"--results={tmp_path / 'rows'}")
    if kv == "dense":
        to_adapt = [f"--init_from={stage}", f"--out_dir={tmp_path / 'on top'}", "--adapt_steps=1"]
        train_theirs(text, "--stage=adapt", "--adapter=lora", *to_adapt)
        assert trainers[-1].s.window == 16
        assert load_run(tmp_path / "on top").tokenizer.name == its.name
        folder = export(run, tmp_path / "exported")
        assert json.loads((folder / "tokenizer.json").read_text()) == its.definition
        assert load_run(folder).tokenizer.chat == its.chat


def test_a_changed_tokenizer_of_a_run_is_refused(tmp_path, text, theirs):
    """Another tokenizer.json than the run was trained with, none, as in runs of before, or words
    about conversations that are not ours, get one line, though the manifest fits them."""
    train_theirs(
        text,
        *["--stage=continue", f"--init_from={theirs}", "--kv=dense", "--adapt_steps=1"],
        f"--out_dir={tmp_path / 'run'}",
    )
    path = find_checkpoint(tmp_path / "run")
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != checkpoint.MANIFEST}
    spec = json.loads(files["tokenizer.json"])
    spec["model"]["merges"].pop()
    other = remake(tmp_path / "a", **files | {"tokenizer.json": json.dumps(spec).encode()})
    assert "its tokenizer.json is that of model-" in error_line(load_run, other)
    bare = {name: data for name, data in files.items() if name != "tokenizer.json"}
    assert "no tokenizer.json is kept with it" in error_line(
        load_run, remake(tmp_path / "c", **bare)
    )
    config = json.loads(files["config.json"]) | {"chat": {"template": 1, "names": {}, "ends": []}}
    other = remake(tmp_path / "b", **files | {"config.json": json.dumps(config).encode()})
    assert "config.json: its chat" in error_line(load_run, other)


@pytest.fixture(scope="module")
def eight(tmp_path_factory, text) -> Path:
    """A pretrained stage with 4 KV heads and 4 layers."""
    folder = tmp_path_factory.mktemp("eight")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(folder / "run", text, "--pretrain_steps=10", "--n_kv_head=4", "--n_layer=4")


TABLE = [
    "--tasks=mixsga",
    "--steps=2",
    "--lr=0.001",
    "--batch_size=4",
    "--sequences=4",
    "--h2o=0.5",
    "--kv_tail=4",
]


def table(folder: Path, text: str, base: Path, capsys, *flags) -> list[dict]:
    capsys.readouterr()
    call(
        evaluation, *TABLE, f"--dataset={text}", f"--out_dir={base}", f"--results={folder}", *flags
    )
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_table_has_every_row_and_goes_on_where_it_stopped(
    tmp_path, text, eight, capsys, monkeypatch
):
    """Rows of all methods at equal shares, ablations, and H2O; a second call trains none of them
    again, one with a further seed only that."""
    rows = table(tmp_path, text, eight, capsys, "--mixes=3:1:6,1-2@1:1+2")
    names = [r["name"] for r in rows]
    assert (
        names[:4] == ["dense", "mixSGA 3:1:6", "GQA 50%", "CLA 50%"]
        and names[-1] == "mixSGA 1-2@1:1+2"
        and len(set(names)) == len(names) == 14
    )
    assert {n.split(", ", 1)[1] for n in names if ", " in n} == {
        "no tail",
        "nothing added",
        "random router",
        "router not calibrated",
        "heads not aligned",
        "no consistency loss",
        "LM gradient to the router",
    }
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    by = {r["name"]: r for r in rows}
    assert (
        by["GQA 50%, no tail"]["kv_kept_model"] == by["CLA 50%, no tail"]["kv_kept_model"] == 0.5
        and by["dense"]["kv_kept_model"] == 1
    )
    assert by["GQA 50%"]["kv_kept_model"] == pytest.approx((4 + 28 / 2) / 32)
    assert all(set(r["h2o"]) == {"0.5", "1"} for r in rows[1:4]) and not any(
        r["h2o"] for r in rows[4:]
    )
    # 4 sequences: fewer than the 32 of H2O
    assert all(r["h2o"]["1"] == pytest.approx(r["value"]) for r in rows[1:4])
    assert all(0 < r["agreement"] <= 1 and r["cache_bytes"] < r["dense_bytes"] for r in rows[1:])
    trained = []
    monkeypatch.setattr(mixsga_table, "train_here", lambda stage, *a: trained.append(stage.name))
    assert table(tmp_path, text, eight, capsys, "--mixes=3:1:6,1-2@1:1+2") == rows and trained == []
    more = table(tmp_path, text, eight, capsys, "--mixes=3:1:6", "--ablations=False", "--seeds=2")
    assert (
        [r["seed"] for r in more] == [0] * 7 + [1] * 7
        and len(trained) == 7
        and all("seed 1" in n for n in trained)
    )
    assert len(json.loads((tmp_path / "results.json").read_text())) == 14 + 7
    assert read_record(tmp_path / "results.json")["seeds"] == [0, 1]


def test_a_row_is_what_a_stage_trains(tmp_path, text, eight, capsys):
    """The table's mixSGA row equals the model that train.py --stage=continue leaves with the same
    settings: perplexity to float32's digits."""
    rows = table(tmp_path, text, eight, capsys, "--mixes=3:1:6", "--ablations=False")
    args = arguments(
        "--stage=continue",
        f"--dataset={text}",
        f"--out_dir={tmp_path / 'run'}",
        f"--init_from={eight}",
        "--kv_tail=4",
        "--adapt_steps=2",
        "--adapt_batch_size=4",
        "--adapt_lr=0.001",
        "--n_kv_head=4",
        "--n_layer=4",
    )
    train.run(args)
    run = load_run(tmp_path / "run" / "mixsga-s0")
    x, y = sequential(prepare(text, DataConfig(), run.tokenizer).val, 4, 32)
    assert rows[1]["value"] == pytest.approx(math.exp(mean_loss(run.model, x, y, 4)), rel=1e-6)


def test_the_miniature_pretrains_its_own_base(tmp_path, text, capsys, monkeypatch):
    """Without a base one is pretrained; two of its rows are measured here, with few steps."""
    monkeypatch.setattr(mixsga_table, "MINI_STEPS", 2)
    monkeypatch.setattr(mixsga_table, "MINI_WINDOW", 32)
    monkeypatch.setattr(
        mixsga_table,
        "rows_of",
        lambda *a: [
            mixsga_table.Row("dense", KVConfig(kv="dense"), MixConfig()),
            mixsga_table.Row("m", KVConfig(kv="mixsga", kv_tail=3), MixConfig()),
        ],
    )
    call(
        evaluation,
        "--tasks=mixsga",
        "--steps=1",
        "--sequences=4",
        f"--dataset={text}",
        f"--results={tmp_path}",
    )
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["method"] for r in rows] == ["dense", "mixsga"] and "miniature" in rows[0][
        "settings"
    ]["base"]
    assert rows[1]["trainable_parameters"] - rows[0]["trainable_parameters"] == 4 * (
        3 * 128 + 3 + 3
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--mixes=1-3@1:1"], "n_kv_head=4"),
        (["--mixes=3:1:6+x"], "+K"),
        (["--mixes=1:2:3:4:5"], "one to four"),
        (["--tasks=mixsga,perplexity"], "alone"),
        (["--h2o=2"], "h2o"),
        (["--steps=0"], "steps=0"),
        (["--mixes="], "one entry"),
    ],
)
def test_wrong_flags_of_the_table_get_one_line(flags, said, tmp_path, text, eight, capsys):
    """One line; nothing is trained or written."""
    with pytest.raises((ValueError, SystemExit)) as e:
        table(tmp_path / "t", text, eight, capsys, *flags)
    message = capsys.readouterr().err if isinstance(e.value, SystemExit) else str(e.value)
    assert said in message and "\n" not in message.strip() and not (tmp_path / "t").exists()


def test_an_adapter_is_no_base_for_the_table(tmp_path, text, base, capsys):
    """Only a dense base is trained on: a run with shared heads is refused."""
    stage = go_on(tmp_path / "run", text, base)
    with pytest.raises(ValueError, match="dense base"):
        table(tmp_path / "t", text, stage, capsys, "--mixes=1:1")
    assert checkpoint.load(find_checkpoint(stage)).config["mix"]["expert_ratios"] == "1:3"


@pytest.mark.parametrize("damaged", ["[1, 2", "{}", "\xff", "[" * 100_000])
def test_damaged_results_of_before_are_named_and_stay(damaged, tmp_path, text, eight, capsys):
    """One line that names the file, before anything is trained; the file is as it was."""
    (tmp_path / "t").mkdir()
    path = tmp_path / "t" / "results.json"
    path.write_bytes(damaged.encode("latin-1"))
    message = error_line(table, tmp_path / "t", text, eight, capsys, "--mixes=1:1")
    assert str(path) in message and "move it away" in message
    assert path.read_bytes() == damaged.encode("latin-1")
