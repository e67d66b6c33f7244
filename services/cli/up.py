"""``regrow up``: a whole cluster on this machine, until Ctrl-C.

This process is the parent of one agent (`services.agent`), which is the parent of everything else. It is kept apart
from the agent so that the agent may be killed like anything else: then it is started again and takes its children over.
Whatever happens, the last thing done here is to end every process that carries this run directory on its command line.

If this process itself is killed, the agent's standard input ends, and it stops everything in order; what even that does
not reach is ended by the next ``regrow up`` in the directory.
"""

import contextlib
import ctypes
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

import msgspec

from common.admin_token import VARIABLE, read_admin_token
from common.cluster_key import SECRET_BYTES, ClusterKey, read_key, write_key
from common.config import ClusterConfig, load_config, validate
from common.ids import make_process_id
from common.monitor_address import MonitorAddress, is_loopback
from common.process_args import ProcessArgs
from common.service_runner import OperatorError
from services.cli.free_ports import pick_monitor_port, require_free
from services.cli.placement import read_placement_file
from services.cli.run_directory import ClusterDescription, RunDirectory
from services.cli.toml_text import to_toml

_READY_S = 300.0
_POLL_S = 0.1
_AGENT_RESTART_S = 0.2
_MAX_AGENT_DEATHS = 8
_PR_SET_CHILD_SUBREAPER = 36
OPEN_WARNING = (
    "WARNING: other machines can reach the bus and the monitor, and nothing asks who they are: anybody may kill ranks "
    "and read prompts. Start with --secure, or with --key-file on several hosts."
)


@dataclass(frozen=True, slots=True)
class UpOptions:
    """None: as the configuration says."""

    decode_ranks: int | None
    prefill_workers: int | None
    port: int
    host: str
    run_dir: Path
    config: Path | None
    model: Path | None
    secure: bool = False  # with the key of the run directory
    key_file: Path | None = None
    admin_token_file: Path | None = None
    init_placement: Path | None = None
    routers: int | None = None


class ClusterFailed(Exception):
    """The cluster cannot run; the text says which process, and what it said."""


def effective_config(options: UpOptions) -> ClusterConfig:
    """The file with the options over it. Raises ValueError with one line."""
    config = load_config(options.config)
    decode, prefill, router, model = config.decode, config.prefill, config.router, config.model
    if options.decode_ranks is not None:
        max_ranks = max(decode.max_ranks, options.decode_ranks)
        decode = msgspec.structs.replace(decode, num_ranks=options.decode_ranks, max_ranks=max_ranks)
    if options.prefill_workers is not None:
        prefill = msgspec.structs.replace(prefill, num_workers=options.prefill_workers)
    if options.routers is not None:
        router = msgspec.structs.replace(router, num_workers=options.routers)
    path = (options.model or Path(model.path)).resolve()
    if not (path / "config.json").is_file():
        raise OperatorError(f"no model in {path}: it has no config.json; name a Hugging Face directory with --model")
    model = msgspec.structs.replace(model, path=str(path))
    planner = config.planner
    if options.init_placement is not None:
        planner = msgspec.structs.replace(planner, init_placement=str(options.init_placement.resolve()))
    if planner.init_placement:
        read_placement_file(Path(planner.init_placement))
    config = msgspec.structs.replace(
        config, decode=decode, prefill=prefill, router=router, model=model, planner=planner
    )
    validate(config)
    return config


def cluster_key(options: UpOptions, run_directory: RunDirectory) -> ClusterKey | None:
    """Raises ValueError on a key file that cannot be used."""
    if options.key_file is not None:
        return read_key(options.key_file)
    if not options.secure:
        return None
    if run_directory.key.exists():
        return read_key(run_directory.key)
    return write_key(run_directory.key, secrets.token_bytes(SECRET_BYTES))


def child_names(config: ClusterConfig) -> list[str]:
    return [
        "monitor",
        "planner",
        *(f"router-{number}" for number in range(config.router.num_workers)),
        *(f"prefill-{number}" for number in range(config.prefill.num_workers)),
        *(f"decode-{number}" for number in range(config.decode.num_ranks + config.decode.num_standbys)),
    ]


def up(options: UpOptions) -> int:
    """Runs until SIGINT, SIGTERM or SIGHUP; returns the exit code. Raises OperatorError before anything runs."""
    config = effective_config(options)
    signal.pthread_sigmask(signal.SIG_BLOCK, _stop_signals())
    run_directory = RunDirectory.acquire(options.run_dir)
    try:
        if ended := run_directory.remove_left_over():
            print(f"ended {ended} processes of an earlier run in {run_directory.path}", file=sys.stderr)
        require_free(options.port)
        read_admin_token(options.admin_token_file, os.environ.get(VARIABLE, ""))
        cluster = _Cluster(options, config, run_directory)
        try:
            return cluster.run()
        except ClusterFailed as failure:
            print(f"regrow up: error: {failure}", file=sys.stderr)
            return 1
    finally:
        run_directory.remove_left_over()
        _reap_orphans(0)
        run_directory.release()


