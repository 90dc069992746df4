"""Versions of prompt tuning as files: the prompt that another run begins with, and each task's of a run of several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ftray.errors import ModelError
from ftray.models.save import ADAPTER, ADAPTER_CONFIG
from ftray.models.virtual import TASKS, TENSOR


def prompt_of(folder: Path) -> Any:
    """[virtual tokens, width]: a version's prompt. ModelError where the version is of another method."""
    from safetensors.torch import load_file

    config = folder / ADAPTER_CONFIG
    kind = json.loads(config.read_text(encoding="utf-8")).get("peft_type") if config.is_file() else "a whole model"
    if kind != "PROMPT_TUNING":
        raise ModelError(f"has no prompt, it is {kind}; name a version of method prompt or multitask_prompt")
    return load_file(folder / ADAPTER)[TENSOR]


def by_task(folder: Path, into: Path) -> dict[str, Path]:
    """A version of several tasks as a version of prompt tuning for each, by its task."""
    from safetensors.torch import load_file, save_file

    prompts = load_file(folder / TASKS)
    for task, prompt in prompts.items():
        shutil.copytree(folder, into / task, ignore=shutil.ignore_patterns(TASKS))
        save_file({TENSOR: prompt}, into / task / ADAPTER, metadata={"format": "pt"})
    return {task: into / task for task in prompts}
