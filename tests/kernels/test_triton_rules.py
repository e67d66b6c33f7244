"""One rank of Triton kernels under the interpreter, its peers played by the test; wrong versions of it must fail."""

from collections.abc import Iterator

import pytest

from tests.kernels.line_process import LineProcess, interpreted

CASES = (
    "writes_only_into_regions_of_its_slot",
    "one_verdict_a_wait",
    "void_publishes_nothing",
    "late_program_of_a_timed_out_combine",
    "ends_of_a_wait",
    "headers",
    "masks_and_routing",
    "group_of_one_in_bfloat16",
    "wrong_use",
    "alone_goes_on_without_the_late",
    "alone_programs_agree_on_who_is_left_out",
    "alone_header_and_barrier",
    "off_raises",
    "fp8_rows_have_the_bits_of_the_reference",
    "waits_and_loads_are_counted",
    "waits_count_for_whom_they_are",
    "a_newcomer_announces_its_header",
)
READS_STATUS = "void = status(flags, MODE)"
# What breaks each rule: case, module, text, replacement.
MUTANTS = {
    "1.1 combine rows of no one's slot": (
        "writes_only_into_regions_of_its_slot",
        "triton_combine",
        "first = ((rank * M + token) * K)",
        "first = ((0 * M + token) * K)",
    ),
    "1.1 dispatch rows of no one's slot": (
        "writes_only_into_regions_of_its_slot",
        "triton_dispatch",
        "+ (rank * M + t).to(tl.int64) * ROW_WORDS\n            wanted",
        "+ t.to(tl.int64) * ROW_WORDS\n            wanted",
    ),
    "2.2 status not set by the program that leaves": (
        "one_verdict_a_wait",
        "triton_wait",
        "                mark_void(flags, reason)\n                if reason",
        "                if reason",
    ),
    "2.3 void ranks go on sending": ("void_publishes_nothing", "triton_combine", READS_STATUS, READS_STATUS + " * 0"),
    "2.3 void ranks go on with barriers": (
        "void_publishes_nothing",
        "triton_control",
        READS_STATUS,
        READS_STATUS + " * 0",
    ),
    "2.3 word without the rows of a late program": (
        "late_program_of_a_timed_out_combine",
        "triton_wait",
        "clean = (void == 0) & (before < VOID_ARRIVAL)",
        "clean = before >= 0",
    ),
    "2.1 poison of non-members counts": (
        "ends_of_a_wait",
        "triton_wait",
        "mask=peers | (j == rank), other=0, volatile=True)",
        "mask=j < 4, other=0, volatile=True)",
    ),
    "2.1 old poison counts": ("ends_of_a_wait", "triton_wait", "tl.where(mark >= floor,", "tl.where(mark > 0,"),
    "alone: programs that do not agree": (
        "alone_programs_agree_on_who_is_left_out",
        "triton_wait",
        "late_bits = tl.where(decides, late_bits, before)",
        "late_bits = late_bits",
    ),
    "1.3 tags unread": ("headers", "triton_control", "if half_read + other_digest > 0", "if other_digest > 0"),
}


@pytest.fixture(scope="module")
def cases() -> Iterator[LineProcess]:
    with interpreted("tests.kernels.case_runner") as process:
        yield process


@pytest.mark.parametrize("case", CASES)
def test_case(cases: LineProcess, case: str) -> None:
    assert cases.ask({"case": case, "mutation": []}) == "ok"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_version_fails(cases: LineProcess, mutant: str) -> None:
    case, *mutation = MUTANTS[mutant]
    answer = cases.ask({"case": case, "mutation": mutation})
    assert "AssertionError" in answer and "nothing to mutate" not in answer, answer
