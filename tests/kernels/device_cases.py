"""Cases of one interpreted rank that a wrong version of the kernels must fail; run by ``case_runner``."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.device_group import DeviceGroup
from kernels.epoch_state import VoidReason
from kernels.heap_layout import EpShape, HeapLayout
from kernels.symmetric_memory.shm import ShmHeap, ShmProvider
from tests.kernels.local_group import DIGEST, SHAPE
from tests.kernels.solo_rank import DEADLINE_S, FLOOR, SELF, Solo


def case_writes_only_into_regions_of_its_slot(directory: Path) -> None:
    """Rule 1.1, for every operation, with rows to return in both forms: what a zombie may still spoil."""
    for ordered in (True, False):
        solo = Solo(directory / f"{ordered}")
        before = [solo.heaps[0].bytes_U8.clone(), solo.heaps[2].bytes_U8.clone()]
        solo.begin()
        for n, operation in ((2, "barrier"), (3, "dispatch"), (4, "combine")):
            solo.say(operation, n)
        solo.group.clean_buffer(DEADLINE_S)
        solo.dispatch([[0, 1, 2], [2, 0, -1]])
        solo.sends(0, 5, [SELF << 16, -1, SELF << 16 | 1])
        solo.sends(2, 4, [SELF << 16, -1, -1])
        solo.combine(2, ordered)
        solo.group.poison_members()
        for rank, old in zip((0, 2), before, strict=True):
            changed = solo.heaps[rank].bytes_U8 != old
            for name, owner_axis in (
                ("ep_poison", 0),
                ("ep_header", 1),
                ("ep_barrier_word", 1),
                ("ep_dispatch_word", 0),
                ("ep_combine_word", 0),
                ("ep_dispatch_rows", 0),
                ("ep_combine_rows", 0),
            ):
                region = solo.layout.regions[name]
                inside = changed[region.offset : region.offset + region.nbytes]
                by_owner = inside.view(*region.shape[: owner_axis + 1], -1).any(-1)
                owners = by_owner.any(0) if owner_axis else by_owner
                assert owners.nonzero().flatten().tolist() == [SELF], (name, owners)
                changed[region.offset : region.offset + region.nbytes] = False
            assert not changed.any()


def case_one_verdict_a_wait(directory: Path) -> None:
    """Rule 2.2: the first of two programs times out, then the words come: the second must not make the round good."""
    solo = Solo(directory, num_programs=2)
    solo.begin()
    solo.say("dispatch", 2)
    solo.dispatch([[0, 1, 2], [2, 0, -1]])
    triton_wait = sys.modules["kernels.triton_wait"]
    poison_peers = triton_wait.poison_peers

    def poison_then_hear(*arguments: object) -> None:
        poison_peers(*arguments)
        solo.say("combine", 3)

    triton_wait.poison_peers = poison_then_hear  # type: ignore[attr-defined]
    solo.combine(2)
    solo.assert_void(VoidReason.DEADLINE, (0, 2))


def case_void_publishes_nothing(directory: Path) -> None:
    """Rule 2.3, for every operation."""
    solo = Solo(directory)
    solo.begin()
    solo.say("dispatch", 2)
    solo.dispatch([[0, 1, 2], [2, 0, -1]])
    solo.group.poison_members()
    assert solo.poisoned() == [True, True]
    before = [solo.snapshot(0), solo.snapshot(2)]
    solo.sends(0, 5, [SELF << 16, -1, -1])
    solo.say("combine", 3)
    assert solo.combine(2).isnan().all()
    solo.say("dispatch", 4)
    solo.dispatch([[0, 1, 2], [2, 0, -1]])
    solo.say("combine", 5)
    solo.combine(2, ordered=False)
    solo.group.clean_buffer(DEADLINE_S)
    solo.group.allgather(torch.arange(SHAPE.num_header_words), solo.out_WN)
    assert solo.clock.num_looks == 0, "a void rank does not wait either"
    for rank, old in zip((0, 2), before, strict=True):
        assert torch.equal(solo.snapshot(rank), old)
    solo.assert_void(VoidReason.STOPPED)


def case_late_program_of_a_timed_out_combine(directory: Path) -> None:
    """The first program times out before the second has begun: rows of the second never go out, so no word may."""
    solo = Solo(directory, num_programs=2)
    solo.begin()
    solo.say("dispatch", 2)
    solo.dispatch([[0, 1, 2], [2, 0, -1]])
    solo.combine(2)
    solo.assert_void(VoidReason.DEADLINE, (0, 2))
    assert [int(solo.view(rank, "ep_combine_word")[SELF]) for rank in (0, 2)] == [0, 0]


def case_ends_of_a_wait(directory: Path) -> None:
    def wait(name: str, event: Callable[[Solo], None], num_late: int = 2) -> Solo:
        solo = Solo(directory / name)
        solo.begin()
        if num_late == 1:
            solo.say("barrier", 2, 0)
        solo.clock.events[2] = lambda: event(solo)
        solo.group.clean_buffer(DEADLINE_S)
        return solo

    def poison(solo: Solo, rank: int, word: int) -> None:
        solo.view(SELF, "ep_poison")[rank] = word

    wait("complete", lambda solo: solo.say("barrier", 2)).assert_clean()
    peer = wait("peer", lambda solo: poison(solo, 0, FLOOR | 1))
    peer.assert_void(VoidReason.PEER_POISON)
    assert peer.poisoned() == [False, False] and peer.clock.now_s < 2
    host = wait("host", lambda solo: solo.group.poison_self(1))
    host.assert_void(VoidReason.HOST_POISON)
    assert host.poisoned() == [True, True] and host.clock.now_s < 2
    future = wait("future", lambda solo: solo.say("barrier", 4, 0))
    future.assert_void(VoidReason.FUTURE_WORD)
    assert future.poisoned() == [True, True]
    one = wait("one", lambda solo: None, num_late=1)
    one.assert_void(VoidReason.DEADLINE, (2,))
    assert one.clock.now_s == 0.5 + DEADLINE_S
    two = wait("two", lambda solo: None)
    two.assert_void(VoidReason.DEADLINE, (0, 2))
    assert two.clock.now_s == 0.5 + 1.1 * DEADLINE_S
    old = wait("old", lambda solo: poison(solo, 0, FLOOR - 1))
    old.assert_void(VoidReason.DEADLINE, (0, 2))
    outsider = wait("outsider", lambda solo: poison(solo, 3, FLOOR | 1))
    outsider.assert_void(VoidReason.DEADLINE, (0, 2))

    def poison_and_word(solo: Solo) -> None:
        poison(solo, 0, FLOOR | 1)
        solo.say("barrier", 2)

    wait("both", poison_and_word).assert_clean()


def case_headers(directory: Path) -> None:
    solo = Solo(directory / "clean")
    solo.begin()
    assert solo.out_WN[SELF].tolist() == list(range(SHAPE.num_header_words))
    assert solo.out_WN[[0, 2, 3]].tolist() == [[0] * SHAPE.num_header_words] * 3
    for name, arguments, reason in (
        ("digest", {"digest": DIGEST + 1}, VoidReason.DIGEST),
        ("half", {"tag": 1 << 20 | 2}, VoidReason.FUTURE_WORD),
    ):
        solo = Solo(directory / name)
        solo.header(0)
        solo.header(2, **arguments)
        solo.group.allgather(torch.arange(SHAPE.num_header_words), solo.out_WN)
        solo.assert_void(reason)
        assert solo.poisoned() == [True, True] and (solo.out_WN == -1).all()
    solo = Solo(directory / "patient")
    solo.header(0)
    solo.clock.events[60] = lambda: solo.header(2)
    solo.group.allgather(torch.arange(SHAPE.num_header_words), solo.out_WN)
    assert solo.group.void_reason() is None and solo.clock.now_s > 5 * DEADLINE_S


def case_masks_and_routing(directory: Path) -> None:
    solo = Solo(directory / "masked")
    solo.begin()
    solo.group.update_mask_buffer(2, True)
    assert solo.group.query_mask_buffer().tolist() == [0, 0, 1, 1]
    before = solo.snapshot(2)
    solo.say("dispatch", 2, 0)
    solo.dispatch([[1, 2, -1], [2, 2, 2]])
    solo.say("combine", 3, 0)
    out_TH = solo.combine(2)
    assert solo.group.void_reason() is None
    assert torch.equal(out_TH, torch.tensor([[0.5], [0.0]]).expand(2, SHAPE.hidden_size))
    assert torch.equal(solo.snapshot(2), before)
    for wrong in (3, 9, -2):
        solo = Solo(directory / f"outsider{wrong}")
        solo.begin()
        solo.dispatch([[1, wrong, -1]])
        solo.assert_void(VoidReason.ROUTING)
        assert solo.poisoned() == [True, True]
        assert int(solo.view(0, "ep_dispatch_word")[SELF, 0]) == 0


def case_group_of_one_in_bfloat16(directory: Path) -> None:
    """The same bits as the same sum in torch."""
    shape = EpShape(1, 5, 3, 64, dtype=torch.bfloat16)
    layout = HeapLayout.build(shape)
    heap = ShmProvider(directory).allocate("one", layout.nbytes)
    layout.format(heap.bytes_U8)
    generator = torch.Generator().manual_seed(7)
    group = DeviceGroup(layout, heap, 0, deadline_s=1.0)
    group.adopt(1, [0], DIGEST)
    group.allgather(torch.zeros(8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
    x_TH = torch.randn(5, 64, generator=generator).bfloat16()
    rank_TK = torch.where(torch.rand(5, 3, generator=generator) < 0.3, -1, 0).int()
    weight_TK = torch.rand(5, 3, generator=generator)
    group.dispatch(x_TH, rank_TK, torch.zeros_like(rank_TK), weight_TK)
    sent = (rank_TK == 0).any(1)
    assert torch.equal(group.row_x_WMH[0][sent], x_TH[sent])
    rows = torch.randn(1, 5, 3, 64, generator=generator).bfloat16()
    out_TH = torch.full((5, 64), float("nan"))  # the interpreter's rounding to bfloat16 is not the hardware's
    group.combine(rows, out_TH, ordered=True)
    total = torch.zeros(5, 64)
    for k in range(3):
        product = weight_TK[:, k, None] * rows[0, :, k].float()
        total = torch.where(rank_TK[:, k, None] >= 0, total + product, total)
    assert group.void_reason() is None and torch.equal(out_TH, total)


def case_wrong_use(directory: Path) -> None:
    solo = Solo(directory)
    good_x, good_rank = torch.zeros(2, SHAPE.hidden_size), torch.zeros(2, SHAPE.top_k, dtype=torch.int32)
    weight = torch.zeros(2, SHAPE.top_k)

    def refused(error: type[Exception], message: str, act: Callable[[], object]) -> None:
        try:
            act()
        except error as caught:
            assert message in str(caught), caught
            return
        raise AssertionError(f"accepted: {message}")

    refused(RuntimeError, "begins with allgather", lambda: solo.group.dispatch(good_x, good_rank, good_rank, weight))
    solo.begin()
    many = torch.zeros(SHAPE.max_tokens + 1, SHAPE.hidden_size)
    group = solo.group
    refused(ValueError, "x has 7 tokens", lambda: group.dispatch(many, good_rank, good_rank, weight))
    refused(ValueError, "x must be", lambda: group.dispatch(good_x.double(), good_rank, good_rank, weight))
    refused(ValueError, "x must be", lambda: group.dispatch(good_x[:, ::2], good_rank, good_rank, weight))
    refused(ValueError, "rank must be", lambda: group.dispatch(good_x, good_rank.long(), good_rank, weight))
    refused(ValueError, "local must be", lambda: group.dispatch(good_x, good_rank, good_rank[:1], weight))
    refused(ValueError, "weight must be", lambda: group.dispatch(good_x, good_rank, good_rank, weight.double()))
    refused(RuntimeError, "each dispatch has one", lambda: group.combine(good_x, good_x, ordered=True))
    refused(ValueError, "not mapped", lambda: group.adopt(2, [1, 3], DIGEST))
    refused(ValueError, "not above", lambda: group.adopt(1, [1], DIGEST))
    refused(ValueError, "is a member", lambda: group.unmap_peer(0))
    refused(ValueError, "deadline_s", lambda: group.set_deadline(0))
    solo.heaps[0].bytes_U8[8] += 1
    refused(ValueError, "another layout", lambda: group.map_peer(0, solo.heaps[0]))
    odd = HeapLayout.build(EpShape(2, 2, 2, 6))
    heap: ShmHeap = solo.provider.allocate("odd", odd.nbytes)
    odd.format(heap.bytes_U8)
    refused(ValueError, "16 bytes", lambda: DeviceGroup(odd, heap, 0, deadline_s=1.0))
