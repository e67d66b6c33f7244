"""Typed access to a JSON object from a stranger. Whatever is wrong is an `ApiError` that names the field."""

from collections.abc import Mapping
from typing import Any

import msgspec

from services.router.api_error import ApiError
from services.router.model_limits import ModelLimits


class JsonFields:
    """Fields of an object; null counts as absent. Every method raises ApiError that names the field."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    @classmethod
    def of_body(cls, body: bytes) -> "JsonFields":
        try:
            value = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the body must be a JSON object")
        return cls(value)

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str, default: str) -> str:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong(name, "a string", value)
        return value

    def required_text(self, name: str) -> str:
        if self.get(name) is None:
            raise wrong(name, "a string", None)
        return self.text(name, "")

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(name, "true or false", value)
        return value

    def whole_number(self, name: str, least: int | None, most: int | None) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, "a whole number", value)
        if (least is not None and value < least) or (most is not None and value > most):
            raise wrong(name, f"at least {least}" if most is None else f"between {least} and {most}", value)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, "a number", value)
        if not least <= value <= most:
            raise wrong(name, f"between {least:g} and {most:g}", value)
        return float(value)

    def table(self, name: str) -> "JsonFields":
        """An object; empty when absent."""
        value = self.get(name)
        if not isinstance(value, dict | None):
            raise wrong(name, "an object", value)
        return JsonFields(value or {})

    def items(self) -> list[tuple[str, Any]]:
        return list(self._values.items())

    def token_ids(self, name: str, limits: ModelLimits) -> tuple[int, ...]:
        """A list of ids of the vocabulary; empty when absent."""
        value = self.get(name)
        if not isinstance(value, list | None):
            raise wrong(name, "a list of token ids", value)
        return checked_token_ids(name, value or [], limits)

    def required_token_ids(self, name: str, limits: ModelLimits) -> tuple[int, ...]:
        if self.get(name) is None:
            raise wrong(name, "a list of token ids", None)
        return self.token_ids(name, limits)

    def check_model(self, limits: ModelLimits) -> None:
        model = self.text("model", limits.name)
        if model != limits.name:
            raise ApiError(404, f"the model {model!r} does not exist; this server has {limits.name!r}", "model")

    def refuse_unless(self, neutral: Mapping[str, tuple[object, ...]]) -> None:
        """Known fields that would change the answer and are not implemented may only have values that do not."""
        for name, values in neutral.items():
            value = self.get(name)
            # Booleans are numbers in Python, but not in JSON.
            same_kind = [one for one in values if isinstance(one, bool) == isinstance(value, bool)]
            if value is None or value in same_kind:
                continue
            shown = msgspec.json.encode(values[0]).decode()
            raise ApiError(400, f"{name} is not supported here; leave it out or set it to {shown}", name)


def checked_token_ids(name: str, ids: list[Any], limits: ModelLimits) -> tuple[int, ...]:
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int):
            raise wrong(name, "a list of token ids", id)
        if not 0 <= id < limits.vocab_size:
            raise ApiError(400, f"{name}: token id {id} is not between 0 and {limits.vocab_size - 1}", name)
    return tuple(ids)


def wrong(name: str, wanted: str, value: object) -> ApiError:
    shown = msgspec.json.encode(value).decode()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ApiError(400, f"{name} must be {wanted}, got {shown}", name)
