"""Cases of one interpreted rank: going on without a monitor, float8 rows, counters, announced headers; run by
``case_runner``.

Legend: W max_ranks, T tokens, K top_k, H hidden.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from kernels.elastic_mode import ElasticMode, LateRanksError
from kernels.epoch_state import VoidReason
from kernels.fp8 import quantise
from kernels.heap_layout import EpShape
from kernels.step_words import epoch_floor, header_bank, tagged
from kernels.triton_wait import MEMBER, MEMBER_OF_VIEW
from tests.kernels.local_group import DIGEST, SHAPE
from tests.kernels.solo_rank import DEADLINE_S, FLOOR, NUM_LOCAL, SELF, Solo

LATE = 2
ROUTES = [[0, 1, LATE], [LATE, 0, -1], [LATE, LATE, LATE]]
WEIGHT_TK = torch.tensor([[0.3, 0.7, 0.11], [0.9, 0.4, 8.0], [0.2, 0.2, 0.2]])


def returned_rows(solo: Solo, ordered: bool) -> torch.Tensor:
    """Rows of ranks 0 and LATE in the own heap, random; what entries of ROUTES get: [T, K, H], reduced [T, W, H]."""
    rows = solo.view(SELF, "ep_combine_rows")
    rows[[0, LATE]] = torch.randn(2, *rows.shape[1:], generator=torch.Generator().manual_seed(5))
    if ordered:
        ones = torch.ones(SHAPE.hidden_size)  # what Solo.combine returns for its own experts
        return torch.stack(
            [
                torch.stack([ones if rank == SELF else rows[rank, t, k] for k, rank in enumerate(ranks)])
                for t, ranks in enumerate(ROUTES)
            ]
        )
    by_rank = rows[:, : len(ROUTES), 0].transpose(0, 1).clone()
    by_rank[:, SELF] = 1
    return by_rank


def expected(entries: torch.Tensor, ordered: bool, renormalise: bool) -> torch.Tensor:
    """The late rank's entries left out."""
    out_TH = torch.zeros(len(ROUTES), SHAPE.hidden_size)
    for t, ranks in enumerate(ROUTES):
        total, kept = torch.zeros(()), torch.zeros(())
        for k, rank in enumerate(ranks):
            if rank >= 0:
                total = total + WEIGHT_TK[t, k]
            if rank in (0, SELF):
                kept = kept + WEIGHT_TK[t, k]
                if ordered:
                    out_TH[t] += WEIGHT_TK[t, k] * entries[t, k]
        if not ordered:
            for rank in (0, SELF):
                if rank in ranks:
                    out_TH[t] += entries[t, rank]
        if renormalise and kept != 0:
            out_TH[t] *= total / kept
    return out_TH


def case_alone_goes_on_without_the_late(directory: Path) -> None:
    for number in (0, 3, 5, 6):  # every pair of choices
        dispatches, ordered, renormalise = bool(number & 1), bool(number & 2), bool(number & 4)
        solo = Solo(directory / str(number), elastic=ElasticMode.ALONE)
        solo.group.set_renormalise(renormalise)
        solo.begin()
        solo.say("dispatch", 2, *((0, LATE) if dispatches else (0,)))
        solo.dispatch(ROUTES, WEIGHT_TK)
        entries = returned_rows(solo, ordered)
        solo.say("combine", 3, 0)
        out_TH = solo.combine(len(ROUTES), ordered)
        solo.assert_void(None, (LATE,))
        assert solo.group.query_mask_buffer().tolist() == [0, 0, 1, 1]
        assert torch.equal(out_TH, expected(entries, ordered, renormalise)), number
        waited_s = (solo.group.wait_ns_by_source() / 1e9).tolist()
        assert waited_s == [0, 0, DEADLINE_S, 0], waited_s
        assert solo.poisoned() == [False, False]
        # Later operations neither wait for it nor send to it, and what it was to get is lost to it.
        before = solo.snapshot(LATE)
        solo.say("dispatch", 4, 0)
        solo.dispatch(ROUTES, WEIGHT_TK)
        solo.say("combine", 5, 0)
        assert torch.equal(solo.combine(len(ROUTES), ordered), expected(entries, ordered, renormalise)), number
        assert torch.equal(solo.snapshot(LATE), before) and solo.clock.now_s < 2 * DEADLINE_S


