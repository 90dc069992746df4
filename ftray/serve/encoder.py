"""The engine for encoders: embeddings and labels from one base and its versions, on plain transformers and torch.

One thread reads, batch after batch, each of one version; another loads. Versions lie on the base's memory
(ftray/models/encoder_version.py); how their labels are called, ftray/models/encoder_files.py says.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftray.config.schema import Model
from ftray.config.serving import EncoderEngine as EncoderSection
from ftray.config.serving import Serving
from ftray.errors import AdapterError, ModelError, ReplicaGone, RequestError, ServeError
from ftray.models.encoder import load_encoder
from ftray.models.encoder_files import Labels, Task, VersionFiles, look_at
from ftray.models.encoder_version import EncoderVersion, load_version
from ftray.serve.build import threads
from ftray.serve.engine import EngineFacts, EngineStats, Labelled, Room
from ftray.serve.reading import Batch, Reading, Waiting

CPU_BATCH_TOKENS = 1024
"""Padded tokens of a batch: a CPU is no faster with more, and others wait meanwhile."""
GPU_BATCH_TOKENS = 65536
_ROOMS: Mapping[str, Room] = {"adapter": "bank", "head": "bank", "model": "own"}


def build_encoder_engine(serving: Serving) -> EncoderEngine:
    """The engine of a serve file, with the base loaded."""
    section = serving.engine if isinstance(serving.engine, EncoderSection) else EncoderSection()
    return EncoderEngine(
        model=serving.model,
        slots=serving.adapters.slots,
        own=serving.adapters.own,
        max_length=None if section.max_length == "auto" else section.max_length,
        max_batch=section.max_batch,
        threads=threads(section),
    )


class EncoderEngine:
    """`Reader` of ftray/serve/engine.py. Loads the base at once: ModelError where it is no complete encoder.

    `slots`: adapters, `own`: whole models that are held at once. `max_length`: tokens of a text, None for what the base
    was made for. `threads`: CPU threads that read, None for as many as torch takes. `device`: None for the first GPU,
    or else the CPU.

    fp32 on CPUs and bf16 on GPUs, unless `model.dtype` says. In fp32 a text's answer is the same to 1e-5, whatever is
    beside it.
    """

    def __init__(
        self,
        *,
        model: Model,
        slots: int,
        own: int,
        max_length: int | None = None,
        max_batch: int = 64,
        threads: int | None = None,
        device: str | None = None,
    ):
        import peft  # noqa: F401 (seconds long: now, and not beside the first requests)
        import torch

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = torch.device(device).type == "cpu"
        dtype = model.dtype if model.dtype != "auto" else "fp32" if on_cpu else "bf16"
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self._model = model
        self._base = load_encoder(model, dtype=dtypes[dtype], device=device)
        if max_length is not None and max_length > self._base.positions:
            raise ModelError(
                f"engine.max_length: {max_length} is more than the base's {self._base.positions} positions"
            )
        self._facts = EngineFacts(
            kind="encoder",
            base=model.base,
            dtype=dtype,
            device=device,
            max_length=max_length or self._base.max_length,
            vocab_size=self._base.module.config.vocab_size,
            room={"bank": slots, "own": own},
            tasks=("embed", "classify"),
        )
        self._threads = threads
        self._versions: dict[str | None, EncoderVersion] = {
            None: EncoderVersion(self._base.module, "embed", self._base.pooling, Labels())
        }
        self._rooms: dict[str, Room] = {}
        self._changed = threading.Condition()
        """Guards what both threads touch: what waits, and the counters."""
        self._waiting = Waiting(max_batch=max_batch, max_tokens=CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        self._running = self._tokens = self._steps = 0
        self._step_s = 0.0
        self._closed = False
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="encoder-loads")
        self._reader = threading.Thread(target=self._work, name="encoder-reads", daemon=True)
        self._reader.start()

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def room_for(self, folder: Path) -> Room:
        return _ROOMS[look_at(folder).kind]

    async def load(self, key: str, folder: Path) -> Room:
        if key not in self._rooms:
            files, version = await asyncio.get_running_loop().run_in_executor(self._loader, self._load, folder)
            self._versions[key] = version
            self._rooms[key] = _ROOMS[files.kind]
        return self._rooms[key]

    async def unload(self, key: str) -> None:
        self._rooms.pop(key, None)
        self._versions.pop(key, None)
        with self._changed:
            left = self._waiting.drop(key)
        left.tell(AdapterError(f"{key} was unloaded"))

    async def embed(self, ids: list[tuple[int, ...]], version: str | None) -> list[list[float]]:
        """RequestError for a text that is empty, too long, or not of the base's tokens, and for a classifier."""
        self._check(ids, version, ("embed",))
        return await self._answers(ids, version)

    async def classify(self, ids: list[tuple[int, ...]], version: str) -> list[Labelled]:
        """`tokens` has every id of the text in order, special ones too. RequestError as in `embed`."""
        self._check(ids, version, ("classify", "classify_tokens"))
        return await self._answers(ids, version)

    def stats(self) -> EngineStats:
        """Texts, not requests, run and wait here; a request may have many."""
        with self._changed:
            return EngineStats(
                running=self._running,
                waiting=len(self._waiting),
                prompt_tokens=self._tokens,
                steps=self._steps,
                step_s=self._step_s,
                alive=self._reader.is_alive(),
            )

    async def close(self) -> None:
        """What waits fails with ReplicaGone; the batch that is being read is still answered."""
        with self._changed:
            self._closed = True
            left = self._waiting.drop_all()
            self._changed.notify_all()
        for batch in left:
            batch.tell(ReplicaGone("the replica is being stopped; send the request again"))
        await asyncio.to_thread(self._reader.join)
        await asyncio.to_thread(self._loader.shutdown, cancel_futures=True)
        self._versions.clear()
        self._rooms.clear()

    def _load(self, folder: Path) -> tuple[VersionFiles, EncoderVersion]:
        files = look_at(folder)
        return files, load_version(self._base, files, trust_remote_code=self._model.trust_remote_code)

    def _check(self, ids: list[tuple[int, ...]], version: str | None, tasks: tuple[Task, ...]) -> None:
        if self._closed:
            raise ReplicaGone("the replica is being stopped; send the request again")
        if version not in self._versions:
            raise AdapterError(f"{version} is not loaded")
        task = self._versions[version].task
        if task not in tasks:
            does, ask = ("gives embeddings", "/v1/embeddings") if task == "embed" else ("gives labels", "/v1/classify")
            raise RequestError(f"{version or 'the base'} {does}; ask {ask}", param="model")
        for number, text in enumerate(ids):
            if not text:
                raise RequestError(f"text {number} is empty", param="input")
            if len(text) > self._facts.max_length:
                raise RequestError(
                    f"text {number} has {len(text)} tokens; at most {self._facts.max_length} can be read",
                    param="input",
                    code="context_length_exceeded",
                )
            if min(text) < 0 or max(text) >= self._facts.vocab_size:
                raise RequestError(
                    f"text {number} has token ids outside 0..{self._facts.vocab_size - 1}", param="input"
                )

    async def _answers(self, ids: list[tuple[int, ...]], version: str | None) -> list[Any]:
        if not ids:
            return []
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Any]] = loop.create_future()

        def tell(outcome: list[Any] | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_settle, future, outcome)

        reading = Reading(ids, tell)
        with self._changed:
            self._waiting.add(version, reading)
            self._changed.notify_all()
        try:
            return await future
        finally:
            reading.give_up()

    def _work(self) -> None:
        import torch

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while self._step():
            pass

    def _step(self) -> bool:
        """Reads one batch, or waits for one; False at the end. A function, so that no local keeps a version alive."""
        with self._changed:
            batch = self._waiting.next()
            self._running = len(batch.items) if batch else 0
            if batch is None:
                if not self._closed:
                    self._changed.wait()
                return not self._closed
        began = time.perf_counter()
        texts = batch.texts()
        outcome: list[Any] | ServeError
        try:
            outcome = self._read(batch, texts)
        except Exception as error:  # whatever a version's code raises is its requests' end and not the thread's
            outcome = error if isinstance(error, ServeError) else ServeError(f"{type(error).__name__}: {error}")
        with self._changed:
            took = time.perf_counter() - began
            self._step_s = took if not self._steps else 0.9 * self._step_s + 0.1 * took
            self._steps += 1
            self._tokens += sum(map(len, texts))
            self._running = 0
        batch.tell(outcome)
        return True

    def _read(self, batch: Batch, texts: list[tuple[int, ...]]) -> list[Any]:
        version = self._versions.get(batch.version)
        if version is None:
            raise AdapterError(f"{batch.version} was unloaded")
        return read(version, texts, pad_id=self._base.module.config.pad_token_id or 0, device=self._facts.device)


