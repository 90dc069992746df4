"""The serve file's schema: which base and versions are served, how, to whom, within which limits. No torch, no ray."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ftray.config.schema import NAME_PATTERN, REF_PATTERN, Auto, Model, safe_name
from ftray.config.section import Section

Scope = Literal["infer", "admin"]
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Adapters(Section):
    serve: Literal["all"] | list[str] = Field("all", description="names that may be asked for; all: every one there is")
    preload: list[str] = Field(default_factory=list, description="loaded before the server is ready, e.g. coffee-bot")
    pin: list[str] = Field(default_factory=list, description="preloaded, and never evicted")
    slots: int = Field(16, ge=1, le=1024, description="LoRA versions that a replica holds at once in the bank")
    max_rank: int = Field(64, ge=1, le=1024, description="largest rank the bank takes")
    own: int = Field(2, ge=0, description="versions held beside the bank: full models, DoRA, prefix, prompt, …")
    watch_s: float = Field(1.0, gt=0, le=60, description="seconds between looks at the registry")


class BankEngine(Section):
    """Plain transformers and torch: CPUs, GPUs, every method."""

    kind: Literal["bank"] = "bank"
    max_length: int | Auto = Field("auto", description="tokens of prompt and answer; auto: the model's, at most 4096")
    max_batch: int = Field(64, ge=1, le=1024, description="requests that are generated for at once")
    cache_gb: float | Auto = Field("auto", description="memory for keys and values; auto: a share of what is free")
    prefill_chunk: int = Field(512, ge=16, description="prompt tokens read per step, so that others go on meanwhile")
    prefix_cache: bool = Field(True, description="do not read again what another prompt of the same version began with")
    threads: int | Auto = Field("auto", description="CPU threads of a replica; auto: the CPUs it reserves")


class VllmEngine(Section):
    """vLLM, for GPUs. Needs the extra: pip install 'ftray[vllm]'."""

    kind: Literal["vllm"] = "vllm"
    max_length: int | Auto = Field("auto", description="tokens of prompt and answer; auto: the model's")
    max_batch: int = Field(64, ge=1, description="requests that are generated for at once")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one replica's weights")
    options: dict[str, Any] = Field(default_factory=dict, description="further engine arguments of vLLM")


class EncoderEngine(Section):
    """An encoder: embeddings, classification and token classification."""

    kind: Literal["encoder"] = "encoder"
    max_length: int | Auto = Field("auto", description="tokens of a text; auto: the model's")
    max_batch: int = Field(64, ge=1, description="texts read at once")
    threads: int | Auto = Field("auto", description="CPU threads of a replica; auto: the CPUs it reserves")


class AutoEngine(Section):
    """vllm where a replica has a GPU and vLLM is installed; encoder for an encoder; else bank."""

    kind: Literal["auto"] = "auto"


ServingEngine = Annotated[AutoEngine | BankEngine | VllmEngine | EncoderEngine, Field(discriminator="kind")]


class Http(Section):
    host: str = Field("127.0.0.1", description="0.0.0.0 lets other machines in; then configure keys")
    port: int = Field(8000, ge=0, le=65535, description="0: a free one")
    playground: bool = Field(True, description="a page at / for trying versions")
    cors: list[str] = Field(default_factory=list, description="origins whose pages may call the server")
    log_prompts: bool = Field(False, description="write prompts and answers into the log")


class Limits(Section):
    max_queue: int = Field(256, ge=0, description="requests that wait in a replica; more are answered 429")
    max_new_tokens: int = Field(1024, ge=1, description="most tokens of an answer, and the default")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; none: what the engine can hold")
    max_body_mb: float = Field(2.0, gt=0, description="largest request body")
    max_n: int = Field(8, ge=1, description="most answers to one request")
    timeout_s: float = Field(300.0, gt=0, description="longest time for a request")


class Key(Section):
    name: str = Field(description="whose key it is, for logs and metrics")
    sha256: str = Field(description="of the key, in hex; `ftray serve --new-key NAME` makes one")
    scopes: list[Scope] = Field(["infer"], min_length=1, description="infer, admin")

    @field_validator("sha256")
    @classmethod
    def _is_a_hash(cls, value: str) -> str:
        if not _SHA256.fullmatch(value):
            raise ValueError("must be 64 hex digits, the sha256 of a key; `ftray serve --new-key NAME` makes one")
        return value


class ServeScale(Section):
    replicas: int | list[int] = Field(1, description="copies of the base; [min, max] lets load decide")
    cpus_per_replica: Annotated[float, Field(gt=0)] | Auto = Field("auto", description="auto: 1 beside a GPU, else 1")
    gpus_per_replica: Annotated[float, Field(ge=0)] | Auto = Field("auto", description="auto: 1 where there are GPUs")
    target_ongoing: int = Field(32, ge=1, description="requests per replica that autoscaling aims at")
    upscale_delay_s: float = Field(5.0, ge=0, description="how long load must be high before a replica is added")
    downscale_delay_s: float = Field(120.0, ge=0, description="how long load must be low before one is taken away")
    ingresses: int = Field(1, ge=1, description="processes that speak HTTP")
    drain_s: float = Field(60.0, ge=0, description="how long a stopping replica may finish its requests")
    address: str | None = Field(None, description="Ray cluster; none: the one around us, or a local one")

    @field_validator("replicas")
    @classmethod
    def _a_range(cls, value: int | list[int]) -> int | list[int]:
        low, high = (value, value) if isinstance(value, int) else (value if len(value) == 2 else (0, 0))
        if not 1 <= low <= high:
            raise ValueError("must be a number from 1, or [min, max] with 1 <= min <= max")
        return value


class Serving(Section):
    name: str = Field("ftray", description="of the Ray Serve application: a-z, 0-9 and -")
    storage: str = Field("./ftray-store", description="root of the registry: a folder every node sees, s3://, gs://")
    model: Model = Field(default_factory=Model)
    adapters: Adapters = Field(default_factory=Adapters)
    engine: ServingEngine = Field(default_factory=AutoEngine)
    http: Http = Field(default_factory=Http)
    limits: Limits = Field(default_factory=Limits)
    keys: list[Key] = Field(default_factory=list, description="who may call; none: everybody who reaches the port")
    scale: ServeScale = Field(default_factory=ServeScale)

    _name_is_safe = field_validator("name")(safe_name)

    @model_validator(mode="after")
    def _sections_agree(self) -> Serving:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _disagreements(serving: Serving):
    adapters = serving.adapters
    for key in ("preload", "pin"):
        for ref in getattr(adapters, key):
            if not REF_PATTERN.fullmatch(ref):
                yield f"adapters.{key}: {ref!r} names no version; write name, name@v3 or name@prod"
            elif adapters.serve != "all" and ref.partition("@")[0] not in adapters.serve:
                yield f"adapters.{key}: {ref!r} is not among adapters.serve"
    if adapters.serve != "all":
        for name in adapters.serve:
            if not NAME_PATTERN.fullmatch(name):
                yield f"adapters.serve: {name!r} is not an adapter's name; use a-z, 0-9 and -"
    if len(set(adapters.pin)) > adapters.slots:
        yield f"adapters.pin: {len(set(adapters.pin))} versions do not fit into {adapters.slots} slots"
    if serving.http.host not in ("127.0.0.1", "localhost", "::1") and not serving.keys:
        yield (
            f"http.host: {serving.http.host} lets every machine that reaches it in; configure keys, "
            "or keep 127.0.0.1 behind a gateway"
        )
    names = [key.name for key in serving.keys]
    if len(set(names)) < len(names):
        yield "keys: two keys have the same name"
