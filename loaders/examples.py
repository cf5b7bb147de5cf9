"""Examples whose answers alone are learned: token ids, and which of them belong to an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEFT_OUT = -100  # the target of a token whose loss does not count


@dataclass(frozen=True)
class Examples:
    """Examples one after another, the first follows the last.

    ids: (n,) int64
    answers: (n,) bool, whether a token belongs to an answer, its end token included
    starts: (examples,) int64, where each begins, ascending
    header: corpus, split and sha256, as a token file's"""

    ids: np.ndarray
    answers: np.ndarray
    starts: np.ndarray
    header: dict

    def __len__(self) -> int:
        return len(self.ids)

    def apart(self, block_size: int) -> np.ndarray:
        """Return starts, the first included, whose windows of block_size tokens share no target and
        do not reach around the end."""
        apart = []
        free = 0
        for start in self.starts.tolist():
            if start >= free and start + block_size < len(self.ids):
                apart.append(start)
                free = start + block_size
        return np.array(apart, dtype=np.int64)