def read(version: EncoderVersion, texts: list[tuple[int, ...]], *, pad_id: int, device: Any) -> list[Any]:
    """A list of floats or a Labelled for each text. B texts, L tokens of the longest, H width, C labels."""
    import torch

    longest = max(map(len, texts))
    ids_BL = torch.tensor([text + (pad_id,) * (longest - len(text)) for text in texts], device=device)
    lengths_B = torch.tensor([len(text) for text in texts], device=device)
    mask_BL = (torch.arange(longest, device=device) < lengths_B[:, None]).long()
    with torch.inference_mode():
        output = version.module(input_ids=ids_BL, attention_mask=mask_BL)
        if version.task == "embed":
            rows = embeddings(output.last_hidden_state.float(), mask_BL, version)
        else:
            rows = scores(output.logits.float(), version.labels)
        if not bool(rows.isfinite().all()):
            raise AdapterError("the version's numbers overflow; it cannot be served")
        rows = rows.cpu().tolist()
    names = version.labels.names
    if version.task == "embed":
        return rows
    if version.task == "classify":
        return [Labelled(scores=dict(zip(names, row, strict=True))) for row in rows]
    return [
        Labelled(tokens=tuple((id, dict(zip(names, row, strict=True))) for id, row in zip(text, rows_L, strict=False)))
        for text, rows_L in zip(texts, rows, strict=True)
    ]


def embeddings(hidden_BLH: Any, mask_BL: Any, version: EncoderVersion) -> Any:
    """[B, H], each of length 1: the mean over a text's own tokens, or its first token's vector."""
    from torch.nn.functional import normalize

    if version.pooling == "cls":
        return normalize(hidden_BLH[:, 0], dim=-1)
    # padding is put to 0, not multiplied by it: what stands there is nobody's business, and may be infinite
    kept_BLH = hidden_BLH.masked_fill(mask_BL[..., None] == 0, 0.0)
    return normalize(kept_BLH.sum(1) / mask_BL.sum(1, keepdim=True), dim=-1)


def scores(logits: Any, labels: Labels) -> Any:
    """Logits [..., C] as probabilities: over the labels, of each label, or as they are (regression)."""
    if labels.scoring == "one":
        return logits.softmax(-1)
    return logits.sigmoid() if labels.scoring == "each" else logits


def _settle(future: asyncio.Future[list[Any]], outcome: list[Any] | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
