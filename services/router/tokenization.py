"""Requests of /tokenize and /detokenize, and their answers: the endpoints that vLLM has."""

from dataclasses import dataclass

from services.router.json_fields import JsonFields
from services.router.model_limits import ModelLimits
from services.router.openai_format import Body
from services.router.prompt_parsing import Message, parse_messages


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A ``prompt``, or ``messages`` of a chat if there are any."""

    prompt: str
    messages: list[Message]
    add_special_tokens: bool  # chat templates write all special tokens themselves: False there
    add_generation_prompt: bool
    return_token_strs: bool


def parse_tokenize(body: bytes, limits: ModelLimits) -> TokenizeRequest:
    """Raises ApiError."""
    fields = JsonFields.of_body(body)
    fields.check_model(limits)
    is_chat = fields.get("messages") is not None
    return TokenizeRequest(
        prompt="" if is_chat else fields.required_text("prompt"),
        messages=parse_messages(fields) if is_chat else [],
        add_special_tokens=fields.boolean("add_special_tokens", not is_chat),
        add_generation_prompt=fields.boolean("add_generation_prompt", True),
        return_token_strs=fields.boolean("return_token_strs", False),
    )


def parse_detokenize(body: bytes, limits: ModelLimits) -> tuple[int, ...]:
    """Raises ApiError."""
    fields = JsonFields.of_body(body)
    fields.check_model(limits)
    return fields.required_token_ids("tokens", limits)


def tokenized(ids: list[int], token_strs: list[str] | None, limits: ModelLimits) -> Body:
    return {"count": len(ids), "max_model_len": limits.max_model_len, "tokens": ids, "token_strs": token_strs}
