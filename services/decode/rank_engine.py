"""The tensor side of a decode rank: its heap, the model, its end of the group. Decides nothing.

A life begins with `begin_life` (heap and model, no slot yet: a warm standby), continues with `open_slot`, and ends with
`end_life`, which unlinks the heap. Between them views come and go.

Legend: L layers, N tokens of a request, C floats of a cache row.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.config import ClusterConfig
from common.ids import ProcessId, Rank
from common.messages import Placement, TopLogprobs, View
from common.model.checkpoint import Checkpoint, LoadProgress
from common.model.experts import VoidRound
from common.model.kv_cache import write_kv
from common.model.model import Batch, Model
from common.model.token_choice import Choosing, TokenChoice, choose_rows, prompt_logprobs
from common.pace import Pace
from common.placement import PhysicalToLogical, num_local_experts
from common.replica_choice import ReplicaChoice
from common.view import digest, orphans, ranks
from kernels.compiled_group import CompiledGroup
from kernels.epoch_state import CLEAN
from kernels.heap_layout import ALIGNMENT_BYTES
from kernels.peer_windows import LinkFault
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.base import HeapError, SymmetricHeap
from kernels.symmetric_memory.shm import ShmProvider
from services.decode.elastic_exchange import ElasticExchange
from services.decode.expert_slots import ExpertSlots
from services.decode.load_counts import CountedLoad
from services.decode.rank_heap import PeerHeaps, heap_name, rank_heap_layout
from services.decode.request import Admission, Computed, RequestLimits, Step
from services.decode.round_header import NEWCOMER_HEADER, RoundHeader
from services.decode.staging import CopyPace, Staging


class RankEngine:
    """``while_waiting`` is called every few milliseconds of a wait for others. Raises ValueError of one line for a
    checkpoint that cannot be used and a heap that cannot be made."""

    def __init__(
        self,
        config: ClusterConfig,
        heap_dir: Path,
        process: ProcessId,
        pace: Pace,
        link_fault: LinkFault,
        while_waiting: Callable[[], None],
    ) -> None:
        self._decode, self._planner, self._process = config.decode, config.planner, process
        self._pace, self._link_fault, self._while_waiting = pace, link_fault, while_waiting
        self.loaded: LoadProgress | None = None  # of this process, by whatever thread loads
        self._checkpoint = Checkpoint.open(config.model.path, self._on_loaded)
        self._layout = rank_heap_layout(self._checkpoint, config.decode)
        self._provider = ShmProvider(heap_dir)
        self._peers = PeerHeaps(self._provider, self._layout)
        self._life = 0
        self._heap: SymmetricHeap | None = None
        self._model: Model | None = None
        self._exchange: ElasticExchange | None = None
        self._slots: ExpertSlots | None = None
        self._staging: Staging | None = None
        self._in_force: PhysicalToLogical = ()
        self.group: ElasticGroup | None = None
        self.lacks_experts = False  # for which all requests wait

    @property
    def limits(self) -> RequestLimits:
        model = self._checkpoint.config
        return RequestLimits(
            vocab_size=model.vocab_size,
            max_positions=model.max_position_embeddings,
            kv_bytes_per_token=4 * model.num_hidden_layers * model.kv_row_size,
            num_kv_layers=model.num_hidden_layers,
        )

    @property
    def progress(self) -> int:
        """Grows with every exchange of a layer and every expert loaded; begins anew with each life. From any thread."""
        exchange, slots = self._exchange, self._slots
        return (exchange.num_operations if exchange else 0) + (slots.num_loads if slots else 0)

    def _on_loaded(self, loaded: LoadProgress) -> None:
        self.loaded = loaded

    def begin_life(self, life: int) -> None:
        """Makes the heap of this life and the model that computes in it."""
        model, self._life = self._checkpoint.config, life
        heap = self._provider.allocate(heap_name(self._process, life), self._layout.nbytes)
        self._heap = heap
        region = {
            name: self._layout.view(heap.bytes_U8, name) for name in ("expert_weights", "expert_tags", "kv_cache")
        }
        moe_layers = model.moe_layers
        self._slots = ExpertSlots(
            region["expert_weights"],
            region["expert_tags"],
            self._checkpoint.expert_layout,
            model.num_moe_layers,
            num_local_experts(self._decode, model.n_routed_experts),
            lambda layer, expert, row: self._checkpoint.read_expert(moe_layers[layer], expert, row),
        )
        ordered = self._decode.combine == "ordered"
        self._exchange = ElasticExchange(self._slots, moe_layers, model.n_routed_experts, self._pace, ordered)
        self._model = Model(self._checkpoint, self._exchange, region["kv_cache"])
        # Last: a heap with a header is one that peers may write into.
        self._layout.format(heap.bytes_U8)

    def end_life(self) -> None:
        """Leaves the group if it is in one, and lets the memory go. No error when there is no life."""
        if self.group is not None:
            self.group.leave()
        self._drop_staging()
        self.group = self._model = self._exchange = self._slots = self._staging = None
        self._peers.close()
        if self._heap is not None:
            self._heap.close()
            self._heap = None
            self._provider.unlink(heap_name(self._process, self._life))

    def open_slot(self, rank: Rank) -> None:
        assert self._heap is not None, "no life begun"
        self.close_slot()
        self.group = CompiledGroup(self._layout, self._heap, rank, deadline_s=self._decode.operation_deadline_s)
        self.group.set_link_fault(self._link_fault)
        self.group.set_while_waiting(self._while_waiting)
        assert self._slots is not None
        pace = CopyPace(self._planner.bandwidth_bytes_per_s) if self._planner.use_async else None
        self._staging = Staging(self._slots, self._peers.expert_rows, rank, pace)

    def close_slot(self) -> None:
        """Forgets a slot in which this rank was never let into the group."""
        self._drop_staging()
        self.group = self._staging = None
        self._peers.close()

    def map_heaps(self, view: View) -> bool:
        """Whether the heaps of all other members are mapped now."""
        group = self._open_group()
        all_mapped = True
        for member in view.members:
            if member.rank == group.rank:
                continue
            try:
                heap = self._peers.map(member)
            except HeapError:
                all_mapped = False
                continue
            if heap is not None:
                group.map_peer(member.rank, heap)
        return all_mapped

    def forget_heaps_except(self, views: Sequence[View]) -> None:
        group = self._open_group()
        wanted = {member.rank for view in views for member in view.members} | set(group.members)
        for rank in self._peers.ranks():
            if rank not in wanted:
                group.unmap_peer(rank)
                self._peers.forget(rank)

    def load_experts(self, view: View) -> int:
        """The number of experts that had to be loaded."""
        assert self._slots is not None
        self._drop_staging()  # it would write over what is loaded now
        return self._slots.adopt(self._own_slots(view.placement), view.placement.version)

    def stage(self, placement: Placement) -> None:
        """From now on `copy_experts` copies what this rank lacks of ``placement``."""
        assert self._staging is not None
        self._staging.stage(self._own_slots(placement), placement.version, self._in_force)

    @property
    def copies_at_once(self) -> bool:
        return not self._planner.use_async

    def copy_experts(self, now: float) -> bool:
        """One slice; whether all is here."""
        assert self._staging is not None
        return self._staging.copy(now)

    def _drop_staging(self) -> None:
        if self._staging is not None:
            self._staging.drop()

    def staging_counters(self) -> dict[str, int]:
        """From any thread; begins anew with each slot."""
        staging = self._staging
        return staging.counters() if staging else {}

    def _own_slots(self, placement: Placement) -> list[tuple[int, ...]]:
        rank = self._open_group().rank
        return [layer_rows[rank] for layer_rows in placement.physical_to_logical]

    def announce(self, view: View) -> None:
        self._open_group().announce_header(view.epoch, ranks(view), NEWCOMER_HEADER.words(), digest(view))

    def missing_first_headers(self, epoch: int, of_ranks: Sequence[int]) -> tuple[int, ...]:
        group = self._open_group()
        return tuple(rank for rank in of_ranks if not group.all_announced(epoch, [rank]))

    def adopt(self, view: View, in_band: bool) -> None:
        group, num_experts = self._open_group(), self._checkpoint.config.n_routed_experts
        assert self._exchange is not None
        members, placement = ranks(view), view.placement
        rows, policy = placement.physical_to_logical, self._planner.replica_policy
        self._in_force = rows
        choice = ReplicaChoice(rows, members, num_experts, group.rank, policy)
        group.adopt(view.epoch, members, digest(view), in_band=in_band)
        misses = bool(orphans(placement, members, num_experts))
        self.lacks_experts = misses and not self._decode.allow_missing_experts
        self._exchange.enter(group, choice, misses)

    def exchange_headers(self, header: RoundHeader, stop: Callable[[], bool]) -> dict[int, RoundHeader] | None:
        """The headers of all members, or None: the round is void."""
        self._open_group().allgather(header.words(), stop)
        return self.headers

    def send_header(self, header: RoundHeader, stop: Callable[[], bool]) -> None:
        """The same without waiting: `compute` does that where it needs the others, and ``headers`` has them then."""
        self._open_group().send_header(header.words(), stop)

    @property
    def headers(self) -> dict[int, RoundHeader] | None:
        """Of this round; None: they did not all come."""
        gathered = self._open_group().headers
        if gathered is None:
            return None
        return {rank: RoundHeader.from_words(words) for rank, words in gathered.words_by_rank.items()}

    def write_kv(self, admission: Admission) -> None:
        assert self._model is not None
        cache_LBPC = self._model.kv_cache_LBPC
        table_M = np.array(admission.block_table, dtype=np.int64)
        for piece in admission.pieces:
            rows = torch.from_numpy(np.frombuffer(piece.frame, dtype="<f4").copy())
            rows_LNC = rows.view(piece.num_layers, piece.num_tokens, cache_LBPC.shape[3])
            layers = slice(piece.first_layer, piece.first_layer + piece.num_layers)
            write_kv(cache_LBPC[layers], table_M, piece.start, rows_LNC)

    def compute(self, steps: Sequence[Step]) -> list[Computed] | None:
        """What comes of each step; None: the round is void, and so is all that it wrote.

        To be called in every round in which any member has tokens, also without own ones.
        """
        assert self._model is not None and self._exchange is not None
        missed_T = self._exchange.begin(sum(len(step.token_ids) for step in steps))
        try:
            logits_SV = self._model.forward(_batch(steps)).numpy()
        except VoidRound:
            return None
        choices = _choices(steps, logits_SV)
        outputs, row, token = [], 0, 0
        for step in steps:
            num_rows, num_tokens = _num_logits(step), len(step.token_ids)
            missed = self._exchange.has_orphans and bool(missed_T[token : token + num_tokens].any())
            judged: Sequence[tuple[float, TopLogprobs]] = ()
            if step.judges_prompt:
                judged = prompt_logprobs(logits_SV[row : row + num_rows], step.sampling, step.prompt, step.position)
            outputs.append(Computed(next(choices) if step.samples else None, tuple(judged), missed))
            row, token = row + num_rows, token + num_tokens
        if self._open_group().header_due and self._open_group().await_headers() is None:
            return None
        # Read once, at the end: clean now means that all which this round has received was complete (PROTOCOL 2.4).
        return outputs if self._open_group().status == CLEAN else None

    def corrupt_heap(self) -> str:
        """Overwrites weights and KV, and takes away what declares them whole: the tags, and the header of the heap, so
        that nobody attaches to it or reads from it. What was done, in words."""
        assert self._heap is not None, "no life begun"
        heap_U8, texts = self._heap.bytes_U8, []
        for name in ("expert_weights", "kv_cache"):
            region_U8 = self._layout.view(heap_U8, name).view(torch.uint8).view(-1)
            before = zlib.crc32(region_U8.numpy().data)
            region_U8.bitwise_not_()
            after = zlib.crc32(region_U8.numpy().data)
            texts.append(f"{region_U8.numel()} bytes of {name} (crc {before:08x} -> {after:08x})")
        self._layout.view(heap_U8, "expert_tags").zero_()
        heap_U8[:ALIGNMENT_BYTES].zero_()
        return f"overwrote {' and '.join(texts)} in {heap_name(self._process, self._life)}"

    def take_load(self) -> CountedLoad | None:
        """Since the last call; None without a life."""
        return self._exchange.load.take() if self._exchange is not None else None

    def _open_group(self) -> ElasticGroup:
        assert self.group is not None, "no slot open"
        return self.group


def _num_logits(step: Step) -> int:
    return len(step.token_ids) if step.judges_prompt else int(step.samples)


def _choices(steps: Sequence[Step], logits_SV: npt.NDArray[np.float32]) -> Iterator[TokenChoice]:
    """Of the steps that sample, in order."""
    rows = [Choosing(step.sampling, step.prompt, step.outputs) for step in steps if step.samples]
    if len(rows) == len(logits_SV):
        return iter(choose_rows(logits_SV, rows) if rows else ())
    last_S = np.cumsum([_num_logits(step) for step in steps]) - 1
    return iter(choose_rows(logits_SV[[last for last, step in zip(last_S, steps, strict=True) if step.samples]], rows))


def _batch(steps: Sequence[Step]) -> Batch:
    if not steps:
        return Batch.empty()
    width = max(len(step.block_table) for step in steps)
    tables = np.zeros((len(steps), width), dtype=np.int64)
    for row, step in zip(tables, steps, strict=True):
        row[: len(step.block_table)] = step.block_table
    if all(len(step.token_ids) == 1 and step.samples and not step.judges_prompt for step in steps):
        each = np.arange(len(steps))
        tokens = np.array([step.token_ids[0] for step in steps], dtype=np.int64)
        return Batch(tokens, np.array([step.position for step in steps], dtype=np.int64), each, tables, each)
    sizes = np.array([len(step.token_ids) for step in steps])
    starts = np.array([step.position for step in steps])
    ends = np.cumsum(sizes)
    return Batch(
        token_ids_T=np.array([id for step in steps for id in step.token_ids], dtype=np.int64),
        position_T=np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes),
        request_index_T=np.repeat(np.arange(len(steps)), sizes),
        block_table_RW=tables,
        logit_index_S=np.concatenate([np.arange(e - _num_logits(step), e) for step, e in zip(steps, ends, strict=True)])
        if any(not step.samples or step.judges_prompt for step in steps)
        else ends - 1,
    )
