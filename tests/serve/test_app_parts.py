"""The app's parts alone: tokens as text and bytes, chunks, streams side by side, work that nobody waits for."""

from __future__ import annotations

import asyncio
import json

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ftray.errors import DeadlineExceeded, Overloaded, RequestError
from ftray.serve.answers import ChatShape, Head, TextShape
from ftray.serve.engine import Piece, Scored
from ftray.serve.prompts import Prompts, Token
from ftray.serve.sequences import interleaved
from ftray.serve.wanted import Deadline, Disconnected, while_wanted

NASTY = [
    '"quoted" \\ back',
    "line\nline\r\t",
    "\u2028\u2029",
    "𝕏 漢字",
    "\x7f\x1b[31m",
    "</script>",
    "",
    "\ud7ff\ufffd",
]


@pytest.fixture(scope="module")
def prompts(tokenizer) -> Prompts:
    return Prompts(tokenizer)


# tokens


@pytest.mark.parametrize("text", ["two flat whites", "漢字 and 𝕏", "a\n\tb", "é", " leading"])
def test_the_bytes_of_a_texts_tokens_are_its_bytes(prompts, tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = [prompts.token(id) for id in ids]
    assert b"".join(bytes(token.bytes) for token in tokens).decode().lstrip() == text.lstrip()
    assert not any(token.special for token in tokens)


def test_part_of_a_character_has_its_bytes_and_a_placeholder(prompts, tokenizer):
    ids = tokenizer("𝕏", add_special_tokens=False)["input_ids"]
    parts = [token for token in map(prompts.token, ids) if token.bytes and token.bytes[0] >= 0x80]
    assert len(parts) > 1
    assert all("�" in token.text for token in parts)


def test_a_special_token_says_so(prompts, tokenizer):
    assert prompts.token(tokenizer.eos_token_id) == Token("<|end|>", tuple(b"<|end|>"), special=True)


def test_sentencepiece_writes_spaces_and_bytes_in_its_own_way():
    vocabulary = {"▁two": 0, "▁": 1, "<0x0A>": 2, "<0xE6>": 3, "<unk>": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    prompts = Prompts(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [bytes(prompts.token(id).bytes) for id in range(4)] == [b" two", b" ", b"\n", b"\xe6"]
    assert prompts.token(99).special  # there is no such token


# prompts


def test_a_template_that_refuses_is_the_requests_error(prompts):
    with pytest.raises(RequestError, match="role 'tool' is not one of system, user, assistant") as told:
        asyncio.run(prompts.of_messages([{"role": "tool", "content": "a"}]))
    assert told.value.param == "messages"


def test_a_base_without_a_template_gets_the_one_it_is_trained_with(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    ids = asyncio.run(Prompts(plain).of_messages([{"role": "user", "content": "a"}]))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "User: a\n\nAssistant:"


def test_what_cannot_fit_is_refused_before_it_is_worked_on(prompts):
    with pytest.raises(RequestError, match="more than 10 tokens") as told:
        asyncio.run(prompts.of_texts(["a" * 100_000], most=10))
    assert told.value.code == "context_length_exceeded"
    [ids] = asyncio.run(prompts.of_texts(["a " * 20], most=10))  # what may fit is counted by the caller
    assert len(ids) > 10


def test_long_texts_do_not_stop_the_loop(prompts):
    async def longest_pause() -> float:
        loop, longest = asyncio.get_running_loop(), 0.0
        work = asyncio.create_task(prompts.of_texts(["two flat whites " * 20_000]))
        while not work.done():
            began = loop.time()
            await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - began)
        began = loop.time()
        await work
        return longest

    assert asyncio.run(longest_pause()) < 0.25  # a busy machine; on the loop it would be the whole of it


# chunks


def head(*, scored: bool = False, includes_usage: bool = False) -> Head:
    return Head("chatcmpl-1", 5, 'a "model"', "fp_1", scored, includes_usage)


def documents(events: str) -> list[dict]:
    assert events.endswith("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in events.strip().split("\n\n")]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("includes_usage", [False, True])
def test_a_chunk_made_by_hand_is_json(prompts, text, includes_usage):
    for shape in (ChatShape, TextShape):
        events = shape(head(includes_usage=includes_usage), prompts.token).chunk(3, Piece(text, (7,), (), "stop"))
        told = documents(events)
        assert {one["model"] for one in told} == {'a "model"'}
        assert told[-1]["choices"][0]["finish_reason"] == "stop"
        assert all(("usage" in one) is includes_usage for one in told)
        if text:
            choice = told[0]["choices"][0]
            assert (choice["delta"]["content"] if shape is ChatShape else choice["text"]) == text
            assert choice["index"] == 3


def test_a_piece_with_nothing_to_say_has_no_chunk(prompts):
    for shape in (ChatShape, TextShape):
        assert shape(head(), prompts.token).chunk(0, Piece("", (7,))) == ""


def test_offsets_go_on_from_chunk_to_chunk(prompts):
    shape = TextShape(head(scored=True), prompts.token)
    id = 300
    text = prompts.token(id).text
    offsets = []
    for _ in range(3):
        [told] = documents(shape.chunk(0, Piece(text, (id,), (Scored(id, float("nan")),))))
        offsets += told["choices"][0]["logprobs"]["text_offset"]
        assert told["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
    assert offsets == [0, len(text), 2 * len(text)]


# streams side by side


class Stream:
    """Gives pieces for ever, or fails after some."""

    def __init__(self, fails_after: int | None = None):
        self.fails_after = fails_after
        self.closed = False

    async def pieces(self):
        try:
            for number in range(10**9):
                await asyncio.sleep(0)
                if number == self.fails_after:
                    raise Overloaded("full")
                yield Piece(str(number))
        finally:
            self.closed = True


@pytest.mark.parametrize("count", [1, 3])
def test_closing_the_whole_closes_each(count):
    streams = [Stream() for _ in range(count)]

    async def some() -> set[int]:
        together = interleaved([stream.pieces() for stream in streams])
        seen = set()
        async for index, _ in together:
            seen.add(index)
            if len(seen) == count:
                break
        await together.aclose()
        return seen

    assert asyncio.run(some()) == set(range(count))
    assert all(stream.closed for stream in streams)


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_ends_all(count):
    streams = [Stream(fails_after=3), *(Stream() for _ in range(count - 1))]

    async def all_of_them() -> None:
        async for _ in interleaved([stream.pieces() for stream in streams]):
            pass

    with pytest.raises(Overloaded, match="full"):
        asyncio.run(all_of_them())
    assert all(stream.closed for stream in streams)


# work that nobody waits for


def receiver(*messages: str):
    queue = list(messages)

    async def receive() -> dict:
        if not queue:
            await asyncio.Event().wait()
        return {"type": queue.pop(0)}

    return receive


async def work_under(receive, seconds: float, work) -> None:
    deadline = Deadline(asyncio.get_running_loop().time() + seconds, seconds)
    async with while_wanted(receive, deadline):
        await work()
    assert len(asyncio.all_tasks()) <= 2


def test_work_ends_when_the_client_hangs_up():
    with pytest.raises(Disconnected):
        asyncio.run(work_under(receiver("http.request", "http.disconnect"), 60, lambda: asyncio.sleep(60)))


def test_work_ends_when_its_time_is_over():
    with pytest.raises(DeadlineExceeded, match=r"longer than 0\.01 s"):
        asyncio.run(work_under(receiver(), 0.01, lambda: asyncio.sleep(60)))


def test_work_that_is_done_in_time_is_left_alone():
    asyncio.run(work_under(receiver(), 60, lambda: asyncio.sleep(0)))


def test_a_timeout_inside_is_not_taken_for_ours():
    async def late() -> None:
        raise TimeoutError("theirs")

    with pytest.raises(TimeoutError, match="theirs"):
        asyncio.run(work_under(receiver(), 60, late))
