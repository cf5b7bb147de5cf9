"""How the tokens of a segment are cut into pieces: each read once, and where pieces are short none
that holds both packed tokens and slots of the window."""

from __future__ import annotations

import pytest
import torch

from storage.kernel_base import jit, tl, triton
from storage.pieces import segment_pieces

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNIT = 32
pytestmark = pytest.mark.skipif(triton is None, reason="the kernels need triton")


@jit
def _cut_kernel(n_packed_ptr, count_ptr, out_ptr, W, chunk, UNIT: tl.constexpr):
    """Store what segment_pieces says of one segment."""
    n_packed, n_slots, _, _, behind, size, pieces = segment_pieces(
        n_packed_ptr, None, count_ptr, 0, 1, 1, 0, 0, W, chunk, UNIT
    )
    tl.store(out_ptr, n_packed)
    tl.store(out_ptr + 1, n_slots)
    tl.store(out_ptr + 2, behind)
    tl.store(out_ptr + 3, size)
    tl.store(out_ptr + 4, pieces)


@pytest.mark.parametrize("chunk", [UNIT, 96, 4096])
@pytest.mark.parametrize("count", [0, 1, 33, 70])
@pytest.mark.parametrize("n_packed", [0, 1, 32, 95, 200])
def test_every_token_is_in_one_piece_and_short_pieces_hold_one_kind(n_packed, count, chunk):
    """Packed tokens and slots at the places that kernels give them, piece by piece: each comes
    once, in order, and a piece of one UNIT has no tokens of both kinds."""
    given = [torch.tensor([n], device=DEVICE) for n in (n_packed, count)]
    out = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    _cut_kernel[(1,)](*given, out, 70, chunk, UNIT=UNIT)
    held, n_slots, behind, size, pieces = out.tolist()
    assert (held, n_slots) == (n_packed, count)
    assert size % UNIT == 0
    packed = []
    slots = []
    for piece in range(pieces):
        of_packed = range(piece * size, min((piece + 1) * size, n_packed))
        of_window = range(max(piece * size - behind, 0), min((piece + 1) * size - behind, n_slots))
        assert size > UNIT or not (of_packed and of_window)
        packed += of_packed
        slots += of_window
    assert packed == list(range(n_packed))
    assert slots == list(range(count))
