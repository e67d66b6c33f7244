"""Real decode streams over shared memory, views made by the test: bits equal to one process with all experts."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from common.config import ClusterConfig
from common.ids import Epoch, RequestId
from common.messages import Announce, Placement, RollAnswer, RollCall, Sampling, SlotLeft, TokenBatch, VoidReport
from common.model.experts import expert_rows
from common.model.token_choice import choose
from services.decode import elastic_exchange
from services.decode.request import Computed, Step
from tests.services.decode_group import MONITOR, ROUTER, Group, Request, decode_group, tiny_config


def prompts(num: int, max_tokens: int = 12) -> list[Request]:
    return [
        Request(f"r{n}", tuple((7 * n + 3 * i) % 250 + 2 for i in range(4 + 5 * n)), max_tokens) for n in range(num)
    ]


def replace_temperature(request: Request) -> Request:
    return Request(request.name, request.prompt, request.max_tokens, temperature=0.0)


def submit_all(group: Group, requests: list[Request], num_ranks: int) -> None:
    for number, request in enumerate(requests):
        group.submit(request, number % num_ranks)


def assert_exact(group: Group, requests: list[Request]) -> None:
    for request in requests:
        assert group.outputs_of(request) == group.reference.outputs(request)


def test_three_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    with decode_group(3, tmp_path) as group:
        group.form(3)
        requests = prompts(7)
        submit_all(group, requests, 3)
        group.await_outputs(requests)
        assert_exact(group, requests)
        for made in group.ranks.values():
            counters = made.stream.counters()
            assert counters["prompt_tokens_computed"] == 0
            assert counters["kv_blocks_used"] == 0


def test_ranks_compute_prompts_with_the_bits_of_a_prefill_worker(tmp_path: Path) -> None:
    """Some requests come with KV, the others are computed where they are, several rounds long, at the same time."""
    with decode_group(3, tmp_path) as group:
        group.form(3)
        requests = [*prompts(7), Request("long", tuple((5 * i) % 250 + 2 for i in range(150)), 20)]
        for number, request in enumerate(requests):
            (group.announce if number % 2 else group.submit)(request, number % 3)
        group.await_outputs(requests, count=4)
        moved = requests[1]  # in the middle: prompt and outputs are computed
        known = group.outputs_of(moved)[:3]
        group.abort(moved, 1)
        group.announce(moved, 2, known, attempt=2)
        group.await_outputs(requests)
        assert_exact(group, requests)
        computed = sum(made.stream.counters()["prompt_tokens_computed"] for made in group.ranks.values())
        assert computed == sum(len(request.prompt) for request in requests[1::2]) + len(moved.prompt) + 3


def test_decoding_goes_on_while_a_prompt_is_computed(tmp_path: Path) -> None:
    with decode_group(2, tmp_path) as group:
        group.form(2)
        engine = group.ranks[0].engine
        rows, compute = list[list[int]](), engine.compute

        def watched(steps: Sequence[Step]) -> list[Computed] | None:
            rows.append([len(step.token_ids) for step in steps])
            return compute(steps)

        engine.compute = watched  # type: ignore[method-assign]
        short, long = Request("short", (5, 6, 7), 40), Request("long", tuple(range(2, 202)), 4)
        group.submit(short, 0)
        group.await_outputs([short], count=2)
        group.announce(long, 0)
        group.await_outputs([short, long])
        assert_exact(group, [short, long])
        shared = [of_round for of_round in rows if len(of_round) == 2 and max(of_round) > 1]
        assert shared == [[1, 32]] * 6 + [[1, 8]], "a token of the one and at most 32 of the other"


def test_log_probabilities_of_a_prompt_that_a_rank_computes(tmp_path: Path) -> None:
    prompt = tuple((3 + 7 * position) % 250 for position in range(45))
    sampling = Sampling(0.0, 1.0, 0, 3, 2, ignore_eos=True, logprobs=True, num_top_logprobs=4, prompt_logprobs=True)
    with decode_group(1, tmp_path) as group:
        group.form(1)
        made = group.ranks[0]
        made.stream.deliver(
            ROUTER, Announce(RequestId("judged"), 1, ROUTER, made.incarnation, prompt, (), sampling, True)
        )
        group.wait_until(lambda: len(group.outputs["judged"]) == 2)
        (judged,) = [
            item.prompt_logprobs
            for message in made.batches
            for item in message.items
            if item.prompt_logprobs and item.start == 0
        ][:1]
    assert len(judged) == len(prompt) - 1
    for size in (1, 33, 44):
        forced = replace(sampling, logit_bias=((prompt[size], 100.0),), max_tokens=1)
        logits = group.reference.logits(prompt[:size])
        assert judged[size - 1] == choose(logits, forced, prompt[:size], ())[1:]


def test_reduced_combine_is_equal_up_to_rounding(tmp_path: Path) -> None:
    decode = replace(tiny_config(3).decode, combine="reduced", num_redundant_experts=0)
    with decode_group(3, tmp_path, replace(tiny_config(3), decode=decode)) as group:
        group.form(3)
        engine = group.ranks[0].engine
        assert engine._exchange is not None and not engine._exchange._ordered
        requests = [replace_temperature(request) for request in prompts(4, max_tokens=6)]
        submit_all(group, requests, 3)
        group.await_outputs(requests)
        differ = 0
        for request in requests:
            for got, expected in zip(group.outputs_of(request), group.reference.outputs(request), strict=True):
                if got[0] != expected[0]:
                    break  # two tokens were as likely but for the rounding: what follows is another text
                assert abs(got[1] - expected[1]) < 1e-4
                differ += got[1] != expected[1]
        assert differ > 0, "the sums of the ordered mode: nothing was switched"


def test_a_dropped_expert_row_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of the other tests is worth something: one wrong row in one round changes bits."""
    num_calls = 0

    def dropping(*args: Any) -> torch.Tensor:
        nonlocal num_calls
        rows = expert_rows(*args)
        num_calls += len(rows) > 0
        if num_calls == 5 and len(rows):
            rows[0] = 0.0
            num_calls += 1
        return rows

    monkeypatch.setattr(elastic_exchange, "expert_rows", dropping)
    with decode_group(2, tmp_path) as group:
        group.form(2)
        requests = prompts(4)
        submit_all(group, requests, 2)
        group.await_outputs(requests)
        with pytest.raises(AssertionError):
            assert_exact(group, requests)


