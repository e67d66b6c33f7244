"""Who may import what, checked on the source.

    services/* -> common/* -> kernels/* -> torch        no service imports another

Decisions are pure: apart from the shells listed here a file of services/ or common/ reaches no tasks, sockets, threads,
processes, clock or global randomness, also not through what it imports. Only the files in `COMPUTE` (and shells of the
processes that run the model) may reach torch; processes that do no tensor work start without it.

When a new shell is needed, it goes into `SHELLS` and into ruff's per-file-ignores: a test holds the two together.
"""

import ast
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.import_graph import ImportGraph, Module

ROOT = Path(__file__).resolve().parent.parent
GRAPH = ImportGraph.read(ROOT)

SHELLS = (
    "common/bus.py",
    "common/handshakes.py",
    "common/heartbeat.py",
    "common/loop_socket.py",
    "common/monitor_client.py",
    "common/service_runner.py",
    "common/transport.py",
    "services/*/__main__.py",
    "services/*/service.py",
    "services/*/stream.py",
    "services/decode/stream_inbox.py",
    "services/router/cluster_links.py",
    "services/router/http_*.py",
    "services/cli/**",
)
# Tensor work: torch and kernels allowed, everything else as in a pure file.
COMPUTE = (
    "common/model/*",
    "services/decode/configured_rank.py",
    "services/decode/elastic_exchange.py",
    "services/decode/expert_copy.py",
    "services/decode/expert_slots.py",
    "services/decode/rank_engine.py",
    "services/decode/rank_heap.py",
    "services/decode/rank_life.py",
    "services/decode/rounds.py",
    "services/decode/staging.py",
    "services/prefill/prefill_engine.py",
)
TORCH_FREE_SERVICES = ("router", "monitor", "planner", "agent", "cli")

IMPURE_MODULES = (
    "asyncio",
    "zmq",
    "uvloop",
    "aiohttp",
    "socket",
    "selectors",
    "threading",
    "concurrent",
    "subprocess",
    "multiprocessing",
    "secrets",
)
TENSOR_MODULES = ("torch", "triton", "safetensors.torch")
# Anything else of these two modules is, or draws from, a generator that the whole process shares.
SEEDED_RANDOMNESS = ("random.Random", "numpy.random.Generator", "numpy.random.default_rng", "numpy.random.SeedSequence")
CLOCKS_AND_ENTROPY = (
    "time.time",
    "time.time_ns",
    "time.monotonic",
    "time.monotonic_ns",
    "time.perf_counter",
    "time.perf_counter_ns",
    "time.process_time",
    "time.sleep",
    "datetime.datetime.now",
    "datetime.datetime.utcnow",
    "os.urandom",
    "uuid.uuid1",
    "uuid.uuid4",
)
KERNELS_MAY_IMPORT = ("kernels", "torch", "triton", "numpy", "nvshmem", "cuda")


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def impurity(module: Module) -> str | None:
    """Why the file by itself is not pure."""
    for name in sorted(module.imports):
        if within(name, IMPURE_MODULES):
            return f"imports {name}"
    for name in sorted(module.uses):
        if name in CLOCKS_AND_ENTROPY:
            return f"uses {name}"
        if name.startswith(("random.", "numpy.random.")) and not within(name, SEEDED_RANDOMNESS):
            return f"uses {name}"
    return None


def tensors(module: Module) -> str | None:
    return next((f"imports {name}" for name in sorted(module.imports) if within(name, TENSOR_MODULES)), None)


def layer_fault(module: Module) -> str | None:
    """Why the file breaks the direction of dependencies."""
    top, _, rest = module.name.partition(".")
    for name in sorted(module.imports):
        if top == "kernels" and within(name, ("services", "common")):
            return f"{module.path}: kernels import nothing of ours, but {name}"
        if top == "common" and within(name, ("services",)):
            return f"{module.path}: common imports {name}"
        if top == "services" and name.startswith("services.") and name.split(".")[1] != rest.split(".")[0]:
            return f"{module.path}: a service imports another, {name}"
    return None


def violations(graph: ImportGraph) -> list[str]:
    """Every breach of the rules of this file, one line each."""
    found = []
    for module in graph.modules.values():
        found.append(layer_fault(module))
        top, service = (*module.name.split("."), "")[:2]
        if top == "services" and service in TORCH_FREE_SERVICES:
            found.append(graph.reaches(module, tensors))
        if top == "kernels" or matches(module.path, SHELLS):
            continue
        if matches(module.path, COMPUTE):
            found.append(graph.reaches(module, impurity, follow=lambda target: not within(target.name, ("kernels",))))
        else:
            found.append(graph.reaches(module, impurity))
            found.append(graph.reaches(module, tensors))
    return sorted({breach for breach in found if breach})


