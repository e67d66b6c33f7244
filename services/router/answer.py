"""One response in the making: texts of its choices in, OpenAI bodies out, whole or chunk by chunk. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec.structs import replace

from common.messages import TopLogprobs
from services.router.choices import Choice
from services.router.event_template import EventTemplate
from services.router.openai_format import (
    Body,
    ResponseHead,
    TokenLogprob,
    Usage,
    chat_choice,
    chat_delta,
    chat_logprobs,
    chat_role,
    completion_choice,
    completion_logprobs,
    marked,
    plain_chat_logprobs,
    plain_completion_logprobs,
)
from services.router.request_parsing import ParsedRequest
from services.router.text_stream import TextDelta


class TokenTexts(Protocol):
    def shown(self, id: int) -> tuple[str, int]:
        """The text of one token by itself, special tokens show their names; and the number of characters that are its
        part in a text, in which special tokens have none."""
        ...


@dataclass(slots=True)
class _Progress:
    """What one choice has so far. ``num_characters`` are those of its tokens: where the next one begins."""

    choice: Choice
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    num_characters: int = 0
    has_begun: bool = False
    finish: str = ""
    stop_reason: int | str | None = None
    missed_experts: bool = False
    template: EventTemplate | None = None


class Answer:
    """`take` for a whole answer, `chunks` for a stream; both take each delta of each choice once, in order."""

    def __init__(
        self, head: ResponseHead, parsed: ParsedRequest, choices: Sequence[Choice], token_texts: TokenTexts
    ) -> None:
        self._head, self._parsed, self._texts = head, parsed, token_texts
        self._choices = [_Progress(choice) for choice in choices]
        self._has_usual_events = not parsed.continuous_usage and parsed.max_tokens != 0

    @property
    def id(self) -> str:
        return self._head.id

    @property
    def is_complete(self) -> bool:
        return all(choice.finish for choice in self._choices)

    @property
    def missed_experts(self) -> bool:
        """Of any choice, so far."""
        return any(choice.missed_experts for choice in self._choices)

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        prompts = self._choices[:: self._parsed.n]
        num_prompt_tokens = sum(len(choice.choice.prompt.ids) for choice in prompts)
        return Usage(num_prompt_tokens, sum(choice.num_tokens for choice in self._choices))

    def take(self, index: int, delta: TextDelta) -> None:
        progress = self._choices[index]
        for text, logprobs in self._parts(progress, delta):
            progress.texts.append(text)
            progress.logprobs += logprobs

    def whole(self) -> Body:
        make = chat_choice if self._head.chat else completion_choice
        choices = [
            marked(
                make(index, "".join(done.texts), self._logprobs(done.logprobs, 0), done.finish, done.stop_reason),
                done.missed_experts,
            )
            for index, done in enumerate(self._choices)
        ]
        return self._head.whole(choices, self.usage)

    def opening(self) -> list[Body]:
        """Chunks that come before any text."""
        if not self._head.chat:
            return []
        return [self._chunk(chat_role(index), progress) for index, progress in enumerate(self._choices)]

    def chunks(self, index: int, delta: TextDelta) -> list[Body]:
        """Two for the first delta of a completion that echoes its prompt, else one."""
        progress = self._choices[index]
        parts = self._parts(progress, delta)
        make = chat_delta if self._head.chat else completion_choice
        bodies = []
        for number, (text, logprobs) in enumerate(parts, 1):
            is_last = number == len(parts)
            finish, stop_reason = (progress.finish, progress.stop_reason) if is_last else ("", None)
            shown = self._logprobs(logprobs, progress.num_characters)
            progress.num_characters += sum(token.num_characters for token in logprobs)
            choice = marked(make(index, text, shown, finish, stop_reason), progress.missed_experts)
            bodies.append(self._chunk(choice, progress))
        return bodies

    def usual_event(self, index: int, delta: TextDelta) -> bytes | None:
        """What `chunks` gives for tokens in the middle of a stream, as an event; None: not that case, nothing was
        taken."""
        progress = self._choices[index]
        is_usual = self._has_usual_events and progress.has_begun and delta.ids and not delta.finish
        if not is_usual or progress.missed_experts or delta.missed_experts:
            return None
        if progress.template is None:
            make = chat_delta if self._head.chat else completion_choice
            progress.template = EventTemplate(self._chunk(make(index, "", None, "", None), progress), self._head.chat)
        progress.num_tokens += len(delta.ids)
        if not self._wants_logprobs:
            return progress.template.event(delta.text, None)
        offset = progress.num_characters
        if delta.top_logprobs:
            tokens = self._tokens(delta)
            progress.num_characters += sum(token.num_characters for token in tokens)
            return progress.template.event(delta.text, self._logprobs(tokens, offset))
        texts, sizes = zip(*map(self._texts.shown, delta.ids), strict=True)
        progress.num_characters += sum(sizes)
        shown = (
            plain_chat_logprobs(texts, delta.logprobs)
            if self._head.chat
            else plain_completion_logprobs(texts, delta.logprobs, sizes, offset)
        )
        return progress.template.event(delta.text, shown)

    def closing(self) -> list[Body]:
        """Chunks after the end of all choices."""
        return [self._head.chunk([], self.usage)] if self._parsed.include_usage else []

    def _chunk(self, choice: Body, progress: _Progress) -> Body:
        if self._parsed.continuous_usage:
            return self._head.chunk([choice], Usage(len(progress.choice.prompt.ids), progress.num_tokens))
        body = self._head.chunk([choice])
        if self._parsed.include_usage:
            body["usage"] = None
        return body

    def _parts(self, progress: _Progress, delta: TextDelta) -> list[tuple[str, list[TokenLogprob]]]:
        """Texts to show now with their tokens: the echoed prompt if this is its moment, and the delta's own."""
        parts = []
        if self._parsed.echo and not progress.has_begun:
            prompt = progress.choice.prompt
            parts.append((prompt.text, self._prompt_tokens(prompt.ids, delta) if self._wants_logprobs else []))
        progress.has_begun = True
        if self._parsed.max_tokens == 0:  # one token was computed all the same
            delta = replace(delta, text="", ids=(), finish=delta.finish and "length", stop=None)
        parts.append((delta.text, self._tokens(delta) if self._wants_logprobs else []))
        progress.num_tokens += len(delta.ids)
        progress.finish, progress.missed_experts = delta.finish, delta.missed_experts
        if delta.stop is not None:
            progress.stop_reason = delta.stop
        elif delta.finish == "stop":
            own = progress.choice.sampling.extra_stop_token_ids
            progress.stop_reason = delta.ids[-1] if delta.ids and delta.ids[-1] in own else None
        return parts

    @property
    def _wants_logprobs(self) -> bool:
        return self._parsed.template.logprobs

    def _logprobs(self, tokens: Sequence[TokenLogprob], text_offset: int) -> Body | None:
        if not self._wants_logprobs:
            return None
        return chat_logprobs(tokens) if self._head.chat else completion_logprobs(tokens, text_offset)

    def _tokens(self, delta: TextDelta) -> list[TokenLogprob]:
        # Shorter than what came with it where the token is not shown.
        tops = delta.top_logprobs or ((),) * len(delta.ids)
        return [self._token(*token) for token in zip(delta.ids, delta.logprobs, tops, strict=False)]

    def _prompt_tokens(self, ids: Sequence[int], delta: TextDelta) -> list[TokenLogprob]:
        rest = zip(ids[1:], delta.prompt_logprobs, strict=True)
        return [self._token(ids[0], None, ()), *(self._token(id, logprob, top) for id, (logprob, top) in rest)]

    def _token(self, id: int, logprob: float | None, top: TopLogprobs) -> TokenLogprob:
        text, num_characters = self._texts.shown(id)
        alternatives = tuple((self._texts.shown(other)[0], value) for other, value in top)
        return TokenLogprob(text, logprob, num_characters, alternatives)
