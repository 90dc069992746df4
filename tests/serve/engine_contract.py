"""What every engine that generates must do, whatever is inside: cases that take an engine and the world around it.

A test module makes the engine from `world.serving(...)` and runs CASES one by one on it, each through `run`. A case
begins with nothing loaded and leaves nothing loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine_asking import GREEDY, Answer, ask, loaded, request
from engine_world import END, EURO, EVERYDAY, MAX_BATCH, MAX_LENGTH, OVER, VOCABULARY, World

from ftray.errors import AdapterError, RequestError
from ftray.serve.engine import Engine, Sampling, VersionRef

Case = Callable[[Engine, World], Awaitable[None]]
CASES: list[Case] = []

SAMPLED = Sampling(max_new_tokens=16, temperature=1.0, ignore_eos=True)
PATIENCE_S = 120.0


def case(function: Case) -> Case:
    CASES.append(function)
    return function


def run(runner: asyncio.Runner, case: Case, engine: Engine, world: World) -> None:
    """A case that hangs is a case that fails."""
    runner.run(asyncio.wait_for(case(engine, world), PATIENCE_S))


@case
async def the_base_answers_as_transformers_does(engine: Engine, world: World) -> None:
    for seed, length in ((1, 1), (2, 12), (3, 77)):
        prompt = world.prompt(seed, length)
        answer = await ask(engine, None, prompt)
        assert answer.ids == world.greedy(None, prompt, 10)
        assert answer.text == world.text(answer.ids)
        assert answer.finish == "length"


@case
async def each_version_answers_as_peft_does(engine: Engine, world: World) -> None:
    async with loaded(engine, world, *EVERYDAY) as keys:
        for seed, (name, key) in enumerate(keys.items()):
            prompt = world.prompt(seed, 9)
            assert (await ask(engine, key, prompt)).ids == world.greedy(name, prompt, 10), name


@case
async def ranks_and_scales_that_differ_by_layer_count_or_are_refused(engine: Engine, world: World) -> None:
    try:
        await engine.load(world.key("pug"), world.folders["pug"])
    except AdapterError:
        return
    try:
        prompt = world.prompt(3)
        assert (await ask(engine, world.key("pug"), prompt)).ids == world.greedy("pug", prompt, 10)
    finally:
        await engine.unload(world.key("pug"))


@case
async def a_mixed_batch_answers_row_by_row_as_each_alone(engine: Engine, world: World) -> None:
    """Also catches base rows that are answered with some version's weights, and the other way round."""
    async with loaded(engine, world, *EVERYDAY) as keys:
        rows = [(name, world.prompt(seed, 5 + 3 * seed)) for seed in (1, 2) for name in (None, *EVERYDAY, None)]
        answers = await asyncio.gather(*(ask(engine, keys[name], prompt) for name, prompt in rows))
        wrong = [
            name
            for (name, prompt), answer in zip(rows, answers, strict=True)
            if answer.ids != world.greedy(name, prompt, 10)
        ]
        assert not wrong


@case
async def requests_join_and_leave_without_touching_the_others(engine: Engine, world: World) -> None:
    async with loaded(engine, world, "bee", "dog", "fox") as keys:

        async def late(number: int) -> bool:
            await asyncio.sleep(0.01 * number)
            name = (None, "bee", "dog", "fox")[number % 4]
            prompt, count = world.prompt(number, 4 + 5 * (number % 5)), 3 + 7 * (number % 4)
            answer = await ask(engine, keys[name], prompt, replace(GREEDY, max_new_tokens=count))
            return answer.ids == world.greedy(name, prompt, count)

        right = await asyncio.gather(*(late(number) for number in range(3 * MAX_BATCH)))
        assert all(right)


@case
async def an_unloaded_version_can_be_loaded_again(engine: Engine, world: World) -> None:
    prompt = world.prompt(3)
    for _ in range(3):
        async with loaded(engine, world, "eel", "ant") as keys:
            assert (await ask(engine, keys["eel"], prompt)).ids == world.greedy("eel", prompt, 10)
            assert (await ask(engine, keys["ant"], prompt)).ids == world.greedy("ant", prompt, 10)
        async with loaded(engine, world, "bee") as keys:  # where one of them lay
            assert (await ask(engine, keys["bee"], prompt)).ids == world.greedy("bee", prompt, 10)
    await engine.unload(world.key("eel"))  # is not there


