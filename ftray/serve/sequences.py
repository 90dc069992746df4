"""The sequences of one request: how each is sampled, and their pieces in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace

from ftray.config.serving import Limits
from ftray.errors import RequestError, ServeError
from ftray.serve.engine import EngineFacts, Generation, Piece, Sampling
from ftray.serve.openai import MAX_PROMPTS, MAX_SEED, ChatBody, CompletionBody
from ftray.serve.wanted import Deadline


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and what `echo` puts before its answers."""

    ids: tuple[int, ...]
    echo: str = ""


def generations(
    body: ChatBody | CompletionBody,
    prompts: Sequence[Prompt],
    *,
    id: str,
    facts: EngineFacts,
    limits: Limits,
    deadline: Deadline,
) -> list[Generation]:
    """n for each prompt, in OpenAI's order: the answers to the first prompt, then those to the second, …"""
    n = body.n or 1
    most = max(limits.max_n, MAX_PROMPTS)
    if n > limits.max_n:
        raise RequestError(f"n: {n} is more than this server's {limits.max_n} answers (limits.max_n)", param="n")
    if n * len(prompts) > most:
        raise RequestError(
            f"{len(prompts)} prompts with n {n} are more than {most} answers; send fewer at once", param="n"
        )
    ends = time.time() + deadline.left_s
    made: list[Generation] = []
    for prompt in prompts:
        sampling = _sampling(body, prompt_length=len(_checked(prompt, facts, limits).ids), facts=facts, limits=limits)
        for number in range(n):
            made.append(
                Generation(
                    id=f"{id}-{len(made)}",
                    prompt_ids=prompt.ids,
                    sampling=sampling if body.seed is None else _seeded(sampling, body.seed + number),
                    deadline=ends,
                    streamed=bool(body.stream),
                )
            )
    return made


async def interleaved(streams: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(which stream, its piece), as they come. The first error ends all; closing it closes all."""
    if len(streams) == 1:
        stream = streams[0]
        try:
            async for piece in stream:
                yield 0, piece
        finally:
            await _close(stream)
        return
    pieces: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(index, stream, pieces)) for index, stream in enumerate(streams)]
    left = len(pumps)
    try:
        while left:
            index, what = await pieces.get()
            if isinstance(what, Exception):
                raise what
            if what is None:
                left -= 1
            else:
                yield index, what
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, stream: AsyncIterator[Piece], into: asyncio.Queue[tuple[int, Piece | Exception | None]]
) -> None:
    """The queue has no bound of its own: a sequence has at most max_new_tokens pieces."""
    try:
        async for piece in stream:
            into.put_nowait((index, piece))
        into.put_nowait((index, None))
    except Exception as error:  # whatever it is, the request's own task raises it
        into.put_nowait((index, error))
    finally:
        await _close(stream)


async def _close(stream: AsyncIterator[Piece]) -> None:
    close = getattr(stream, "aclose", None)  # the seam asks for an iterator; what can be closed is closed at once
    if close is not None:
        with contextlib.suppress(ServeError):
            await close()


def _checked(prompt: Prompt, facts: EngineFacts, limits: Limits) -> Prompt:
    length = len(prompt.ids)
    if not length:
        raise RequestError("the prompt is empty; write at least one token", param="prompt")
    if any(id >= facts.vocab_size for id in prompt.ids):
        raise RequestError(f"a token id of the prompt is not below the vocabulary's {facts.vocab_size}", param="prompt")
    if limits.max_prompt_tokens is not None and length > limits.max_prompt_tokens:
        raise _too_long(
            f"the prompt has {length} tokens; this server takes {limits.max_prompt_tokens} (limits.max_prompt_tokens)"
        )
    if length >= facts.max_length:
        raise _too_long(
            f"the prompt has {length} tokens, and prompt and answer together may have {facts.max_length}; shorten it"
        )
    return prompt


def _sampling(body: ChatBody | CompletionBody, *, prompt_length: int, facts: EngineFacts, limits: Limits) -> Sampling:
    most = _new_tokens(body, prompt_length=prompt_length, facts=facts, limits=limits)
    if (body.min_tokens or 0) > most:
        raise RequestError(f"min_tokens: {body.min_tokens} is more than the answer's {most}", param="min_tokens")
    return Sampling(
        max_new_tokens=most,
        temperature=_given(body.temperature, 1.0),
        top_p=_given(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=_biases(body.logit_bias or {}, facts.vocab_size),
        stop=body.stops,
        stop_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_new_tokens=body.min_tokens or 0,
        logprobs=body.alternatives,
    )


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _new_tokens(body: ChatBody | CompletionBody, *, prompt_length: int, facts: EngineFacts, limits: Limits) -> int:
    room, wanted = facts.max_length - prompt_length, body.wanted_tokens
    if wanted is None:
        return min(limits.max_new_tokens, room)
    if wanted > limits.max_new_tokens:
        raise RequestError(
            f"max_tokens: {wanted} is more than this server's {limits.max_new_tokens} (limits.max_new_tokens)",
            param="max_tokens",
        )
    if wanted > room:
        raise _too_long(
            f"a prompt of {prompt_length} tokens and an answer of {wanted} do not fit into {facts.max_length}; "
            f"shorten the prompt, or ask for at most {room}"
        )
    return wanted


def _biases(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    biases = {int(id): bias for id, bias in given.items()}
    if outside := [id for id in biases if id >= vocab_size]:
        raise RequestError(
            f"logit_bias: token id {outside[0]} is not below the vocabulary's {vocab_size}", param="logit_bias"
        )
    return biases


def _seeded(sampling: Sampling, seed: int) -> Sampling:
    return replace(sampling, seed=seed % (MAX_SEED + 1))


def _too_long(message: str) -> RequestError:
    return RequestError(message, param="messages", code="context_length_exceeded")
