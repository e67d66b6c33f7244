"""What `regrow up` makes of its options, before anything runs."""

import socket
import tomllib
from pathlib import Path
from random import Random

import msgspec
import pytest

from common.cluster_key import write_key
from common.config import ClusterConfig, DecodeConfig, ModelConfig, load_config
from common.monitor_address import MonitorAddress
from common.process_args import ProcessArgs, parse_process_args
from common.service_runner import OperatorError
from services.cli.free_ports import is_free, pick_monitor_port, require_free
from services.cli.toml_text import to_toml
from services.cli.up import UpOptions, child_names, effective_config

TINY_RANDOM = Path(__file__).resolve().parents[2] / "fixtures" / "tiny-random"


def options(
    decode_ranks: int | None = None,
    prefill_workers: int | None = None,
    config: Path | None = None,
    model: Path = TINY_RANDOM,
) -> UpOptions:
    return UpOptions(decode_ranks, prefill_workers, 8000, "127.0.0.1", Path("run"), config, model)


def test_options_go_over_the_file_and_the_group_may_be_larger_than_max_ranks(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[decode]\nnum_ranks = 3\nblock_size = 8\n[prefill]\nnum_workers = 2\n")
    config = effective_config(options(config=file))
    assert (config.decode.num_ranks, config.decode.block_size, config.prefill.num_workers) == (3, 8, 2)
    config = effective_config(options(config=file, decode_ranks=10, prefill_workers=1))
    assert (config.decode.num_ranks, config.decode.max_ranks, config.prefill.num_workers) == (10, 10, 1)
    assert Path(config.model.path) == TINY_RANDOM


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (options(decode_ranks=0), "need 1 <= decode.num_ranks"),
        (options(decode_ranks=65), "<= 64"),
        (options(prefill_workers=0), "prefill.num_workers must be at least 1"),
        (options(model=Path("/no/such/model")), "no model in /no/such/model"),
        (options(config=Path("/no/such/file")), "cannot read configuration /no/such/file"),
    ],
)
def test_what_cannot_work_is_one_line(wrong: UpOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        effective_config(wrong)
    assert "\n" not in str(caught.value)


def test_one_child_for_each_process() -> None:
    config = ClusterConfig(decode=DecodeConfig(num_ranks=2))
    assert child_names(config) == ["monitor", "planner", "router-0", "prefill-0", "decode-0", "decode-1"]


def test_the_configuration_survives_its_own_text(tmp_path: Path) -> None:
    config = ClusterConfig(model=ModelConfig(path='/a "b"/\\c\u00e9\n', name="x"), decode=DecodeConfig(num_ranks=7))
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config
    assert set(tomllib.loads(file.read_text())) == set(msgspec.structs.asdict(config))


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        assert not is_free(port)
        with pytest.raises(OperatorError, match=f"port {port} is in use"):
            require_free(port)
    with pytest.raises(OperatorError, match="from 1 to 65535"):
        require_free(70_000)


def test_monitor_ports_lie_below_the_ephemeral_ones_and_keep_clear_of_the_router() -> None:
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    first = pick_monitor_port(Random(7), taken=0)
    again = pick_monitor_port(Random(7), taken=first + 2)
    assert first + 3 < max(first_ephemeral, 11_000)
    assert not again <= first + 2 <= again + 3


def test_a_command_line_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", bytes(32))
    args = ProcessArgs(
        kind="decode",
        monitor_address=MonitorAddress("h", 7000, key),
        host="10.0.0.1",
        name="decode-2",
        process_id=parse_process_args(
            "decode", ["--monitor-address", "h:1", "--host", "x", "--process-id", "p"]
        ).process_id,
        agent="agent-0",
        config=Path("/c.toml"),
        heap_dir=Path("/heaps"),
        port=0,
        run_dir=Path("/run/x"),
        admin_token_file=Path("/token"),
    )
    assert key.secret.hex() not in " ".join(args.command_line())
    assert parse_process_args("decode", args.command_line()) == args


@pytest.mark.parametrize("words", [["--host", "x"], ["--host", "x", "--monitor-address", "nonsense"]])
def test_a_wrong_command_line_ends_with_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_process_args("decode", words)
    assert caught.value.code == 2
    assert "--monitor-address" in capsys.readouterr().err
