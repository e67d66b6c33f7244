"""What the build of the CPU kernels leaves beside their sources: one library for each instruction set."""

import hashlib
import platform
from pathlib import Path

FOLDER = Path(__file__).parent
# From the best to what every machine has.
LEVELS: dict[str, tuple[str, ...]] = (
    {"v4": ("-march=x86-64-v4",), "v3": ("-march=x86-64-v3",), "base": ()}
    if platform.machine() in ("x86_64", "AMD64")
    else {"base": ()}
)


def library_path(level: str) -> Path:
    return FOLDER / f"libregrow_cpu_{level}.so"


def sources_digest() -> str:
    """Of the C sources and of how they are compiled: a library that was built from others is stale."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.[ch]"), FOLDER / "artifacts.py", FOLDER / "build.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
