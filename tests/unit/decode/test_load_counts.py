"""What ranks report of their experts' load."""

import numpy as np

from services.decode.load_counts import CountedLoad, LoadCounts


def test_own_tokens_outlast_an_epoch_and_served_ones_do_not() -> None:
    counts = LoadCounts(2, 3)
    for _ in range(2):
        counts.on_pass()
        counts.on_layer(0, np.array([[0, 2], [2, 1]]), 7)
        counts.on_layer(1, np.array([[1, 2]]), 0)
    assert counts.take() == CountedLoad(((2, 2, 4), (0, 2, 2)), (14, 0), 2)
    counts.on_pass()
    counts.on_layer(1, np.array([[0]]), 5)
    counts.on_epoch()
    counts.on_pass()
    counts.on_layer(0, np.array([[0]]), 3)
    assert counts.take() == CountedLoad(((1, 0, 0), (1, 0, 0)), (3, 0), 1)
    assert counts.take() == CountedLoad(((0, 0, 0), (0, 0, 0)), (0, 0), 0)
