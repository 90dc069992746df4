"""The terminal chat: one question for a script, or a conversation with commands, alone or beside the base."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ftray.errors import FtrayError
from ftray.serve.screen import Screen
from ftray.serve.speaker import BASE, Answer, Message, Question, Speaker

HELP = """\
/model NAME    ask another: a name, name@v2, name@canary, or base; without NAME: what there is
/system TEXT   set the system prompt and start over; without TEXT: none
/compare       the base beside every answer, or no longer
/reset         forget the conversation
/quit          leave; so do Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer. A line that ends with \\ goes on in the next; // at its start sends one /."""


@dataclass(frozen=True)
class Settings:
    """How answers are asked for. None: what the answering side takes by default."""

    system: str | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def question(self, model: str, messages: Sequence[Message]) -> Question:
        messages = [{**message, "content": message["content"].replace("\0", "")} for message in messages]
        opening: tuple[Message, ...] = ({"role": "system", "content": self.system},) if self.system else ()
        return Question(model, (*opening, *messages), self.temperature, self.max_new_tokens, self.seed)


async def ask(speaker: Speaker, settings: Settings, models: Sequence[str], message: str) -> list[Answer]:
    """One question to each model at once. Raises what an answer failed with."""
    answers = [Answer(model) for model in models]
    said: list[Message] = [{"role": "user", "content": message}]
    await asyncio.gather(*(_hear(speaker, settings.question(answer.model, said), answer) for answer in answers))
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return answers


class Chat:
    """A conversation at the terminal. `runner` has the loop on which the speaker works; it turns during answers only,
    so that Ctrl-C means what it means everywhere: at the prompt it interrupts the typing, else the answer."""

    def __init__(
        self, runner: asyncio.Runner, speaker: Speaker, model: str, settings: Settings, *, compare: bool = False
    ):
        self._runner = runner
        self._speaker = speaker
        self._settings = settings
        self._screen = Screen(sys.stdout)
        self._sides = [_Side(model)]
        self._interrupts = 0
        if compare:
            self._compare("")

    def run(self) -> int:
        """Until the user leaves. Raises FtrayError when the model that was asked for does not exist."""
        version = self._runner.run(self._speaker.version_of(self._sides[0].model))
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then has line editing and a history
            self._screen.note(f"{version} on {self._speaker.where}; /help lists commands, Ctrl-D leaves")
        while (line := self._read()) is not None:
            if line.startswith("/") and not line.startswith("//"):
                if not self._obey(line):
                    break
            elif line.strip():
                self._ask(line[1:] if line.startswith("//") else line)
        return 0

    def _read(self) -> str | None:
        """The next message; None: the user leaves."""
        prompt = "> " if sys.stdin.isatty() else ""
        lines: list[str] = []
        while True:
            try:
                line = input("… " if lines and prompt else prompt)
            except EOFError:
                if prompt:
                    print()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                print()
                if self._interrupted():
                    return None
                lines = []
                continue
            self._interrupts = 0
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def _interrupted(self) -> bool:
        """Counts a Ctrl-C; True for the second in a row."""
        self._interrupts += 1
        if self._interrupts < 2:
            self._screen.note("Ctrl-C again or Ctrl-D leaves")
        return self._interrupts >= 2

    # answers

    def _ask(self, message: str) -> None:
        for side in self._sides:
            side.messages.append({"role": "user", "content": message})
        try:
            self._runner.run(self._answer())
        except KeyboardInterrupt:
            self._interrupted()
        for side in self._sides:
            side.settle()

    async def _answer(self) -> None:
        screen = self._screen
        for side in self._sides:
            side.answer = Answer(side.model)
        if len(self._sides) > 1 and screen.is_wide:
            with screen.columns([side.answer for side in self._sides]) as grown:
                await asyncio.gather(*(self._hear(side, lambda _: grown()) for side in self._sides))
            return
        for side in self._sides:
            if len(self._sides) > 1:
                screen.speaker(side.model)
            try:
                await self._hear(side, screen.piece)
            finally:
                screen.end_of(side.answer)

    async def _hear(self, side: _Side, show: Callable[[str], None]) -> None:
        await _hear(self._speaker, self._settings.question(side.model, side.messages), side.answer, show)

    # commands

    def _obey(self, line: str) -> bool:
        """Carries out a command; False: leave."""
        commands: dict[str, Callable[[str], None]] = {
            "/model": self._model,
            "/system": self._system,
            "/compare": self._compare,
            "/reset": self._reset,
            "/help": lambda _: self._screen.note(HELP),
        }
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word in commands:
            commands[word](rest.strip())
            return True
        near = difflib.get_close_matches(word, [*commands, "/quit"], n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists commands"
        self._screen.problem(f"there is no {word}; {hint}")
        return True

    def _model(self, name: str) -> None:
        try:
            if not name:
                self._screen.note("\n".join(self._runner.run(self._speaker.models())))
                return
            version = self._runner.run(self._speaker.version_of(name))
        except FtrayError as error:
            self._screen.problem(error)
            return
        self._sides[0].model = name
        self._screen.note(f"{version} answers now; /reset forgets the conversation")

    def _system(self, text: str) -> None:
        self._settings = replace(self._settings, system=text or None)
        self._reset("")

    def _compare(self, _: str) -> None:
        if len(self._sides) > 1:
            self._sides = self._sides[:1]
            self._screen.note("without the base")
        else:
            self._sides.append(_Side(BASE, list(self._sides[0].messages)))

    def _reset(self, _: str) -> None:
        for side in self._sides:
            side.messages.clear()
        self._screen.note("a new conversation")


@dataclass
class _Side:
    """One of the conversations: with `--compare`, each model remembers its own answers."""

    model: str
    messages: list[Message] = field(default_factory=list)
    answer: Answer = field(default_factory=lambda: Answer(""))

    def settle(self) -> None:
        """Keeps what was said; a question without any answer is taken back, so that roles keep alternating."""
        if self.answer.text:
            self.messages.append({"role": "assistant", "content": self.answer.text})
        else:
            self.messages.pop()


async def _hear(
    speaker: Speaker, question: Question, answer: Answer, show: Callable[[str], None] = lambda _: None
) -> None:
    """Fills the answer while it comes. What the user can fix becomes its `error`, so that another beside it goes on."""
    began = time.monotonic()
    try:
        async with contextlib.aclosing(speaker.answer(question)) as pieces:
            async for said in pieces:
                answer.add(said, seconds=time.monotonic() - began)
                show(said.text)
    except FtrayError as error:
        answer.error = error
