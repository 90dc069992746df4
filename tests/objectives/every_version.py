"""In a process that has seen no run: what each version of a registry says, loaded, merged, and through its engine."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from run_drill import ASKED

from ftray.config.methods import Full
from ftray.config.schema import Model
from ftray.config.serving import Serving
from ftray.errors import AdapterError, ModelError
from ftray.models.encoder import is_encoder
from ftray.models.heads import read_head
from ftray.models.load import load_base, load_config
from ftray.models.merge import load_version, merge
from ftray.serve.build import build_engine
from ftray.serve.engine import Generation, Sampling, VersionRef
from ftray.store.paths import Storage
from ftray.store.registry import Registry

TOLD = ("servability", "task", "labels", "scoring")
ANSWER = Sampling(max_new_tokens=5, temperature=0.0, ignore_eos=True, logprobs=0)


async def main(root: Path) -> None:
    gc.freeze()  # what libraries made is not looked through again and again
    registry, found = Registry(Storage(str(root))), {}
    engines: dict[str, Any] = {}
    for name in registry.names():
        version = registry.resolve(name)
        folder, card = registry.fetch(version), version.card
        base = Model(base=card["base"], dtype="fp32")
        said = {key: card[key] for key in TOLD if key in card}
        merged = root / "merged" / name
        try:
            merge(base, folder, merged, torch.float32)
            head = read_head(merged)
            said["merged"] = outputs(load_base(Model(base=str(merged)), method=Full(), dtype=torch.float32, head=head))
        except ModelError as error:
            said["unmerged"] = str(error)
        loaded, _ = load_version(base, folder, card, torch.float32)
        said["loaded"] = outputs(loaded)

        if base.base not in engines:
            engines[base.base] = engine_over(base)
        engine = engines[base.base]
        writes = "generate" in engine.facts.tasks
        as_model = card["servability"] == "merge" and not writes
        said |= await served(engine, VersionRef.of(version).key, merged if as_model else folder)
        if writes and "refused" not in said:
            said["wanted"] = [
                likeliest(loaded, ids, one["ids"]) for ids, one in zip(ASKED, said["served"], strict=True)
            ]
        found[name] = said
    for engine in engines.values():
        await engine.close()
    print(json.dumps(found))


def outputs(model: Any) -> list:
    """The logits of ASKED: of each text, or of its last five tokens."""
    ids = torch.tensor(ASKED)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -5:].float().tolist()


def likeliest(model: Any, prompt: list[int], answer: list[int]) -> dict[str, list]:
    """At each place of an answer the most likely token after prompt and answer so far, and its logarithm."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(answer) - 1 : -1]
    best = logits.float().log_softmax(-1).max(-1)
    return {"ids": best.indices.tolist(), "logprobs": best.values.tolist()}


def engine_over(base: Model) -> Any:
    kind = "encoder" if is_encoder(load_config(base)) else "bank"
    return build_engine(
        Serving.model_validate(
            {
                "model": base.model_dump(),
                "adapters": {"slots": 1, "own": 1, "max_rank": 8},
                "engine": {"kind": kind, "max_batch": 2},
            }
        )
    )


async def served(engine: Any, key: str, folder: Path) -> dict[str, Any]:
    """What the engine says to ASKED by a version, and where it holds it; or why it refuses it."""
    try:
        room = await engine.load(key, folder)
    except AdapterError as error:
        return {"refused": str(error)}
    if "generate" in engine.facts.tasks:
        answers = [await answer(engine, key, ids) for ids in ASKED]
    else:
        answers = [
            [list(scores.values()) for _, scores in one.tokens] or list(one.scores.values())
            for one in await engine.classify([tuple(ids) for ids in ASKED], key)
        ]
    await engine.unload(key)
    return {"room": room, "served": answers}


async def answer(engine: Any, key: str, ids: list[int]) -> dict[str, list]:
    pieces = [piece async for piece in engine.generate(Generation(f"to {ids}", tuple(ids), ANSWER, key))]
    return {
        "ids": [id for piece in pieces for id in piece.ids],
        "logprobs": [score.logprob for piece in pieces for score in piece.scores],
    }


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
