"""The key file: who may read it, what it must hold, and what it proves."""

from pathlib import Path

import pytest

from common.admin_token import is_authorised, read_admin_token
from common.cluster_key import CHALLENGE_BYTES, ClusterKey, read_key, write_key
from common.ids import ProcessId
from common.monitor_address import MonitorAddress, interface_for

SECRET = bytes(range(32))
CHALLENGE = bytes(CHALLENGE_BYTES)
RANK, OTHER = ProcessId("decode-0-ab"), ProcessId("decode-1-cd")


def test_a_written_key_is_read_back_and_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert write_key(path, SECRET) == read_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SECRET.hex() in path.read_text() and SECRET.hex() not in repr(read_key(path))
    assert "key" not in repr(MonitorAddress("h", 1, read_key(path)))
    with pytest.raises(ValueError, match=r"cannot write key file .*: File exists"):
        write_key(path, SECRET)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602, 0o644])
def test_a_key_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_key(path, SECRET)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"open to other users .mode {mode:o}.: chmod 600 {path}"):
        read_key(path)


@pytest.mark.parametrize(
    "text", ["", "regrow-key-1", "regrow-key-1 zz", "regrow-key-1 " + "ab" * 31, "regrow-key-2 " + "ab" * 32, "\xff\0"]
)
def test_what_is_no_key_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ValueError, match=f"^{path} is no key file of Regrow; make one with: regrow keys new FILE$"):
        read_key(path)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot read key file {tmp_path / 'none'}: No such file"):
        read_key(tmp_path / "none")


def test_a_proof_holds_for_one_key_one_challenge_and_one_process(tmp_path: Path) -> None:
    key, other = ClusterKey(tmp_path, SECRET), ClusterKey(tmp_path, SECRET[::-1])
    proof = key.proof(CHALLENGE, RANK)
    assert key.is_proof(proof, CHALLENGE, RANK)
    assert not key.is_proof(proof, CHALLENGE, OTHER)
    assert not key.is_proof(proof, b"\1" * CHALLENGE_BYTES, RANK)
    assert not other.is_proof(proof, CHALLENGE, RANK)
    assert not key.is_proof("", CHALLENGE, RANK) and not key.is_proof("\u00e4", CHALLENGE, RANK)


def test_only_what_others_must_reach_listens_beyond_this_machine() -> None:
    assert {interface_for(host) for host in ("127.0.0.1", "127.0.1.1", "localhost", "::1")} == {"127.0.0.1"}
    assert {interface_for(host) for host in ("10.0.0.1", "monitor", "")} == {"*"}


def test_an_admin_token_comes_from_a_private_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a-token-of-the-file\n")
    file.chmod(0o600)
    assert read_admin_token(file, "a-token-of-the-environment") == "a-token-of-the-file"
    assert read_admin_token(None, " a-token-of-the-environment\n") == "a-token-of-the-environment"
    assert read_admin_token(None, "") == ""
    file.chmod(0o644)
    with pytest.raises(ValueError, match=r"admin token file .* is open to other users"):
        read_admin_token(file, "")
    file.chmod(0o600)
    for text in ("", "short", "two lines of\ntext that is long"):
        file.write_text(text)
        with pytest.raises(ValueError, match="at least 16 printable"):
            read_admin_token(file, "")
    with pytest.raises(ValueError, match="REGROW_ADMIN_TOKEN must hold"):
        read_admin_token(None, "short")


@pytest.mark.parametrize(
    ("header", "is_right"),
    [
        ("Bearer a-token-of-the-file", True),
        ("bearer  a-token-of-the-file ", True),
        ("Bearer a-token-of-the-fil", False),
        ("Bearer ", False),
        ("Basic a-token-of-the-file", False),
        ("a-token-of-the-file", False),
        ("Bearer \udce4", False),
        ("", False),
    ],
)
def test_the_header_must_carry_exactly_the_token(header: str, is_right: bool) -> None:
    assert is_authorised("a-token-of-the-file", header) is is_right
    assert not is_authorised("", header)
