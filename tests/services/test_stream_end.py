"""However a stream ends, its process hears of it: otherwise it would live on without one."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.ids import ProcessId
from services.decode.rank_state import RankState
from services.decode.stream import Stream


@pytest.mark.parametrize("turn_fails", [False, True])
def test_a_failure_while_the_life_ends_is_told(tmp_path: Path, turn_fails: bool) -> None:
    heard: list[BaseException | None] = []
    ended = threading.Event()

    def on_end(error: BaseException | None) -> None:
        heard.append(error)
        ended.set()

    def end_life() -> None:
        raise OSError("the heap cannot be unlinked")

    def turn() -> None:
        if turn_fails:
            raise RuntimeError("the first failure")
        stream._membership = SimpleNamespace(state=RankState.STOPPED)  # type: ignore[assignment]

    stream = Stream(ProcessId("decode-0-a"), tmp_path, emit=lambda out: None, on_end=on_end)
    engine = SimpleNamespace(end_life=end_life, group=None)
    stream._rank = SimpleNamespace(engine=engine)  # type: ignore[assignment]
    stream._turn = turn  # type: ignore[method-assign]
    stream.start()
    assert ended.wait(20.0) and stream.join(20.0)
    assert [str(error) for error in heard] == ["the first failure" if turn_fails else "the heap cannot be unlinked"]
