"""Reward models of the registry, by which answers of others are scored: found, checked, and loaded frozen.

A run names them in `objective.rewards` and `evaluate.judge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from safetensors import safe_open

from ftray.config.methods import is_adapter
from ftray.config.rewards import ByVersion
from ftray.config.schema import Model, Run
from ftray.errors import ModelError
from ftray.models import chain
from ftray.models.heads import REWARD
from ftray.models.load import Shape, fingerprint, load_config, load_tokenizer
from ftray.models.merge import load_version
from ftray.models.save import ADAPTER
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.versions import Version


def named(run: Run) -> dict[str, str]:
    """The reward versions that a run names, by their keys."""
    found = {
        f"objective.rewards.{index}.version": reward.version
        for index, reward in enumerate(getattr(run.objective, "rewards", []))
        if isinstance(reward, ByVersion)
    }
    return found | ({"evaluate.judge": run.evaluate.judge} if run.evaluate.judge else {})


def pinned(run: Run, storage: Storage, *, began: Mapping[str, Any] | None = None) -> Run:
    """The run with reward versions by number: what an alias or a bare name means now. RegistryError for none.

    `began`: the run as it began earlier; its numbers stay, wherever aliases point by now.
    """
    asked = named(run)
    if not asked:
        return run
    before = _named_before(began) if began else {}
    numbers = {key: chain.numbered(key, ref, storage, began=before.get(key)) for key, ref in asked.items()}
    changes: dict[str, Any] = {}
    if "evaluate.judge" in numbers:
        changes["evaluate"] = run.evaluate.model_copy(update={"judge": numbers["evaluate.judge"]})
    if rewards := getattr(run.objective, "rewards", None):
        rewards = [
            one.model_copy(update={"version": numbers[f"objective.rewards.{index}.version"]})
            if isinstance(one, ByVersion)
            else one
            for index, one in enumerate(rewards)
        ]
        changes["objective"] = run.objective.model_copy(update={"rewards": rewards})
    return run.model_copy(update=changes)


def check(run: Run, storage: Storage, tokenizer: Any) -> int:
    """Weights of the reward models that each worker will hold. RegistryError where there is no such version, ModelError
    where it is no reward model, or reads other tokens than the run's base."""
    weights = {}
    for key, ref in named(run).items():
        version = chain.resolved(key, ref, storage)
        kind = (version.card.get("objective") or {}).get("kind")
        if kind != "reward":
            raise ModelError(
                f"{key}: {version.id} was trained with objective {kind or 'unknown'} and is no reward model; "
                "train one with objective.kind: reward"
            )
        theirs = load_tokenizer(Model(base=str(_files(version, storage))))
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"{key}: {version.id} is a reward model of another tokenizer than {run.model.base}, whose tokens mean "
                f"other words to it; train one on {run.model.base}, or on a model of its family"
            )
        weights[version.id] = _own_weights(version, run, storage)
    return sum(weights.values())


def load(ref: str, storage: Storage, *, dtype: Any, beside: Any = None) -> Any:
    """A reward version with its base, frozen, on the CPU. What of it `beside`, a model that learns, holds frozen too,
    is held once."""
    version = chain.resolved("reward", ref, storage)
    base = chain.found(_base(version), storage)
    model, _ = load_version(base, _files(version, storage), version.card, dtype)
    model.eval().requires_grad_(False)
    if beside is not None:
        share(model, beside)
    return model


def share(model: Any, other: Any) -> None:
    """Parameters of a frozen model that are equal to frozen ones of the other take their memory."""
    import torch

    held = {_plain(name): parameter for name, parameter in other.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        twin = held.get(_plain(name))
        if twin is None or (twin.shape, twin.dtype) != (parameter.shape, parameter.dtype):
            continue
        if torch.equal(twin.detach().to(parameter.device), parameter):
            parameter.data = twin.data


def _plain(name: str) -> str:
    """A parameter's name in the base, whatever PEFT has put around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _own_weights(version: Version, run: Run, storage: Storage) -> int:
    """Weights that a worker holds for it: of an adapter over the policy's frozen base, the adapter alone."""
    base, adapter = chain.found(_base(version), storage), _files(version, storage) / ADAPTER
    frozen = is_adapter(run.method) and not getattr(run.method, "bits", None) and run.scale.zero != 3
    bits = (version.card.get("method") or {}).get("bits")
    if frozen and not bits and adapter.is_file() and fingerprint(base) == fingerprint(chain.found(run.model, storage)):
        with safe_open(adapter, "np") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return Shape.from_config(load_config(base), head=REWARD).parameters


def _named_before(began: Mapping[str, Any]) -> dict[str, str]:
    """`named` of what was written down, perhaps by an older version of the schema."""
    rewards = enumerate(began["objective"].get("rewards", []))
    found = {f"objective.rewards.{index}.version": one["version"] for index, one in rewards if "version" in one}
    judge = began["evaluate"].get("judge")
    return found | ({"evaluate.judge": judge} if judge else {})


def _base(version: Version) -> Model:
    return Model(base=version.card["base"], revision=version.card.get("base_revision"))


def _files(version: Version, storage: Storage) -> Path:
    return Registry(storage).fetch(version, Path(gettempdir(), "ftray-cache", "versions", version.digest))
