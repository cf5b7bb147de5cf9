"""A run knows its base, its text and its settings: what would silently measure, resume or adapt
something else is refused or put right."""

from __future__ import annotations

import json

import pytest
from helpers import error_line

import cli
import data
import eval as evaluation
import train
from config import ModelConfig, SelectConfig
from loaders import checkpoint
from loaders.tokenizer import get_tokenizer
from runs import adapt_arguments, arguments, call, pretrain
from settings.fields import from_dict, to_dict
from settings.train import DataConfig, TrainConfig
from training.same_run import entry

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def adapted(tmp_path, text, base):
    """A run of one adaptation, two steps, half of the text held out."""
    train.run(
        adapt_arguments(tmp_path / "run", text, base, "--adapt_steps=2", "--val_fraction=0.5")
    )
    return tmp_path / "run"


def rows(capsys, *flags) -> list[dict]:
    call(evaluation, *flags)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_evaluation_reads_the_text_as_the_run_prepared_it(adapted, tmp_path, text, capsys):
    """Without flags eval.py uses the run's own val_fraction, so no training document is measured; a
    flag still wins."""
    common = [f"--out_dir={adapted}", f"--results={tmp_path / 'r'}", "--sequences=999"]
    own, same, other = (
        rows(capsys, *common, *f)[0] for f in ([], ["--val_fraction=0.5"], ["--val_fraction=0.1"])
    )
    assert own["n"] == same["n"] and own["value"] == same["value"] and own["n"] > 2 * other["n"]


def test_flags_of_an_older_run_that_are_refused_now_do_not_hinder_it(adapted):
    """A run that was started with flags that nothing reads, of a stage, beside another's value or
    beside several, is not refused; one of them given anew is."""
    path = adapted / "config.json"
    saved = json.loads(path.read_text())
    unread = {"train": {"seeds": 5}, "adapter": {"experts": 8}, "kv": {"key_block": 32}}
    unread |= {"data": {"template": "chat"}, "select": {"refit_ridge": 0.5}}
    for group, flags in unread.items():
        saved[group] |= flags
        saved["given"] += flags
    path.write_text(json.dumps(saved))
    resume = ["--resume", f"--out_dir={adapted}"]
    args = cli.parse_args(train.CONFIGS, [*resume, "--adapt_steps=3"])
    assert {"experts", "key_block", "adapt_steps"} <= args.given
    assert args.given_now == {"resume", "out_dir", "adapt_steps"}
    train.check_asked(args)
    for flag in ("--seeds=5", "--experts=8", "--template=chat", "--refit_ridge=0.5"):
        name = flag.split("=")[0][2:]
        again = cli.parse_args(train.CONFIGS, [*resume, flag])
        assert error_line(train.check_asked, again).startswith(f"{name} with ")


def test_an_older_run_with_a_flag_that_is_refused_now_goes_on(tmp_path, text, base, capsys):
    """Such a run is trained on to its end, keeps what it was given, and is measured as ever."""
    out = tmp_path / "run"
    flags = ["--stage=adapt", f"--dataset={text}", f"--init_from={base}", f"--out_dir={out}"]
    args = arguments(*flags, "--adapt_steps=1", "--key_block=32", "--kv_sinks=2")
    args.given_now -= {"key_block", "kv_sinks"}  # taken, then
    train.run(args)
    common = [f"--out_dir={out}", f"--results={tmp_path / 'r'}", "--sequences=3"]
    before = rows(capsys, *common)
    train.run(cli.parse_args(train.CONFIGS, ["--resume", f"--out_dir={out}", "--adapt_steps=2"]))
    saved = json.loads((out / "config.json").read_text())
    assert {"key_block", "kv_sinks"} <= {*saved["given"]} and saved["kv"]["key_block"] == 32
    assert (out / "routed-s0" / checkpoint.step_name(2)).is_dir()
    after = rows(capsys, *common)
    assert [r["cache_bytes"] for r in after] == [r["cache_bytes"] for r in before]
    assert rows(capsys, *common, "--kv_bits=8")[0]["value_bits"] == 8


@pytest.mark.parametrize(
    "flag, why",
    [
        ("--val_fraction=0.1", "val_fraction=0.1 with resume"),
        ("--detokenize", "detokenize=True with resume"),
        ("--weights=bfloat16", "weights=bfloat16 with resume"),
    ],
)
def test_resume_refuses_other_text_and_weights(flag, why, adapted, capsys):
    """What the tokens are made of and how the base is held belong to a run: resuming with something
    else names it."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.parse_args(train.CONFIGS, ["--resume", f"--out_dir={adapted}", flag])
    said = capsys.readouterr().err
    assert why in said and str(adapted) in said and said.count("\n") == 1


def test_resume_refuses_another_base_and_changed_text(adapted, tmp_path, text, base):
    """A base of the same shape with other weights, and a text that has changed under its name, are
    refused by name."""
    other = pretrain(tmp_path / "other", text, "--pretrain_steps=3")
    flags = ["--adapt_steps=2", "--val_fraction=0.5", "--resume"]
    assert "base_sha256=" in error_line(train.run, adapt_arguments(adapted, text, other, *flags))
    config = checkpoint.load(adapted / "routed-s0" / checkpoint.step_name(2)).config
    files = data.prepare_splits(
        text, DataConfig(val_fraction=0.5), get_tokenizer("byte"), ["train", "val"]
    )
    assert config["tokens"] == [f.header["sha256"] for f in files]
    prepared = {"tokenizer": "byte", "val_fraction": 0.5, "detokenize": False}
    assert config["data"] == prepared | {"text_field": "text", "template": "auto"}


def test_a_run_killed_before_its_first_checkpoint_resumes(tmp_path, text, base):
    """A folder that holds no more than config.json is begun anew by --resume."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    train.run(adapt_arguments(out, text, base, "--adapt_steps=1", "--resume"))
    assert (out / "routed-s0" / checkpoint.step_name(1)).is_dir()


