"""Calls of the router's HTTP API without any client library."""

from collections.abc import Mapping
from typing import Any

import aiohttp

PROMPT = [10, 11, 12, 13]
CHAT = [{"role": "user", "content": "hi"}]


async def get(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200
        return await response.json()


async def post(url: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, Any, Mapping[str, str]]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
        return response.status, await response.json(), response.headers
