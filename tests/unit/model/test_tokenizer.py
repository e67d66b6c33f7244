"""Ids to text in pieces, and chat templates in the sandbox."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import tokenizers.decoders
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.models import WordLevel

from common.model.tokenizer import ChatTemplateError, IncrementalDetokenizer, Tokenizer
from tests.unit.model.tiny_models import TINY_RANDOM

TOKENIZER = Tokenizer.load(TINY_RANDOM)


def test_text_survives_the_round_trip() -> None:
    for text in ("hello", " two  spaces ", "grüße, 日本語 🙂\n\x00"):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.vocab_size == 260
    assert TOKENIZER.encode("<|eos|>") == [1]
    assert TOKENIZER.decode([1]) == ""
    assert TOKENIZER.decode([1], skip_special_tokens=False) == "<|eos|>"


def test_half_a_character_is_held_back() -> None:
    ids = TOKENIZER.encode("é🙂")
    assert len(ids) == 6
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert [detokenizer.push([token]) for token in ids] == ["", "é", "", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_an_unfinished_end_comes_with_the_flush() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.push(TOKENIZER.encode("a🙂")[:-1]) == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character_do_not_hold_the_stream_for_long() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    stray = TOKENIZER.encode("é")[1]
    pieces = [detokenizer.push([stray]) for _ in range(10)]
    assert "".join(pieces) == "\ufffd" * 7


@given(
    ids=st.lists(st.integers(0, 259), max_size=60),
    cuts=st.lists(st.integers(1, 7), max_size=60),
    skip=st.booleans(),
)
def test_the_pieces_are_the_text_however_it_is_cut(ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=skip)
    pieces, rest = [], list(ids)
    for cut in [*cuts, len(ids)]:
        pieces.append(detokenizer.push(rest[:cut]))
        rest = rest[cut:]
    assert "".join(pieces) + detokenizer.flush() == TOKENIZER.decode(ids, skip_special_tokens=skip)


def _in_pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> str:
    detokenizer, pieces, rest = IncrementalDetokenizer(tokenizer), [], list(ids)
    for cut in [*cuts, len(ids)]:
        pieces.append(detokenizer.push(rest[:cut]))
        rest = rest[cut:]
    return "".join(pieces) + detokenizer.flush()


@given(ids=st.lists(st.integers(0, 3), max_size=20), cuts=st.lists(st.integers(1, 4), max_size=20))
def test_spaces_between_words_are_there_however_it_is_cut(ids: list[int], cuts: list[int]) -> None:
    """A decoder that drops the first space of a text must not drop that of a piece."""
    backend = tokenizers.Tokenizer(WordLevel({"\u2581a": 0, "\u2581bc": 1, "d": 2, "\u2581": 3}, unk_token="d"))
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend, None, {})
    assert _in_pieces(tokenizer, ids, cuts) == tokenizer.decode(ids)


@given(
    ids=st.lists(st.one_of(st.sampled_from("\u4f60\u597d\U0001f642".encode()), st.integers(0, 258)), max_size=30),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
def test_bytes_that_are_tokens_read_the_same_however_they_are_cut(ids: list[int], cuts: list[int]) -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "\u2581b": 257, "\u65e5": 258}
    backend = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="a"))
    parts = [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence(parts)
    tokenizer = Tokenizer(backend, None, {})
    assert _in_pieces(tokenizer, ids, cuts) == tokenizer.decode(ids)


@given(text=st.text(max_size=30))
def test_no_piece_of_valid_text_shows_a_replacement_character(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=False)
    pieces = [detokenizer.push([token]) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) == text.rstrip("\ufffd") or "\ufffd" in text


def test_chat_is_rendered_with_the_special_tokens() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "?"},
    ]
    text = "<|bos|><|user|>hi<|assistant|>yo<|eos|><|user|>?<|assistant|>"
    assert TOKENIZER.render_chat(messages) == text
    assert TOKENIZER.encode_chat(messages) == TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.render_chat(messages, add_generation_prompt=False) == text.removesuffix("<|assistant|>")


def with_template(directory: Path, template: object) -> Tokenizer:
    shutil.copy(TINY_RANDOM / "tokenizer.json", directory / "tokenizer.json")
    config = {"bos_token": {"content": "<|bos|>"}, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(directory)


def test_the_template_may_refuse_and_may_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="role tool is not supported here"):
        TOKENIZER.render_chat([{"role": "tool", "content": "x"}])
    without = with_template(tmp_path, None)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        without.render_chat([])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[5].content.foo }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_nor_crash_the_router(tmp_path: Path, template: str) -> None:
    with pytest.raises(ChatTemplateError):
        with_template(tmp_path, template).render_chat([])


def test_named_templates_a_file_of_its_own_and_json(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ bos_token }}<d>"}]
    assert with_template(tmp_path, named).render_chat([]) == "<|bos|><d>"
    (tmp_path / "chat_template.jinja").write_text("{% for x in messages %}{% break %}{% endfor %}{{ extra | tojson }}")
    assert Tokenizer.load(tmp_path).render_chat([{"role": "user"}], extra={"a": "<ü>"}) == '{"a": "<ü>"}'


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="the chat template is not valid"):
        with_template(tmp_path, "{% if %}")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
