"""The fields of a JSON object, taken one by one with a check of each; every complaint names the field."""

from collections.abc import Mapping
from typing import Any


class JsonFields:
    """``prefix`` stands before names in messages, say "config: rope_scaling.". Null counts as absent, not for `choice`.

    Every method that returns a value also takes the field; `left` is what nobody asked for.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str = "config: ") -> None:
        self._left, self._prefix = dict(raw), prefix

    def __contains__(self, name: str) -> bool:
        return name in self._left

    @property
    def left(self) -> dict[str, Any]:
        return dict(self._left)

    def take(self, name: str) -> Any:
        """The value as it is, None when absent."""
        return self._left.pop(name, None)

    def whole(self, name: str, default: int | None = None, at_least: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be a whole number, got {value!r}")
        if value < at_least:
            raise self.error(name, f"must be at least {at_least}, got {value}")
        return value

    def optional_whole(self, name: str, at_least: int = 1) -> int | None:
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return None
        return self.whole(name, at_least=at_least)

    def number(self, name: str, default: float | None = None, at_least: float = 0.0) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, got {value!r}")
        # Written so that NaN, which Python's JSON reads, is refused as well.
        if not at_least <= value < float("inf"):
            raise self.error(name, f"must be finite and at least {at_least:g}, got {value}")
        return float(value)

    def optional_number(self, name: str, at_least: float = 0.0) -> float | None:
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return None
        return self.number(name, at_least=at_least)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def choice(self, name: str, default: object, *others: object) -> Any:
        """One of the supported values; the first is meant when the field is absent."""
        value = self._left.pop(name, default)
        # By type too: JSON's true is not 1.
        if not any(value == supported and type(value) is type(supported) for supported in (default, *others)):
            shown = ", ".join("null" if item is None else repr(item) for item in (default, *others))
            raise self.error(name, f"= {value!r} is not supported; supported: {shown}")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An id, a list of them, or null."""
        value = self._left.pop(name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
            raise self.error(name, f"must be a token id, a list of them, or null, got {value!r}")
        return tuple(values)

    def error(self, name: str, complaint: str) -> ValueError:
        return ValueError(f"{self._prefix}{name} {complaint}")

    def _value(self, name: str, default: object) -> object:
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is None:
            raise self.error(name, "is missing")
        return default
