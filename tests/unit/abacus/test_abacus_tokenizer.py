"""The tokenizer that ships with abacus: any text round-trips, and chats encode as they did in training."""

import json
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training.abacus.batches import encode_answer, encode_prompt
from training.abacus.tokenizer import BOS, END, SPECIAL_TOKENS, SYSTEM, VOCAB_SIZE, build_tokenizer

CHECKPOINT = Path(__file__).parents[3] / "models" / "abacus"
SHIPPED = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def _render(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    def raise_exception(message: str) -> None:
        raise ValueError(message)

    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(config["chat_template"])
    return template.render(
        messages=messages,
        bos_token=config["bos_token"],
        add_generation_prompt=add_generation_prompt,
        raise_exception=raise_exception,
    )


@given(st.text(max_size=200).filter(lambda text: not any(special in text for special in SPECIAL_TOKENS)))
def test_a_token_is_a_byte(text: str) -> None:
    ids = SHIPPED.encode(text).ids
    assert ids == list(text.encode())
    assert SHIPPED.decode(ids) == text


def test_the_shipped_tokenizer_is_the_one_the_code_builds() -> None:
    assert json.loads(SHIPPED.to_str()) == json.loads(build_tokenizer().to_str())
    assert SHIPPED.get_vocab_size() == VOCAB_SIZE
    assert [SHIPPED.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(256, VOCAB_SIZE))


def test_the_chat_template_writes_what_the_model_was_trained_on() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what is 1 + 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": " sort 3 1\n"},
    ]
    ids = SHIPPED.encode(_render(messages, add_generation_prompt=True)).ids
    first_turn = [*encode_prompt("what is 1 + 2?"), *encode_answer("3")]
    assert ids == [BOS, SYSTEM, *b"Be brief.", END, *first_turn, *encode_prompt("sort 3 1")]
    assert SHIPPED.encode(_render(messages[:3], add_generation_prompt=False)).ids == ids[: 12 + len(first_turn)]


def test_a_role_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="not tool"):
        _render([{"role": "tool", "content": "x"}], add_generation_prompt=True)
