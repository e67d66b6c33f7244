"""``python -m tests.kernels.case_runner`` (with TRITON_INTERPRET=1) imports torch and Triton once and forks a process
for each case that it reads: a line of JSON with the case's name and, for a mutant, the text to replace in a kernel
module. It answers "ok" or the traceback.
"""

import importlib.util
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from kernels import device_launch
from tests.kernels import device_cases, mode_cases
from tests.own_directory import own_directory_prefix

MODULES = ("triton_wait", "triton_control", "triton_dispatch", "triton_combine")

KERNELS = tuple(f"{name}_kernel" for name in ("allgather", "announce", "barrier", "poison", "dispatch", "combine"))
CASES: dict[str, Callable[[Path], None]] = {
    name.removeprefix("case_"): case
    for module in (device_cases, mode_cases)
    for name, case in vars(module).items()
    if name.startswith("case_")
}


def mutate(directory: Path, module: str, old: str, new: str) -> None:
    """Load all kernel modules anew, with ``old`` replaced in one, and let the group launch those."""
    assert module in MODULES
    for name in MODULES[MODULES.index(module) :]:
        source = Path(device_launch.__file__).with_name(f"{name}.py").read_text()
        if name == module:
            assert source.count(old) >= 1, f"nothing to mutate: {old!r}"
            source = source.replace(old, new)
        path = directory / f"{name}_mutant.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"kernels.{name}", path)
        assert spec is not None and spec.loader is not None
        mutant = importlib.util.module_from_spec(spec)
        sys.modules[f"kernels.{name}"] = mutant
        spec.loader.exec_module(mutant)
        for kernel in (
            "allgather_kernel",
            "announce_kernel",
            "barrier_kernel",
            "poison_kernel",
            "dispatch_kernel",
            "combine_kernel",
        ):
            if hasattr(mutant, kernel):
                setattr(device_launch, kernel, getattr(mutant, kernel))


def run_case(name: str, mutation: list[str]) -> str:
    """Fork, run, report."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "ok"
        try:
            with tempfile.TemporaryDirectory(prefix=own_directory_prefix(os.getpid()), dir="/dev/shm") as root:
                try:
                    if mutation:
                        mutate(Path(root), *mutation)
                    CASES[name](Path(root))
                except BaseException:
                    answer = traceback.format_exc()
        finally:
            os.write(write_end, answer.encode()[-60_000:])
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run_case(request["case"], request["mutation"])), flush=True)


if __name__ == "__main__":
    main()
