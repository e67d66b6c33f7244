"""How the workers of pytest-xdist share the tests (`make test`).

All tests of whole clusters go to one worker, one after another: a second cluster beside one would only make both slow.
Their processes wait more than they compute, so the rest runs beside them, a file at a time.
"""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

CLUSTERS = ("tests/chaos/", "tests/cluster/", "tests/services/test_agent_cluster.py")


class ClustersTogether(LoadScopeScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if file.startswith(CLUSTERS) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ClustersTogether:
    config.option.loadscopereorder = False  # as collected: the clusters, which take longest, are first
    return ClustersTogether(config, log)
