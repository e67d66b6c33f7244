"""GET /metrics of a router: brings what others count up to date when it is asked for. Pure."""

from collections.abc import Mapping
from typing import Any

from common.metrics import RouterMetrics, render
from common.placement_metrics import PlacementMetrics
from services.router.request_table import RequestTable


class ShownMetrics:
    """``metrics`` is shared with those who count in it as things happen."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics, self._placement = metrics, PlacementMetrics(metrics.registry)
        self._num_stale = self._num_malformed = 0  # already counted: these counters only grow

    def render(self, table: RequestTable, num_malformed: int, placement: Mapping[str, Any]) -> bytes:
        """``num_malformed``: messages since the process began; ``placement``: as in the cluster's status."""
        metrics = self._metrics
        self._placement.show(placement)
        metrics.requests_running.set(table.num_running)
        metrics.requests_waiting.set(len(table) - table.num_running)
        metrics.epoch.set(table.epoch)
        metrics.stale_tokens.inc(table.num_stale_tokens - self._num_stale)
        self._num_stale = table.num_stale_tokens
        metrics.dropped_messages.inc(num_malformed - self._num_malformed)
        self._num_malformed = num_malformed
        metrics.ranks.labels(state="serving").set(table.num_ranks)
        return render(metrics.registry)
