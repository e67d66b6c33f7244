"""``regrow``: the commands and their options. Each command's work is in a file of its own, imported when it runs."""

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.config import EMBEDDED_MODEL
from common.process_args import DEFAULT_HEAP_DIR

app = typer.Typer(
    help="Serve Mixture-of-Experts models; ranks may die and come back, streams go on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunDir = Annotated[Path, typer.Option(help="Directory of the cluster.")]
Url = Annotated[str, typer.Option(help="Address of the router; empty: that of the cluster in the run directory.")]
Publish = Annotated[str, typer.Option(metavar="HOST:PORT", help="Bus address for publishers, in place of --run-dir.")]
Subscribe = Annotated[str, typer.Option(metavar="HOST:PORT", help="Bus address for subscribers, likewise.")]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", envvar="REGROW_KEY_FILE", help="The key of the cluster, if it has one.")
]
AdminTokenFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Holds the bearer token for /admin; or set REGROW_ADMIN_TOKEN."),
]
_RUN_DIR = Path(".regrow")
_FAULTS = "kill, term, stop, cont, slow, drop_network, corrupt_heap, mask, unmask, drain or undrain."


@app.command()
def up(
    decode_ranks: Annotated[int | None, typer.Option(help="Size of the expert-parallel group.")] = None,
    prefill_workers: Annotated[int | None, typer.Option(help="Number of prefill workers.")] = None,
    routers: Annotated[int | None, typer.Option(help="Number of routers, which share the HTTP port.")] = None,
    port: Annotated[int, typer.Option(help="HTTP port of the routers.")] = 8000,
    host: Annotated[str, typer.Option(help="Address under which the processes reach each other.")] = "127.0.0.1",
    run_dir: RunDir = _RUN_DIR,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="See common/config.py.")] = None,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Hugging Face directory.")] = None,
    secure: Annotated[bool, typer.Option("--secure", help="With a key of its own, kept in the run directory.")] = False,
    key_file: KeyFile = None,
    admin_token_file: AdminTokenFile = None,
    init_placement: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A recorded placement, or recorded loads, to start with.")
    ] = None,
) -> None:
    """Start a cluster on this machine; Ctrl-C stops it."""
    from services.cli.up import UpOptions
    from services.cli.up import up as run_up

    options = UpOptions(
        decode_ranks, prefill_workers, port, host, run_dir, config, model, secure, key_file, admin_token_file,
        init_placement, routers,
    )  # fmt: skip
    raise typer.Exit(run_up(options))


@app.command()
def agent(
    role: Annotated[str, typer.Option(help="monitor, router, prefill, decode or planner.")],
    monitor_address: Annotated[str, typer.Option(metavar="HOST:PORT")],
    host: Annotated[str, typer.Option(help="Name of this container for others; empty: its address.")] = "",
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="For the monitor.")] = None,
    heap_dir: Annotated[Path, typer.Option(help="A tmpfs that all decode ranks share.")] = DEFAULT_HEAP_DIR,
    port: Annotated[int, typer.Option(help="HTTP port of a router.")] = 8000,
    key_file: KeyFile = None,
    admin_token_file: AdminTokenFile = None,
) -> None:
    """Run one process of a cluster, as the first process of a container."""
    from services.cli.container_agent import ContainerOptions, run_agent

    run_agent(ContainerOptions(role, monitor_address, host, config, heap_dir, port, key_file, admin_token_file))


