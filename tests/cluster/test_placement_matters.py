"""The experts of other ranks decide tokens: proof that the group computes together and not each rank for itself."""

import asyncio
import subprocess
import sys
from pathlib import Path

from tests.cluster.harness import ROOT, Cluster, stream_all, varied_bodies

ONE_COPY = "[decode]\nnum_redundant_experts = 0\n"


def _overwrite_experts(heap: Path) -> None:
    """Zeroes the expert weights in the heap file of a rank, as a stranger would."""
    code = "import sys; from tests.cluster.heap_surgeon import zero_experts; zero_experts(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(heap)], cwd=ROOT, check=True, timeout=60)


async def test_overwriting_the_only_copy_of_experts_changes_outputs_on_other_ranks(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", "--decode-ranks", "2", config=ONE_COPY)
    try:
        cluster.wait_ready()
        bodies = varied_bodies(8, 24)
        before = await stream_all(cluster.url, bodies)
        status = await cluster.fetch_status()
        heap = next(entry["heap"] for entry in status["ranks"] if entry["rank"] == 1)
        await asyncio.to_thread(_overwrite_experts, Path(heap))
        after = await stream_all(cluster.url, bodies)
        assert all(stream.error == "" for stream in [*before, *after])
        changed = [a.outcome != b.outcome for a, b in zip(before, after, strict=True)]
        # Requests live on both ranks; those of rank 0 can only change because rank 1 computes for them.
        assert all(changed), changed
    finally:
        cluster.stop()
