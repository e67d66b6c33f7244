"""A configuration as TOML text: what ``regrow up`` puts together from a file and options, for the monitor to read."""

import json

import msgspec

from common.config import ClusterConfig


def to_toml(config: ClusterConfig) -> str:
    """Sections of plain values. JSON's spelling of strings, numbers and booleans is TOML's too."""
    lines = []
    for section, values in msgspec.to_builtins(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)
