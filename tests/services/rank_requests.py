"""Requests for a group of decode ranks, and what one process makes of them."""

from tests.services.decode_group import Group, Request


def prompts(num: int, max_tokens: int = 12) -> list[Request]:
    return [
        Request(f"r{n}", tuple((7 * n + 3 * i) % 250 + 2 for i in range(4 + 5 * n)), max_tokens) for n in range(num)
    ]


def submit_all(group: Group, requests: list[Request], num_ranks: int) -> None:
    for number, request in enumerate(requests):
        group.submit(request, number % num_ranks)


def assert_exact(group: Group, requests: list[Request]) -> None:
    for request in requests:
        assert group.outputs_of(request) == group.reference.outputs(request)
