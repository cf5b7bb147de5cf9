"""What only files tell: corpora, runs and checkpoints that cannot be used are refused by one line,
and stay as they were."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from commands import (  # noqa: F401 (fixtures)
    PRETRAIN,
    TINY,
    complaint,
    here,
    process,
    run,
    trained,
    tree,
)

import cli
import data
from loaders import checkpoint, token_files
from loaders.tokenizer import get_tokenizer
from settings.train import DataConfig


def test_corpus_that_cannot_be_trained_on(capsys, here, text):
    """An empty corpus, one file too short for the context in either split, for either stage, is
    refused before anything is trained."""
    (here / "empty.txt").write_text("")
    (here / "short").mkdir()
    for i, n in enumerate((500, 500, 20)):
        (here / "short" / f"{i}.txt").write_text(f"{i}" * n)
    before = tree(here)
    for flag in ("dataset", "adapt_dataset"):
        other = [f"--dataset={text}"] if flag == "adapt_dataset" else []
        assert (
            "empty"
            in complaint(
                capsys, "train", *TINY, *other, f"--{flag}=text:empty.txt", "--out_dir=run"
            ).lower()
        )
        line = complaint(
            capsys,
            "train",
            *TINY,
            *other,
            f"--{flag}=text:short",
            "--out_dir=deep/run",
            "--block_size=600",
        )
        assert "block_size=600" in line and "601 are needed" in line
        for i in (1, 2):  # 20 letters or, where the hash of the content says so, 500, are held out
            line = complaint(
                capsys,
                "train",
                *TINY,
                *other,
                f"--{flag}=text:short",
                f"--val_fraction=0.{i}",
                "--block_size=510",
            )
            assert "val: " in line and "511 are needed" in line
        assert tree(here) == before


def test_token_id_out_of_range(capsys, here, text, tmp_path):
    """A token file with an id past the vocabulary, though its sha256 is right, and one with a wrong
    sha256, are named before step 0."""
    flags = [*PRETRAIN, f"--dataset={text}", "--out_dir=run"]
    tokens = data.prepare(text, DataConfig(), get_tokenizer("byte")).train
    raw = bytearray(tokens.path.read_bytes())
    payload = raw[token_files.HEADER_BYTES :]
    payload[10:12] = (300).to_bytes(2, "little")  # ids of the byte tokenizer end at 256
    header = json.loads(bytes(raw[len(token_files.MAGIC) : token_files.HEADER_BYTES]))
    tokens.path.write_bytes(bytes(raw[: token_files.HEADER_BYTES]) + bytes(payload))
    line = complaint(capsys, "train", *flags)
    assert str(tokens.path) in line and "sha256" in line
    header["sha256"] = hashlib.sha256(payload).hexdigest()
    head = (token_files.MAGIC + json.dumps(header).encode()).ljust(token_files.HEADER_BYTES)
    tokens.path.write_bytes(head + bytes(payload))
    line = complaint(capsys, "train", *flags)
    assert str(tokens.path) in line and "token id 300" in line and "0..256" in line
    assert tree(here) == {}


def test_out_dir_must_be_empty(capsys, here, text):
    """A named folder with something in it is left alone without --resume, and a failed start leaves
    an empty folder empty."""
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    (here / "bare").mkdir()
    before = tree(here)
    assert "is not empty; give --resume" in complaint(
        capsys, "train", *TINY, f"--dataset={text}", "--out_dir=full"
    )
    assert "is a file" in complaint(
        capsys, "train", *TINY, f"--dataset={text}", "--out_dir=full/notes.txt"
    )
    assert "no such file" in complaint(
        capsys, "train", *TINY, "--dataset=text:gone", "--out_dir=bare"
    )
    assert tree(here) == before


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "flipped":
        i = len(raw) * 2 // 3
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
    elif how == "truncated":
        path.write_bytes(raw[:-7])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
@pytest.mark.parametrize(
    "file",
    [
        "pretrain/model.safetensors",
        "pretrain/config.json",
        "pretrain/manifest.json",
        "routed-s0/adapter.safetensors",
        "routed-s0/config.json",
    ],
)
def test_damaged_checkpoint_is_named(file, how, run, capsys, here):
    """eval.py, sample.py and train.py --stage=adapt name a damaged checkpoint, the base of an
    adapter included, and change nothing."""
    stage, name = file.split("/")
    where = run / stage / "step-00000002"
    damage(where / name, how)
    before = tree(run)
    for program, flags in (("eval", ["--sequences=2"]), ("sample", ["--max_new_tokens=2"])):
        for out in {run / stage, run / "routed-s0", where}:
            line = complaint(capsys, program, f"--out_dir={out}", "--device=cpu", *flags)
            assert stage in line and any(
                w in line for w in (name, "no usable checkpoint", "that is gone", "manifest")
            ), line
    if stage == "pretrain":
        assert stage in complaint(
            capsys,
            "train",
            "--stage=adapt",
            f"--init_from={run / 'pretrain'}",
            "--out_dir=new",
            "--device=cpu",
        )
    assert tree(run) == before and tree(here) == {}


@pytest.mark.parametrize(
    "stage, key, field, value",
    [
        ("pretrain", "model", "n_embd", 40),
        ("pretrain", "model", "n_layer", 3),
        ("routed-s0", "adapter", "r", 5),
        ("routed-s0", "kv", "kv_layers", "1"),
        ("routed-s0", "adapter", "adapter", "moe_lora"),
    ],
)
def test_checkpoint_of_another_shape(stage, key, field, value, run, capsys):
    """A config.json that says another shape, with a manifest that fits it, is refused by names and
    shapes, not by a crash."""
    path = run / stage / "step-00000002"
    c = checkpoint.load(path)
    c.config[key][field] = value
    checkpoint.save(
        path.parent, path.name, step=c.step, tensors=c.tensors, config=c.config, state=c.state
    )
    before = tree(run)
    for program in ("eval", "sample"):
        line = complaint(capsys, program, f"--out_dir={path}", "--device=cpu")
        assert "does not fit" in line or "value-group state" in line, line
        assert any(w in line for w in ("of another shape", "missing", "unexpected")), line
    assert tree(run) == before


def test_adapter_without_its_base(run, capsys):
    """An adapter whose base was replaced by another, whole one, or moved away, is refused."""
    base = run / "pretrain" / "step-00000002"
    c = checkpoint.load(base)
    c.tensors["model"]["norm.weight"] += 1
    checkpoint.save(
        base.parent, base.name, step=c.step, tensors=c.tensors, config=c.config, state=c.state
    )
    assert "give the base it was trained on" in complaint(
        capsys, "sample", f"--out_dir={run / 'routed-s0'}", "--device=cpu"
    )
    shutil.rmtree(run / "pretrain")
    assert "that is gone; move base and adapter together" in complaint(
        capsys, "sample", f"--out_dir={run / 'routed-s0'}", "--device=cpu"
    )


def test_damaged_checkpoint_of_a_process(run, here):
    """A true process of sample.py on a flipped byte: one line after that of loading, exit 2."""
    damage(run / "pretrain" / "step-00000002" / "model.safetensors", "flipped")
    code, out, err, _ = process("sample", f"--out_dir={run / 'pretrain'}", cwd=here)
    assert (code, out, err.count("\n")) == (2, "", 2), err
    assert err.startswith("loading ")
    assert "model.safetensors is damaged" in err, err
    assert tree(here) == {}


@pytest.mark.parametrize(
    "program, flags, why",
    [
        ("sample", ["--prompt="], "an empty prompt"),
        ("sample", ["--prompt=" + "x" * 31], "the context is 32"),
        ("sample", ["--max_new_tokens=32"], "the context is 32"),
        ("sample", ["--device=cuda:99"], "device='cuda:99'"),
        ("eval", ["--device=tpu"], "device='tpu'"),
        ("eval", ["--block_size=33"], "context is 32"),
        ("eval", ["--methods=value_groups", "--budgets=0.1"], "at least one"),
        ("eval", ["--dataset=text:gone"], "no such file"),
        ("eval", ["--block_size=100000"], "the model's context is 32"),
        ("eval", ["--split=test"], "it has train, val, all"),
        (
            "eval",
            ["--tasks=continuation", "--query=20", "--continuation=12"],
            "some context must be left",
        ),
        ("eval", ["--tasks=continuation"], "32 tokens"),
        ("eval", ["--tasks=needle"], "22 tokens for a prompt"),
        ("eval", ["--tasks=variable_tracking", "--hops=3"], "4 tokens for a prompt"),
        ("eval", ["--tasks=multiple_choice", "--questions=gone.csv"], "no such file or folder"),
        ("eval", ["--sequences=2", "--results=/dev/null/x"], "dev/null"),
        ("eval", ["--results=/dev/null"], "is a file"),
    ],
)
def test_requests_the_model_cannot_meet(program, flags, why, run, capsys, here):
    """Prompts, contexts, budgets, devices and corpora that do not go with a whole checkpoint."""
    before = tree(run)
    for stage in ("pretrain", "routed-s0"):
        assert why in complaint(capsys, program, f"--out_dir={run / stage}", *flags)
    assert tree(run) == before and tree(here) == {}


@pytest.mark.parametrize("task", ["perplexity", "mixsga"])
def test_eval_refuses_a_base_beside_a_base(task, run, capsys):
    """--init_from beside --out_dir names the moved base of an adapter, and is refused where the
    run is a base itself."""
    flags = [f"--init_from={run / 'pretrain'}", f"--tasks={task}", "--sequences=2", "--device=cpu"]
    line = complaint(capsys, "eval", f"--out_dir={run / 'pretrain'}", *flags)
    assert f"init_from={run / 'pretrain'} with out_dir=" in line and "leave one of them out" in line


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--n_groups=16", "--kv_layers=2"], "layers are 0..1"),
        (["--adapter=none", "--kv=dense"], "give --kv=value_groups with --learn_basis"),
        (["--n_layer=3"], "the base has 2"),
        (["--block_size=33"], "the base knows 32"),
        (["--preset=paper"], "the base knows 32"),
        (["--tokenizer=gpt2"], "tokenizer"),
        (["--objective=distill"], "give --adapter=none and --learn_basis"),
        (["--objective=distill", "--adapter=moe_lora"], "give --adapter=none and --learn_basis"),
        (["--objective=distill", "--adapter=none"], "give --learn_basis, --value_router=linear or"),
        (["--adapter=none", "--learn_basis", "--kv_warmup=0.5"], "kv_warmup"),
        (["--adapter=none", "--learn_basis", "--topk_groups=4"], "topk_groups"),
        (["--kv_from=no/where"], "no such folder"),
    ],
)
def test_adapt_refuses_what_the_base_cannot(flags, why, run, capsys, here, text):
    """Layers, groups, contexts, shapes and tokenizers that do not go with the base, and a choice
    that trains nothing."""
    common = ["--stage=adapt", f"--dataset={text}", "--device=cpu"]
    assert why in complaint(
        capsys, "train", *common, f"--init_from={run / 'pretrain'}", "--out_dir=new", *flags
    )
    assert "an adapter" in complaint(capsys, "train", *common, f"--init_from={run / 'routed-s0'}")
    assert tree(here) == {}


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--stage=adapt", "--kv=value_groups", "--kv_layers=2"], "layers are 0..1"),
        (["--stage=adapt", "--kv=value_groups", "--n_groups=64"], "S must divide D"),
        (["--stage=select", "--kv_layers=2"], "layers are 0..1"),
        (["--stage=select", "--n_groups=64"], "S must divide D"),
        (["--stage=select", "--shortest=8", "--readers=4", "--recall=0"], "every part needs"),
        (["--stage=select"], "some context must be left, so 133 are needed; give fewer --readers"),
        (["--stage=select", "--readers=4"], "a question needs 96; give --recall=0"),
        (
            ["--stage=continue", "--kv=mixsga", "--group_sizes=1,7", "--expert_ratios=1:1"],
            "must divide the KV heads",
        ),
        (
            [
                *["--stage=continue", "--group_sizes=1,2", "--expert_ratios=1:1"],
                *["--n_groups=64", "--expert_groups=3"],
            ],
            "S must divide D",
        ),
        (["--stage=continue", "--kv=gqa", "--kv_share=0.1"], "one head is kept at least"),
        (["--stage=all", "--kv_layers=2"], "layers are 0..1"),
        (["--stage=all", "--n_groups=64"], "S must divide D"),
    ],
)
def test_what_does_not_fit_the_base_is_said_before_a_text_is_read(
    flags, why, run, capsys, here, text
):
    """Storage that needs the base's layers and heads is refused as soon as these are known: no
    text is encoded, nothing is calibrated, and no folder made."""
    base = f"--init_from={run / 'pretrain'}"
    places = [base, f"--adapt_dataset={text}", "--out_dir=new", "--device=cpu"]
    assert why in complaint(capsys, "train", *flags, *places)
    assert tree(here) == {} and nothing_encoded()


@pytest.mark.parametrize("program", ["sample", "eval"])
@pytest.mark.parametrize("kind", ["value_groups", "select"])
@pytest.mark.parametrize(
    "flag, why", [("--kv_layers=2", "layers are 0..1"), ("--n_groups=64", "S must divide D")]
)
def test_what_does_not_fit_a_model_is_said_before_it_is_calibrated(
    program, kind, flag, why, run, capsys, here, text
):
    """The same of programs that calibrate a base on a text, and measure or use it."""
    read = f"--dataset={text}" if program == "eval" else "--prompt=a"
    flags = [f"--init_from={run / 'pretrain'}", f"--kv={kind}", flag, read, "--device=cpu"]
    assert why in complaint(capsys, program, *flags)
    assert tree(here) == {} and nothing_encoded()


def nothing_encoded() -> bool:
    """Whether no text lies encoded in the test's cache."""
    return not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.tok"))


def test_resume_when_every_checkpoint_is_foreign(capsys, run, here, text):
    """--resume with a checkpoint of another model says which setting differs and leaves the folder
    alone."""
    before = tree(run)
    line = complaint(
        capsys,
        "train",
        *PRETRAIN,
        "--n_inner=56",
        f"--dataset={text}",
        f"--out_dir={run}",
        "--resume",
    )
    assert "was trained with model=" in line and re.search("same flags", line)
    assert tree(run) == before


def test_ctrl_c_is_one_line(capsys):
    """Ctrl-C outside of training ends with one line and exit 130."""

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        cli.exit_on_bad_input(main)
    assert e.value.code == 130 and capsys.readouterr().err.count("\n") == 1
