"""The load window: what enters it, what counts how much, what leaves it."""

import numpy as np
import pytest

from services.planner.load_window import LoadWindow


def test_buckets_fade_with_age_and_leave() -> None:
    window = LoadWindow(1, 2, window_size=10, decay=0.25)
    assert window.on_load(np.array([[8.0, 0.0]]), num_passes=5)
    assert window.load().tolist() == [[8.0, 0.0]]
    assert window.on_load(np.array([[0.0, 2.0]]), num_passes=5)
    assert window.load().tolist() == [[4.0, 2.0]]  # half a window old: a quarter to the power of a half
    assert window.on_load(np.array([[0.0, 2.0]]), num_passes=5)
    assert window.load().tolist() == [[0.0, 3.0]]
    assert window.num_passes == 15


def test_idle_time_changes_nothing() -> None:
    window = LoadWindow(1, 2, window_size=10)
    window.on_load(np.array([[8.0, 1.0]]), num_passes=5)
    assert window.on_load(np.zeros((1, 2)), num_passes=1000)
    assert (window.load().tolist(), window.num_passes) == ([[8.0, 1.0]], 5)


def test_what_is_no_load_is_refused() -> None:
    window = LoadWindow(1, 2, window_size=10)
    assert not window.on_load(np.array([[1.0, np.nan]]), 1)
    assert not window.on_load(np.array([[1.0, -1.0]]), 1)
    assert not window.on_load(np.ones((2, 2)), 1)
    assert not window.on_load(np.ones((1, 2)), 0)
    assert window.load().tolist() == [[0.0, 0.0]]


def test_load_is_a_copy() -> None:
    window = LoadWindow(1, 1, window_size=10)
    loads = np.ones((1, 1))
    window.on_load(loads, 1)
    window.load()[:] = 7.0
    loads[:] = 9.0
    assert window.load().tolist() == [[1.0]]


@pytest.mark.parametrize(("window_size", "decay"), [(0, 0.5), (10, 0.0), (10, 1.1)])
def test_settings_out_of_range(window_size: int, decay: float) -> None:
    with pytest.raises(ValueError, match="window_size"):
        LoadWindow(1, 1, window_size, decay)
