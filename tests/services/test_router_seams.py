"""What a client asked for holds across the seam between two attempts of its request."""

import pytest

from tests.services.api_calls import PROMPT
from tests.services.fake_cluster import fake_cluster
from tests.services.fake_decode import TOKENIZER, expected_text, logprob, prompt_logprobs, token

KEY = tuple(PROMPT)


async def test_the_options_outlive_a_rank() -> None:
    async with fake_cluster(num_decodes=2) as cluster, cluster.client() as client:
        stop = expected_text(KEY, 60)[40:50]
        for decode in cluster.decodes:
            decode.pause_at = 45
        stream = await client.completions.create(
            model="tiny-random",
            prompt=PROMPT,
            n=4,
            max_tokens=60,
            stream=True,
            echo=True,
            logprobs=2,
            stop=stop,
            extra_body={"min_tokens": 30, "stop_token_ids": [3]},
        )
        chunks = [await anext(stream) for _ in range(4 * 46)]
        victims = set(cluster.decodes[0].rows)
        assert 0 < len(victims) < 4
        cluster.kill(cluster.decodes[0])
        cluster.decodes[0].pause_at = -1
        cluster.publish()
        chunks += [chunk async for chunk in stream]
        for index in range(4):
            mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert "".join(choice.text for choice in mine) == "".join(
                TOKENIZER.decode([id]) for id in PROMPT
            ) + expected_text(KEY, 40)
            assert mine[-1].finish_reason == "stop"
            values = [value for choice in mine if choice.logprobs for value in choice.logprobs.token_logprobs or []]
            prompt_values = [value for value, _ in prompt_logprobs(KEY, 2)]
            assert values == [None, *prompt_values, *(logprob(KEY, n) for n in range(50))]
        again = [prefill for prefill in cluster.prefills[0].seen if prefill.attempt == 1]
        assert {prefill.request for prefill in again} == victims
        assert all(len(prefill.outputs) == 45 for prefill in again)


@pytest.mark.parametrize("seam", [41, 45, 49])
async def test_a_stop_string_is_found_across_the_seam_of_a_preemption(seam: int) -> None:
    """Of its ten characters, one to nine come from the attempt that was given up; what came is never shown."""
    async with fake_cluster(num_decodes=2) as cluster, cluster.client() as client:
        stop = expected_text(KEY, 60)[40:50]
        for decode in cluster.decodes:
            decode.pause_at = seam
        asked = client.completions.create(
            model="tiny-random", prompt=PROMPT, max_tokens=60, stop=stop, stream=True, logprobs=0
        )
        stream = await asked
        chunks = [await anext(stream) for _ in range(seam)]
        (giver,) = [decode for decode in cluster.decodes if decode.rows]
        (request,) = giver.rows
        giver.preempt(request)
        for decode in cluster.decodes:
            decode.pause_at = -1
        chunks += [chunk async for chunk in stream]
        (again,) = [prefill for prefill in cluster.prefills[0].seen if prefill.attempt == 1]
        assert again.outputs == tuple(token(KEY, index) for index in range(seam))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert "".join(choice.text for choice in choices) == expected_text(KEY, 40)
        assert choices[-1].finish_reason == "stop"
        values = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs or []]
        assert values == [logprob(KEY, number) for number in range(50)]
