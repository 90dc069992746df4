"""How the terminal chat shows answers: as they come, or two beside each other where there is room."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ftray.serve.speaker import Answer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 100
"""Columns from which on two answers stand side by side."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_REFRESHES_PER_S = 12


class Screen:
    """Where a chat is written. What a model says cannot move the cursor or set the window's title: see `printable`."""

    def __init__(self, file: TextIO):
        self._file = file
        self.is_terminal = file.isatty()
        self._rich: Console | None = None

    @property
    def is_wide(self) -> bool:
        return self.is_terminal and shutil.get_terminal_size().columns >= WIDE

    def note(self, text: str) -> None:
        self._line(text, style="dim")

    def problem(self, error: Exception | str) -> None:
        self._line(str(error), style="red")

    def speaker(self, model: str) -> None:
        """The line above an answer."""
        self._line(f"{model}:", style="bold cyan")

    def piece(self, text: str) -> None:
        self._file.write(printable(text) if self.is_terminal else text)
        self._file.flush()

    def end_of(self, answer: Answer) -> None:
        """Under an answer: which version it was, and how fast; or why there is none."""
        if answer.text and not answer.text.endswith("\n"):
            self.piece("\n")
        if answer.error is not None:
            self.problem(answer.error)
        else:
            self.note(figures(answer))

    @contextmanager
    def columns(self, answers: Sequence[Answer]) -> Iterator[Callable[[], None]]:
        """Shows answers beside each other until the block ends; call what it gives whenever they have grown."""
        from rich.live import Live

        console = self._console()

        def last_lines() -> Table:
            return _beside(answers, console, height=console.height - 6)

        with Live(last_lines(), console=console, refresh_per_second=_REFRESHES_PER_S, transient=False) as live:
            try:
                yield lambda: live.update(last_lines())
            finally:
                live.update(_beside(answers, console, height=None))

    def _line(self, text: str, *, style: str) -> None:
        if self.is_terminal:
            self._console().print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._file, flush=True)

    def _console(self) -> Console:
        from rich.console import Console

        if self._rich is None:
            self._rich = Console(file=self._file, highlight=False)
        return self._rich


def printable(text: str) -> str:
    """Text with the characters replaced that a terminal obeys; line ends and tabs stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def figures(answer: Answer) -> str:
    """`orders@v2 · 12 tokens · 85.3 tokens/s · first after 0.05 s`."""
    speed = answer.tokens_per_s
    parts = [
        answer.version or answer.model,
        None if answer.tokens is None else f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}",
        None if speed is None else f"{speed:.1f} tokens/s",
        None if answer.first_s is None else f"first after {answer.first_s:.2f} s",
        {"length": "cut at the most tokens", "stop": None, None: "stopped"}.get(answer.finish, answer.finish),
    ]
    return " · ".join(part for part in parts if part)


def _beside(answers: Sequence[Answer], console: Console, *, height: int | None) -> Table:
    """A column for each answer; with `height`, its last lines: a taller live table would leave pieces of itself."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, expand=True, show_edge=False, pad_edge=False)
    width = max(10, console.width // len(answers) - 4)
    cells: list[Any] = []
    for answer in answers:
        table.add_column(Text(answer.model, style="bold cyan"), ratio=1, overflow="fold")
        lines = Text(printable(answer.text)).wrap(console, width)
        cells.append(Text("\n").join(lines if height is None else lines[-max(1, height) :]))
    table.add_row(*cells)
    table.add_row(*(_under(answer, written=height is None or bool(answer.finish)) for answer in answers))
    return table


def _under(answer: Answer, *, written: bool) -> Any:
    from rich.text import Text

    if answer.error is not None:
        return Text(printable(str(answer.error)), style="red")
    return Text(figures(answer) if written else "…", style="dim")
