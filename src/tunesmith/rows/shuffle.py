"""Shuffling of examples, of packed rows, and of the rows from which held-out rows are drawn."""

import numpy as np


def shuffled(n: int, *seed: int) -> np.ndarray:
    """Return the numbers 0 to n - 1 in an order that depends only on the seed, int64 [n].

    The function uses only raw output of Philox and SeedSequence, because numpy guarantees that this
    output never changes. Methods of numpy's Generator may give another order in another version, so
    that a resumed run would get other batches.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(n), kind="stable")
