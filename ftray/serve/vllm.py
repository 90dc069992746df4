"""vLLM behind the engine seam: one base, LoRA versions under immutable names, continuous batching on GPUs.

Every load has a vLLM name and number of its own and nothing is ever replaced in place: vLLM files the prefixes it has
cached under the adapter's name, in some releases under nothing else, and would answer from those of other weights. The
folder of a loaded version must stay where it is until `unload`: vLLM may read it again, and one that is missing takes
the whole engine down.
"""

from __future__ import annotations

import asyncio
import difflib
import itertools
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ftray.config.serving import Serving
from ftray.config.serving import VllmEngine as VllmSection
from ftray.errors import AdapterError, ReplicaGone, RequestError, ServeError
from ftray.models.load import load_config, load_tokenizer, resolve_base
from ftray.models.turns import stop_ids
from ftray.serve.engine import EngineFacts, EngineStats, Finish, Generation, Piece, Room, Sampling, Scored
from ftray.serve.shifts import Shifts
from ftray.serve.vllm_adapters import Layers, check, layers_of

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OURS = {
    "model": "model.base",
    "tokenizer": "model.base",
    "revision": "model.revision",
    "tokenizer_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "model.dtype",
    "max_model_len": "engine.max_length",
    "max_num_seqs": "engine.max_batch",
    "tensor_parallel_size": "engine.tensor_parallel",
    "enable_lora": "adapters.slots",
    "max_loras": "adapters.slots",
    "max_cpu_loras": "adapters.slots",
    "max_lora_rank": "adapters.max_rank",
    "max_num_queued_reqs": "limits.max_queue",
    "max_num_queued_tokens": "limits.max_queue",
}
"""Engine arguments that other keys of the serve file decide: argument -> key."""

CPU_MAX_BATCH = 128
"""vLLM's front end handles 128 answers at a time. In one go, a stop string's abort leaves before the next request."""


def build_vllm_engine(serving: Serving, section: VllmSection) -> VllmEngine:
    """Starting takes from half a minute up. ServeError, ModelError when it fails."""
    layers = layers_of(load_config(serving.model))
    # vLLM knows the ends of tokenizer and generation config, but not the chat template's end of turn.
    ends = stop_ids(None, load_tokenizer(serving.model))
    steps = Steps()
    llm, device = _start(serving, section, steps)
    return VllmEngine(serving, llm=llm, device=device, layers=layers, ends=ends, steps=steps)


