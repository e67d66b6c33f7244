"""Real decode streams over shared memory, views made by the test: bits equal to one process with all experts."""

from pathlib import Path

from tests.services.decode_group import Request, decode_group


def prompts(num: int, max_tokens: int = 12) -> list[Request]:
    return [
        Request(f"r{n}", tuple((7 * n + 3 * i) % 250 + 2 for i in range(4 + 5 * n)), max_tokens) for n in range(num)
    ]


def test_three_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    with decode_group(3, tmp_path) as group:
        group.form(3)
        requests = prompts(7)
        for number, request in enumerate(requests):
            group.submit(request, number % 3)
        group.await_outputs(requests)
        for request in requests:
            assert group.outputs_of(request) == group.reference.outputs(request)
