"""The bearer token of those who may change the cluster over HTTP."""

import hmac
from pathlib import Path

from common.cluster_key import read_secret_file

VARIABLE = "REGROW_ADMIN_TOKEN"
_MIN_LENGTH = 16


def read_admin_token(file: Path | None, from_environment: str) -> str:
    """Of the file, or else the text of `VARIABLE`; empty when there is neither, and nobody may. Raises ValueError."""
    token = from_environment.strip() if file is None else read_secret_file(file, "admin token file").strip()
    source = VARIABLE if file is None else f"admin token file {file}"
    if file is None and not token:
        return ""
    if len(token) < _MIN_LENGTH or not token.isascii() or not token.isprintable():
        raise ValueError(f"{source} must hold one line of at least {_MIN_LENGTH} printable ASCII characters")
    return token


def is_authorised(token: str, header: str) -> bool:
    """Whether ``header``, the request's ``Authorization``, carries the token. Takes equally long for any wrong one."""
    scheme, _, given = header.partition(" ")
    is_equal = hmac.compare_digest(given.strip().encode(errors="replace"), token.encode())
    return scheme.lower() == "bearer" and is_equal and bool(token)
