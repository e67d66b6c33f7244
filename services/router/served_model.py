"""The model as the router knows it: its tokenizer, its limits, its defaults. No weights."""

from dataclasses import dataclass
from pathlib import Path

from common.config import ClusterConfig
from common.model.config import load_generation_defaults, load_model_config
from common.model.tokenizer import ChatTemplateError, IncrementalDetokenizer, Tokenizer
from services.router.api_error import ApiError
from services.router.choices import Prompt
from services.router.model_limits import ModelLimits
from services.router.openai_format import Body
from services.router.prompt_parsing import Message
from services.router.request_parsing import ParsedRequest
from services.router.tokenization import TokenizeRequest, tokenized


@dataclass(frozen=True, slots=True)
class ServedModel:
    limits: ModelLimits
    tokenizer: Tokenizer

    def prompts(self, parsed: ParsedRequest) -> list[Prompt]:
        """The prompts of a request as token ids. Raises ApiError when the chat template refuses the messages."""
        if parsed.chat:
            text = self._render(parsed.messages, add_generation_prompt=True)
            return [Prompt(tuple(self.tokenizer.encode(text, add_special_tokens=False)), text)]
        return [
            Prompt(tuple(self.tokenizer.encode(prompt)), prompt)
            if isinstance(prompt, str)
            else Prompt(prompt, self.tokenizer.decode(prompt))
            for prompt in parsed.prompts
        ]

    def tokenize(self, request: TokenizeRequest) -> Body:
        """Raises ApiError when the chat template refuses the messages."""
        text = request.prompt
        if request.messages:
            text = self._render(request.messages, request.add_generation_prompt)
        ids = self.tokenizer.encode(text, request.add_special_tokens)
        token_strs = [self.tokenizer.token(id) for id in ids] if request.return_token_strs else None
        return tokenized(ids, token_strs, self.limits)

    def detokenize(self, ids: tuple[int, ...]) -> Body:
        return {"prompt": self.tokenizer.decode(ids, skip_special_tokens=False)}

    def detokenizer(self) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.tokenizer)

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.render_chat(messages, add_generation_prompt)
        except ChatTemplateError as error:
            raise ApiError(400, str(error), "messages") from None


def load_served_model(config: ClusterConfig) -> ServedModel:
    """Reads the directory that the cluster is configured with. Raises ValueError that names the file at fault."""
    directory = Path(config.model.path)
    model, defaults = load_model_config(directory), load_generation_defaults(directory)
    # A request has to fit into the KV blocks of one rank and of one prefill worker as well.
    num_blocks = min(config.decode.num_kv_blocks, config.prefill.num_kv_blocks)
    limits = ModelLimits(
        name=config.model.name or directory.name,
        max_model_len=min(model.max_position_embeddings, num_blocks * config.decode.block_size),
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(dict.fromkeys((*defaults.eos_token_ids, *model.eos_token_ids))),
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
    )
    return ServedModel(limits, Tokenizer.load(directory))
