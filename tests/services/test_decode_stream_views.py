"""Streams of decode ranks through views: ranks vanish, join, are called, hear nobody."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from common.config import ClusterConfig
from common.ids import Epoch
from common.messages import Placement, RollAnswer, RollCall, SlotLeft, VoidReport
from kernels.compiled_group import CompiledGroup
from services.decode.request import Computed, Step
from tests.services.decode_group import MONITOR, Group, Request, decode_group, tiny_config
from tests.services.rank_requests import assert_exact, prompts, submit_all


class Hang:
    """Stops one rank's stream between dispatch and combine, as a stopped process would be, until `resume`."""

    def __init__(self, group: Group, rank: int, after: int) -> None:
        self.reached, self._resume = threading.Event(), threading.Event()
        engine = group.ranks[rank].engine
        assert engine.group is not None
        assert isinstance(engine.group, CompiledGroup)
        assert engine._exchange is not None
        # This rank goes layer by layer. The words of the dispatch are out, those of the combine are not.
        engine._exchange.run_pass = lambda model, batch: None  # type: ignore[method-assign]
        combine, self._left = engine.group.combine, after
        engine.group.combine = lambda *args, **options: self._pass(combine, args, options)  # type: ignore[method-assign]

    def _pass(self, combine: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._left -= 1
        if self._left == 0:
            self.reached.set()
            assert self._resume.wait(60)
        return combine(*args, **options)

    def resume(self) -> None:
        self._resume.set()


def test_survivors_go_on_when_a_rank_vanishes_in_mid_round(tmp_path: Path) -> None:
    with decode_group(3, tmp_path) as group:
        group.form(3)
        hang = Hang(group, 2, after=9)
        requests = prompts(6, max_tokens=20)
        submit_all(group, requests, 3)
        group.wait_until(hang.reached.is_set)
        started = group.now()
        view = group.view([0, 1])
        group.publish(view, only=[0, 1])
        group.await_epoch(view)
        assert group.now() - started < 2.0, "survivors waited for a deadline (20 s), not for the view"
        for request in requests[2::3]:
            known = group.outputs_of(request)
            group.submit(request, 0, known, attempt=2)
        group.await_outputs(requests)
        assert_exact(group, requests)

        hang.resume()  # the zombie: it has been poisoned, and learns of the view later
        group.publish(view, only=[2])
        group.await_told(group.ranks[2], SlotLeft)
        for rank in (0, 1):
            assert group.ranks[rank].stream.counters()["void_rounds"] <= 1


def test_join_in_band_without_a_void_round(tmp_path: Path) -> None:
    with decode_group(3, tmp_path) as group:
        first = group.form(2)
        requests = prompts(4, max_tokens=60)
        submit_all(group, requests, 2)
        group.await_outputs(requests, count=5)
        group.start_rank(2)
        view = group.view([0, 1, 2])
        group.prepare(view, first.epoch)
        group.await_epoch(view)
        late = [Request(f"late{n}", (5, 6, 7 + n), 12) for n in range(2)]
        for request in late:
            group.submit(request, 2)
        group.await_outputs(requests + late)
        assert_exact(group, requests + late)
        for made in group.ranks.values():
            assert made.stream.counters()["void_rounds"] == 0
            assert not any(isinstance(message, VoidReport) for message in made.told)
            assert made.stream.counters()["stale_messages"] == 0


def test_a_dropped_join_costs_no_round_and_can_be_repeated(tmp_path: Path) -> None:
    """The newcomer of a prepared view dies before it is ready; a view of the old members ends the preparation."""
    with decode_group(3, tmp_path) as group:
        first = group.form(2)
        newcomer = group.start_rank(2)
        prepared = group.view([0, 1, 2])
        for rank in (0, 1):
            group.prepare_at(rank, prepared, first.epoch)
        requests = prompts(4)
        submit_all(group, requests, 2)
        group.await_outputs(requests)
        dropped = group.view([0, 1])
        group.publish(dropped, only=[0, 1])
        group.await_epoch(dropped)
        again = group.view([0, 1, 2])
        group.prepare(again, dropped.epoch)
        group.await_epoch(again)
        assert newcomer.stream.status.state == "serving"
        assert_exact(group, requests)


def test_roll_call_is_answered_and_ends_in_the_next_view(tmp_path: Path) -> None:
    with decode_group(2, tmp_path) as group:
        first = group.form(2)
        requests = prompts(4, max_tokens=40)
        submit_all(group, requests, 2)
        group.await_outputs(requests, count=3)
        for made in group.ranks.values():
            made.stream.deliver(MONITOR, RollCall(MONITOR, 1, first.epoch))
        for made in group.ranks.values():
            group.await_told(made, RollAnswer)
            assert made.stream.status.state == "void"
        view = group.view([0, 1])
        group.publish(view)
        group.await_outputs(requests)
        assert_exact(group, requests)


def test_a_group_forms_of_ranks_that_remember_a_roll_call(tmp_path: Path) -> None:
    """Of the group before it, of which nothing is left: it must not end the waits of the new one for ever."""
    with decode_group(2, tmp_path) as group:
        for rank in range(2):
            group.start_rank(rank).stream.deliver(MONITOR, RollCall(MONITOR, 1, Epoch(1000)))
        view = group.view([0, 1])
        group.prepare(view, Epoch(0))
        requests = prompts(4)
        submit_all(group, requests, 2)
        group.await_outputs(requests)
        assert_exact(group, requests)
        assert [made.stream.counters()["void_rounds"] for made in group.ranks.values()] == [0, 0]


def test_loading_experts_is_progress(tmp_path: Path) -> None:
    """Others wait for the headers of a rank that loads repaired experts; the monitor must not take it for stuck."""
    decode = msgspec.structs.replace(tiny_config(2).decode, num_redundant_experts=0)
    config: ClusterConfig = msgspec.structs.replace(tiny_config(2), decode=decode)
    with decode_group(2, tmp_path, config) as group:
        group.form(2)
        made = group.ranks[0]
        engine = made.engine
        assert engine._slots is not None
        read, seen = engine._slots._read_expert, list[int]()

        def watched(layer: int, expert: int, row: torch.Tensor) -> None:
            seen.append(made.stream.progress)
            read(layer, expert, row)

        engine._slots._read_expert = watched
        layers = tuple((rows[1], rows[0], *rows[2:]) for rows in group.placement.physical_to_logical)
        view = group.view([0, 1], Placement(group.placement.version + 1, layers))
        group.publish(view)
        group.await_epoch(view)
        assert len(seen) > 1 and seen == list(range(seen[0], seen[0] + len(seen)))


def test_a_rank_that_hears_nobody_leaves_also_while_it_waits_for_headers(tmp_path: Path) -> None:
    decode = msgspec.structs.replace(tiny_config(2).decode, lonely_s=0.5)
    config: ClusterConfig = msgspec.structs.replace(tiny_config(2), decode=decode)
    with decode_group(2, tmp_path, config) as group:
        group.form(2)
        engine = group.ranks[1].engine
        exchange, resume = engine.exchange_headers, threading.Event()

        def hang(*args: Any) -> Any:
            assert resume.wait(60)
            return exchange(*args)

        engine.exchange_headers = hang  # type: ignore[assignment, method-assign]
        group.await_told(group.ranks[0], SlotLeft)
        resume.set()
        group.await_told(group.ranks[1], SlotLeft)


def test_tokens_of_a_void_round_are_thrown_away(tmp_path: Path) -> None:
    """One rank finds its round void after it has sampled; its neighbour found the same round clean, and committed."""
    with decode_group(2, tmp_path) as group:
        group.form(2)
        made = group.ranks[0]
        engine = made.engine
        compute, num_left = engine.compute, 4

        def void_once(steps: Sequence[Step]) -> list[Computed] | None:
            nonlocal num_left
            outputs = compute(steps)
            num_left -= 1
            if num_left == 0 and engine.group is not None:
                engine.group.poison_members()
                return None
            return outputs

        engine.compute = void_once  # type: ignore[method-assign]
        requests = prompts(4)
        submit_all(group, requests, 2)
        group.await_told(made, VoidReport)
        committed = made.stream.counters()["tokens_committed"]
        view = group.view([0, 1])
        group.publish(view)
        group.await_outputs(requests)
        assert_exact(group, requests)
        assert made.stream.counters()["void_rounds"] == 1 and committed < 2 * 12


def test_formation_begins_anew_when_one_dies_in_it(tmp_path: Path) -> None:
    with decode_group(3, tmp_path) as group:
        for rank in range(3):
            group.start_rank(rank)
        never = group.view([0, 1, 2])
        for rank in (0, 1):
            group.prepare_at(rank, never, Epoch(0))
        view = group.view([0, 1])
        for rank in (0, 1):
            group.prepare_at(rank, view, Epoch(0))
        group.await_epoch(view)
        requests = prompts(4)
        submit_all(group, requests, 2)
        group.await_outputs(requests)
        assert_exact(group, requests)
