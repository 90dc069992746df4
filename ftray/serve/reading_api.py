"""POST /v1/embeddings and /v1/classify, where the engine is an encoder."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse

from ftray.errors import RequestError
from ftray.serve.bodies import read
from ftray.serve.call import Call
from ftray.serve.engine import EngineFacts, Labelled
from ftray.serve.keys import needs
from ftray.serve.openai import ClassifyBody, EmbeddingBody
from ftray.serve.prompts import Encoded
from ftray.serve.schema import takes
from ftray.serve.server import Server
from ftray.serve.wanted import while_wanted

router = APIRouter(dependencies=[Depends(needs("infer"))], tags=["read"])


@router.post("/v1/embeddings", **takes(EmbeddingBody))
async def embed(request: Request) -> JSONResponse:
    """A vector of length 1 for each text."""
    server, call = Server.of(request), Call.of(request.scope)
    deadline = server.deadline(request)
    body = await read(request, EmbeddingBody, max_mb=server.limits.max_body_mb)
    async with while_wanted(request.receive, deadline):
        facts = await server.facts_for("embed")
        route = await server.route(request, body.model)
        ids = _fitting(await _ids(server, body, facts), facts)
        call.prompt_tokens = sum(map(len, ids))
        vectors = await server.fleet.embed(ids, route.version)
    if body.dimensions is not None:
        vectors = [_shortened(vector, body.dimensions) for vector in vectors]
    write = _as_base64 if body.encoding_format == "base64" else list
    data = [{"object": "embedding", "index": index, "embedding": write(vector)} for index, vector in enumerate(vectors)]
    return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": _usage(call)})


@router.post("/v1/classify", **takes(ClassifyBody))
async def classify(request: Request) -> JSONResponse:
    """The labels of each text with their scores, or of its tokens, as the version was trained."""
    server, call = Server.of(request), Call.of(request.scope)
    deadline = server.deadline(request)
    body = await read(request, ClassifyBody, max_mb=server.limits.max_body_mb)
    async with while_wanted(request.receive, deadline):
        facts = await server.facts_for("classify")
        route = await server.route(request, body.model)
        if route.version is None:
            raise RequestError(
                f"{body.model!r} is the base, which has no labels; name a classification version", param="model"
            )
        encoded = await server.prompts.with_spans(body.inputs, most=facts.max_length, param="input")
        ids = _fitting([one.ids for one in encoded], facts)
        call.prompt_tokens = sum(map(len, ids))
        labelled = await server.fleet.classify(ids, route.version)
    data = [
        {"index": index, **_labels(result, text, where)}
        for index, (result, text, where) in enumerate(zip(labelled, body.inputs, encoded, strict=True))
    ]
    return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": _usage(call)})


async def _ids(server: Server, body: EmbeddingBody, facts: EngineFacts) -> list[tuple[int, ...]]:
    if isinstance(body.inputs[0], str):
        return await server.prompts.of_texts(cast(list[str], body.inputs), most=facts.max_length, param="input")
    return [tuple(ids) for ids in cast(list[list[int]], body.inputs)]


def _fitting(ids: list[tuple[int, ...]], facts: EngineFacts) -> list[tuple[int, ...]]:
    for index, text in enumerate(ids):
        param = f"input[{index}]"
        if not text:
            raise RequestError(f"{param}: is empty", param=param)
        if len(text) > facts.max_length:
            raise RequestError(
                f"{param}: has {len(text)} tokens, and the model reads at most {facts.max_length}; cut it into pieces",
                param=param,
                code="context_length_exceeded",
            )
        if max(text) >= facts.vocab_size:
            raise RequestError(f"{param}: a token id is not below the vocabulary's {facts.vocab_size}", param=param)
    return ids


def _labels(result: Labelled, text: str, where: Encoded) -> dict[str, Any]:
    if not result.tokens:
        return {"label": _best(result.scores), "scores": dict(result.scores)}
    tokens, words = [], []
    for span, word, (_, scores) in zip(where.spans, where.words, result.tokens, strict=True):
        start, end = _without_blanks(text, *span)
        if end > start:  # the tokenizer's own tokens stand for no text
            label = _best(scores)
            tokens.append({"start": start, "end": end, "text": text[start:end], "label": label, "scores": dict(scores)})
            words.append(word)
    return {"tokens": tokens, "spans": _spans(tokens, words, text)}


def _spans(tokens: Sequence[dict[str, Any]], words: Sequence[int | None], text: str) -> list[dict[str, Any]]:
    """Neighbouring words of one kind as one: B- begins a span, I- goes on with it, O is none. `score` is their mean.

    A word is what its first token says, the only one that training asked for a label. It ends at a blank, as some
    tokenizers take a whole text for one word.
    """
    spans: list[dict[str, Any]] = []
    kind, word, end = "O", None, 0
    for token, its in zip(tokens, words, strict=True):
        goes_on = its is not None and its == word and token["start"] <= end
        word, end = its, token["end"]
        if not goes_on:
            before, label = kind, token["label"]
            part, kind = (label[0], label[2:]) if label[:2] in ("B-", "I-") else ("", label)
            if kind != "O":
                if kind != before or part == "B":
                    spans.append({"label": kind, "start": token["start"], "scores": []})
                spans[-1]["scores"].append(token["scores"][label])
        if kind != "O":
            spans[-1]["end"] = end
    return [
        {
            "label": span["label"],
            "start": span["start"],
            "end": span["end"],
            "text": text[span["start"] : span["end"]],
            "score": sum(span["scores"]) / len(span["scores"]),
        }
        for span in spans
    ]


def _without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    """Many tokens take the blank before a word along."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def _best(scores: Mapping[str, float]) -> str | None:
    return max(scores, key=scores.__getitem__) if scores else None


def _shortened(vector: Sequence[float], dimensions: int) -> list[float]:
    """Its first entries at length 1: what a model trained for shorter vectors means by `dimensions`."""
    if dimensions > len(vector):
        raise RequestError(f"dimensions: the model's vectors have {len(vector)}", param="dimensions")
    kept = list(vector[:dimensions])
    length = math.sqrt(math.fsum(value * value for value in kept))
    return [value / length for value in kept] if length else kept


def _as_base64(vector: Sequence[float]) -> str:
    """Little-endian 32-bit floats."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(call: Call) -> dict[str, int]:
    return {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