@case
async def a_new_version_never_answers_from_what_was_cached_for_another(engine: Engine, world: World) -> None:
    """The prompt is long enough to be kept; the key is another, or the same again over other files."""
    prompt = world.prompt(4, 260)
    first, second = (VersionRef("bot", number, f"{number:064x}").key for number in (1, 2))
    for key, name in ((first, "dog"), (second, "fox"), (second, "cat"), (first, "dog")):
        await engine.load(key, world.folders[name])
        try:
            for _ in range(2):
                assert (await ask(engine, key, prompt)).ids == world.greedy(name, prompt, 10), name
            assert (await ask(engine, None, prompt)).ids == world.greedy(None, prompt, 10)
        finally:
            await engine.unload(key)


@case
async def a_prompt_read_before_gives_the_same_answer(engine: Engine, world: World) -> None:
    async with loaded(engine, world, "hen") as keys:
        start = world.prompt(5, 200)
        for name in (None, "hen", None, "hen"):
            for tail in (0, 1, 40):
                prompt = start + world.prompt(6, tail)
                answer = await ask(engine, keys[name], prompt)
                assert answer.ids == world.greedy(name, prompt, 10)
                assert answer.pieces[0].cached_tokens < len(prompt)
                assert not any(piece.cached_tokens for piece in answer.pieces[1:])


