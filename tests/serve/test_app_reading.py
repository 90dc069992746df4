"""/v1/embeddings and /v1/classify over an engine that reads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx2 as httpx
import openai
import pytest
from app_server import ReaderEngine, Running, running

from ftray.config.serving import Serving


@pytest.fixture(scope="module")
def server(storage, tokenizer) -> Iterator[Running]:
    with running(Serving(storage=str(storage)), engine=ReaderEngine(), tokenizer=tokenizer) as started:
        yield started


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


def classify(server: Running, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/classify", json=body)


@pytest.mark.parametrize("form", ["float", "base64", None])
@pytest.mark.parametrize(("given", "lengths"), [("one", None), ([5, 6], [2]), ([[5], [5, 6, 7]], [1, 3])])
def test_every_form_of_input_has_its_vectors(client, tokenizer, given, lengths, form):
    more = {} if form is None else {"encoding_format": form}
    answer = client.embeddings.create(model="base", input=given, **more)
    lengths = lengths or [len(tokenizer(given)["input_ids"])]
    assert [one.index for one in answer.data] == list(range(len(lengths)))
    if form == "base64":
        assert all(isinstance(one.embedding, str) for one in answer.data)
    else:  # without a format the client asks for base64 and decodes it
        assert [one.embedding for one in answer.data] == [[length, 1.0, 0.0] for length in lengths]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)


def test_fewer_dimensions_are_the_first_ones_at_length_one(client):
    [one] = client.embeddings.create(model="base", input=[5, 6], dimensions=2).data
    assert one.embedding == pytest.approx([2 / math.sqrt(5), 1 / math.sqrt(5)])
    with pytest.raises(openai.BadRequestError, match="vectors have 3"):
        client.embeddings.create(model="base", input="a", dimensions=4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("word " * 100, "at most 64"),
        ([4096], "not below the vocabulary"),
        ([], "at least 1 item"),
        ([[]], "at least 1 item"),
        (["a"] * 2049, "at most 2048"),
    ],
)
def test_what_cannot_be_read_is_refused(client, given, says):
    with pytest.raises(openai.BadRequestError, match=says):
        client.embeddings.create(model="base", input=given)


def test_labels_come_with_their_scores(server):
    answer = classify(server, model="orders", input=["a", "a rather long text of many words"])
    assert answer.headers["x-ftray-version"] == "orders@v2"
    assert [one["label"] for one in answer.json()["data"]] == ["short", "long"]
    assert answer.json()["data"][1]["scores"] == {"long": 0.75, "short": 0.25}
    assert classify(server, model="orders", input="a").json()["data"][0]["index"] == 0


def test_the_base_has_no_labels(server):
    answer = classify(server, model="base", input="a")
    assert answer.status_code == 400
    assert "has no labels" in answer.json()["error"]["message"]


def test_an_engine_that_reads_does_not_write(client):
    with pytest.raises(openai.BadRequestError, match="does not generate"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "a"}])


@pytest.fixture(scope="module")
def by_token(storage, tokenizer) -> Iterator[Running]:
    """Its tokens are B-THING, I-THING, O, B-THING, … by their places."""
    with running(Serving(storage=str(storage)), engine=ReaderEngine(by_token=True), tokenizer=tokenizer) as started:
        yield started


def test_labels_of_tokens_are_put_together_to_spans(by_token):
    text = "go flat out please"
    [one] = classify(by_token, model="orders", input=text).json()["data"]
    tokens = [(token["text"], token["label"]) for token in one["tokens"]]
    assert tokens == [("go", "B-THING"), ("flat", "I-THING"), ("out", "O"), ("please", "B-THING")]
    assert one["spans"] == [
        {"label": "THING", "start": 0, "end": 7, "text": "go flat", "score": 0.5},
        {"label": "THING", "start": 12, "end": 18, "text": "please", "score": 0.5},
    ]


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("he said no more", ["he said no"]),  # he s-a-id no more: B I-O-B I O
        ("flibbertigibbets and two whites", ["flibbertigibbets and", "whites"]),
        ("an €uro", ["an"]),  # blank and sign are five tokens
    ],
)
def test_a_span_ends_where_a_word_does(by_token, text, spans):
    [one] = classify(by_token, model="orders", input=text).json()["data"]
    assert [span["text"] for span in one["spans"]] == spans