def test_the_tree_keeps_its_rules() -> None:
    assert len(GRAPH.modules) > 10, "the checker looked in the wrong place"
    assert violations(GRAPH) == []


def test_kernels_import_only_what_an_engine_would_have() -> None:
    allowed = KERNELS_MAY_IMPORT + tuple(sys.stdlib_module_names)
    for module in GRAPH.modules.values():
        if within(module.name, ("kernels",)):
            foreign = {name for name in module.imports if not within(name, allowed)}
            assert not foreign, f"{module.path} imports {sorted(foreign)}"


def test_kernels_package_is_a_docstring() -> None:
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def test_ruff_exempts_exactly_the_shells() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ignores = config["tool"]["ruff"]["lint"]["per-file-ignores"]
    exempt = {path for path, codes in ignores.items() if "TID251" in codes}
    assert {path for path in exempt if path.startswith(("common/", "services/"))} == set(SHELLS)


@pytest.mark.parametrize("pattern", SHELLS + COMPUTE)
def test_no_exemption_is_stale(pattern: str) -> None:
    assert any(fnmatch(module.path, pattern) for module in GRAPH.modules.values()), f"nothing matches {pattern}"


BREACHES = {
    "task in a pure file": ("services/router/admission.py", "import asyncio", "imports asyncio"),
    "clock under an alias": ("services/router/admission.py", "import time as t\nx = t.monotonic()", "time.monotonic"),
    "clock by name": ("common/view.py", "from time import perf_counter", "uses time.perf_counter"),
    "global randomness": ("common/view.py", "import random\nx = random.choice([1])", "uses random.choice"),
    "numpy's global randomness": (
        "common/view.py",
        "import numpy as np\nx = np.random.rand()",
        "uses numpy.random.rand",
    ),
    "import in a function": ("common/view.py", "def f():\n    import zmq.asyncio", "imports zmq.asyncio"),
    "through a module of ours": (
        "services/monitor/views.py",
        "from common import transport",
        "transport.py: imports zmq",
    ),
    "relative import": ("common/view.py", "from .transport import send", "transport.py: imports zmq"),
    "through a package": ("services/planner/load.py", "import common.tensors.shapes", "imports torch"),
    "torch in a router's shell": ("services/router/service.py", "import common.model.mla", "imports torch"),
    "torch in a pure file": ("services/decode/scheduler.py", "import torch", "imports torch"),
    "clock in compute": ("common/model/mla.py", "import torch, time\nx = time.monotonic()", "uses time.monotonic"),
    "service imports service": ("services/cli/demo.py", "from services.agent import plan", "a service imports another"),
    "common imports service": ("common/view.py", "import services.router", "common imports services.router"),
    "kernels import ours": ("kernels/reference.py", "from common.view import View", "kernels import nothing of ours"),
}
SOUND = {
    "common/__init__.py": "",
    "common/transport.py": "import zmq",
    "common/view.py": "import random\ndef f(rng: random.Random) -> None: ...",
    "common/model/__init__.py": "",
    "common/model/mla.py": "import torch\nfrom kernels.reference import wait",
    "common/tensors/__init__.py": "import torch",
    "common/tensors/shapes.py": "",
    "kernels/__init__.py": "'''Kernels.'''",
    "kernels/reference.py": "import time\nimport torch\ndef wait(): return time.monotonic()",
    "services/__init__.py": "",
    "services/agent/__init__.py": "",
    "services/agent/plan.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import asyncio",
    "services/router/service.py": "import asyncio, time\nfrom common.transport import send\nx = time.monotonic()",
    "services/router/admission.py": "from common.view import f",
    "services/decode/service.py": "import common.model.mla",
}


def write_tree(root: Path, files: dict[str, str]) -> ImportGraph:
    for path, source in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return ImportGraph.read(root)


def test_a_sound_tree_has_no_violations(tmp_path: Path) -> None:
    sound = {path: source for path, source in SOUND.items() if not path.startswith("common/tensors/")}
    assert violations(write_tree(tmp_path, sound)) == []


@pytest.mark.parametrize(("path", "source", "expected"), BREACHES.values(), ids=BREACHES.keys())
def test_a_breach_is_found(tmp_path: Path, path: str, source: str, expected: str) -> None:
    found = violations(write_tree(tmp_path, SOUND | {path: source}))
    assert any(path in line and expected in line for line in found), found
