"""Every process has a registry of its own, and its names follow the rule."""

from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from common.metrics import render, router_metrics


def test_two_routers_in_one_process_share_nothing() -> None:
    first, second = router_metrics(), router_metrics()
    first.requests.labels("finished").inc()
    assert first.registry.get_sample_value("regrow_requests_total", {"outcome": "finished"}) == 1.0
    assert second.registry.get_sample_value("regrow_requests_total", {"outcome": "finished"}) is None
    assert not any(family.name.startswith("regrow_") for family in REGISTRY.collect())


def test_exposition_is_parsable_and_prefixed() -> None:
    metrics = router_metrics()
    metrics.token_gap.observe(0.2)
    metrics.ranks.labels("serving").set(4)
    families = {family.name: family for family in text_string_to_metric_families(render(metrics.registry).decode())}
    assert all(name.startswith("regrow_") for name in families)
    below = {
        s.labels["le"]: s.value for s in families["regrow_token_gap_seconds"].samples if s.name.endswith("_bucket")
    }
    assert (below["0.15"], below["0.2"], below["+Inf"]) == (0.0, 1.0, 1.0)
    assert [(s.labels, s.value) for s in families["regrow_ranks"].samples] == [({"state": "serving"}, 4.0)]
