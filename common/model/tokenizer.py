"""Text to token ids and back, and chat templates, from a Hugging Face directory; no torch, no transformers.

Templates come with checkpoints, from strangers: they run in jinja2's immutable sandbox, with what transformers gives
them (raise_exception, tojson, loop controls) except the clock.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
import tokenizers.decoders

_REPLACEMENT = "\ufffd"
# A UTF-8 character cut short has at most three bytes, each of which may show as one U+FFFD.
_MAX_UNFINISHED = 3
_NUM_REMEMBERED = 1 << 15
_NUM_FEW = 3
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(ValueError):
    """The template refused the messages, or the model has none; the message is fit for the client."""


class Tokenizer:
    """tokenizer.json and the chat template of one model directory."""

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: str | None, special_tokens: Mapping[str, str]
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._template = None if chat_template is None else _compile(chat_template)
        # Then what stands before a token does not matter, except for a character that it continues.
        self.joins_bytes = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        # Then bytes of a character are tokens of their own, and one that fits nowhere spoils its whole run of them.
        self.byte_ids = _byte_ids(backend)
        self._decode_few = lru_cache(_NUM_REMEMBERED)(self._decode)
        self.shown = lru_cache(_NUM_REMEMBERED)(self._shown)

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja (the latter two may be missing).

        Raises ValueError with one line that names the file.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{path}: no such file; a model directory in Hugging Face layout is needed")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path}: not a readable tokenizer: {error}") from None
        config_path = directory / "tokenizer_config.json"
        try:
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
            if not isinstance(config, dict):
                raise ValueError("a JSON object is expected")
        except ValueError as error:
            raise ValueError(f"{config_path}: {error}") from None
        template_path = directory / "chat_template.jinja"
        template = _template_of(config)
        if template_path.exists():
            template = template_path.read_text(encoding="utf-8")
        try:
            return cls(backend, template, _special_tokens_of(config))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{directory}: the chat template is not valid: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of a token ("" for an id without one), not fit for people as its text is."""
        return self._backend.id_to_token(id) or ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in the text are recognised as such."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_few(self, ids: tuple[int, ...], skip_special_tokens: bool = True) -> str:
        """`decode` of a handful of ids, as streams ask for them: few enough are remembered, more hardly come again."""
        decode = self._decode_few if len(ids) <= _NUM_FEW else self._decode
        return decode(ids, skip_special_tokens)

    def _decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _shown(self, id: int) -> tuple[str, int]:
        """The text of one token by itself, special tokens show their names; and the number of characters that it adds
        to a text, in which special tokens do not show."""
        return self.decode((id,), skip_special_tokens=False), len(self.decode((id,)))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation. Raises ChatTemplateError when the template refuses."""
        if self._template is None:
            raise ChatTemplateError("this model has no chat template; use the completions API")
        try:
            return self._template.render(
                **{**self._special_tokens, **variables},
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ChatTemplateError(f"the chat template refuses the messages: {error}") from None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation; the template writes all special tokens itself."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)


class IncrementalDetokenizer:
    """Turns a growing list of ids into text, piece by piece; the pieces together are the text of the whole.

    A character whose bytes are not all there yet is held back: no piece ends in the middle of one. Where bytes are
    tokens of their own (byte fallback), a whole run of them is: what it says is known when it is over.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._start = 0  # decoding begins here, at ids whose text is out, so that the decoder sees their context
        self._context_end = 0  # ids up to here have given all their text
        self._num_out = 0  # characters already given of the text of ids[_start:]

    def push(self, ids: Sequence[int]) -> str:
        """The text that the new ids add, "" while a character is unfinished."""
        self._ids.extend(ids)
        if self._ids and self._ids[-1] in self._tokenizer.byte_ids:
            return ""
        text = self._text()
        held = 0
        if text.endswith(_REPLACEMENT):
            held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_UNFINISHED)
        piece = text[self._num_out : len(text) - held]
        self._num_out += len(piece)
        if held == 0 and self._tokenizer.joins_bytes:
            self._ids, self._num_out = [], 0
        elif held == 0:
            self._start, self._context_end = self._context_end, len(self._ids)
            self._num_out = len(self._text())
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        text = self._text()
        piece = text[self._num_out :]
        self._num_out += len(piece)
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode_few(tuple(self._ids[self._start :]), self._skip_special_tokens)


def _byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """The tokens ``<0x00>`` to ``<0xFF>`` of a vocabulary that is decoded with byte fallback."""
    if "ByteFallback" not in json.dumps(json.loads(backend.to_str())["decoder"]):
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(id for id in ids if id is not None)


def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    # jinja2's own filter escapes characters for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _template_of(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens
