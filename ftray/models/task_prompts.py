"""A prompt for each of several tasks, made of what all share (MPT, arXiv 2303.02861, equation 1).

The prompt of task k is P * (U_k V_k), entry by entry: P [virtual tokens, width] is shared, U_k [virtual tokens, rank]
and V_k [rank, width] are the task's own. A row of no task is read with P times the mean of the tasks' matrices, which
is also what a new task begins with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class TaskPrompts(nn.Module):
    """Stands where PEFT has its encoder of multitask prompts. Every U_k V_k begins as ones, so every prompt as P."""

    def __init__(self, tasks: Sequence[str], *, tokens: int, width: int, rank: int):
        super().__init__()
        self.tasks = tuple(tasks)
        self.embedding = nn.Embedding(tokens, width)
        self.task_cols = nn.Parameter(torch.randn(len(tasks), tokens, rank) / rank)
        self.task_rows = nn.Parameter(torch.zeros(len(tasks), rank, width))
        with torch.no_grad():
            self.task_cols[..., 0], self.task_rows[:, 0] = 1, 1
        self._asked: Sequence[str] = ()
        self._read: torch.Tensor | None = None

    def prompts(self) -> torch.Tensor:
        """[tasks + 1, virtual tokens, width]: each task's prompt, then that of no task."""
        if self._read is not None:
            return self._read
        own = self.task_cols @ self.task_rows
        return self.embedding.weight * torch.cat([own, own.mean(0, keepdim=True)])

    def read(self, prompts: torch.Tensor) -> None:
        """From now on the prompts are these, in the order of `prompts()`."""
        self._read = prompts.to(self.embedding.weight)

    @contextmanager
    def asked(self, tasks: Sequence[str]) -> Iterator[None]:
        """Inside, row i of what the model reads is of tasks[i]."""
        before, self._asked = self._asked, tasks
        try:
            yield
        finally:
            self._asked = before

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, virtual tokens, width] for `indices` [rows, virtual tokens]."""
        places = {task: place for place, task in enumerate(self.tasks)}
        of_rows = [places.get(task, -1) for task in self._asked] or [-1] * len(indices)
        assert len(of_rows) == len(indices), f"{len(of_rows)} tasks for {len(indices)} rows"
        return self.prompts()[of_rows]
