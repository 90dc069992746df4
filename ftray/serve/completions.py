"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import cast

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ftray.errors import ServeError
from ftray.serve.answers import DONE, ChatShape, Choice, Head, Shape, TextShape, Usage
from ftray.serve.bodies import read
from ftray.serve.call import Call
from ftray.serve.catalog import Route
from ftray.serve.engine import EngineFacts, Piece
from ftray.serve.keys import needs
from ftray.serve.openai import ChatBody, CompletionBody
from ftray.serve.schema import takes
from ftray.serve.sequences import Prompt, generations, interleaved
from ftray.serve.server import Server, fingerprint
from ftray.serve.streaming import EventStream
from ftray.serve.wanted import Deadline, while_wanted

router = APIRouter(dependencies=[Depends(needs("infer"))], tags=["generate"])


@router.post("/v1/chat/completions", **takes(ChatBody))
async def chat(request: Request) -> Response:
    """The next message of a conversation."""
    server = Server.of(request)
    deadline = server.deadline(request)
    body = await read(request, ChatBody, max_mb=server.limits.max_body_mb)
    async with while_wanted(request.receive, deadline):
        facts = await server.facts_for("generate")
        route = await server.route(request, body.model, who=body.who)
        messages = [message.for_template() for message in body.messages]
        prompts = [Prompt(await server.prompts.of_messages(messages, most=facts.max_length))]
        head = _head("chatcmpl", body, facts, route)
        shape = ChatShape(head, server.prompts.token)
        if server.http.log_prompts:
            Call.of(request.scope).prompts = list(messages)
        return await _answer(request, _Work(body, prompts, facts, route, head, shape, deadline))


@router.post("/v1/completions", **takes(CompletionBody))
async def complete(request: Request) -> Response:
    """What follows a text."""
    server = Server.of(request)
    deadline = server.deadline(request)
    body = await read(request, CompletionBody, max_mb=server.limits.max_body_mb)
    async with while_wanted(request.receive, deadline):
        facts = await server.facts_for("generate")
        route = await server.route(request, body.model, who=body.who)
        prompts = await _prompts(server, body, facts)
        head = _head("cmpl", body, facts, route)
        shape = TextShape(head, server.prompts.token)
        if server.http.log_prompts:
            Call.of(request.scope).prompts = list(body.prompts)
        return await _answer(request, _Work(body, prompts, facts, route, head, shape, deadline))


@dataclass(frozen=True)
class _Work:
    """A request that is understood."""

    body: ChatBody | CompletionBody
    prompts: Sequence[Prompt]
    facts: EngineFacts
    route: Route
    head: Head
    shape: Shape
    deadline: Deadline

    @property
    def echoes(self) -> list[str]:
        """One for each answer."""
        return [prompt.echo for prompt in self.prompts for _ in range(self.body.n or 1)]


async def _answer(request: Request, work: _Work) -> Response:
    call = Call.of(request.scope)
    call.stream = bool(work.body.stream)
    pieces = _pieces(Server.of(request), call, work)
    if work.body.stream:
        events = _events(pieces, call, work)
        return EventStream(await anext(events), events, deadline=work.deadline)
    choices = [Choice() for _ in work.echoes]
    async for index, piece in pieces:
        choices[index].add(piece)
    if call.answers is not None:
        call.answers = [choice.text for choice in choices]
    return JSONResponse(work.shape.whole(choices, work.echoes, Usage.of(call)))


async def _pieces(server: Server, call: Call, work: _Work) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all answers as they come, counted. An answer that stops without an end is an error."""
    asked = generations(
        work.body, work.prompts, id=work.head.id, facts=work.facts, limits=server.limits, deadline=work.deadline
    )
    call.prompt_tokens = sum(len(prompt.ids) for prompt in work.prompts)
    call.answers = [""] * len(asked) if server.http.log_prompts else None
    n, unfinished = work.body.n or 1, len(asked)
    last = [0.0] * len(asked)
    pieces = interleaved([server.fleet.generate(generation, work.route.version) for generation in asked])
    try:
        async for index, piece in pieces:
            now = time.perf_counter()
            if last[index]:
                server.metrics.gap.observe((now - last[index]) / max(1, len(piece.ids)))
            else:
                call.first_token()
                call.cached_tokens += 0 if index % n else piece.cached_tokens  # the n answers share their prompt
            last[index] = now
            call.new_tokens += len(piece.ids)
            unfinished -= piece.finish is not None
            yield index, piece
    finally:
        await pieces.aclose()
    if unfinished:
        raise ServeError("the engine ended an answer without saying why; send the request again")


async def _events(
    pieces: AsyncGenerator[tuple[int, Piece], None], call: Call, work: _Work
) -> AsyncGenerator[bytes, None]:
    """A text of events for each piece; the last one tells the usage and the end."""
    shape, echoes = work.shape, work.echoes
    opened: set[int] = set()
    try:
        async for index, piece in pieces:
            event = shape.chunk(index, piece)
            if index not in opened:
                opened.add(index)
                event = shape.opening(index, echoes[index]) + event
            if call.answers is not None:
                call.answers[index] += piece.text
            yield event.encode()
        usage = shape.usage_chunk(Usage.of(call)) if work.body.includes_usage else ""
        yield usage.encode() + DONE
    finally:
        await pieces.aclose()


async def _prompts(server: Server, body: CompletionBody, facts: EngineFacts) -> list[Prompt]:
    if isinstance(body.prompts[0], str):
        texts = cast(list[str], body.prompts)
        encoded = await server.prompts.of_texts(texts, most=facts.max_length)
        return [Prompt(ids, text if body.echo else "") for ids, text in zip(encoded, texts, strict=True)]
    given = cast(list[list[int]], body.prompts)
    echoes = await server.prompts.texts_of(given) if body.echo else [""] * len(given)
    return [Prompt(tuple(ids), echo) for ids, echo in zip(given, echoes, strict=True)]


def _head(prefix: str, body: ChatBody | CompletionBody, facts: EngineFacts, route: Route) -> Head:
    return Head(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=body.model,
        fingerprint=fingerprint(facts, route),
        scored=body.alternatives is not None,
        includes_usage=body.includes_usage,
    )
