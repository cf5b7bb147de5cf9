"""What a prompt leaves behind: no tensor lies in a cycle of objects, which only Python's collector
would free. It comes when there are many objects, not when there is much memory, so on a GPU whole
prompts would pile up."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import tokens
from stores import PATHS, selecting

from generate import generate
from selection.training import fit_statistics


@pytest.fixture
def in_cycles():
    """Return what lists the tensors made since that only the collector could free."""
    gc.collect()
    # held, so that they are freed after this test: a test that failed leaves some
    before = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    gc.set_debug(gc.DEBUG_SAVEALL)

    def found() -> list[tuple]:
        gc.collect()
        return [tuple(t.shape) for t in gc.garbage if isinstance(t, torch.Tensor)]

    yield found
    gc.set_debug(0)
    gc.garbage.clear()
    before.clear()


@pytest.mark.parametrize("name", PATHS)
def test_generation_leaves_no_tensor_in_a_cycle(name, in_cycles):
    """Of every way to store, once the cache is let go, what prompts and steps made is freed by
    counts of references alone."""
    model = PATHS[name]()
    in_cycles()
    gc.garbage.clear()  # what making the model left
    generate(model, tokens(2, 40, seed=1).tolist(), 3)
    assert in_cycles() == []


def test_a_batch_of_calibration_leaves_no_tensor_in_a_cycle(in_cycles):
    """Statistics of predictors are of many prompts, none of which outlives them."""
    model = selecting()
    in_cycles()
    gc.garbage.clear()
    fit_statistics(model, [tokens(2, 40, seed=1)])
    assert in_cycles() == []
