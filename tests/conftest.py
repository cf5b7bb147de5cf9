"""Fixtures that several test files use; none is used unless a file or a test asks for it."""

import functools
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    # before triton is imported: kernels then run on CPU tensors where a test asks for them
    os.environ.setdefault("TRITON_INTERPRET", "1")
import lora
import train
from report import figures
from runs import adapt_arguments, pretrain
from training import loop as trainer
from training.adapters import adapt_stage, adaptation
from training.base import load_base


def check_nothing_in_vain() -> None:
    """Triton's interpreter widens every sum and product of integers to see whether it overflows,
    and without `debug` drops what it saw; and looks for numpy's type in a dictionary that it makes
    at every call. Half of its time: nothing else changes."""
    try:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        options = replace(builder.options, sanitize_overflow=builder.options.debug)
        of_scalar = functools.cache(interpreter._get_np_dtype)
    except (ImportError, AttributeError, TypeError):  # another version: as slow as it is
        return
    builder.options = options
    pointers = interpreter.tl.pointer_type
    interpreter._get_np_dtype = lambda ty: of_scalar(
        interpreter.tl.uint64 if isinstance(ty.scalar, pointers) else ty.scalar
    )


def patch_once() -> None:
    """Triton's interpreter puts its functions in place of tl's at every launch, and again,
    searching all of tl, at every call of one jitted function by another: most of its time. What
    stands in place since the launch began is left there: nothing else changes."""
    try:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang
        restore = interpreter._LangPatchScope.restore
        standing = set()
    except (ImportError, AttributeError):  # another version: as slow as it is
        return

    def patch_lang(fn):
        langs = frozenset(
            id(v)
            for v in fn.__globals__.values()
            if v is interpreter.tl or v is interpreter.tl.core
        )
        if langs in standing:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        outermost = not standing
        standing.add(langs)
        if outermost:
            scope.restore = lambda: (standing.clear(), restore(scope))
        return scope

    interpreter._patch_lang = patch_lang


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_once()
    check_nothing_in_vain()


@pytest.fixture(scope="session", autouse=True)
def one_thread(tmp_path_factory):
    """One thread, here and in processes started here: tiny models are faster so, several times
    where other work wants the cores, and subprocesses compute the same numbers. They share
    matplotlib's list of fonts, too, which would lie in the cache that own_cache moves."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("OMP_NUM_THREADS", "1")
        m.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


@pytest.fixture(scope="session", autouse=True)
def pyplot():
    """Figures are made, but nothing is drawn, which takes a second for each: their files are empty
    but where a test asks for `pictures`. What draws, for that fixture."""
    drawing = figures.pyplot

    def undrawn() -> SimpleNamespace:
        plt = drawing()

        def subplots(*args, **kwargs):
            fig, axes = plt.subplots(*args, **kwargs)
            fig.savefig = lambda path, **_: Path(path).touch()
            return fig, axes

        return SimpleNamespace(subplots=subplots, close=plt.close)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(figures, "pyplot", undrawn)
        yield drawing


@pytest.fixture
def pictures(pyplot, monkeypatch):
    """Pictures are drawn."""
    monkeypatch.setattr(figures, "pyplot", pyplot)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """Token files go to the test's folder, never to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A corpus of 12 documents of seeded words: text:PATH."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 7))) for _ in range(60)]
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choices(words, k=150)) + ".\n")
    return f"text:{folder}"


@pytest.fixture(scope="module")
def base(tmp_path_factory, text) -> Path:
    """The folder of a pretrained stage."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return pretrain(folder / "run", text, "--pretrain_steps=20")


@pytest.fixture
def run_stage(text, base):
    """run_stage(kind, out, *flags) runs one stage of 'pretrain' or 'adapt' to its end and returns
    its folder."""

    def go(kind: str, out: Path, *flags) -> Path:
        if kind == "pretrain":
            return pretrain(out, text, *flags)
        args = adapt_arguments(out, text, base, *flags)
        train.run(args)
        kind = args.adapter.adapter if args.adapter.adapter != "none" else args.kv.kv
        return out / f"{kind}-s{args.train.seed}"

    return go


@pytest.fixture
def trainers(monkeypatch) -> list:
    """The Trainers made from here on, newest last."""
    made = []

    class Spy(trainer.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(trainer, "Trainer", Spy)
    return made


@pytest.fixture
def stage_of(tmp_path, text, base):
    """stage_of(*flags): an adapt stage whose lora_B and MLP reconstructor are not zero (zeros would
    hide every error), without dropout."""

    def make(*flags):
        args = adapt_arguments(
            tmp_path / "stage",
            text,
            base,
            "--lora_dropout=0",
            "--grad_clip=0",
            "--adapt_batch_size=11",
            *flags,
        )
        w = trainer.World(0, 1, torch.device("cpu"))
        loaded = load_base(args, base, w.device)
        stage = adapt_stage(args, tmp_path / "stage", w, loaded, adaptation(args, name="s"))
        torch.manual_seed(1)
        for name, p in lora.adapter_state(stage.model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        for name, p in stage.model.named_parameters():
            if name.endswith("reconstructor.down.weight"):
                torch.nn.init.normal_(p, std=0.1)  # zero at the start, too
        stage.model.train()
        return stage, args.train

    return make