class _Cluster:
    def __init__(self, options: UpOptions, config: ClusterConfig, run_directory: RunDirectory) -> None:
        self._options, self._config, self._directory = options, config, run_directory
        port = pick_monitor_port(SystemRandom(), options.port)
        self._monitor = MonitorAddress(options.host, port, cluster_key(options, run_directory))
        self._url = f"http://{options.host}:{options.port}"
        self._deaths: list[float] = []
        self._log_start = 0

    def run(self) -> int:
        self._directory.config.write_text(to_toml(self._config))
        self._directory.heap_dir.mkdir(mode=0o700)
        self._directory.describe(
            ClusterDescription(
                os.getpid(),
                self._url,
                str(self._monitor),
                self._monitor.publish,
                self._monitor.subscribe,
                str(self._directory.heap_dir),
                str(self._monitor.key.path) if self._monitor.key else "",
            )
        )
        _become_subreaper()
        agent, ready_by, is_ready = self._start_agent(), time.monotonic() + _READY_S, False
        print(f"bus: publish {self._monitor.publish}, subscribe {self._monitor.subscribe}", flush=True)
        if self._monitor.key is not None:
            print(f"key: {self._monitor.key.path}", flush=True)
        elif not is_loopback(self._options.host):
            print(OPEN_WARNING, file=sys.stderr, flush=True)
        print(f"logs: {self._directory.path / 'logs'}", flush=True)
        while signal.sigtimedwait(_stop_signals(), _POLL_S) is None:
            if agent.poll() is not None:
                agent = self._after_agent(agent)
            _reap_orphans(agent.pid)
            if not is_ready:
                is_ready, why_not = _is_healthy(self._options.host, self._options.port)
                if is_ready:
                    print(f"ready {self._url}", flush=True)
                elif time.monotonic() > ready_by:
                    self._stop(agent)
                    raise ClusterFailed(f"not ready after {_READY_S:.0f} s: {why_not}; see {self._directory.path}/logs")
        self._stop(agent)
        return 0

    def _start_agent(self) -> "subprocess.Popen[bytes]":
        args = ProcessArgs(
            kind="agent",
            monitor_address=self._monitor,
            host=self._options.host,
            name="agent-0",
            process_id=make_process_id("agent-0", SystemRandom().getrandbits(64)),
            agent="",
            config=self._directory.config,
            heap_dir=self._directory.heap_dir,
            port=self._options.port,
            run_dir=self._directory.path,
            admin_token_file=self._options.admin_token_file,
        )
        with self._directory.agent_log.open("ab") as log:
            self._log_start = log.tell()
            return subprocess.Popen(
                agent_command(args, child_names(self._config), "--stop-at-eof"),
                env=agent_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
                preexec_fn=_unblock_signals,
            )

    def _after_agent(self, agent: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
        """The agent has ended and nobody asked it to: by its own decision, or killed; then the next one takes over."""
        _close(agent)
        now = time.monotonic()
        self._deaths = [*(death for death in self._deaths if now - death < 60.0), now]
        reason = _last_error(self._directory.agent_log, self._log_start)
        if agent.returncode == 2:
            raise ClusterFailed(reason or f"the agent refuses to run; see {self._directory.agent_log}")
        if len(self._deaths) >= _MAX_AGENT_DEATHS:
            raise ClusterFailed(f"the agent ended {len(self._deaths)} times; see {self._directory.agent_log}")
        time.sleep(_AGENT_RESTART_S)
        self._directory.heap_dir.mkdir(mode=0o700, exist_ok=True)  # an agent that ends in order removes it
        return self._start_agent()

    def _stop(self, agent: "subprocess.Popen[bytes]") -> None:
        """In order; a second signal, or too long a time, ends the patience, and what is left is killed."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            agent.send_signal(number)
        config = self._config
        deadline = time.monotonic() + config.router.drain_s + 3 * config.agent.stop_s + 2.0
        while agent.poll() is None and time.monotonic() < deadline:
            if signal.sigtimedwait(_stop_signals(), _POLL_S) is not None:
                break
        if agent.poll() is None:
            agent.kill()
            agent.wait()
        _close(agent)


def agent_command(args: ProcessArgs, children: Sequence[str], *options: str) -> list[str]:
    named = [word for child in children for word in ("--child", child)]
    return [sys.executable, "-m", "services.agent", *args.command_line(), *named, *options]


def agent_environment() -> dict[str, str]:
    """Imports come from this tree, not from a folder ``common`` that lies where the user stands."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def _stop_signals() -> list[signal.Signals]:
    """A closed terminal stops the cluster, unless it was started with nohup."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignores_hangup else [signal.SIGHUP])]


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _close(agent: "subprocess.Popen[bytes]") -> None:
    if agent.stdin is not None:
        agent.stdin.close()


def _is_healthy(host: str, port: int) -> tuple[bool, str]:
    """``GET /health``; and if it is not, what it says."""
    connection = http.client.HTTPConnection(host, port, timeout=1.0)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return False, "the router does not answer"
    if response.status == 200:
        return True, ""
    try:
        return False, str(json.loads(body).get("reason", response.reason))
    except (ValueError, AttributeError):
        return False, f"GET /health answers {response.status}"


def _last_error(log: Path, start: int) -> str:
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    return next((line.partition(" error: ")[2] for line in reversed(lines) if " error: " in line), "")


def _become_subreaper() -> None:
    """Children of a killed agent become ours, to be reaped, and not those of a distant init."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans(agent_pid: int) -> None:
    """Collects every ended child but the agent, whose exit code is read elsewhere."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == agent_pid:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)
