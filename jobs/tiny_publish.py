"""Packs a pre-trained tiny model as the built-in one: bf16 weights, tokenizer, digests, and a card."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftray.models.builtin import write_digests

PARTS = {
    "sgd": "Schema-Guided Dialogue (Google), CC BY-SA 4.0: task-oriented dialogues over 16 domains",
    "coffee": "Taskmaster-4 (Google), CC BY 4.0: coffee orders between a customer and an agent",
    "wiki": "WikiText-2, validation part (Salesforce), CC BY-SA: English Wikipedia prose",
    "generated": "text of our own templates (`jobs/tiny_text.py`), Apache-2.0: copying, notes, JSON, lists",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_WEIGHT_BYTES = 16 * 10**6
WINDOW = 512


Talk = list[dict[str, str]]


@dataclass(frozen=True)
class HeldBack:
    """Over the tokens of one held-back part: mean loss in nats per token, share of tokens guessed, and how many."""

    loss: float
    accuracy: float
    tokens: int


def publish(trained: Path, *, work: Path, into: Path, recipes: list[Path]) -> None:
    """Casts the model in `trained` to bf16 and writes it into `into` with tokenizer, digests and README.md."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16, use_safetensors=True)
    into.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(into)
    for name in TOKENIZER_FILES:
        shutil.copyfile(work / "untrained" / name, into / name)
    for path in into.iterdir():
        path.chmod(0o644)
    weights = (into / "model.safetensors").stat().st_size
    assert weights <= MAX_WEIGHT_BYTES, f"{weights} bytes are too many for a package"
    write_digests(into)

    tokenizer = AutoTokenizer.from_pretrained(into)
    packed = AutoModelForCausalLM.from_pretrained(into, dtype=torch.float32).eval()
    scores = {part: held_back(packed, tokenizer, rows(work / f"{part}.test.jsonl")) for part in PARTS}
    right, asked = answers_right(packed, tokenizer, rows(work / "generated.test.jsonl"))
    card = model_card(
        counts=json.loads((work / "counts.json").read_text(encoding="utf-8")),
        recipes=[yaml.safe_load(recipe.read_text(encoding="utf-8")) for recipe in recipes],
        weights=weights,
        scores=scores,
        answers=f"{right} of {asked}",
        samples=samples(packed, tokenizer, work),
    )
    (into / "README.md").write_text(card, encoding="utf-8")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encoded(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """Token ids of a row as the pre-training sees it."""
    if "text" in row:
        return [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
    return tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)


@torch.inference_mode()
def held_back(model: Any, tokenizer: Any, part: list[dict[str, Any]]) -> HeldBack:
    """Scores every token after the first of each row's first `WINDOW` tokens."""
    total, hits, count = 0.0, 0, 0
    examples = sorted((encoded(tokenizer, row)[:WINDOW] for row in part), key=len)
    for batch in _batches(examples, 16):
        longest = max(map(len, batch))
        ids_BT = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in batch])
        real_BT = ids_BT != tokenizer.pad_token_id  # right padding behind causal attention needs no mask
        logits_BTV = model(ids_BT).logits[:, :-1].float()
        targets_BT, real_BT = ids_BT[:, 1:], real_BT[:, 1:]
        nats_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
        total += float(nats_BT[real_BT].sum())
        hits += int((logits_BTV.argmax(-1) == targets_BT)[real_BT].sum())
        count += int(real_BT.sum())
    return HeldBack(total / count, hits / count, count)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, messages: Talk, *, seed: int | None = None) -> str:
    """The next assistant turn: greedy, or sampled at temperature 0.8 with a seed."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    how: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": 0.8, "top_k": 40}
    made = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=96, **how)
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def answers_right(model: Any, tokenizer: Any, part: list[dict[str, Any]], limit: int = 200) -> tuple[int, int]:
    """(answers equal to the expected ones, answers asked for): the first answer of so many rows, greedy."""
    right = 0
    for row in part[:limit]:
        first = next(at for at, message in enumerate(row["messages"]) if message["role"] == "assistant")
        right += answer(model, tokenizer, row["messages"][:first]) == row["messages"][first]["content"]
    return right, min(limit, len(part))


def samples(model: Any, tokenizer: Any, work: Path) -> list[tuple[str, Talk]]:
    """Five dialogues (how made, messages); every assistant turn is the model's own."""
    sgd, coffee, generated = (rows(work / f"{part}.test.jsonl") for part in ("sgd", "coffee", "generated"))
    clerk = next(row for row in generated if "JSON" in row["messages"][0]["content"] and len(row["messages"]) >= 4)
    met = _says("Hello, I am Priya.", "What is my name?")
    hungry = _says("I am looking for a place to eat in San Jose.", "Something cheap, please.")
    return [
        ("dialogue from held-back SGD, greedy", _talk(model, tokenizer, sgd[1]["messages"], turns=3)),
        ("dialogue from held-back Taskmaster, greedy", _talk(model, tokenizer, coffee[0]["messages"], turns=2)),
        ("held-back generated task, greedy", _talk(model, tokenizer, clerk["messages"], turns=2)),
        ("our own words, greedy", _talk(model, tokenizer, met, turns=2)),
        ("our own words, temperature 0.8, seed 1", _talk(model, tokenizer, hungry, turns=2, seed=1)),
    ]