class VllmEngine:
    """Around a vLLM that runs; `ends`: tokens that end an answer, beside those that vLLM finds by itself."""

    def __init__(self, serving: Serving, *, llm: Any, device: str, layers: Layers, ends: Sequence[int], steps: Steps):
        self._llm, self._layers, self._ends, self._steps = llm, layers, ends, steps
        self._max_rank = serving.adapters.max_rank
        self._requests: dict[str, Any] = {}
        self._numbers = itertools.count(1)
        self._in_vllm = 0
        self._counted = {"prompt_tokens": 0, "cached_prompt_tokens": 0, "generated_tokens": 0}
        # vLLM's CPU kernels take "no adapter" for the last slot's adapter: base rows that share a batch with adapter
        # rows are answered with somebody else's weights (vllm#48421, #49656). On GPUs such rows are skipped.
        self._shifts = Shifts() if device == "cpu" else None
        config = self._llm.vllm_config
        self._capacity = (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size
        self.facts = EngineFacts(
            kind="vllm",
            base=serving.model.base,
            dtype=next(ours for ours, theirs in DTYPES.items() if str(config.model_config.dtype).endswith(theirs)),
            device=device,
            max_length=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            room={"bank": serving.adapters.slots, "own": 0},
        )

    def room_for(self, folder: Path) -> Room:
        from vllm.lora.peft_helper import PEFTHelper

        reads = {field.name for field in fields(PEFTHelper)}
        check(folder, layers=self._layers, max_rank=self._max_rank, reads=reads)
        return "bank"

    async def load(self, key: str, folder: Path) -> Room:
        from vllm.lora.request import LoRARequest

        assert key not in self._requests, f"{key} is loaded already"
        assert len(self._requests) < self.facts.room["bank"], "no slot was freed: vLLM would evict one by itself"
        room = await asyncio.to_thread(self.room_for, folder)
        number = next(self._numbers)
        request = LoRARequest(lora_name=f"{key}#{number}", lora_int_id=number, lora_path=str(folder.absolute()))
        try:
            with _translated():
                await self._llm.add_lora(request)
        except ReplicaGone:
            raise
        except BaseException as error:  # whatever vLLM says of a version is that version's, and the engine goes on
            with _translated():
                await self._llm.remove_lora(number)  # it may lie in a slot half-way
            if isinstance(error, asyncio.CancelledError):
                raise
            raise AdapterError(f"{key}: vLLM cannot load it: {error}") from error
        self._requests[key] = request
        return room

    async def unload(self, key: str) -> None:
        request = self._requests.pop(key, None)
        if request is not None:
            with _translated():
                await self._llm.remove_lora(request.lora_int_id)

    async def generate(self, request: Generation) -> AsyncIterator[Piece]:
        if request.version is not None and request.version not in self._requests:
            raise AdapterError(f"{request.version} is not loaded")
        adapter = self._requests[request.version] if request.version is not None else None
        self._check_prompt(request.prompt_ids)
        with _translated():
            params = _sampling_params(request, self._ends)
            async with AsyncExitStack() as stack:
                if self._shifts is not None:
                    await stack.enter_async_context(self._shifts.shift("base" if adapter is None else "adapters"))
                prompt = {"type": "token", "prompt_token_ids": list(request.prompt_ids)}
                outputs = self._llm.generate(prompt, params, request.id, lora_request=adapter)
                self._in_vllm += 1
                try:
                    first = True
                    async for output in outputs:
                        if first:
                            self._counted["prompt_tokens"] += len(request.prompt_ids)
                            self._counted["cached_prompt_tokens"] += output.num_cached_tokens or 0
                        piece = _piece(output, request.sampling, first)
                        self._counted["generated_tokens"] += len(piece.ids)
                        first = False
                        yield piece
                finally:
                    self._in_vllm -= 1
                    await outputs.aclose()  # aborts it in vLLM, where it has not ended

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if len(ids) >= self.facts.max_length:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, and prompt and answer together may have {self.facts.max_length}; "
                "shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        # vLLM 0.29 does not look, and answers something.
        if not ids or min(ids) < 0 or max(ids) >= self.facts.vocab_size:
            raise RequestError(
                f"the prompt must be one or more token ids from 0 to {self.facts.vocab_size - 1}", param="prompt"
            )

    def stats(self) -> EngineStats:
        queued = min(self._steps.queued, self._in_vllm)
        return EngineStats(
            running=self._in_vllm - queued,
            waiting=queued + (self._shifts.waiting if self._shifts is not None else 0),
            cache_tokens=round(self._steps.cache_usage * self._capacity) if self._in_vllm else 0,
            cache_capacity=self._capacity,
            steps=self._steps.count,
            step_s=self._steps.smoothed_s,
            alive=not self._llm.errored,
            **self._counted,
        )

    async def close(self) -> None:
        # On the loop, though it takes seconds: else vLLM's listener there sees the engine go and reports a crash.
        self._llm.shutdown()


@dataclass
class Steps:
    """What vLLM reports after each step. `queued` requests are vLLM's, but wait for a place in the batch."""

    count: int = 0
    queued: int = 0
    cache_usage: float = 0.0
    smoothed_s: float = 0.0
    last_at: float | None = None

    def record(self, scheduler: Any) -> None:
        now = time.monotonic()
        if self.last_at is not None:
            self.smoothed_s += 0.1 * (now - self.last_at - self.smoothed_s)
        self.count += 1
        self.queued = scheduler.num_waiting_reqs
        self.cache_usage = scheduler.kv_cache_usage
        self.last_at = now if scheduler.num_running_reqs else None  # a pause is no step


def _start(serving: Serving, section: VllmSection, steps: Steps) -> tuple[Any, str]:
    """(AsyncLLM, device)."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # a server does not report its owner's use to anybody
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ServeError(
            f"engine.kind: vllm needs vLLM, which cannot be imported ({error}); pip install 'ftray[vllm]', "
            "or take engine: {kind: bank}"
        ) from error
    device = current_platform.device_type
    arguments = _arguments(serving, section, device, known={field.name for field in fields(AsyncEngineArgs)})
    try:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[_reporter(steps)])
    except Exception as error:  # vLLM raises anything here; the cause is in its log
        raise ServeError(f"vLLM cannot start on {serving.model.base}: {error}") from error
    return llm, device


def _arguments(serving: Serving, section: VllmSection, device: str, known: set[str]) -> dict[str, Any]:
    """vLLM's engine arguments. ServeError for an option that vLLM does not have, or that another key decides."""
    problems = []
    for name in section.options:
        if name in OURS:
            problems.append(f"engine.options.{name}: {OURS[name]} decides it")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"engine.options.{name}: vLLM has no such engine argument{_did_you_mean(near)}")
    if problems:
        raise ServeError("\n".join(problems))
    dtype = serving.model.dtype if serving.model.dtype != "auto" else "fp32" if device == "cpu" else "bf16"
    return {
        "load_format": "safetensors",  # never a pickle
        "enforce_eager": device == "cpu",  # with LoRA, vLLM compiles nothing there
        "disable_log_stats": True,
        **section.options,
        "model": resolve_base(serving.model),
        "revision": serving.model.revision,
        "tokenizer_revision": serving.model.revision,
        "trust_remote_code": serving.model.trust_remote_code,
        "dtype": DTYPES[dtype],
        "max_model_len": None if section.max_length == "auto" else section.max_length,
        "max_num_seqs": min(section.max_batch, CPU_MAX_BATCH) if device == "cpu" else section.max_batch,
        "tensor_parallel_size": section.tensor_parallel,
        "enable_lora": True,
        "max_loras": serving.adapters.slots,
        "max_cpu_loras": serving.adapters.slots,
        "max_lora_rank": _rank_for(serving.adapters.max_rank),
    }


