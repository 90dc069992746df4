"""Where an answer ends: the tokens after which a chat model says nothing more."""

from __future__ import annotations

from typing import Any

_ANSWER = "Xanswer"


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: EOS of tokenizer and generation config, and the chat template's end of turn."""
    ids: set[int] = set()
    config = getattr(model, "generation_config", None)
    for value in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer.chat_template:
        ids.update(_end_of_turn(tokenizer))
    return sorted(ids)


def _end_of_turn(tokenizer: Any) -> set[int]:
    """The first special token that the template puts after an answer, e.g. <|im_end|>, <end_of_turn>."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program of the model's authors: what it may raise is open
        return set()
    _, found, tail = str(text).rpartition(_ANSWER)
    special = set(tokenizer.all_special_ids) | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    after = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    return set([id for id in after if id in special][:1])