def case_alone_programs_agree_on_who_is_left_out(directory: Path) -> None:
    """The first of two programs leaves out the late rank; then its word comes, before the second looks, which has not
    heard of the mask."""
    solo = Solo(directory, num_programs=2, elastic=ElasticMode.ALONE)
    solo.begin()
    solo.say("dispatch", 2)
    solo.dispatch(ROUTES, WEIGHT_TK)
    entries = returned_rows(solo, True)
    solo.say("combine", 3, 0)
    triton_wait: Any = sys.modules["kernels.triton_wait"]
    leave_out = triton_wait.leave_out

    def leave_out_then_hear(*arguments: Any) -> Any:
        bits = leave_out(*arguments)
        solo.say("combine", 3)
        solo.group._state.flags[MEMBER.value + LATE] = MEMBER_OF_VIEW.value
        return bits

    triton_wait.leave_out = leave_out_then_hear
    assert torch.equal(solo.combine(len(ROUTES)), expected(entries, True, False))


def case_alone_header_and_barrier(directory: Path) -> None:
    solo = Solo(directory, elastic=ElasticMode.ALONE)
    solo.header(0)
    solo.group.allgather(torch.arange(SHAPE.num_header_words), solo.out_WN)
    solo.assert_void(None, (LATE,))
    assert solo.out_WN[LATE].tolist() == [0] * SHAPE.num_header_words
    solo.say("barrier", 2, 0)
    solo.group.clean_buffer(DEADLINE_S)
    solo.assert_clean()
    assert solo.clock.now_s < 2 * DEADLINE_S


def case_off_raises(directory: Path) -> None:
    solo = Solo(directory, elastic=ElasticMode.OFF)
    solo.begin()
    solo.say("barrier", 2, 0)
    solo.group.clean_buffer(DEADLINE_S)
    try:
        solo.group.void_reason()
    except LateRanksError as error:
        assert "epoch 1 (deadline): nothing came from ranks [2]" in str(error), error
    else:
        raise AssertionError("no error")


def case_fp8_rows_have_the_bits_of_the_reference(directory: Path) -> None:
    """Random rows over many magnitudes; and around every value of e4m3 and every tie between two."""
    shape = EpShape(4, 40, 3, 256, dispatch_dtype=torch.float8_e4m3fn)
    solo = Solo(directory, shape)
    solo.begin()
    value = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    point = torch.cat([value, (value[1:] + value[:-1]) / 2])
    point = torch.cat([point, point.nextafter(torch.tensor(1e9)), point.nextafter(torch.tensor(-1e9))]).clamp(-448, 448)
    point = torch.cat([point, -point])
    exact = torch.nn.functional.pad(point, (0, -len(point) % 126)).view(-1, 126)
    exact = torch.nn.functional.pad(exact, (2, 0), value=448.0)  # the largest of a group of 128: the factor is 1
    exact = torch.nn.functional.pad(exact.view(-1), (0, -exact.numel() % 256)).view(-1, 256)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(20, 256, generator=generator) * torch.logspace(-8, 6, 20)[:, None]
    x_TH = torch.cat([exact, noise, torch.zeros(1, 256)])
    rank_TK = torch.tensor([[SELF, 0, -1]], dtype=torch.int32).repeat(len(x_TH), 1)
    solo.say("dispatch", 2)
    solo.group.dispatch(x_TH, rank_TK, torch.zeros_like(rank_TK), torch.ones(rank_TK.shape))
    solo.assert_clean()
    q_TH, scale_TG = quantise(x_TH)
    num_tokens = len(x_TH)
    got_q = solo.group.row_x_WMH[SELF, :num_tokens].contiguous()
    assert got_q.dtype == torch.float8_e4m3fn
    assert torch.equal(got_q.view(torch.uint8), q_TH.view(torch.uint8))
    assert torch.equal(solo.group.row_scale_WMG[SELF, :num_tokens], scale_TG)
    theirs = solo.view(0, "ep_dispatch_rows")[SELF, :num_tokens]
    assert torch.equal(theirs, solo.view(SELF, "ep_dispatch_rows")[SELF, :num_tokens])