def test_no_number_comes_from_the_text_it_was_fitted_to(tmp_path, text, base, capsys):
    """A table tested on its adaptation text, and bases calibrated on the measured text under any
    spelling of its path, are refused."""
    twice = f"text:{text[5:]}/../{text.rsplit('/', 1)[1]}"
    args = arguments(
        "--stage=all",
        f"--init_from={base}",
        f"--out_dir={tmp_path / 'x'}",
        f"--adapt_dataset={text}",
        f"--test_dataset={twice}",
    )
    assert (
        "that is the text adapted on" in error_line(train.run, args)
        and not (tmp_path / "x").exists()
    )
    flags = [
        f"--out_dir={base}",
        f"--results={tmp_path / 'r'}",
        "--groups=4",
        f"--calibrate={twice}",
    ]
    assert "that is the text that is measured" in error_line(call, evaluation, *flags)
    assert data.same_text("wikitext2", "wikitext103") and not data.same_text("pydocs", "pycode")
    assert (
        data.whole_split("wikitext2", "test") == "test" and data.whole_split(text, "test") == "all"
    )


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--stage=all", "--dataset=pydocs"], "dataset with init_from"),
        (["--stage=all", "--pretrain_steps=3"], "pretrain_steps with init_from"),
        (["--stage=adapt", "--kv=dense", "--kv_from=x"], "there are no value groups"),
    ],
)
def test_flags_that_would_be_ignored_are_refused_by_train(flags, why, tmp_path, base):
    """Nothing is pretrained on a given base, and a dense cache starts from nobody's value
    groups."""
    assert why in error_line(
        train.run, arguments(*flags, f"--init_from={base}", f"--out_dir={tmp_path / 'x'}")
    )


def test_flags_that_would_be_ignored_are_refused_or_felt_by_eval(adapted, base, tmp_path, capsys):
    """A trained run refuses storage flags; a base takes any of them as the wish to compress;
    nothing is trained while measuring."""
    results = f"--results={tmp_path / 'r'}"
    assert "kv_tail, topk_groups" in error_line(
        call, evaluation, f"--out_dir={adapted}", results, "--topk_groups=1", "--kv_tail=0"
    )
    assert "measuring trains nothing" in error_line(
        call, evaluation, f"--out_dir={base}", results, "--learn_basis"
    )
    assert [
        r["method"]
        for r in rows(capsys, f"--out_dir={base}", results, "--value_basis=pca", "--sequences=3")
    ] == ["dense", "value_groups"]


def test_a_base_in_bfloat16_goes_all_the_way(tmp_path, text, base, capsys):
    """Adapters of every kind train in float32 on bfloat16 weights, and table, sample and evaluation
    run to their end."""
    out = tmp_path / "run"
    flags = ["--weights=bfloat16", "--dtype=bfloat16"]
    train.run(
        arguments(
            "--stage=all",
            f"--init_from={base}",
            f"--adapt_dataset={text}",
            f"--out_dir={out}",
            "--adapt_steps=2",
            "--seeds=1",
            "--sample_interval=1",
            "--learn_basis",
            *flags,
        )
    )
    saved = checkpoint.load(out / "routed-s0" / checkpoint.step_name(2)).tensors["adapter"]
    assert {str(t.dtype) for t in saved.values()} == {"torch.float32", "torch.float64"}
    capsys.readouterr()
    assert rows(capsys, f"--out_dir={out}", "--sequences=3", *flags)[0]["method"] == "value_groups"
    assert (
        len(
            rows(
                capsys,
                f"--out_dir={base}",
                f"--results={tmp_path / 'r'}",
                "--sequences=3",
                "--value_router=linear",
                "--n_groups=4",
                *flags,
            )
        )
        == 2
    )


def test_settings_that_an_older_run_does_not_name_are_what_it_did():
    """A run from before a setting existed had its default, or what was done then (no recall); an
    entry that is no settings, or absent, stays as it is."""
    model = to_dict(ModelConfig())
    older = {name: value for name, value in model.items() if not name.startswith("rope_scal")}
    assert older != model and entry({"model": older}, "model") == model
    select = to_dict(SelectConfig(recall=0.0, past=9))
    older = {name: value for name, value in select.items() if name != "recall"}
    assert entry({"select": older}, "select") == select
    assert entry({"select": to_dict(SelectConfig())}, "select")["recall"] == SelectConfig().recall
    assert entry({"lr": 0.1}, "lr") == 0.1 and entry({}, "mix") is None


def test_settings_that_an_older_run_names_and_that_are_gone_are_passed_over():
    """What they said is done without a flag now; other unknown names are still refused."""
    assert from_dict(TrainConfig, {"capture_ranks": True, "seed": 3}) == TrainConfig(seed=3)
    with pytest.raises(ValueError, match="unknown entries"):
        from_dict(TrainConfig, {"capture_rank": True})
