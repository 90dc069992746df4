"""The chat template of a base that has none; training renders with it, so serving must too."""

from __future__ import annotations

from typing import Any

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\n\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def plain_template(tokenizer: Any) -> str:
    """For this tokenizer: with BOS where it puts BOS before a text by itself."""
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + PLAIN_TEMPLATE


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