def _says(*texts: str) -> Talk:
    return [{"role": "user", "content": text} for text in texts]


def _talk(model: Any, tokenizer: Any, messages: Talk, *, turns: int, seed: int | None = None) -> Talk:
    talk = [message for message in messages[:1] if message["role"] == "system"]
    for message in [message for message in messages if message["role"] == "user"][:turns]:
        talk.append(message)
        talk.append({"role": "assistant", "content": answer(model, tokenizer, talk, seed=seed)})
    return talk


def model_card(
    *,
    counts: dict[str, Any],
    recipes: list[dict[str, Any]],
    weights: int,
    scores: dict[str, HeldBack],
    answers: str,
    samples: list[tuple[str, Talk]],
) -> str:
    """README.md of the packaged model, in Markdown."""
    trained = {part: counts[f"{part}.train"] for part in PARTS}
    losses = [
        f"| {part} | {score.loss:.3f} | {math.exp(score.loss):.1f} | {score.accuracy:.1%} | {score.tokens:,} |"
        for part, score in scores.items()
    ]
    return CARD.format(
        parameters=counts["parameters"] / 1e6,
        megabytes=weights / 1e6,
        sources="\n".join(f"| {PARTS[part]} | {of['rows']:,} | {of['tokens']:,} |" for part, of in trained.items()),
        tokens=counts["train_tokens"],
        first=recipes[0]["optim"],
        second=recipes[1]["optim"],
        window=WINDOW,
        losses="\n".join(losses),
        answers=answers,
        samples="\n\n".join(f"**{how}**\n\n```text\n{_lines(talk)}\n```" for how, talk in samples),
    )


def _lines(talk: Talk) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in talk)


CARD = """\
# builtin:tiny

A Llama of {parameters:.1f} M parameters (hidden 256, 6 layers, 8 heads over 4 key-value heads, tied embeddings, 2048
positions) with a byte-level tokenizer of 4096 tokens and a chat template that marks the assistant's tokens. bf16
safetensors, {megabytes:.1f} MB. It lets every path of ftray, from a run file to a tuned and served adapter, run with
real weights on a laptop and without a download.

## Trained on

| source, licence | rows | tokens |
|---|---:|---:|
{sources}

{tokens:,} tokens, by ftray itself, full fine-tuning with AdamW in two runs. `jobs/make_tiny.py` writes text, tokenizer
and random weights. `jobs/runs/builtin-tiny.yaml` trains every token of the sources above: {first[steps]:,} updates of
{first[batch_size]} rows (a part of the rows, each once), peak learning rate {first[lr]:g}.
`jobs/runs/builtin-tiny-copies.yaml` goes on from there with
the answers alone, mostly of copying drills (`jobs/tiny_copies.py`, our own): {second[steps]:,} updates of
{second[batch_size]} rows, peak learning rate {second[lr]:g}. That is why the model finds a word in its context and says
it, and why its losses on dialogues are above those after the first run, which ended at 1.93 on sgd.

## Held-back parts

Never trained on; weights as shipped; the first {window} tokens of each row. Loss in nats per token, over all tokens
but a row's first.

| part | loss | perplexity | tokens guessed | tokens |
|---|---:|---:|---:|---:|
{losses}

First answers of held-back generated conversations, greedy, equal to the expected ones: {answers}.

## Samples

Every assistant turn is the model's own.

{samples}

## Limits

It knows next to nothing about the world, makes up places, numbers and names, and holds a topic for a few turns only.
English only: other scripts pass through its tokenizer unharmed, but byte by byte. Use it to learn, to test and to
demonstrate; do not use its answers for anything that matters. The public data sets were taken as they are.

## Licence

Apache-2.0 as far as it is ours to give. Two of the sources are share-alike (CC BY-SA): whoever publishes something
derived from these weights should name the sources above.
"""
