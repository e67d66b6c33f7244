"""How the workers of pytest-xdist share the tests (`make test`).

All tests of real processes go to one worker, one after another: clusters are for whole machines, and a second one
beside them would only make both slow. Their processes wait more than they compute, so the rest runs beside them, a file
at a time.
"""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

PROCESSES = ("tests/chaos/", "tests/cluster/", "tests/services/")


class ProcessesTogether(LoadScopeScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "processes" if file.startswith(PROCESSES) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ProcessesTogether:
    config.option.loadscopereorder = False  # as collected: the processes, which take longest, are first
    return ProcessesTogether(config, log)
