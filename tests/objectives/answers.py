"""Small stores of pairs and of judged answers, and objectives over them, for the tests of preferences."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from ftray.config.methods import Full
from ftray.data.tokens import TokenStore, TokenWriter
from ftray.models.adapt import adapt, trainable
from ftray.models.load import load_base
from ftray.objectives import OBJECTIVES

VOCAB = 96


def some(rng, low, high):
    return rng.integers(3, VOCAB, rng.integers(low, high))


def write_pairs(folder, count=9, seed=0):
    """Pairs of 2 to 6 tokens of prompt and 1 to 8 of each answer."""
    rng = np.random.default_rng(seed)
    with TokenWriter(folder, VOCAB, ["pairs"]) as writer:
        for line in range(1, count + 1):
            prompt, answers = some(rng, 2, 7), [some(rng, 1, 9), some(rng, 1, 9)]
            ids = np.concatenate([part for answer in answers for part in (prompt, answer)])
            trained = np.concatenate([np.repeat([False, True], [len(prompt), len(answer)]) for answer in answers])
            cut = np.array([len(prompt) + len(answers[0])], np.int32)
            rows = [(0, writer.file_number("pairs.jsonl"), line)]
            writer.extend(ids, trained, [len(ids)], rows, {"cut": cut})
    return TokenStore.open(folder)


def write_judged(folder, count=9, seed=0):
    """Answers of 1 to 8 tokens after 2 to 6 of prompt; every third is bad."""
    rng = np.random.default_rng(seed)
    with TokenWriter(folder, VOCAB, ["judged"]) as writer:
        for line in range(1, count + 1):
            prompt, answer = some(rng, 2, 7), some(rng, 1, 9)
            trained = np.repeat([False, True], [len(prompt), len(answer)])
            rows = [(0, writer.file_number("judged.jsonl"), line)]
            good = np.array([line % 3 > 0], np.int8)
            writer.extend(np.concatenate([prompt, answer]), trained, [len(trained)], rows, {"good": good})
    return TokenStore.open(folder)


def write_rows(folder, kind, **options):
    return write_judged(folder, **options) if kind == "kto" else write_pairs(folder, **options)


def objective_over(store, section, *, packed=False):
    return OBJECTIVES[section.kind](section, packed=packed, data=SimpleNamespace(train=store, eval=store))


def built(base, method=None, *, packed=False):
    """The base with a method on it, as a run builds it."""
    method = method or Full()
    attention = "ftray_varlen" if packed else "sdpa"
    model = load_base(base, method=method, dtype=torch.float32, attention=attention)
    return adapt(model, method, seed=3, steps=20).train()


def begun(objective, model, method, store):
    """As a worker calls it, on one worker."""

    def figures(store, observe):
        rows = np.arange(len(store))
        with torch.no_grad():
            return observe(model, objective.batch(store, rows, spare=0))

    objective.begin(model, method=method, stores=[store], figures=figures)
    return objective


def moved(model, size=0.05):
    """Away from where it began, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def window_loss(objective, model, store, hands):
    """The mean loss of a window that is cut into micro-batches, as one worker computes it."""
    micros = [objective.batch(store, np.asarray(hand), spare=0) for hand in hands]
    count = sum(map(len, hands))
    objective.before_update(model, micros, count=count)
    return sum(objective.loss_sum(model, micro) for micro in micros) / count
