"""Which source the i-th sample comes from, for weighted mixtures: a pure function of (seed, i), in constant time.

Samples are dealt in blocks of 1024. In every block each source has its share exactly, in an order drawn for the block,
so that sample i of the mixture is sample j of one source with nothing remembered in between.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BLOCK = 1024


class Mixture:
    """``weights``: name -> weight, in any unit; they are rounded to 1024ths, none below one."""

    def __init__(self, weights: Mapping[str, float], seed: int = 0):
        bad = {k: w for k, w in weights.items() if not w > 0}
        if not weights or bad:
            raise ValueError(f"data.weights must name at least one source, each above 0; found {dict(weights)}.")
        if len(weights) > BLOCK:
            raise ValueError(f"data.weights names {len(weights)} sources; at most {BLOCK} can be mixed.")
        self.names = list(weights)
        self.seed = seed
        exact = np.array([float(weights[n]) for n in self.names])
        exact = exact / exact.sum() * BLOCK
        counts = np.maximum(np.floor(exact).astype(int), 1)
        while counts.sum() != BLOCK:  # the largest remainder gains, the most over-served gives
            step = 1 if counts.sum() < BLOCK else -1
            gap = np.where(counts + step >= 1, (exact - counts) * step, -np.inf)
            counts[int(np.argmax(gap))] += step
        self.counts = counts
        self._block: tuple[int, int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, i: int) -> tuple[str, int]:
        """(source, j): sample i is the j-th of that source."""
        block, within = divmod(i, BLOCK)
        if self._block is None or self._block[:2] != (self.seed, block):
            order = np.repeat(np.arange(len(self.names)), self.counts)
            np.random.default_rng([self.seed, block, 0x313]).shuffle(order)
            rank = np.empty(BLOCK, dtype=np.int64)
            for source, count in enumerate(self.counts):
                rank[order == source] = np.arange(count)
            self._block = (self.seed, block, order, rank)
        source = int(self._block[2][within])
        return self.names[source], block * int(self.counts[source]) + int(self._block[3][within])
