"""The compose files as Compose reads them: overrides fit what they lie over, and commands fit the agent's options.

Without a Docker engine: the files are parsed and merged here. With one, `make test-compose` asks Compose itself.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from common.config import load_config
from services.cli import __main__ as cli
from services.cli.container_agent import ROLES
from tests.compose.containers import ROOT, compose_command

BASE = ROOT / "docker-compose.yml"
OVERRIDES = sorted((ROOT / "compose").glob("*.yml"))
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")


class Missing(Exception):
    """A variable that the file insists on; the text is what the file says then."""


def substituted(text: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, rule, rest = match.groups()
        if variables.get(name):
            return variables[name]
        if rule == ":?":
            raise Missing(rest)
        return rest or ""

    return _VARIABLE.sub(value, text)


def rendered(*files: Path, **variables: str) -> dict[str, Any]:
    """What Compose makes of the files together, as far as ours go: maps are merged, lists united."""

    def merge(old: Any, new: Any) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            return {key: merge(old.get(key), new.get(key)) for key in {**old, **new}}
        if isinstance(old, list) and isinstance(new, list):
            return old + [item for item in new if item not in old]
        return old if new is None else new

    whole: dict[str, Any] = {}
    for file in files:
        whole = merge(whole, yaml.safe_load(substituted(file.read_text(), variables)))
    return whole


def test_each_container_runs_an_agent_of_one_role_by_options_that_it_knows() -> None:
    services = rendered(BASE)["services"]
    assert set(services) == set(ROLES)
    usage = CliRunner().invoke(cli.app, ["agent", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for name, service in services.items():
        words = shlex.split(service["command"])
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert options["--role"] == name and options["--monitor-address"] == "monitor:7000"
        assert all(option in usage for option in options), f"{name}: {options}\n{usage}"
    config = shlex.split(services["monitor"]["command"])[-1]
    assert load_config(ROOT / config).decode.num_ranks == services["decode"]["deploy"]["replicas"]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda path: path.stem)
def test_an_override_changes_services_that_are_there(override: Path) -> None:
    variables = {"REGROW_PORT": "8000-8001", "REGROW_KEY_FILE": "cluster.key"}
    base, both = rendered(BASE, **variables), rendered(BASE, override, **variables)
    assert set(both["services"]) == set(base["services"])
    for name, service in both["services"].items():
        assert service["command"] == base["services"][name]["command"]


def test_several_routers_share_a_range_of_ports_which_must_be_named() -> None:
    routers = ROOT / "compose" / "routers.yml"
    router = rendered(BASE, routers, REGROW_PORT="8000-8003", REGROW_ROUTERS="4")["services"]["router"]
    assert router["ports"] == ["127.0.0.1:8000-8003:8000"]
    assert router["deploy"]["replicas"] == 4
    with pytest.raises(Missing, match="range of host ports"):
        rendered(BASE, routers)


@pytest.mark.compose
@pytest.mark.parametrize("override", OVERRIDES, ids=lambda path: path.stem)
def test_compose_reads_it_the_same_way(override: Path, tmp_path: Path) -> None:
    command = compose_command()
    if command is None:
        pytest.skip("needs a Docker engine with compose")
    key = tmp_path / "cluster.key"
    key.touch()
    variables = {"REGROW_PORT": "8000-8001", "REGROW_ROUTERS": "2", "REGROW_KEY_FILE": str(key)}
    line = [*command, "-f", str(BASE), "-f", str(override), "config"]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs, ours = yaml.safe_load(done.stdout)["services"], rendered(BASE, override, **variables)["services"]
    assert set(theirs) == set(ours)
    for name, service in ours.items():
        assert len(theirs[name].get("ports", [])) == len(service.get("ports", []))
        for key_, value in service.get("deploy", {}).items():
            assert str(theirs[name]["deploy"][key_]) == str(value)
