"""`regrow up` as its operator meets it: mistakes are one clear line, and nothing is left running."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.harness import ROOT, TINY_RANDOM, Cluster, processes_of, stream_all, varied_bodies


def _up(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", "up", "--run-dir", str(run_dir), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)


def _assert_refused(done: subprocess.CompletedProcess[str], run_dir: Path, *named: str) -> None:
    assert done.returncode not in (0, None), done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[-1] for word in named), f"{named} not named in: {lines[-1]}"
    assert list(processes_of(run_dir)) == []


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _up(tmp_path / "run", "--port", str(port), "--model", str(TINY_RANDOM))
    _assert_refused(done, tmp_path / "run", str(port), "in use")


def test_an_unknown_configuration_key(tmp_path: Path) -> None:
    config = tmp_path / "cluster.toml"
    config.write_text("[decode]\nnum_rank = 2\n")
    _assert_refused(_up(tmp_path / "run", "--config", str(config)), tmp_path / "run", "cluster.toml", "num_rank")


def test_a_model_directory_that_does_not_exist(tmp_path: Path) -> None:
    done = _up(tmp_path / "run", "--model", str(tmp_path / "nothing"))
    _assert_refused(done, tmp_path / "run", "nothing")


def test_a_configuration_field_of_the_model_that_is_not_supported(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY_RANDOM, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0}
    (model / "config.json").write_text(json.dumps(config))
    _assert_refused(_up(tmp_path / "run", "--model", str(model)), tmp_path / "run", "rope")


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY_RANDOM, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    _assert_refused(_up(tmp_path / "run", "--model", str(model)), tmp_path / "run", "model.safetensors")


def test_a_missing_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(TINY_RANDOM, model)
    tensors = load_file(model / "model.safetensors")
    missing = next(name for name in sorted(tensors) if ".experts.3." in name)
    del tensors[missing]
    save_file(tensors, model / "model.safetensors")
    _assert_refused(_up(tmp_path / "run", "--model", str(model)), tmp_path / "run", missing)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_orderly_stop_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    cluster = Cluster(tmp_path / "run", "--decode-ranks", "2").wait_ready()
    heaps = {Path(entry["heap"]).parent for entry in cluster.status()["ranks"]}
    assert cluster.stop(number) in (0, 130)
    assert not any(path.exists() for path in heaps)


def test_two_clusters_do_not_disturb_each_other_and_the_next_start_removes_what_a_sigkill_left(tmp_path: Path) -> None:
    first = Cluster(tmp_path / "first", "--decode-ranks", "2")
    second = Cluster(tmp_path / "second", "--decode-ranks", "2")
    try:
        first.wait_ready()
        second.wait_ready()
        first.process.kill()
        first.process.wait(timeout=10)
        orphans = [pid for pid, _ in processes_of(first.run_dir)]
        heaps = {Path(entry["heap"]).parent for entry in second.status()["ranks"]}
        assert orphans, "the fault did not happen: SIGKILL of regrow up left nothing to remove"
        successor = Cluster(first.run_dir, "--decode-ranks", "2").wait_ready()
        assert not [pid for pid in orphans if Path(f"/proc/{pid}").exists()]
        for cluster in (second, successor):
            streams = asyncio.run(stream_all(cluster.url, varied_bodies(2, 8)))
            assert [stream.finish for stream in streams] == ["length", "length"]
        successor.stop()
        assert all(path.exists() for path in heaps)
    finally:
        first.stop()
        second.stop()


def test_a_second_start_in_a_live_run_directory_is_refused(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", "--decode-ranks", "1")
    try:
        cluster.wait_ready()
        done = _up(tmp_path / "run")
        assert done.returncode != 0 and str(tmp_path / "run") in done.stderr.splitlines()[-1]
        started = time.monotonic()
        assert asyncio.run(stream_all(cluster.url, varied_bodies(1, 4)))[0].finish == "length"
        assert time.monotonic() - started < 30
    finally:
        cluster.stop()
