"""The router's links to ranks and prefill workers."""

import asyncio

from common.ids import ProcessId
from common.network_cut import NetworkCut
from common.transport import Endpoint, open_context
from services.router.cluster_links import ClusterLinks


async def test_a_word_that_comes_while_the_router_ends_opens_no_link() -> None:
    """Its task would end with nobody, and the router with it."""
    context = open_context(None)
    endpoint = Endpoint(context)
    addresses = {ProcessId(name): endpoint.address("127.0.0.1") for name in ("decode-0", "decode-1")}
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        links = ClusterLinks(context, ProcessId("router-0"), NetworkCut(), group, lambda peer, message: None)
        links.open({ProcessId("decode-0"): addresses[ProcessId("decode-0")]})
        await asyncio.sleep(0)
        links.cancel()
        links.open(addresses)
    assert links.num_malformed == 0
    context.destroy(linger=0)