keys = typer.Typer(help="The secret that keeps strangers out of a cluster.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@keys.command("new")
def new_key(file: Annotated[Path, typer.Argument(metavar="FILE", help="Must not exist yet.")]) -> None:
    """Make a key file; give it to every process and every command with --key-file."""
    from common.cluster_key import SECRET_BYTES, write_key

    write_key(file, secrets.token_bytes(SECRET_BYTES))
    print(f"wrote {file}; whoever can read it commands the cluster")


@app.command()
def fault(
    action: Annotated[str, typer.Argument(help=_FAULTS)],
    rank: Annotated[int | None, typer.Option(help="The decode rank that is meant.")] = None,
    process: Annotated[str | None, typer.Option(metavar="NAME", help="Or a process, as prefill-0.")] = None,
    at_round: Annotated[int | None, typer.Option(metavar="N", help="When the group has made N rounds.")] = None,
    factor: Annotated[float | None, typer.Option(help="slow: times its own work; 1 ends it.")] = None,
    which: Annotated[str | None, typer.Option(help="drop_network: monitor, peers or all.")] = None,
    direction: Annotated[str | None, typer.Option(help="drop_network: in, out or both.")] = None,
    duration_s: Annotated[float | None, typer.Option("--duration", help="drop_network, stop: seconds.")] = None,
    run_dir: RunDir = _RUN_DIR,
    publish: Publish = "",
    subscribe: Subscribe = "",
    key_file: KeyFile = None,
) -> None:
    """Inject a fault over the bus; exits 0 only with proof that it took effect."""
    from services.cli.fault import fault as run_fault
    from services.cli.run_directory import bus_address

    address = bus_address(run_dir, publish, subscribe, key_file)
    options = {"at_round": at_round, "factor": factor, "which": which, "direction": direction, "duration_s": duration_s}
    raise typer.Exit(run_fault(address, action, rank, process, **options))


@app.command()
def drain(
    rank: Annotated[int, typer.Option(help="The decode rank that is meant.")],
    run_dir: RunDir = _RUN_DIR,
    publish: Publish = "",
    subscribe: Subscribe = "",
    key_file: KeyFile = None,
) -> None:
    """Move a rank's requests away and take it out of the group; its process stays, without work, until undrain."""
    from services.cli.fault import fault as run_fault
    from services.cli.run_directory import bus_address

    raise typer.Exit(run_fault(bus_address(run_dir, publish, subscribe, key_file), "drain", rank, None))


@app.command()
def undrain(
    rank: Annotated[int, typer.Option(help="The drained decode rank.")],
    run_dir: RunDir = _RUN_DIR,
    publish: Publish = "",
    subscribe: Subscribe = "",
    key_file: KeyFile = None,
) -> None:
    """Take a drained rank back into the group."""
    from services.cli.fault import fault as run_fault
    from services.cli.run_directory import bus_address

    raise typer.Exit(run_fault(bus_address(run_dir, publish, subscribe, key_file), "undrain", rank, None))


@app.command()
def scale(
    decode_ranks: Annotated[
        int | None, typer.Argument(help="Wanted size of the group, up to decode.max_ranks.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(metavar="N", help="Wanted number of prefill workers.")] = None,
    run_dir: RunDir = _RUN_DIR,
    publish: Publish = "",
    subscribe: Subscribe = "",
    key_file: KeyFile = None,
) -> None:
    """Make the group larger or smaller while it serves; returns when every rank is in the view of that size."""
    from services.cli.fault import scale as run_scale
    from services.cli.run_directory import bus_address

    raise typer.Exit(run_scale(bus_address(run_dir, publish, subscribe, key_file), decode_ranks, prefill))


@app.command()
def restart(
    process: Annotated[str, typer.Argument(metavar="NAME", help="A router, as router-0.")],
    run_dir: RunDir = _RUN_DIR,
    publish: Publish = "",
    subscribe: Subscribe = "",
    key_file: KeyFile = None,
) -> None:
    """Put a new router in the place of one that finishes its streams; returns when the new one serves."""
    from services.cli.fault import fault as run_fault
    from services.cli.run_directory import bus_address

    raise typer.Exit(run_fault(bus_address(run_dir, publish, subscribe, key_file), "restart", None, process))


@app.command()
def status(
    url: Url = "", run_dir: RunDir = _RUN_DIR, json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Show ranks and processes."""
    from services.cli.cluster_state import show_status

    raise typer.Exit(show_status(_url(url, run_dir), json))


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what happens, from the bus.")] = False,
    url: Url = "",
    run_dir: RunDir = _RUN_DIR,
    publish: Publish = "",
    subscribe: Subscribe = "",
    key_file: KeyFile = None,
) -> None:
    """Show the last events, or every one from now on."""
    from services.cli.cluster_state import follow_events, show_events
    from services.cli.run_directory import bus_address

    if follow:
        raise typer.Exit(follow_events(bus_address(run_dir, publish, subscribe, key_file)))
    raise typer.Exit(show_events(_url(url, run_dir)))


@app.command("eval")
def evaluate(
    url: Url = "",
    run_dir: RunDir = _RUN_DIR,
    count: Annotated[int, typer.Option(min=1, help="Problems of each kind.")] = 1000,
    kinds: Annotated[list[str] | None, typer.Option("--kinds", help="Kind of task; may be repeated.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests side by side.")] = 16,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 0,
    threshold: Annotated[float, typer.Option(help="Least share of right answers.")] = 0.98,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="All answers.")] = None,
    kill_every: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Then ask all again while ranks are killed, and compare.")
    ] = 0.0,
) -> None:
    """Measure exact-match accuracy of the embedded model on unseen problems."""
    from services.cli.evaluate import EvalOptions
    from services.cli.evaluate import evaluate as run_eval
    from services.cli.run_directory import monitor_address

    named = tuple(kind for entry in kinds or () for kind in entry.split(","))
    bus = monitor_address(run_dir) if kill_every else None
    options = EvalOptions(_url(url, run_dir), count, named, concurrency, seed, threshold, output, kill_every, bus)
    raise typer.Exit(run_eval(options))


placement_app = typer.Typer(help="Where experts lie: record it, or go back to what was recorded.", no_args_is_help=True)
app.add_typer(placement_app, name="placement")


@placement_app.command("export")
def export_placement(
    file: Annotated[Path, typer.Argument(metavar="FILE.json")],
    run_dir: RunDir = _RUN_DIR,
    loads_s: Annotated[float, typer.Option(help="Record the loads of experts too, for so many seconds.")] = 0.0,
) -> None:
    """Write the placement in force to a file, for import or for up --init-placement."""
    from services.cli.placement import export_placement as run_export

    raise typer.Exit(run_export(run_dir, file, loads_s))


@placement_app.command("import")
def import_placement(
    file: Annotated[Path, typer.Argument(metavar="FILE.json")],
    run_dir: RunDir = _RUN_DIR,
    deadline_s: Annotated[float, typer.Option(help="Give up after so many seconds.")] = 300.0,
) -> None:
    """Move experts until they lie as in the file, while the cluster serves; the planner may move them again."""
    from services.cli.placement import import_placement as run_import

    raise typer.Exit(run_import(run_dir, file, deadline_s))


@app.command()
def demo(
    decode_ranks: Annotated[int, typer.Option(min=2, help="Size of the group.")] = 4,
    streams: Annotated[int, typer.Option(min=1, help="Requests side by side.")] = 16,
    model: Annotated[Path, typer.Option(metavar="DIR", help="Hugging Face directory.")] = EMBEDDED_MODEL,
) -> None:
    """Kill a rank under sixteen streams, and compare every token with those of a run without the fault."""
    from services.cli.demo import DemoOptions
    from services.cli.demo import demo as run_demo

    raise typer.Exit(run_demo(DemoOptions(decode_ranks, streams, model)))


def _url(url: str, run_dir: Path) -> str:
    from services.cli.run_directory import read_description

    return (url or read_description(run_dir).http).rstrip("/")


def main() -> None:
    """Exit codes: 0 as asked, 1 it failed while running, 2 somebody must change something first."""
    try:
        app()
    except ValueError as error:
        print(f"regrow: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
