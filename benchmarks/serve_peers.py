"""The peers of benchmarks/serve.py that live in ftray's environment, each in a process: `serve_peers.py SPEC`.

ftray            the bank engine in process, as a replica holds it
transformers     `generate` on batches of as many requests as there are clients; the base only
peft-mixed       the same with PEFT's `adapter_names`: one batch over all adapters
peft-sequential  the same, one adapter after the other
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from serve_cell import Cell, Lines, Row, Spec, Trace, drive, figures, processor_s


def main() -> None:
    lines, spec = Lines(), Spec(**json.loads(sys.argv[1]))
    PEERS[spec.peer](spec, lines)


# -------------------------------------------------------------------------------------------------------------- ftray


def ftray(spec: Spec, lines: Lines) -> None:
    import torch

    from ftray.serve.build import build_engine
    from ftray.serve.engine import Generation, Sampling

    engine = build_engine(serving(spec, slots=len(spec.adapters)))

    async def load() -> None:
        for number, folder in enumerate(spec.adapters):
            await engine.load(str(number), Path(folder))

    async def run(cell: Cell) -> dict[str, Any]:
        sampling = Sampling(max_new_tokens=cell.new, temperature=0, ignore_eos=True)

        async def ask(row: Row) -> AsyncIterator[Sequence[int]]:
            version = None if row.adapter is None else str(row.adapter)
            async for piece in engine.generate(Generation(str(row.number), row.ids, sampling, version)):
                yield piece.ids

        return await drive(cell, ask)

    with asyncio.Runner() as runner:
        runner.run(load())
        facts = engine.facts
        lines.say({"dtype": facts.dtype, "device": facts.device, "threads": torch.get_num_threads()})
        lines.serve(lambda values: runner.run(run(Cell(**values))))
        runner.run(engine.close())


def serving(spec: Spec, *, slots: int, **more: Any):
    """The serve file of a benchmark. Nothing is answered from what was read before: no peer does."""
    from ftray.config.serving import Serving

    return Serving.model_validate(
        {
            "name": "benchmark",
            "storage": spec.storage,
            "model": {"base": spec.base, "dtype": spec.dtype},
            "adapters": {"slots": slots, "max_rank": max(spec.ranks), **more.pop("adapters", {})},
            "engine": {
                "kind": "bank",
                "max_length": spec.max_length,
                "max_batch": spec.max_batch,
                "prefix_cache": False,
                "threads": spec.threads,
            },
            **more,
        }
    )


# ------------------------------------------------------------------------------------------------ transformers and PEFT


def transformers(spec: Spec, lines: Lines) -> None:
    serve_batches(spec, lines, model=plain_model(spec), batches=lambda cell: of_a_size(cell.rows(), cell.concurrency))


def peft_mixed(spec: Spec, lines: Lines) -> None:
    def names(rows: Sequence[Row]) -> dict[str, Any]:
        return {"adapter_names": ["__base__" if row.adapter is None else str(row.adapter) for row in rows]}

    serve_batches(
        spec,
        lines,
        model=peft_model(spec),
        batches=lambda cell: of_a_size(cell.rows(), cell.concurrency),
        options=names,
    )


def peft_sequential(spec: Spec, lines: Lines) -> None:
    model = peft_model(spec)

    def choose(rows: Sequence[Row]) -> dict[str, Any]:
        model.set_adapter(str(rows[0].adapter))
        return {}

    def batches(cell: Cell) -> Iterator[list[list[Row]]]:
        for [batch] in of_a_size(cell.rows(), cell.concurrency):
            by_adapter = sorted(batch, key=lambda row: row.adapter)
            yield [list(rows) for _, rows in groupby(by_adapter, key=lambda row: row.adapter)]

    serve_batches(spec, lines, model=model, batches=batches, options=choose)


def of_a_size(rows: Sequence[Row], size: int) -> Iterator[list[list[Row]]]:
    """What is sent at once, as the batches that it is answered in: here one."""
    for begin in range(0, len(rows), size):
        yield [list(rows[begin : begin + size])]


def serve_batches(
    spec: Spec,
    lines: Lines,
    *,
    model: Any,
    batches: Callable[[Cell], Iterator[list[list[Row]]]],
    options: Callable[[Sequence[Row]], dict[str, Any]] = lambda rows: {},
) -> None:
    import torch

    def run(values: dict[str, Any]) -> dict[str, Any]:
        cell = Cell(**values)
        traces: list[Trace] = []
        processor, began = processor_s(), time.perf_counter()
        for sent_at_once in batches(cell):
            sent = time.perf_counter()
            for rows in sent_at_once:
                own = [Trace(row.number, sent) for row in rows]
                ids = torch.tensor([row.ids for row in rows])
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=cell.new,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    streamer=streamer(own),
                    **options(rows),
                )
                traces += own
        wall = time.perf_counter() - began
        return figures(cell, traces, wall_s=wall, processor_s=processor_s() - processor)

    with torch.inference_mode():
        attention = model.config._attn_implementation
        lines.say({"dtype": spec.dtype, "attention": attention, "threads": torch.get_num_threads()})
        lines.serve(run)


def streamer(traces: Sequence[Trace]) -> Any:
    """What `generate` hands each step's tokens to."""
    from transformers.generation.streamers import BaseStreamer

    class Arrivals(BaseStreamer):
        def __init__(self) -> None:
            self.prompt_came = False

        def put(self, value: Any) -> None:
            if self.prompt_came:
                for trace, token in zip(traces, value.tolist(), strict=True):
                    trace.arrived([token])
            self.prompt_came = True

        def end(self) -> None:
            pass

    return Arrivals()


def plain_model(spec: Spec) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.dtype]
    return AutoModelForCausalLM.from_pretrained(spec.base, dtype=dtype).eval()


def peft_model(spec: Spec) -> Any:
    """Adapters in the base's type: PEFT's default of fp32 would cost it more."""
    from peft import PeftModel

    first, *others = spec.adapters
    model = PeftModel.from_pretrained(plain_model(spec), first, adapter_name="0", autocast_adapter_dtype=False)
    for number, folder in enumerate(others, start=1):
        model.load_adapter(folder, adapter_name=str(number), autocast_adapter_dtype=False)
    return model.eval()


PEERS = {
    "ftray": ftray,
    "transformers": transformers,
    "peft-mixed": peft_mixed,
    "peft-sequential": peft_sequential,
}


if __name__ == "__main__":
    main()
