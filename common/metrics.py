"""Prometheus metrics: one registry per process, made by it and passed on, never the library's global one.

Every name starts with ``regrow_`` and ends with its unit; counters end with ``_total``. Only the router serves HTTP;
what the other processes count reaches it in the cluster's status and is shown by the gauges here.
"""

from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from common.time_histogram import TimeHistogram

__all__ = ["CONTENT_TYPE_LATEST", "RouterMetrics", "render", "router_metrics"]

# A gap of 0.25 s on a killed rank is the goal, so the buckets are dense around it.
_GAP_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 1.0, 2.0, 5.0, 10.0)
_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """What a router counts. Labels: ``outcome`` is finished | failed | cancelled | refused; ``reason`` is why a request
    was placed again (its rank left, its memory was lost, moved to even out the load, ...)."""

    registry: CollectorRegistry
    requests: Counter  # {outcome}
    prompt_tokens: Counter
    output_tokens: Counter
    replacements: Counter  # {reason}
    stale_tokens: Counter  # received twice or for an old attempt, and dropped
    dropped_messages: Counter  # malformed, or from an older incarnation
    requests_running: Gauge
    requests_waiting: Gauge
    time_to_first_token: TimeHistogram
    token_gap: TimeHistogram
    epoch: Gauge
    ranks: Gauge  # {state}


def router_metrics() -> RouterMetrics:
    """A fresh registry with the metrics of a router, all zero."""
    registry = CollectorRegistry()

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"regrow_{name}", text, labels, registry=registry)

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"regrow_{name}", text, labels, registry=registry)

    def histogram(name: str, text: str, bounds_s: tuple[float, ...]) -> TimeHistogram:
        return TimeHistogram(f"regrow_{name}", text, bounds_s, registry)

    return RouterMetrics(
        registry=registry,
        requests=counter("requests_total", "Requests that ended, by outcome", "outcome"),
        prompt_tokens=counter("prompt_tokens_total", "Prompt tokens of accepted requests"),
        output_tokens=counter("output_tokens_total", "Tokens accepted for clients, each once"),
        replacements=counter("replacements_total", "Requests placed again, by reason", "reason"),
        stale_tokens=counter("stale_tokens_total", "Tokens dropped: doubled, or of an old attempt"),
        dropped_messages=counter("dropped_messages_total", "Messages dropped: malformed, or of an old incarnation"),
        requests_running=gauge("requests_running", "Requests that produce tokens"),
        requests_waiting=gauge("requests_waiting", "Requests accepted that have no token yet"),
        time_to_first_token=histogram(
            "time_to_first_token_seconds", "From acceptance to the first token", _FIRST_TOKEN_BUCKETS_S
        ),
        token_gap=histogram("token_gap_seconds", "Between two pieces of one stream", _GAP_BUCKETS_S),
        epoch=gauge("epoch", "Epoch of the membership view that this router holds"),
        ranks=gauge("ranks", "Decode ranks, by state", "state"),
    )


def render(registry: CollectorRegistry) -> bytes:
    """The text exposition format, to be sent as `CONTENT_TYPE_LATEST`."""
    return generate_latest(registry)
