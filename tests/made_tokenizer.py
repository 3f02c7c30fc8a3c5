"""A tokenizer of bytes and a few longer tokens, made in memory, with a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
SPECIAL = ["<pad>", BOS, EOS, "<|user|>", "<|assistant|>"]
MERGES = [(".", "Ċ"), ("Ċ", "Ċ"), ("1", "8"), ("Ġ", "1")]
"""The second letter of a pair is a newline or a space, as byte-level tokenizers write them."""

CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def made_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Which begins every text with its BOS token; 265 ids."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(one + other for one, other in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, words.index(BOS))])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=SPECIAL[3:],
    )
    made.chat_template = chat_template
    return made
