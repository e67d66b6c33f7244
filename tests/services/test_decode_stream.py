"""Real decode streams over shared memory, views made by the test: bits equal to one process with all experts."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from msgspec.structs import replace

from common.config import ClusterConfig
from common.ids import RequestId
from common.messages import Announce, Sampling, TokenBatch
from common.model.token_choice import choose
from kernels.cpu.exchange import CompiledExchange
from services.decode.elastic_exchange import ElasticExchange
from services.decode.request import Computed, Step
from tests.services.decode_group import ROUTER, Request, decode_group, tiny_config
from tests.services.rank_requests import assert_exact, prompts, submit_all


def replace_temperature(request: Request) -> Request:
    return Request(request.name, request.prompt, request.max_tokens, temperature=0.0)


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
    num_calls, route = 0, CompiledExchange.route

    def dropping(
        exchange: CompiledExchange, rank_TK: torch.Tensor, local_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> int:
        nonlocal num_calls
        num_calls += len(rank_TK) > 0
        if num_calls == 5 and len(rank_TK):
            weight_TK = weight_TK.clone()
            weight_TK[0, 0] = 0.0
            num_calls += 1
        return route(exchange, rank_TK, local_TK, weight_TK)

    monkeypatch.setattr(ElasticExchange, "run_pass", lambda *_: None)  # layer by layer, where it can be reached
    monkeypatch.setattr(CompiledExchange, "route", dropping)
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


def test_a_group_without_work_rests(tmp_path: Path) -> None:
    with decode_group(2, tmp_path) as group:
        group.form(2)
        before = group.ranks[0].stream.counters()["rounds"]
        until = group.now() + 0.5
        group.wait_until(lambda: group.now() > until)
        num_rounds = group.ranks[0].stream.counters()["rounds"] - before
        assert 1 <= num_rounds <= 50, "about one round each idle_poll_s (50 ms)"


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
