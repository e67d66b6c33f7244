"""The model as the router knows it: its tokenizer, its limits, its defaults. No weights."""

from dataclasses import dataclass
from pathlib import Path

from common.config import ClusterConfig
from common.model.config import load_generation_defaults, load_model_config
from common.model.tokenizer import ChatTemplateError, IncrementalDetokenizer, Tokenizer
from services.router.request_parsing import ApiError, ModelLimits, ParsedRequest


@dataclass(frozen=True, slots=True)
class ServedModel:
    limits: ModelLimits
    tokenizer: Tokenizer

    def prompt_ids(self, parsed: ParsedRequest) -> tuple[int, ...]:
        """Token ids of the prompt. Raises ApiError when the chat template refuses the messages."""
        match parsed.prompt:
            case tuple():
                return parsed.prompt
            case str():
                return tuple(self.tokenizer.encode(parsed.prompt))
            case _:
                try:
                    return tuple(self.tokenizer.encode_chat(parsed.prompt))
                except ChatTemplateError as error:
                    raise ApiError(400, str(error), parsed.prompt_field) from None

    def detokenizer(self) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.tokenizer)

    def token_text(self, id: int) -> str:
        """The text of one token by itself; special tokens show their names."""
        return self.tokenizer.decode([id], skip_special_tokens=False)


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
