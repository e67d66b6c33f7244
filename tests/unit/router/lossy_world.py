"""A world around one router core in which everything goes wrong that may: messages are lost, doubled and reordered,
ranks and prefill workers die, are masked and go on as zombies, and join. No sockets, no clock: a seed is a story.
"""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from common.config import ClusterConfig, RouterConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Directory,
    Member,
    Message,
    Placement,
    Sampling,
    View,
    Worker,
    decode,
    encode,
)
from services.router.request_actions import Action, Deliver, Fail, Replaced, Send
from services.router.request_table import RequestTable
from tests.unit.router.lossy_workers import (
    ROUTER,
    STOP_ID,
    DecodeRank,
    PrefillWorker,
    logprob,
    prompt_logprobs,
    top_logprobs,
)

MONITOR = ProcessId("monitor-0")
STEP_S = 0.02


@dataclass
class Client:
    prompt: tuple[int, ...]
    max_tokens: int
    logprobs: bool  # of outputs, alternatives and prompt
    received: list[int] = field(default_factory=list)
    finish: str = ""

    def check_logprobs(self, tokens: Deliver) -> None:
        indices = range(tokens.start, tokens.start + len(tokens.ids)) if self.logprobs else range(0)
        assert tokens.logprobs == tuple(logprob(self.prompt, index) for index in indices)
        assert tokens.top_logprobs == tuple(top_logprobs(self.prompt, index) for index in indices)
        assert tokens.prompt_logprobs == (prompt_logprobs(self.prompt) if 0 in indices else ())


class World:
    """``loss``, ``doubling`` are probabilities; ``max_delay_s`` bounds how far messages overtake each other."""

    def __init__(self, seed: int, loss: float = 0.0, doubling: float = 0.0, max_delay_s: float = 0.02) -> None:
        self.rng = Random(seed)
        self.loss, self.doubling, self.max_delay_s = loss, doubling, max_delay_s
        self.rows_per_rank = 1000
        self.num_prompts_on_ranks = 0
        self.now = 0.0
        router = RouterConfig(no_news_s=0.3, request_deadline_s=100.0)
        self.table = RequestTable(ROUTER, ClusterConfig(router=router))
        self.ranks: list[DecodeRank] = []  # all that are alive, zombies included
        self.members: list[DecodeRank] = []
        self.workers: list[PrefillWorker] = []
        self.clients: dict[RequestId, Client] = {}
        self.reasons: Counter[str] = Counter()
        self._epoch, self._version, self._number = 1024, 0, 0
        self._wire: list[tuple[float, int, ProcessId, ProcessId, bytes]] = []

    # What may happen.

    def submit(self) -> RequestId:
        self._number += 1
        request = RequestId(f"r.{self._number}")
        prompt = tuple(self.rng.randrange(1000) for _ in range(self.rng.randint(1, 6)))
        client = self.clients[request] = Client(prompt, self.rng.randint(1, 40), self.rng.random() < 0.5)
        sampling = Sampling(
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            seed=self._number,
            max_tokens=client.max_tokens,
            logprobs=client.logprobs,
            stop_token_ids=(STOP_ID,),
            num_top_logprobs=int(client.logprobs),
            prompt_logprobs=client.logprobs,
        )
        self._perform(self.table.on_submit(request, prompt, sampling, self.now))
        return request

    def leave(self, request: RequestId) -> None:
        """The client is gone."""
        del self.clients[request]
        self._perform(self.table.on_client_gone(request, self.now))

    def join(self) -> None:
        """A process takes the lowest free slot."""
        taken = {rank.member.rank for rank in self.members}
        slot = next(rank for rank in range(8) if rank not in taken)
        self._epoch += 1
        process = ProcessId(f"decode-{slot}-{self._epoch}")
        member = Member(Rank(slot), Incarnation(self._epoch), process, "host", f"tcp://{process}", "")
        rank = DecodeRank(member, self)
        self.ranks.append(rank)
        self.members.append(rank)
        self._publish_view()

    def kill(self, index: int, detected: bool = True) -> None:
        """SIGKILL of the ``index``-th member; undetected ones are removed by the next view."""
        rank = self.members.pop(index % len(self.members))
        self.ranks.remove(rank)
        if detected:
            self._publish_view()

    def mask(self, index: int) -> None:
        """The member leaves the group, and goes on sending as if it did not know."""
        self.members.pop(index % len(self.members))
        self._publish_view()

    def bury_zombies(self) -> None:
        self.ranks = list(self.members)

    def add_worker(self) -> None:
        self.workers.append(PrefillWorker(ProcessId(f"prefill-{self._version}"), self))
        self._publish_directory()

    def kill_worker(self, index: int) -> None:
        self.workers.pop(index % len(self.workers))
        self._publish_directory()

    def forget(self, index: int) -> None:
        """A rank loses all its requests, and stays."""
        self.members[index % len(self.members)].rows.clear()

    @property
    def is_over(self) -> bool:
        """Nobody holds anything for any request."""
        return len(self.table) == 0 and not any(rank.rows for rank in self.members)

    def run(self, seconds: float, until_over: bool = False) -> None:
        end = self.now + seconds
        while self.now < end and not (until_over and self.is_over):
            self.now += STEP_S
            while self._wire and self._wire[0][0] <= self.now:
                _, _, source, target, data = heapq.heappop(self._wire)
                self._arrive(source, target, decode(data))
            for rank in self.ranks:
                rank.on_round()
            for worker in self.workers:
                worker.on_round()
            self._perform(self.table.on_tick(self.now))

    # How it happens.

    def send(self, source: ProcessId, target: ProcessId, message: Message) -> None:
        if self.rng.random() < self.loss:
            return
        for _ in range(2 if self.rng.random() < self.doubling else 1):
            self._number += 1
            arrival = self.now + self.rng.uniform(0, self.max_delay_s)
            heapq.heappush(self._wire, (arrival, self._number, source, target, encode(message)))

    def _arrive(self, source: ProcessId, target: ProcessId, message: Message) -> None:
        if target == ROUTER:
            self._perform(self.table.on_message(source, message, self.now))
        for rank in self.ranks:
            if rank.member.process == target:
                rank.on_message(message)
        for worker in self.workers:
            if worker.process == target:
                worker.on_message(message)

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(peer, message):
                    self.send(ROUTER, peer, message)
                case Deliver(request, start, ids, finish=finish):
                    client = self.clients.get(request)
                    assert client is not None, f"tokens for {request}, whose client is gone"
                    assert not client.finish, f"{request} got tokens after its end"
                    assert start == len(client.received), f"{request} got tokens from {start} after {client.received}"
                    client.check_logprobs(action)
                    client.received += ids
                    client.finish = finish
                case Replaced(reason=reason):
                    self.reasons[reason] += 1
                case Fail(request=request, message=text):
                    raise AssertionError(f"{request} failed: {text}")
        self.table.check_invariants()

    def _publish_view(self) -> None:
        self._epoch += 1
        members = tuple(sorted((rank.member for rank in self.members), key=lambda member: member.rank))
        view = View(MONITOR, 1024, Epoch(self._epoch), members, Placement(self._epoch, ()))
        self._perform(self.table.on_view(view, self.now))

    def _publish_directory(self) -> None:
        self._version += 1
        workers = tuple(Worker(w.process, "prefill", w.process, "host", 1, f"tcp://{w.process}") for w in self.workers)
        self._perform(self.table.on_directory(Directory(MONITOR, 1024, self._version, workers), self.now))
