"""The one draw of all that is shuffled: examples, rows of tokens, and what is held out."""

import numpy as np


def shuffled(n: int, *seed: int) -> np.ndarray:
    """int64: 0 to n - 1 in an order that depends on the seed alone.

    Raw output of Philox and SeedSequence is what numpy promises never to change; the methods of
    Generator may draw differently in another version, and a resumed run would see other batches.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(n), kind="stable")
