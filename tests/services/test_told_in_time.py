"""Tokens that are kept back for a common message leave before whatever would keep them longer."""

import threading
from pathlib import Path
from typing import Any

import msgspec

from common.config import ClusterConfig
from common.messages import View
from tests.services.decode_group import Group, Request, decode_group, tiny_config
from tests.services.rank_requests import prompts, submit_all

LONG_S = 60.0  # nothing is told because its time has come


def _config(interval_s: float) -> ClusterConfig:
    config = tiny_config(2)
    decode = msgspec.structs.replace(config.decode, delivery_interval_s=interval_s)
    return msgspec.structs.replace(config, decode=decode)


def _committed_and_told(group: Group) -> tuple[int, int]:
    committed = group.ranks[0].stream.counters()["tokens_committed"]
    return committed, sum(len(outputs) for outputs in group.outputs.values())


def _decode_on_rank_0(group: Group) -> list[Request]:
    group.form(2)
    requests = prompts(3, max_tokens=200)
    submit_all(group, requests, 1)
    group.wait_until(lambda: _committed_and_told(group)[0] >= 30)
    return requests


def test_before_the_experts_of_a_view_are_loaded(tmp_path: Path) -> None:
    with decode_group(2, tmp_path, _config(LONG_S)) as group:
        _decode_on_rank_0(group)
        engine = group.ranks[0].engine
        load, seen = engine.load_experts, list[tuple[int, int]]()

        def watched(view: View) -> int:
            seen.append(_committed_and_told(group))
            return load(view)

        engine.load_experts = watched  # type: ignore[method-assign]
        view = group.view([0, 1])
        group.publish(view)
        group.await_epoch(view)
        assert [committed == told for committed, told in seen] == [True]


def test_before_a_rank_leaves(tmp_path: Path) -> None:
    with decode_group(2, tmp_path, _config(LONG_S)) as group:
        _decode_on_rank_0(group)
        stream = group.ranks[0].stream
        stream.stop()
        assert stream.join(30)
        committed, told = _committed_and_told(group)
        assert told == committed >= 30


def test_while_others_are_awaited(tmp_path: Path) -> None:
    with decode_group(2, tmp_path, _config(0.1)) as group:
        requests = _decode_on_rank_0(group)
        engine = group.ranks[1].engine
        exchange, reached, resume = engine.exchange_headers, threading.Event(), threading.Event()

        def hang(*args: Any) -> Any:
            reached.set()
            assert resume.wait(60)
            return exchange(*args)

        engine.exchange_headers = hang  # type: ignore[assignment, method-assign]
        assert reached.wait(30)
        group.wait_until(lambda: len(set(_committed_and_told(group))) == 1)
        resume.set()
        group.await_outputs(requests)
