"""The agent's shell: processes, pidfds, signals, the monitor.

Children are started in sessions of their own, so a terminal's Ctrl-C reaches ``regrow up`` alone, which then stops them
in order. They outlive a killed agent on purpose; its next life finds them by their command lines and goes on with them.
As process 1 of a container the agent also reaps whatever its children left behind.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import SystemRandom

import msgspec
import zmq
import zmq.asyncio

from common.config import load_config
from common.fault import MAX_CHILDREN
from common.ids import make_process_id
from common.messages import Exited, Heartbeat, Hello, Message, SetChildren, Signal, Welcome
from common.monitor_client import MonitorClient
from common.process_args import CHILDREN_FILE, ProcessArgs
from common.process_table import open_pidfd, processes_of, send_signal, state_of
from common.service_runner import OperatorError, for_the_operator
from common.transport import open_context
from services.agent import child_process, signal_requests, supervisor
from services.agent.exit_reports import ExitReports
from services.agent.signal_requests import Answer, Deliver, SignalRequests
from services.agent.supervisor import GiveUp, Kill, Spawn, Supervisor

_TICK_S = 0.05
_PROOF_TICK_S = 0.005
log = logging.getLogger("regrow.agent")

Command = Callable[[str, ProcessArgs], Sequence[str]]


def service_command(kind: str, args: ProcessArgs) -> list[str]:
    return [sys.executable, "-m", f"services.{kind}", *args.command_line()]


class AgentService:
    """``names``: the children ("decode-0", ...); ``command`` makes the command line of one."""

    def __init__(
        self,
        args: ProcessArgs,
        names: Sequence[str],
        context: zmq.asyncio.Context,
        command: Command = service_command,
    ) -> None:
        random = SystemRandom()
        self._args, self._command = args, command
        self.process = args.process_id or make_process_id(args.name, random.getrandbits(64))
        with for_the_operator():
            config = load_config(args.config)
        self.supervisor = Supervisor(names, config, random, time.monotonic())
        self._requests, self._reports = SignalRequests(), ExitReports()
        self._pidfds: dict[str, int] = {}
        self._log_starts: dict[str, int] = {}
        self._wanted = self._read_wanted(names) if args.run_dir else {}
        self._num_routers = sum(supervisor.kind_of(name) == "router" for name in names)
        self._failure = ""
        self._loop = asyncio.get_running_loop()
        self._monitor = MonitorClient(
            context, self.process, args.monitor_address, self._hello, self._beat, self._on_message
        )

    async def serve(self, stop: asyncio.Event) -> None:
        """Until everything has been stopped; raises OperatorError when a child without which nothing works gives up."""
        self._take_over()
        for kind, count in self._wanted.items():
            self._perform(self.supervisor.on_set_children(kind, count, (), time.monotonic()))
        self.supervisor.keep_routers(self._num_routers)
        self._remove_old_heaps()
        monitor = asyncio.create_task(self._monitor.run())
        try:
            while not self.supervisor.is_stopped:
                if stop.is_set() or self._failure or monitor.done():
                    self._perform(self.supervisor.on_stop(time.monotonic()))
                self._tick()
                await self._wait_for_tick(stop)
        finally:
            for name in list(self._pidfds):
                self._close_pidfd(name)
            monitor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await monitor
        if self._failure:
            raise OperatorError(self._failure)

    async def _wait_for_tick(self, stop: asyncio.Event) -> None:
        tick_s = _PROOF_TICK_S if self._requests.stop_or_cont_pending else _TICK_S
        if stop.is_set():
            await asyncio.sleep(tick_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(tick_s):
                await stop.wait()

    def _tick(self) -> None:
        now = time.monotonic()
        for process in self._requests.stop_or_cont_pending:
            if child := self.supervisor.by_process(process):
                self._answer(self._requests.on_state(process, state_of(child.pid)))
        self._answer(self._requests.on_tick(now))
        for report in self._reports.on_tick(now):
            self._monitor.send(report)
        self._perform(self.supervisor.on_tick(now))
        if os.getpid() == 1:
            self._reap_strangers()

    def _take_over(self) -> None:
        """Children that a former life of this agent left running."""
        run_dir = self._args.run_dir
        if run_dir is None:
            return
        for found in processes_of(run_dir):
            if found.name not in self.supervisor.children and (found.kind in self._wanted or found.kind == "router"):
                self.supervisor.add(found.name, time.monotonic())
            child = self.supervisor.children.get(found.name)
            if child is None or child.kind != found.kind or (pidfd := open_pidfd(found, run_dir)) is None:
                continue
            if found.name in self._pidfds:
                send_signal(pidfd, signal.SIGKILL)  # a second one of the same name: its agent died while starting it
                os.close(pidfd)
                continue
            log.info("takes over %s, pid %d", found.name, found.pid)
            self.supervisor.on_spawned(found.name, found.process, found.pid, time.monotonic())
            self._watch(found.name, pidfd)
            if found.kind == "monitor":
                # A former life may have stopped it for a time, and nobody else would ever continue it: orders come from
                # the monitor.
                send_signal(pidfd, signal.SIGCONT)

    def _read_wanted(self, names: Sequence[str]) -> dict[str, int]:
        """How many children of each kind there should be: as the last life of this agent was told, else as started."""
        kinds = [supervisor.kind_of(name) for name in names]
        wanted = {kind: kinds.count(kind) for kind in supervisor.SCALABLE_KINDS if kind in kinds}
        with contextlib.suppress(OSError, msgspec.DecodeError):
            written = msgspec.json.decode(self._wanted_path.read_bytes(), type=dict[str, int])
            wanted |= {kind: count for kind, count in written.items() if kind in wanted}
        return wanted

    @property
    def _wanted_path(self) -> Path:
        assert self._args.run_dir is not None
        return self._args.run_dir / CHILDREN_FILE

    def _set_children(self, message: SetChildren) -> None:
        """Written down first: a next life of this agent goes by it, and the monitor asks it."""
        kind, count = message.kind, message.count
        if kind not in self._wanted or not 1 <= count <= MAX_CHILDREN:
            return
        if self._wanted[kind] != count:
            self._wanted[kind] = count
            temporary = self._wanted_path.with_suffix(".new")
            temporary.write_bytes(msgspec.json.encode(self._wanted))
            temporary.replace(self._wanted_path)
            log.info("from now on %d of %s", count, kind)
        self._perform(self.supervisor.on_set_children(kind, count, message.retire, time.monotonic()))

    def _remove_old_heaps(self) -> None:
        """Of children whose end no agent saw: the memory of a container's former life would never be given back."""
        living = {child.process for child in self.supervisor.alive}
        for name in self.supervisor.children:
            own = re.compile(re.escape(name) + r"-[0-9a-f]{16}")
            for heap in self._args.heap_dir.glob(f"{name}-*.heap"):
                process = heap.name.partition(".")[0]
                if own.fullmatch(process) and process not in living:
                    heap.unlink(missing_ok=True)

    def _perform(self, actions: Sequence[supervisor.Action]) -> None:
        for action in actions:
            match action:
                case Spawn():
                    self._spawn(action)
                case Kill(name=name, signal=signal_name):
                    if name in self._pidfds:
                        send_signal(self._pidfds[name], signal.Signals[f"SIG{signal_name}"])
                case GiveUp(name=name, reason=reason, fatal=fatal):
                    self._on_given_up(name, reason, fatal)

    def _spawn(self, spawn: Spawn) -> None:
        args = ProcessArgs(
            kind=spawn.kind,
            monitor_address=self._args.monitor_address,
            host=self._args.host,
            name=spawn.name,
            process_id=spawn.process,
            agent=self._args.name,
            config=self._args.config,
            heap_dir=self._args.heap_dir,
            port=self._args.port if spawn.kind == "router" else 0,
            run_dir=self._args.run_dir,
            admin_token_file=self._args.admin_token_file if spawn.kind == "router" else None,
        )
        log_path = self._log_path(spawn.name)
        self._log_starts[spawn.name] = log_path.stat().st_size if log_path and log_path.exists() else 0
        try:
            pid, pidfd = child_process.start(self._command(spawn.kind, args), spawn.kind, log_path)
        except OSError as error:
            log.error("cannot start %s: %s", spawn.name, error.strerror)
            self._perform(self.supervisor.on_exit(spawn.name, f"cannot start: {error.strerror}", time.monotonic()))
            return
        log.info("started %s, pid %d", spawn.name, pid)
        self.supervisor.on_spawned(spawn.name, spawn.process, pid, time.monotonic())
        self._watch(spawn.name, pidfd)

    def _log_path(self, name: str) -> Path | None:
        return self._args.run_dir / "logs" / f"{name}.log" if self._args.run_dir else None

    def _watch(self, name: str, pidfd: int) -> None:
        self._pidfds[name] = pidfd
        self._loop.add_reader(pidfd, self._on_exit, name)

    def _close_pidfd(self, name: str) -> None:
        pidfd = self._pidfds.pop(name)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)

    def _on_exit(self, name: str) -> None:
        """The pidfd became readable: the process has ended, however it did."""
        now, child = time.monotonic(), self.supervisor.children[name]
        reason = child_process.reap(self._pidfds[name])
        self._close_pidfd(name)
        log.warning("%s, pid %d, has ended: %s", name, child.pid, reason)
        process, pid = child.process, child.pid
        for report in self._reports.on_exit(Exited(self._args.name, process, name, pid, reason), now):
            self._monitor.send(report)
        self._answer(self._requests.on_exit(process, reason))
        for heap in self._args.heap_dir.glob(f"{process}.*.heap"):
            heap.unlink(missing_ok=True)
        self._perform(self.supervisor.on_exit(name, reason, now))
        self.supervisor.keep_routers(self._num_routers)

    def _on_given_up(self, name: str, reason: str, fatal: bool) -> None:
        log_path = self._log_path(name)
        said = child_process.last_words(log_path, self._log_starts.get(name, 0)) if log_path else ""
        text = f"{name} cannot run: {said or reason}"
        log.error("%s; %s; it will not be started again", text, reason)
        if fatal and not self._failure:
            self._failure = text

    def _reap_strangers(self) -> None:
        """Orphans of children come to process 1; nobody else collects them."""
        own = {child.pid for child in self.supervisor.alive}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid in own:
                    return  # its pidfd is readable: `_on_exit` comes next
                os.waitpid(ended.si_pid, os.WNOHANG)

    def _answer(self, actions: Sequence[signal_requests.Action]) -> None:
        for action in actions:
            match action:
                case Answer(message=message):
                    self._monitor.send(message)
                case Deliver(process=process, signal=signal_name):
                    if signal_name == signal_requests.RESTART:
                        self._perform(self.supervisor.on_restart(process, time.monotonic()))
                        continue
                    if signal_name in ("KILL", "TERM"):
                        self.supervisor.on_asked_to_kill(process)
                    if child := self.supervisor.by_process(process):
                        send_signal(self._pidfds[child.name], signal.Signals[f"SIG{signal_name}"])

    def _on_message(self, message: Message) -> None:
        match message:
            case Signal(process=process) if process == self.process:
                self._signal_myself(message)
            case Signal(process=process):
                is_alive = self.supervisor.by_process(process) is not None
                self._answer(self._requests.on_request(message, is_alive, time.monotonic()))
            case SetChildren():
                self._set_children(message)
            case Welcome(config=config):
                self.supervisor.configure(config)
            case _:
                pass  # views and directories are for others

    def _signal_myself(self, request: Signal) -> None:
        """Nobody else can: the agent's parent takes no orders. Of a SIGKILL its lifeline tells."""
        if request.signal != "STOP" or not request.duration_s:
            os.kill(os.getpid(), signal.Signals[f"SIG{request.signal}"])
            return
        if answer := self._requests.answered(request.id):
            self._monitor.send(answer)
            return
        before = time.monotonic()
        child_process.stop_myself_for(request.duration_s)
        self._answer([self._requests.on_stood_still(request, time.monotonic() - before)])

    def _hello(self) -> Hello:
        children = tuple((child.process, child.name, child.pid) for child in self.supervisor.alive)
        return Hello(self.process, "agent", self._args.name, self._args.host, os.getpid(), "", children=children)

    def _beat(self) -> Heartbeat:
        children = list(self.supervisor.children.values())
        counters = {
            "children": len(children),
            "restarts": sum(child.num_restarts for child in children),
            "given_up": sum(child.state is supervisor.ChildState.GIVEN_UP for child in children),
        }
        for kind, count in self._wanted.items():
            counters |= {f"wanted_{kind}": count, f"children_{kind}": self.supervisor.num_wanted_children(kind)}
        return Heartbeat(self.process, term=self._monitor.term, counters=counters)


async def serve(args: ProcessArgs, names: Sequence[str], stop_at_eof: bool, stop: asyncio.Event) -> None:
    """``stop_at_eof``: end of standard input, which is a pipe from ``regrow up``, means that it is gone."""
    loop = asyncio.get_running_loop()

    def on_input() -> None:
        if not os.read(0, 4096):
            loop.remove_reader(0)
            stop.set()

    if stop_at_eof:
        loop.add_reader(0, on_input)
    with open_context(args.monitor_address.key) as context:
        await AgentService(args, names, context).serve(stop)
    if args.run_dir is not None:
        with contextlib.suppress(OSError):
            args.heap_dir.rmdir()  # made for this cluster, and empty now
