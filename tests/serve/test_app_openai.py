"""The `openai` client against the app: every route that it knows, streaming and not."""

from __future__ import annotations

import openai
import pytest
from app_server import Running

ASK = [{"role": "user", "content": "two coffees"}]


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


def test_the_models_are_the_base_and_names_aliases_and_versions(client):
    assert [model.id for model in client.models.list()] == [
        "base", "orders", "orders@prod", "orders@v2", "orders@v1", "refunds", "refunds@v1",
    ]  # fmt: skip
    orders = client.models.retrieve("orders@prod")
    assert (orders.id, orders.object, orders.model_extra["version"]) == ("orders@prod", "model", "orders@v1")
    assert orders.created > 1_700_000_000


def test_a_chat_is_answered_by_the_version_that_the_name_means(client):
    answer = client.chat.completions.create(model="orders", messages=ASK, max_tokens=3)
    assert answer.choices[0].message.content.startswith("first ")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == "orders"
    assert answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.system_fingerprint.startswith("fp_")


def test_the_version_and_the_request_id_are_in_the_headers(client):
    raw = client.chat.completions.with_raw_response.create(
        model="orders@v2", messages=ASK, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-ftray-version"] == "orders@v2"
    assert raw.headers["x-request-id"] == "mine-1"
    raw = client.chat.completions.with_raw_response.create(
        model="base", messages=ASK, max_tokens=1, extra_headers={"x-request-id": "not a word {}"}
    )
    assert raw.headers["x-ftray-version"] == "base"
    assert raw.headers["x-request-id"].startswith("req-")


def test_a_streamed_chat_says_what_the_whole_one_says(client):
    whole = client.chat.completions.create(model="orders@v2", messages=ASK, max_tokens=5)
    chunks = list(
        client.chat.completions.create(
            model="orders@v2", messages=ASK, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 6 + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].system_fingerprint == whole.system_fingerprint


def test_a_stream_without_include_usage_has_none(client):
    chunks = list(client.chat.completions.create(model="base", messages=ASK, max_tokens=2, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_n_answers_take_seeds_in_a_row_and_count_the_prompt_once(client, server):
    del server.engine.asked[:]
    answer = client.chat.completions.create(model="base", messages=ASK, max_tokens=2, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(asked.sampling.seed for asked in server.engine.asked) == [7, 8, 9]
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == len(server.engine.asked[0].prompt_ids)


def test_n_streams_are_interleaved_and_told_apart_by_their_index(client):
    chunks = list(client.chat.completions.create(model="base", messages=ASK, max_tokens=3, n=2, stream=True))
    texts, finishes, roles = {0: "", 1: ""}, [], []
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes += [choice.index] if choice.finish_reason else []
        roles += [choice.index] if choice.delta.role else []
    assert texts[0] == texts[1] != ""
    assert sorted(finishes) == sorted(roles) == [0, 1]


def test_every_sampling_option_reaches_the_engine(client, server):
    del server.engine.asked[:]
    client.chat.completions.create(
        model="base",
        messages=ASK,
        max_completion_tokens=4,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"12": 5},
        stop=["\n", "END"],
        seed=-1,
        extra_body={
            "top_k": 40,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "stop_token_ids": [9],
            "min_tokens": 2,
            "ignore_eos": True,
        },
    )
    [asked] = server.engine.asked
    sampling = asked.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (4, 0.5, 0.9, 40)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.25, -0.5)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.2, {12: 5.0})
    assert (sampling.stop, sampling.stop_ids, sampling.ignore_eos) == (("\n", "END"), (9,), True)
    assert (sampling.min_new_tokens, sampling.seed) == (2, 2**63 - 1)


def test_one_stop_string_may_stand_alone(client, server):
    del server.engine.asked[:]
    client.completions.create(model="base", prompt="a", max_tokens=1, stop="\n")
    assert server.engine.asked[0].sampling.stop == ("\n",)


def test_without_max_tokens_an_answer_may_fill_what_is_left(client, server):
    del server.engine.asked[:]
    prompt = [5] * 500
    answer = client.completions.create(model="base", prompt=prompt)
    assert server.engine.asked[0].sampling.max_new_tokens == server.engine.facts.max_length - 500
    assert answer.choices[0].finish_reason == "length"


def test_a_chat_has_its_log_probabilities_in_openais_shape(client, tokenizer):
    answer = client.chat.completions.create(model="base", messages=ASK, max_tokens=8, logprobs=True, top_logprobs=1)
    content = answer.choices[0].logprobs.content
    # The fake's tokens are 0, 1, 2, …, of which the first are special and no part of a text.
    assert [token.token for token in content] == [tokenizer.decode([id]) for id in (6, 7)]
    assert content[0].logprob == -0.5
    assert bytes(content[0].bytes).decode() == content[0].token
    assert content[0].top_logprobs[0].token == content[0].token


def test_a_streamed_chat_has_them_with_each_chunk(client):
    chunks = client.chat.completions.create(model="base", messages=ASK, max_tokens=8, logprobs=True, stream=True)
    told = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert len(told) == 2
    assert told[0].top_logprobs == [] or told[0].top_logprobs[0].logprob == -0.5


def test_a_completion_has_them_in_its_own_shape(client):
    answer = client.completions.create(model="base", prompt="a", max_tokens=9, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 3
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    assert logprobs.top_logprobs[0] == {logprobs.tokens[0]: -0.5}


@pytest.mark.parametrize("prompt", ["one text", ["one", "two"], [5, 6, 7], [[5, 6], [7]]])
def test_a_completion_takes_every_form_of_prompt(client, server, prompt):
    del server.engine.asked[:]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    answer = client.completions.create(model="refunds", prompt=prompt, max_tokens=2, n=2)
    assert [choice.index for choice in answer.choices] == list(range(4 if several else 2))
    assert answer.choices[0].text.startswith("money ")
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 2 * len(answer.choices)
    if prompt == [[5, 6], [7]]:
        assert [asked.prompt_ids for asked in server.engine.asked] == [(5, 6), (5, 6), (7,), (7,)]


def test_echo_puts_the_prompt_before_its_answers(client, tokenizer):
    answer = client.completions.create(model="base", prompt=["one ", "two "], max_tokens=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["one base ", "two base "]
    chunks = client.completions.create(model="base", prompt="one ", max_tokens=1, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one base "
    ids = tokenizer("two coffees")["input_ids"]
    answer = client.completions.create(model="base", prompt=ids, max_tokens=1, echo=True)
    assert answer.choices[0].text == "two coffees" + "base "


def test_a_completion_streams(client):
    chunks = list(
        client.completions.create(
            model="orders", prompt="a", max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]).startswith("first ")
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 3


def test_text_parts_are_joined_and_a_developer_is_the_system(client, server, tokenizer):
    del server.engine.asked[:]
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "coffees"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    client.chat.completions.create(model="base", messages=messages, max_tokens=1)
    plain = [{"role": "system", "content": "be brief"}, *ASK]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    assert server.engine.asked[0].prompt_ids == tuple(ids)


def test_keys_that_change_nothing_are_taken(client):
    answer = client.chat.completions.create(
        model="base",
        messages=[*ASK, {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": []}, *ASK],
        max_tokens=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
    )
    assert answer.choices


def test_one_user_stays_on_one_side_of_a_split(client, server):
    server.call(server.catalog.split("orders", "canary", {"v1": 0.5, "v2": 0.5}))
    sides = {}
    for user in (f"user-{number}" for number in range(12)):
        asked = [
            client.chat.completions.with_raw_response.create(
                model="orders@canary", messages=ASK, max_tokens=1, user=user
            ).headers["x-ftray-version"]
            for _ in range(2)
        ]
        assert asked[0] == asked[1]
        sides[user] = asked[0]
    assert set(sides.values()) == {"orders@v1", "orders@v2"}


def test_embeddings_of_a_decoder_are_refused_with_the_way_out(client):
    with pytest.raises(openai.BadRequestError, match="serve an encoder") as told:
        client.embeddings.create(model="base", input="a")
    assert told.value.code == "unsupported_task"
