"""What ``regrow placement export`` writes and ``--init-placement`` reads: a placement, loads of experts, or both. Pure.

    {"model": ..., "version": ..., "physical_to_logical": [layer][rank][local], "loads": [layer][expert]}

A file of `benchmarks.planner.record_trace` is understood too: ``tokens`` [window][layer][expert] are loads.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from common.placement import PhysicalToLogical

Loads = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class PlacementFile:
    """``physical_to_logical`` counts when both are there."""

    physical_to_logical: PhysicalToLogical | None = None
    loads: Loads | None = None
    model: str = ""
    version: int = 0

    def to_text(self) -> str:
        fields = {
            "model": self.model,
            "version": self.version,
            "physical_to_logical": self.physical_to_logical,
            "loads": self.loads,
        }
        return json.dumps({key: value for key, value in fields.items() if value is not None}) + "\n"


def parse_placement_file(text: str) -> PlacementFile:
    """Raises ValueError of one line. Whether it fits a model and a group is another question."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    rows = body.get("physical_to_logical")
    loads = body.get("loads")
    if loads is None and "tokens" in body:
        loads = _sum_of_windows(body["tokens"])
    if rows is None and loads is None:
        raise ValueError("neither physical_to_logical nor loads nor tokens is there")
    return PlacementFile(
        None if rows is None else _placement(rows),
        None if loads is None else _loads(loads),
        str(body.get("model", "")),
        int(body.get("version", 0)),
    )


def _placement(rows: Any) -> PhysicalToLogical:
    try:
        placement = tuple(tuple(tuple(row) for row in layer) for layer in rows)
    except TypeError:
        raise ValueError("physical_to_logical must be lists [layer][rank][local]") from None
    if not all(isinstance(expert, int) for layer in placement for row in layer for expert in row):
        raise ValueError("physical_to_logical must hold numbers of experts, -1 for none")
    return placement


def _loads(loads: Any) -> Loads:
    try:
        table = tuple(tuple(float(load) for load in layer) for layer in loads)
    except (TypeError, ValueError):
        raise ValueError("loads must be lists [layer][expert] of numbers") from None
    if not all(math.isfinite(load) and load >= 0 for layer in table for load in layer):
        raise ValueError("loads must not be negative, infinite or no numbers")
    return table


def _sum_of_windows(windows: Any) -> list[list[float]]:
    try:
        return [[sum(loads) for loads in zip(*layer, strict=True)] for layer in zip(*windows, strict=True)]
    except (TypeError, ValueError):
        raise ValueError("tokens must be lists [window][layer][expert], all of one shape") from None