def case_waits_and_loads_are_counted(directory: Path) -> None:
    solo = Solo(directory)
    solo.begin()
    solo.group.update_mask_buffer(LATE, True)
    for operation, n in (("dispatch", 2), ("combine", 3)):
        solo.say(operation, n, 0)
        if operation == "dispatch":
            solo.dispatch([[0, SELF, LATE], [SELF, SELF, -1]])
        else:
            solo.combine(2)
    load = solo.group.expert_load()
    assert load.shape == (SHAPE.max_ranks, NUM_LOCAL) and load[:, 7].tolist() == [1, 3, 0, 0] and load.sum() == 4
    assert solo.group.wait_ns_by_source().tolist() == [0, 0, 0, 0]
    solo.group.update_mask_buffer(LATE, False)
    looks = solo.clock.num_looks
    solo.clock.events = {looks + 4: lambda: solo.say("barrier", 4, 0), looks + 8: lambda: solo.say("barrier", 4)}
    solo.group.clean_buffer(DEADLINE_S)
    solo.assert_clean()
    waited_s = (solo.group.wait_ns_by_source() / 1e9).tolist()
    assert waited_s == [1.0, 0, 3.5, 0], waited_s
    wrong = Solo(directory / "wrong")
    wrong.begin()
    rank_TK = torch.zeros(1, SHAPE.top_k, dtype=torch.int32)
    wrong.group.dispatch(torch.zeros(1, SHAPE.hidden_size), rank_TK, rank_TK + NUM_LOCAL, torch.ones(rank_TK.shape))
    wrong.assert_void(VoidReason.ROUTING)


def case_a_newcomer_announces_its_header(directory: Path) -> None:
    solo, epoch = Solo(directory), 3
    words_N = torch.arange(SHAPE.num_header_words) + 40
    step, bank = epoch_floor(epoch) | 1, header_bank(epoch, 0)
    solo.group.announce_header(epoch, [0, 2], words_N, DIGEST)
    wanted = [step, *(word - (word >> 63 << 64) for word in tagged(step, [DIGEST, *words_N.tolist()]))]
    for rank in range(3):
        assert solo.view(rank, "ep_header")[bank, SELF].tolist() == wanted, rank
    assert solo.group.sees_announcement(epoch, SELF) and not solo.group.sees_announcement(epoch, 0)
    assert not solo.group.all_announced(epoch, [0, 2])
    for rank in (0, 2):
        solo.view(SELF, "ep_header")[bank, rank] = torch.tensor(wanted)
    assert solo.group.all_announced(epoch, [0, 2])
    solo.group.adopt(epoch, [0, 1, 2], DIGEST)
    try:
        solo.group.allgather(words_N + 1, solo.out_WN)
    except ValueError as error:
        assert "words: the first header of epoch 3 differs" in str(error)
    else:
        raise AssertionError("a header that differs from the one announced was accepted")
    solo.group.allgather(words_N, solo.out_WN)
    solo.assert_clean()
    assert solo.out_WN[:3].tolist() == [words_N.tolist()] * 3
    assert step > FLOOR


def case_waits_count_for_whom_they_are(directory: Path) -> None:
    """One rank comes soon, the other never: the deadline is the other's alone."""
    solo = Solo(directory)
    solo.begin()
    looks = solo.clock.num_looks
    solo.clock.events = {looks + 4: lambda: solo.say("dispatch", 2, 0)}
    solo.dispatch([[0, 1, LATE]])
    solo.assert_void(VoidReason.DEADLINE, (LATE,))
    waited_s = (solo.group.wait_ns_by_source() / 1e9).tolist()
    assert waited_s == [1.0, 0, DEADLINE_S, 0], waited_s
