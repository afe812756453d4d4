"""Chooses combinations of test parameters: enough to see every pair of values, or all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, product


def cover(sizes: Sequence[int], seed: str) -> list[tuple[int, ...]]:
    """Rows of indices, one index per axis, that cover the axes cheaply.

    Args:
        sizes: The number of values of each axis.
        seed: Decides between rows that cover as much, so that tests with different seeds see different combinations.

    Returns:
        Rows in which every pair of values of any two axes occurs; with only two axes, where that would be all
        combinations, every value of either.
    """
    strength = 2 if len(sizes) > 2 else 1
    rows = list(product(*map(range, sizes)))
    random.Random(seed).shuffle(rows)
    covered_by = {row: set(combinations(enumerate(row), strength)) for row in rows}
    missing = set().union(*covered_by.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(covered_by[row] & missing))
        chosen.append(best)
        missing -= covered_by[best]
    return sorted(chosen)
