"""The tokenizer of abacus: one token per byte, and six special tokens.

A byte's token id is the byte, so every text round-trips, and a reader can check a stream of ids by eye.
`write_tokenizer` produces the files of a Hugging Face checkpoint; training uses the same ids directly.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, SYSTEM, USER, ASSISTANT, END = range(NUM_BYTES, NUM_BYTES + len(SPECIAL_TOKENS))
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% else %}"
    "{{ raise_exception('abacus knows the roles system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _printable_of_byte() -> list[str]:
    """GPT-2's stand-ins: printable Latin-1 bytes stand for themselves, the others for code points from 256 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    printable: dict[int, str] = {byte: chr(byte) for byte in kept}
    for byte in range(NUM_BYTES):
        printable.setdefault(byte, chr(NUM_BYTES + len(printable) - len(kept)))
    return [printable[byte] for byte in range(NUM_BYTES)]


def build_tokenizer() -> Tokenizer:
    """The tokenizer; without merges, byte-level BPE yields exactly one token per UTF-8 byte."""
    vocab = {character: byte for byte, character in enumerate(_printable_of_byte())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the latter with the chat template."""
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