def test_a_rank_computes_with_the_experts_of_others(tmp_path: Path) -> None:
    """Overwriting the only copy of an expert on rank 1 changes what requests on rank 0 produce."""
    decode = msgspec.structs.replace(tiny_config(2).decode, num_redundant_experts=0)
    config: ClusterConfig = msgspec.structs.replace(tiny_config(2), decode=decode)
    with decode_group(2, tmp_path, config) as group:
        group.form(2)
        engine = group.ranks[1].engine
        assert engine._slots is not None
        with torch.inference_mode():
            engine._slots.rows.weights_NF.mul_(-1.0)
        requests = prompts(2)
        for request in requests:
            group.submit(request, 0)
        group.await_outputs(requests)
        for request in requests:
            assert group.outputs_of(request) != group.reference.outputs(request)


class Hang:
    """Stops one rank's stream inside a combine, as a stopped process would be, until `resume`."""

    def __init__(self, group: Group, rank: int, after: int) -> None:
        self.reached, self._resume = threading.Event(), threading.Event()
        engine = group.ranks[rank].engine
        assert engine.group is not None
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


def test_a_group_without_work_rests(tmp_path: Path) -> None:
    with decode_group(2, tmp_path) as group:
        group.form(2)
        before = group.ranks[0].stream.counters()["rounds"]
        until = group.now() + 0.5
        group.wait_until(lambda: group.now() > until)
        num_rounds = group.ranks[0].stream.counters()["rounds"] - before
        assert 1 <= num_rounds <= 50, "about one round each idle_poll_s (50 ms)"


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


def test_aborted_requests_give_their_blocks_back(tmp_path: Path) -> None:
    with decode_group(2, tmp_path) as group:
        group.form(2)
        requests = prompts(4, max_tokens=500)
        for request in requests:
            group.submit(request, 0)
        group.await_outputs(requests[:2], count=2)
        for request in requests:
            group.abort(request, 0)
        group.wait_until(lambda: group.ranks[0].stream.counters()["kv_blocks_used"] == 0)
        assert not any(isinstance(message, TokenBatch) for message in group.ranks[1].told)
