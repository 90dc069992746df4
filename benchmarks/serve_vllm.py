"""vLLM as a peer of benchmarks/serve.py, run by the interpreter of vLLM's environment: `serve_vllm.py SPEC`.

vllm-lora   LoRA enabled, as many slots as there are adapters; on CPUs vLLM then compiles nothing
vllm-plain  without LoRA, compiled; the base only
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from serve_cell import Cell, Lines, Row, Spec, drive

TYPES = {"fp32": "float32", "bf16": "bfloat16"}
CACHE_BYTES = 2**30


def main() -> None:
    lines, spec = Lines(), Spec(**json.loads(sys.argv[1]))
    with asyncio.Runner() as runner:
        engine, adapters = runner.run(start(spec))
        config = engine.vllm_config
        lines.say(
            {
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
                "compiled": not config.model_config.enforce_eager and bool(config.compilation_config.mode),
                "threads": spec.threads,
            }
        )
        lines.serve(lambda values: runner.run(run(engine, adapters, Cell(**values))))
        engine.shutdown()


async def start(spec: Spec) -> tuple[Any, list[Any]]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    lora: dict[str, Any] = {}
    if spec.peer == "vllm-lora":
        count = len(spec.adapters)
        lora = {"enable_lora": True, "max_loras": count, "max_cpu_loras": count, "max_lora_rank": max(spec.ranks)}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=spec.base,
            dtype=TYPES[spec.dtype],
            max_model_len=spec.max_length,
            max_num_seqs=spec.max_batch,
            enable_prefix_caching=False,  # as for all peers
            kv_cache_memory_bytes=CACHE_BYTES,
            disable_log_stats=True,
            **lora,
        )
    )
    adapters = [LoRARequest(str(number), number + 1, folder) for number, folder in enumerate(spec.adapters)]
    if not lora:
        return engine, []
    for adapter in adapters:
        await engine.add_lora(adapter)
    return engine, adapters


async def run(engine: Any, adapters: Sequence[Any], cell: Cell) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(max_tokens=cell.new, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def ask(row: Row) -> AsyncIterator[Sequence[int]]:
        prompt = {"type": "token", "prompt_token_ids": list(row.ids)}
        adapter = None if row.adapter is None else adapters[row.adapter]
        async for output in engine.generate(prompt, params, str(row.number), lora_request=adapter):
            yield output.outputs[0].token_ids

    return await drive(cell, ask)


if __name__ == "__main__":  # vLLM's processes import this file
    main()