def _rank_for(rank: int) -> int:
    """vLLM's matrices come in a few ranks; the next one that holds `rank`."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    if rank > ranks[-1]:
        raise ServeError(f"adapters.max_rank: {rank} is more than vLLM's {ranks[-1]}; lower it")
    return next(size for size in ranks if size >= rank)


def _reporter(steps: Steps) -> Any:
    """What vLLM makes its statistics' listeners with."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Reporter(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0):
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            if scheduler_stats is not None:
                steps.record(scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    return Reporter


def _sampling_params(request: Generation, ends: Sequence[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=None if sampling.seed is None else sampling.seed % 2**63,  # vLLM takes -1 for none
        stop=list(sampling.stop),
        stop_token_ids=[*sampling.stop_ids, *(() if sampling.ignore_eos else ends)],
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        output_kind=RequestOutputKind.DELTA if request.streamed else RequestOutputKind.FINAL_ONLY,
    )


def _piece(output: Any, sampling: Sampling, first: bool) -> Piece:
    answer = output.outputs[0]
    if answer.finish_reason not in (None, "stop", "length"):
        raise ReplicaGone(f"vLLM gave the request up ({answer.finish_reason}); send it again")
    finish: Finish | None = answer.finish_reason
    scores: tuple[Scored, ...] = ()
    if sampling.logprobs is not None:
        pairs = zip(answer.token_ids, answer.logprobs or (), strict=True)
        scores = tuple(_scored(id, at_place, sampling.logprobs) for id, at_place in pairs)
    return Piece(
        text=answer.text,
        ids=tuple(answer.token_ids),
        scores=scores,
        finish=finish,
        cached_tokens=(output.num_cached_tokens or 0) if first else 0,
    )


def _scored(id: int, at_place: Any, count: int) -> Scored:
    """`at_place`: token -> vLLM's Logprob, of the chosen token and of the most likely ones."""
    ranked = sorted(at_place.items(), key=lambda item: item[1].rank)
    top = tuple((token, entry.logprob) for token, entry in ranked[:count])
    return Scored(id, at_place[id].logprob, top)


@contextmanager
def _translated() -> Iterator[None]:
    """vLLM's errors as ours."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except EngineDeadError as error:
        raise ReplicaGone("vLLM's engine process died; send the request again") from error
    except EngineGenerateError as error:
        raise ServeError(f"vLLM failed on the request: {error.__cause__ or error}") from error
    except (VLLMValidationError, ValueError) as error:
        raise RequestError(str(error), param=getattr(error, "parameter", None)) from error


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""
