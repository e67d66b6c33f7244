"""Where experts lie, as Prometheus gauges: what `GET /cluster` says under ``placement``."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

# Key of the status, name and text of the metric.
_PLAIN = {
    "balancedness": ("balancedness", "Mean / largest of what ranks have computed in this epoch, all layers; 1 is even"),
    "foretold_balancedness": ("foretold_balancedness", "The same, had the loads of late met the placement in force"),
    "served_entries": ("served_entries", "(token, expert) pairs that the balancedness was measured on; 0: foretold"),
    "moved_experts": ("moved_experts", "Experts loaded by migrations that came into force"),
    "expert_bytes_copied": ("copied_bytes", "Expert weights copied by the ranks that serve now"),
    "experts_from_checkpoint": ("checkpoint_reads", "Experts that no live copy could be read for"),
    "bad_expert_copies": ("bad_copies", "Copies of experts whose checksum was wrong; made anew"),
    "plan_s": ("plan_seconds", "Time that the last plan took"),
    "orphans": ("orphans", "Experts without a live copy"),
    "experts": ("experts", "Experts over all layers"),
    "covered_experts": ("covered_experts", "Experts with copies in two fault domains"),
}


class PlacementMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"regrow_placement_{name}", text, labels, registry=registry)

        self._plain = {key: gauge(*named) for key, named in _PLAIN.items()}
        self._layers = gauge("layer_balancedness", "The same for one layer", "layer")
        self._versions = gauge("version", "Of the placement in force, and of the one on its way (0: none)", "state")
        self._migrations = gauge("migrations", "Migrations since the monitor started, by outcome", "outcome")

    def show(self, placement: Mapping[str, Any]) -> None:
        """A key that is not there keeps its last value."""
        for key, gauge in self._plain.items():
            if key in placement:
                gauge.set(placement[key])
        for layer, figure in enumerate(placement.get("layers", ())):
            self._layers.labels(layer=str(layer)).set(figure)
        self._versions.labels(state="active").set(placement.get("version", 0))
        self._versions.labels(state="staged").set(placement.get("staged_version", 0))
        for outcome, count in placement.get("migrations", {}).items():
            self._migrations.labels(outcome=outcome).set(count)
