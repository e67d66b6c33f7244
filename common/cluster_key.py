"""The secret of a cluster: who holds its key file may talk on its sockets, all others are refused at the handshake.

The file holds one line, ``regrow-key-1`` and 64 hexadecimal digits: a Curve25519 secret key. Only its owner may be able
to read it. From it follow the CURVE keys of all sockets (`common.transport`) and the proof that a lifeline, which is a
plain stream, is opened by a process of the cluster.
"""

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from common.ids import ProcessId

SECRET_BYTES = 32
CHALLENGE_BYTES = 16
_PREFIX = "regrow-key-1"
_FOR_LIFELINES = b"regrow lifeline 1"


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """``path`` is the file that it was read from, for the command lines of other processes."""

    path: Path
    secret: bytes = field(repr=False)

    def proof(self, challenge: bytes, process: ProcessId) -> str:
        """What only a holder of the key can answer to ``challenge``, for this process. Hexadecimal."""
        key = hmac.digest(self.secret, _FOR_LIFELINES, hashlib.sha256)
        return hmac.digest(key, challenge + process.encode(), hashlib.sha256).hex()

    def is_proof(self, proof: str, challenge: bytes, process: ProcessId) -> bool:
        return hmac.compare_digest(proof.encode(), self.proof(challenge, process).encode())


def read_key(path: Path) -> ClusterKey:
    """Raises ValueError with one line that says what is wrong with the file."""
    words = read_secret_file(path, "key file").split()
    try:
        prefix, digits = words
        secret = bytes.fromhex(digits)
    except ValueError:
        prefix, secret = "", b""
    if prefix != _PREFIX or len(secret) != SECRET_BYTES:
        raise ValueError(f"{path} is no key file of Regrow; make one with: regrow keys new FILE")
    return ClusterKey(path.absolute(), secret)


def write_key(path: Path, secret: bytes) -> ClusterKey:
    """A new file that only its owner can read. Raises ValueError when there is one already, or it cannot be written."""
    assert len(secret) == SECRET_BYTES
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{_PREFIX} {secret.hex()}\n")
    except OSError as error:
        raise ValueError(f"cannot write key file {path}: {error.strerror}") from None
    return ClusterKey(path.absolute(), secret)


def read_secret_file(path: Path, what: str) -> str:
    """The text of a file that nobody but its owner can read. Raises ValueError with one line otherwise."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(4096)
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"{what} {path} is open to other users (mode {stat.S_IMODE(mode):o}): chmod 600 {path}")
    return data.decode(errors="replace")
