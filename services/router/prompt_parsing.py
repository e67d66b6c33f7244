"""Prompts of completions and messages of chats, as they come in JSON."""

from typing import Any

from services.router.api_error import ApiError
from services.router.json_fields import JsonFields, checked_token_ids, wrong
from services.router.model_limits import ModelLimits

Message = dict[str, Any]
_PROMPT = "a string, a list of token ids, or a list of such"


def parse_prompts(fields: JsonFields, limits: ModelLimits) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each a text or token ids. Raises ApiError."""
    value = fields.get("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong("prompt", _PROMPT, value)
    if not any(isinstance(item, str | list) for item in value):
        return (checked_token_ids("prompt", value, limits),)
    prompts: list[str | tuple[int, ...]] = []
    for item in value:
        if not isinstance(item, str | list):
            raise wrong("prompt", _PROMPT, item)
        prompts.append(item if isinstance(item, str) else checked_token_ids("prompt", item, limits))
    return tuple(prompts)


def parse_messages(fields: JsonFields) -> list[Message]:
    """Raises ApiError."""
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise wrong("messages", "a list of at least one message", value)
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, message: object) -> Message:
    """The message with its content as one string: parts of type "text" are joined by line ends."""
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object with role and content", "messages")
    if not isinstance(message.get("role"), str):
        raise ApiError(400, f"{where}.role must be a string", "messages")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise ApiError(400, f'{where}.content: only parts of type "text" are supported', "messages")
        content = "\n".join(str(text) for text in texts)
    if not isinstance(content, str) and not (content is None and message["role"] == "assistant"):
        raise ApiError(400, f"{where}.content must be a string or a list of text parts", "messages")
    return {**message, "content": content or ""}
