"""From records of streams and faults to the figures, the table and the picture. Pure.

A stream's gap around a fault is its longest wait between two pieces, of those that overlap the time from 0.5 s before
the fault to 10 s after it. Percentiles are over (stream, fault) pairs; victims are the streams that the faulted rank
served when it was faulted.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BEFORE_S, AFTER_S = 0.5, 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Times in monotonic seconds; ``rejoined_at`` 0 = not seen in time."""

    action: str
    rank: int
    at: float
    removed_at: float
    rejoined_at: float
    victims: tuple[str, ...]  # request ids


@dataclass(frozen=True, slots=True)
class Window:
    """A span of time around something done to the cluster, or (not ``is_fault``) an equally quiet one beside it."""

    name: str
    is_fault: bool
    start: float
    end: float


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def gap_around(times: Sequence[float], at: float) -> float | None:
    """The longest wait that overlaps the window of a fault at ``at``; None if the stream was not open then."""
    gaps = [
        after - before for before, after in itertools.pairwise(times) if after > at - BEFORE_S and before < at + AFTER_S
    ]
    return max(gaps) if gaps and times[0] < at < times[-1] else None


def gaps_by_group(records: Sequence[dict[str, Any]], faults: Sequence[Fault]) -> dict[str, list[float]]:
    """Seconds, under "ACTION victims" and "ACTION survivors"."""
    groups: dict[str, list[float]] = {}
    for fault in faults:
        victims = set(fault.victims)
        for record in records:
            gap = gap_around(record["times"], fault.at)
            if gap is not None:
                kind = "victims" if record["id"] in victims else "survivors"
                groups.setdefault(f"{fault.action} {kind}", []).append(gap)
    return groups


def join_pauses(records: Sequence[dict[str, Any]], faults: Sequence[Fault]) -> list[float]:
    """For each join, the longest wait of any stream from 0.1 s before to 0.5 s after it came into force."""
    pauses = []
    for fault in faults:
        if not fault.rejoined_at:
            continue
        start, end = fault.rejoined_at - 0.1, fault.rejoined_at + 0.5
        pauses.append(
            max(
                (
                    after - before
                    for record in records
                    for before, after in itertools.pairwise(record["times"])
                    if after > start and before < end
                ),
                default=0.0,
            )
        )
    return pauses


def gaps_within(records: Sequence[dict[str, Any]], window: Window) -> list[float]:
    """For each stream, its longest wait that overlaps the window; streams without any have none."""
    longest = (
        max(
            (b - a for a, b in itertools.pairwise(record["times"]) if b > window.start and a < window.end), default=None
        )
        for record in records
    )
    return [gap for gap in longest if gap is not None]


def window_figures(records: Sequence[dict[str, Any]], windows: Sequence[Window]) -> dict[str, Any]:
    """Gaps of all streams in the windows with the fault and in those without: of each name, and of all together."""
    figures: dict[str, Any] = {}
    for name in ("", *dict.fromkeys(window.name for window in windows)):
        for is_fault, suffix in ((True, "gap"), (False, "gap without it")):
            chosen = [window for window in windows if window.is_fault is is_fault and name in ("", window.name)]
            gaps = [gap for window in chosen for gap in gaps_within(records, window)]
            title = f"{name or 'all'}: {suffix}_s"
            figures |= {f"{title} p99": percentile(gaps, 0.99), f"{title} max": max(gaps, default=0.0)}
    return figures