@case
async def closing_the_iterator_frees_the_request(engine: Engine, world: World) -> None:
    endless = replace(GREEDY, max_new_tokens=300)
    async with loaded(engine, world, "gnu") as keys:
        for version in (None, keys["gnu"]):
            pieces = engine.generate(request(version, world.prompt(1), endless))
            assert (await anext(pieces)).ids
            assert engine.stats().running == 1
            begin = engine.stats().steps
            await pieces.aclose()  # type: ignore[attr-defined]
            await _idle(engine)
            assert engine.stats().steps < begin + 150, "it was generated to its end"
        begin = engine.stats().steps
        tasks = [asyncio.create_task(ask(engine, None, world.prompt(n), endless)) for n in range(2 * MAX_BATCH)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _idle(engine)
        assert engine.stats().steps < begin + 250, "they were generated to their end"
        prompt = world.prompt(2)
        assert (await ask(engine, keys["gnu"], prompt)).ids == world.greedy("gnu", prompt, 10)


async def _idle(engine: Engine) -> None:
    """Until nothing is left, and the engine really rests."""
    for _ in range(100):
        before = engine.stats()
        await asyncio.sleep(0.05)
        after = engine.stats()
        if after.running == after.waiting == 0 and after.steps == before.steps:
            return
    raise AssertionError(f"requests that were cancelled still run: {after}")


@case
async def a_stop_string_ends_the_answer_and_is_never_seen(engine: Engine, world: World) -> None:
    prompt = world.prompt(1)
    text = world.text(world.greedy(None, prompt, 16))
    for begin, length in ((3, 1), (7, 4), (9, 9)):
        stop = text[begin : begin + length]
        sampling = replace(GREEDY, max_new_tokens=16, stop=("never to come", stop))
        answer = await ask(engine, None, prompt, sampling)
        assert answer.text == text.partition(stop)[0]
        assert answer.finish == "stop"


@case
async def text_that_only_might_begin_a_stop_string_comes_in_the_end(engine: Engine, world: World) -> None:
    prompt = world.prompt(1)
    text = world.text(world.greedy(None, prompt, 10))
    answer = await ask(engine, None, prompt, replace(GREEDY, stop=(text[-3:] + "~~", text[2:5] + "~~")))
    assert answer.text == text
    assert answer.finish == "length"


@case
async def a_stop_token_ends_the_answer_and_is_not_in_its_text(engine: Engine, world: World) -> None:
    prompt = world.prompt(2)
    ids = world.greedy(None, prompt, 10)
    place = next(place for place in range(3, 10) if ids[place] not in ids[:place])
    answer = await ask(engine, None, prompt, replace(GREEDY, stop_ids=(ids[place],)))
    assert answer.ids == ids[: place + 1]
    assert answer.text == world.text(ids[:place])
    assert answer.finish == "stop"


@case
async def the_end_token_ends_the_answer_unless_it_is_ignored(engine: Engine, world: World) -> None:
    prompt = world.prompt(2)
    ending = replace(GREEDY, ignore_eos=False, logit_bias={END: 50.0})
    answer = await ask(engine, None, prompt, ending)
    assert (answer.ids, answer.text, answer.finish) == ((END,), "", "stop")
    answer = await ask(engine, None, prompt, replace(ending, ignore_eos=True, max_new_tokens=4))
    assert (answer.ids, answer.text, answer.finish) == ((END,) * 4, "", "length")
    answer = await ask(engine, None, prompt, replace(ending, min_new_tokens=3))
    assert answer.ids == (*world.greedy(None, prompt, 3), END)
    assert answer.finish == "stop"


@case
async def the_end_of_a_turn_ends_the_answer(engine: Engine, world: World) -> None:
    answer = await ask(engine, None, world.prompt(2), replace(GREEDY, ignore_eos=False, logit_bias={OVER: 50.0}))
    assert (answer.ids, answer.text, answer.finish) == ((OVER,), "", "stop")


@case
async def an_answer_ends_where_the_context_does(engine: Engine, world: World) -> None:
    assert engine.facts.max_length == MAX_LENGTH
    answer = await ask(engine, None, world.prompt(1, MAX_LENGTH - 3))
    assert len(answer.ids) == 3
    assert answer.finish == "length"


@case
async def a_seed_repeats_an_answer_whatever_is_beside_it(engine: Engine, world: World) -> None:
    async with loaded(engine, world, "eel", "hen") as keys:
        for name in (None, "eel"):
            prompt = world.prompt(7)
            seeded = replace(SAMPLED, seed=11)
            alone = await ask(engine, keys[name], prompt, seeded)
            beside = [ask(engine, keys[other], world.prompt(8), SAMPLED) for other in (None, "hen", name)]
            again, other_seed, *_ = await asyncio.gather(
                ask(engine, keys[name], prompt, seeded),
                ask(engine, keys[name], prompt, replace(SAMPLED, seed=12)),
                *beside,
            )
            assert alone.ids == again.ids
            assert alone.ids != other_seed.ids


@case
async def logprobs_are_those_of_the_model(engine: Engine, world: World) -> None:
    async with loaded(engine, world, "fox") as keys:
        for name, sampling in ((None, GREEDY), ("fox", GREEDY), ("fox", replace(SAMPLED, temperature=0.7, seed=1))):
            prompt = world.prompt(9)
            answer = await ask(engine, keys[name], prompt, replace(sampling, logprobs=3))
            assert tuple(score.id for score in answer.scores) == answer.ids
            expected = world.logits(name, prompt + answer.ids)[len(prompt) - 1 : -1].log_softmax(-1)
            for score, row in zip(answer.scores, expected, strict=True):
                best = row.topk(3)
                assert score.logprob == pytest.approx(float(row[score.id]), abs=1e-3)
                assert [id for id, _ in score.top] == best.indices.tolist()
                assert [logprob for _, logprob in score.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        without = await ask(engine, keys["fox"], prompt, replace(GREEDY, logprobs=0))
        assert len(without.scores) == 10
        assert not any(score.top for score in without.scores)
        assert not (await ask(engine, keys["fox"], prompt)).scores


@case
async def an_answer_that_nobody_reads_along_is_the_same(engine: Engine, world: World) -> None:
    sampling = replace(GREEDY, max_new_tokens=20, stop=("~never~",), logprobs=1)
    for prompt in (world.prompt(6), world.prompt(6, 150)):
        streamed = await ask(engine, None, prompt, sampling)
        asked = replace(request(None, prompt, sampling), streamed=False)
        whole = Answer(tuple([piece async for piece in engine.generate(asked)]))
        assert (whole.ids, whole.text, whole.finish) == (streamed.ids, streamed.text, streamed.finish)
        assert [score.id for score in whole.scores] == list(whole.ids)


@case
async def a_bias_forces_a_token_and_forbids_one(engine: Engine, world: World) -> None:
    prompt = world.prompt(3)
    answer = await ask(engine, None, prompt, replace(GREEDY, logit_bias={99: 100.0}))
    assert answer.ids == (99,) * 10
    first = world.greedy(None, prompt, 1)[0]
    answer = await ask(engine, None, prompt, replace(GREEDY, logit_bias={first: -100.0}))
    assert first not in answer.ids


@case
async def the_narrowest_cuts_are_greedy(engine: Engine, world: World) -> None:
    prompt = world.prompt(4)
    expected = world.greedy(None, prompt, 16)
    for cut in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert (await ask(engine, None, prompt, replace(SAMPLED, **cut))).ids == expected, cut


@case
async def cuts_keep_the_most_likely_tokens_only(engine: Engine, world: World) -> None:
    prompt = world.prompt(5)
    for cut in ({"top_k": 4}, {"top_p": 0.3}, {"min_p": 0.4}):
        answer = await ask(engine, None, prompt, replace(SAMPLED, max_new_tokens=40, seed=5, **cut))
        rows = world.logits(None, prompt + answer.ids)[len(prompt) - 1 : -1].softmax(-1)
        for id, row in zip(answer.ids, rows, strict=True):
            above = row[row > row[id] * 1.001]
            if "top_k" in cut:
                assert len(above) < 4
            elif "top_p" in cut:
                assert float(above.sum()) < 0.301
            else:
                assert float(row[id]) >= 0.399 * float(row.max())
        assert len(set(answer.ids)) > 2


@case
async def penalties_are_as_defined(engine: Engine, world: World) -> None:
    async with loaded(engine, world, "bee") as keys:
        for name in (None, "bee"):
            prompt = world.prompt(1)
            plain = world.greedy(name, prompt, 16)

            def repetition(logits: Any, answer: list[int], prompt: Sequence[int] = prompt) -> Any:
                seen = list({*prompt, *answer})
                logits[seen] = (
                    logits[seen].where(logits[seen] < 0, logits[seen] / 1.5).where(logits[seen] > 0, logits[seen] * 1.5)
                )
                return logits

            def presence(logits: Any, answer: list[int]) -> Any:
                logits[list(set(answer))] -= 1.2
                return logits

            def frequency(logits: Any, answer: list[int]) -> Any:
                for id in answer:
                    logits[id] -= 0.8
                return logits

            kinds = {"repetition_penalty": (1.5, repetition), "presence_penalty": (1.2, presence)}
            kinds["frequency_penalty"] = (0.8, frequency)
            for kind, (value, adjust) in kinds.items():
                expected = world.greedy(name, prompt, 16, adjust)
                assert expected != plain, "the case shows nothing"
                answer = await ask(engine, keys[name], prompt, replace(GREEDY, max_new_tokens=16, **{kind: value}))
                assert answer.ids == expected, kind


@case
async def a_character_comes_whole_or_not_at_all(engine: Engine, world: World) -> None:
    """The biases write the three bytes of one character in turn: each use of a byte puts it behind the others."""
    bias = dict(zip(EURO, (100.0, 99.5, 99.0), strict=True))
    sampling = replace(GREEDY, max_new_tokens=9, logit_bias=bias, frequency_penalty=2.0)
    answer = await ask(engine, None, world.prompt(1), sampling)
    assert answer.ids == EURO * 3
    assert answer.text == "€€€"
    assert all(set(piece.text) <= {"€"} for piece in answer.pieces)


@case
async def a_version_that_cannot_be_loaded_harms_nothing(engine: Engine, world: World) -> None:
    prompt = world.prompt(8)
    async with loaded(engine, world, "dog") as keys:
        for number, (name, folder) in enumerate(world.bad.items()):
            key = VersionRef(name, 1, f"{number + 100:064x}").key
            with pytest.raises(AdapterError) as caught:
                await engine.load(key, folder)
            assert len(str(caught.value)) > 20, "an error without a reason"
            assert (await ask(engine, keys["dog"], prompt)).ids == world.greedy("dog", prompt, 10), name
    async with loaded(engine, world, *EVERYDAY) as keys:  # no slot is lost
        answers = await asyncio.gather(*(ask(engine, keys[name], prompt) for name in EVERYDAY))
        expected = [world.greedy(name, prompt, 10) for name in EVERYDAY]
        assert [answer.ids for answer in answers] == expected


@case
async def the_headers_say_as_much_as_loading(engine: Engine, world: World) -> None:
    assert engine.room_for(world.folders["eel"]) == "bank"
    for folder in (*world.bad.values(), world.root / "nowhere"):
        with pytest.raises(AdapterError):
            engine.room_for(folder)


@case
async def a_wrong_request_is_refused_by_itself(engine: Engine, world: World) -> None:
    for prompt in (world.prompt(1, MAX_LENGTH), world.prompt(1, 4 * MAX_LENGTH), (), (len(VOCABULARY),), (-1,)):
        with pytest.raises(RequestError):
            await ask(engine, None, prompt)
    with pytest.raises(RequestError):
        await ask(engine, None, world.prompt(1), replace(GREEDY, logit_bias={len(VOCABULARY): 1.0}))
    prompt = world.prompt(2)
    assert (await ask(engine, None, prompt)).ids == world.greedy(None, prompt, 10)


@case
async def counters_count(engine: Engine, world: World) -> None:
    before = engine.stats()
    await asyncio.gather(*(ask(engine, None, world.prompt(seed, 20)) for seed in (21, 22, 23)))
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 60
    assert after.generated_tokens - before.generated_tokens == 30
    assert after.steps >= before.steps + 10
    assert after.cache_capacity >= MAX_LENGTH
    assert after.running == after.waiting == 0
