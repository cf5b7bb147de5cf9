"""How far a reader has to go: changes of file along one token's way through a layer."""

from __future__ import annotations

import pytest
import torch
from trace_reader import by_file, calls_of_path, selection, value_groups


@pytest.mark.parametrize("make, most", [(value_groups, 16), (selection, 28)])
def test_a_token_passes_few_files(make, most):
    """A prompt and two steps: the path's file comes first, its cache and the attention that reads
    the cache are among the files, and files change at most `most` times."""
    torch.manual_seed(0)
    runs = by_file(calls_of_path(make()))
    files = [file for file, _ in runs]
    assert files[0] == {value_groups: "kv_router.py", selection: "selector.py"}[make]
    assert "kernels.py" in files and "storage/layout.py" in files
    stored = [{"append", "fill_windows"} & set(functions) for _, functions in runs]
    assert sum(map(bool, stored)) == 3
    assert len(files) - 1 <= most, files