def verdict(records: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a run, stream by stream against the fault-free one."""
    reference = {record["body"]: record for record in expected}
    same = [
        all(record[k] == reference[record["body"]][k] for k in ("text", "logprobs", "finish")) for record in records
    ]
    wrong_counts = [len(record["logprobs"]) - len(reference[record["body"]]["logprobs"]) for record in records]
    return {
        "requests": len(records),
        "completed": sum(not record["error"] for record in records),
        "equal_to_fault_free": sum(same),
        "tokens_lost": -sum(min(0, count) for count in wrong_counts),
        "tokens_doubled": sum(max(0, count) for count in wrong_counts),
    }


def is_perfect(figures: dict[str, Any]) -> bool:
    """Every stream the same; those that ended with a killed router as far as they went, and when asked again."""
    ended = figures.get("ended_with_their_router", 0)
    begun = figures.get("of_these_beginning_as_fault_free", 0)
    again = figures.get("of_these_asked_again_and_answered", 0)
    whole = figures["requests"] - ended
    return bool(ended == begun == again and whole == figures["completed"] == figures["equal_to_fault_free"])


def rate(records: Sequence[dict[str, Any]], start: float, end: float) -> float:
    """Tokens per second that clients received from ``start`` to ``end``."""
    arrivals = (arrival for record in records for arrival in zip(record["times"], record["sizes"], strict=True))
    return float(sum(size for at, size in arrivals if start <= at < end) / (end - start))


def summary(
    records: Sequence[dict[str, Any]],
    expected: Sequence[dict[str, Any]],
    faults: Sequence[Fault],
    span: tuple[float, float],
) -> dict[str, Any]:
    """All figures; ``expected``: records of the fault-free run, ``span``: start and end of the run with faults."""
    disturbed = [(fault.at, fault.rejoined_at or fault.at + AFTER_S) for fault in faults]
    during_s = sum(end - start for start, end in disturbed)
    figures: dict[str, Any] = {
        **verdict(records, expected),
        "tokens_per_s_fault_free": rate(expected, *_span(expected)),
        "tokens_per_s_while_a_rank_is_missing": sum(rate(records, *w) * (w[1] - w[0]) for w in disturbed) / during_s,
        "tokens_per_s_overall": rate(records, *span),
    }
    for action in sorted({fault.action for fault in faults}):
        chosen = [fault for fault in faults if fault.action == action]
        views = [fault.removed_at - fault.at for fault in chosen]
        returns = [fault.rejoined_at - fault.at for fault in chosen if fault.rejoined_at]
        figures[f"{action}_count"] = len(chosen)
        figures |= _quantiles(f"{action}_to_view_s", views) | _quantiles(f"{action}_to_serving_again_s", returns)
    for group, gaps in sorted(gaps_by_group(records, faults).items()):
        figures |= _quantiles(f"gap_s {group}", gaps) | {f"gap_s {group} n": len(gaps)}
    return figures | _quantiles("join_pause_s", join_pauses(records, faults))


def _span(records: Sequence[dict[str, Any]]) -> tuple[float, float]:
    return min(record["times"][0] for record in records), max(record["times"][-1] for record in records)


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name} p50": percentile(values, 0.5),
        f"{name} p99": percentile(values, 0.99),
        f"{name} max": max(values, default=0.0),
    }


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| figure | value |", "|---|---|"]
    for name, value in figures.items():
        shown = f"{value * 1000:.0f} ms" if "_s " in name and isinstance(value, float) else f"{value:.6g}"
        lines.append(f"| {name.replace('_s ', ' ').replace('_', ' ')} | {shown} |")
    return "\n".join(lines)


def picture(records: Sequence[dict[str, Any]], faults: Sequence[Fault], span: tuple[float, float]) -> str:
    """SVG: tokens per second above, the longest open wait below, faults as lines (red: kill, orange: stop), one pixel
    column for each half second."""
    start, end = span
    step, width, height = 0.5, 4, 160
    num = max(1, int((end - start) / step))
    rates, waits = [0.0] * num, [0.0] * num
    for record in records:
        for (before, after), size in zip(itertools.pairwise(record["times"]), record["sizes"][1:], strict=True):
            column = int((after - start) / step)
            if 0 <= column < num:
                rates[column] += size / step
                waits[column] = max(waits[column], after - before)
    parts = [_bars(rates, 20, height, width, "#4477aa"), _bars(waits, 60 + height, height, width, "#222222")]
    for fault in faults:
        x = (fault.at - start) / step * width
        colour = "#cc3311" if fault.action == "kill" else "#ee7733"
        parts.append(f'<line x1="{x:.0f}" x2="{x:.0f}" y1="20" y2="{60 + 2 * height}" stroke="{colour}"/>')
    labels = (
        f'<text x="4" y="14">tokens per second, largest {max(rates):.0f}</text>'
        f'<text x="4" y="{54 + height}">longest wait of any stream, largest {max(waits):.2f} s</text>'
    )
    size = f'width="{num * width}" height="{80 + 2 * height}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{labels}{"".join(parts)}</svg>\n'


def _bars(values: Sequence[float], top: int, height: int, width: int, colour: str) -> str:
    largest = max(values) or 1.0
    bars = "".join(
        f"M{index * width} {top + height}v{-value / largest * height:.1f}h{width - 1}v{value / largest * height:.1f}z"
        for index, value in enumerate(values)
        if value
    )
    return f'<path d="{bars}" fill="{colour}"/>'
