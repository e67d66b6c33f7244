"""Mistakes that `regrow up` meets at its start: each is one clear line, and nothing is left running."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.cluster.harness import ROOT, TINY_RANDOM, processes_of


def _up(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", "up", "--decode-ranks", "2", "--prefill-workers", "1"]
    command += ["--run-dir", str(run_dir), *arguments]
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


def test_a_missing_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(TINY_RANDOM, model)
    tensors = load_file(model / "model.safetensors")
    missing = next(name for name in sorted(tensors) if ".experts.3." in name)
    del tensors[missing]
    save_file(tensors, model / "model.safetensors")
    _assert_refused(_up(tmp_path / "run", "--model", str(model)), tmp_path / "run", missing)
