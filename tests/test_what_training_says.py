"""Promise 29: a stage says at once what it loads, reads, calibrates and validates, and at its end,
also where it had ended before, the validation loss and the next commands, which can be given."""

import os
import shlex
import signal

import pytest

import cli
import eval as evaluation
import train
from data import prepare
from loaders import checkpoint, export
from loaders.tokenizer import ByteTokenizer
from report import progress as reporting
from runs import arguments, call, call_main
from settings.train import DataConfig
from training import loop as trainer

pytestmark = pytest.mark.usefixtures("own_cache")


def last_loss(stage) -> str:
    """The newest validation loss that a stage logged, as it is said."""
    log = checkpoint.read_jsonl(stage / "metrics.jsonl")
    return f"validation loss {[r['val_loss'] for r in log if 'val_loss' in r][-1]:.4f}"


def test_each_wait_is_announced(tmp_path, text, run_stage, capsys):
    """What is loaded, read, calibrated and validated is said in a line each, in this order, before
    and after the steps."""
    stage = run_stage("adapt", tmp_path / "run", "--adapt_steps=1")
    told = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" ...")]
    loading, *others = told[-4:]
    assert loading.startswith("loading ")
    assert others == [
        f"reading {text} ...",
        "calibrating value groups ...",
        f"{stage.name}: validating 6 sequences ...",
    ]


def test_finished_run_says_its_loss_and_what_is_next(tmp_path, run_stage, capsys):
    """Resuming a run that is done prints its logged validation loss and the same next commands."""
    flags = ["--pretrain_steps=2"]
    stage = run_stage("pretrain", tmp_path / "run", *flags)
    (command,) = next_lines(capsys)
    run_stage("pretrain", tmp_path / "run", *flags, "--resume")
    said = capsys.readouterr().err
    assert said.count("2 of 2 steps") == 1  # in the log, where the bar is opened and closed at once
    assert "all 2 steps are done" in said and f"{last_loss(stage)}, in {stage}\n" in said
    assert f"  next: {command}\n" in said
    assert command == f"python train.py --stage=adapt --init_from={stage}"


def next_lines(capsys) -> list[str]:
    """The commands that were said to be next."""
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("  next: ") for line in lines if line.startswith("  next: ")]


def test_signal_in_the_last_step_says_that_all_is_done(tmp_path, run_stage, monkeypatch, capfd):
    """A signal while the last step of a lone stage is evaluated is answered at once, and at the
    end by the loss and the next commands, not by advice to resume."""
    evaluate = trainer.Trainer.evaluate

    def signalled(self):
        os.kill(os.getpid(), signal.SIGINT)
        evaluate(self)

    monkeypatch.setattr(trainer.Trainer, "evaluate", signalled)
    with pytest.raises(SystemExit) as stopped:
        run_stage("pretrain", tmp_path / "run", "--pretrain_steps=3")
    said = capfd.readouterr().err
    assert stopped.value.code == 130
    answered, stop = said.index("stopping after this step\n"), said.index("stopped by a signal")
    assert answered < said.index("3 of 3 steps") < stop
    assert "stopped by a signal after the last of 3 steps\n" in said and "--resume" not in said
    assert last_loss(tmp_path / "run" / "pretrain") in said and "  next: python " in said


def test_adapter_says_whether_it_can_be_exported(tmp_path, run_stage, capsys):
    """The export command that plain LoRA ends with writes a folder; a routed adapter, which no
    weight can hold, names the one that can be exported."""
    run_stage("adapt", tmp_path / "a b", "--adapter=lora", "--kv=dense", "--adapt_steps=1")
    command = shlex.split(next_lines(capsys)[-1])
    assert command[:3] == ["python", "-m", "loaders.export"]
    call_main(export, cli.parse_args(export.CONFIGS, command[3:]))
    assert (tmp_path / "a b" / "lora-s0-exported" / "config.json").is_file()
    capsys.readouterr()
    run_stage("adapt", tmp_path / "routed", "--adapt_steps=1")
    said = capsys.readouterr().err
    assert "loaders.export" not in said and "--adapter=lora can be exported" in said


def test_interrupt_before_the_first_step_leaves_nothing(tmp_path, text, run_stage, monkeypatch):
    """Ctrl-C while a base is loaded or a text read takes the folder back, so that the same command
    can be given again."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.base.prepare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_stage("pretrain", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_log_has_each_number_of_steps_once(monkeypatch, capsys):
    """Where every step is slow enough for a line of its own, closing the bar says no step twice; a
    bar that begins at its end is one line."""
    monkeypatch.setattr(reporting, "EVERY", 0)
    for begin in (0, 3):
        with reporting.progress("name", 3, "step", begin=begin) as bar:
            for _ in range(3 - begin):
                bar.update()
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(",")[0] for line in lines] == [
            f"name: {n} of 3 steps" for n in range(begin, 4)
        ]


def test_fewer_sequences_than_asked_for_are_said(tmp_path, text, base, run_stage, capsys):
    """A stage, the table and the mixSGA table each say once that a text has fewer windows than are
    asked for, how many there are, and nothing where there are as many; the numbers are counted
    from the tokens."""
    val = prepare(text, DataConfig(), ByteTokenizer()).val
    n = (len(val) - 1) // 32
    flags = ["--adapter=lora", "--kv=dense", "--adapt_steps=1"]
    for asked, said in ((n + 1, [f"lora-s0: validation: {n}"]), (n, [])):
        run_stage("adapt", tmp_path / f"{asked}", *flags, f"--eval_sequences={asked}")
        assert fewer(capsys) == [f"{line} sequences, all there are, not {asked}" for line in said]
    table = [f"--dataset={text}", f"--adapt_dataset={text}", f"--out_dir={tmp_path / 'table'}"]
    short = ["--pretrain_steps=1", "--adapt_steps=1", "--seeds=1", "--test_sequences=999"]
    train.run(arguments(*table, *short))
    assert fewer(capsys) == [f"the table's text: {n} sequences, all there are, not 999"]
    mix = ["--tasks=mixsga", "--steps=1", "--ablations=False", "--h2o=", "--mixes=1-2@1:1"]
    rows = [f"--dataset={text}", f"--out_dir={base}", f"--results={tmp_path / 'rows'}"]
    call(evaluation, *mix, *rows, "--sequences=999", "--batch_size=4")
    assert fewer(capsys) == [f"the table's text: {n} sequences, all there are, not 999"]


def fewer(capsys) -> list[str]:
    """The lines that say that there is less than was asked for."""
    return [line for line in capsys.readouterr().err.splitlines() if "all there are" in line]
