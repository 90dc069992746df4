"""`ftray chat`: one question for a script, and a conversation at a terminal, over HTTP and in this process."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from app_server import Engine, publish, running
from terminal import Terminal

from ftray.cli import main
from ftray.config.serving import Serving
from ftray.errors import RegistryError, RequestError, ServeError
from ftray.serve import inprocess
from ftray.serve.chat import Chat, Settings, ask
from ftray.serve.client import Client
from ftray.serve.keys import make_key
from ftray.serve.screen import figures, printable
from ftray.serve.speaker import Answer, Question, Said


@pytest.fixture
def slow(storage, tokenizer):
    """A server whose answers take long enough to be stopped."""
    with running(Serving(storage=str(storage)), engine=Engine(slots=4, pause_s=0.05), tokenizer=tokenizer) as started:
        started.registry.promote("orders@v1")
        started.call(started.catalog.refresh())
        yield started


@pytest.fixture
def terminal():
    """Starts `ftray chat …` at a terminal."""
    started = []

    def start(*words: str, columns: int = 80) -> Terminal:
        started.append(Terminal([sys.executable, "-m", "ftray.cli", "chat", *words], columns=columns))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def local(storage, tokenizer):
    """A fake engine in this process, and the loop it works on."""
    engine = Engine(slots=4)
    with asyncio.Runner() as runner:
        speaker = runner.run(inprocess.start(Serving(storage=str(storage)), build=lambda serving: engine))
        yield Local(runner, speaker, engine)
        runner.run(speaker.close())


@dataclass
class Local:
    runner: asyncio.Runner
    speaker: inprocess.InProcess
    engine: Engine


def eventually(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


# one question, over HTTP


def test_a_question_for_a_script_prints_the_answer_alone(server, capsys):
    assert main(["chat", "orders", "--url", server.url, "-m", "Hi", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out == "first \n"


def test_as_json_it_says_which_version_answered_and_how_fast(server, capsys):
    assert main(["chat", "orders", "--url", server.url, "-m", "Hi", "--max-new-tokens", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"].startswith("first ")
    assert (told["model"], told["version"], told["tokens"], told["finish"]) == ("orders", "orders@v1", 5, "length")
    assert told["tokens_per_s"] > 0


def test_compared_it_answers_beside_the_base(server, capsys):
    words = ["chat", "orders@v2", "--url", server.url, "-m", "Hi", "--max-new-tokens", "1", "--compare"]
    assert main([*words, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [(one["version"], one["answer"]) for one in both] == [("orders@v2", "second "), ("base", "base ")]
    assert main(words) == 0
    assert capsys.readouterr().out == "orders@v2 (orders@v2):\nsecond \n\nbase (base):\nbase \n"


def test_settings_reach_the_engine(server, capsys):
    words = ["--system", "Be brief", "--temperature", "0.5", "--seed", "7", "--max-new-tokens", "2"]
    assert main(["chat", "base", "--url", server.url, "-m", "Hi", *words]) == 0
    sampling = server.engine.asked[-1].sampling
    assert (sampling.temperature, sampling.seed, sampling.max_new_tokens) == (0.5, 7, 2)
    with_system = len(server.engine.asked[-1].prompt_ids)
    assert main(["chat", "base", "--url", server.url, "-m", "Hi"]) == 0
    asked = server.engine.asked[-1]
    assert len(asked.prompt_ids) < with_system
    assert asked.sampling.temperature == 0  # so that two answers can be compared


def test_what_the_server_refuses_is_said_in_its_words(server, capsys):
    assert main(["chat", "order", "--url", server.url, "-m", "Hi"]) == 2
    assert capsys.readouterr().err == "ftray: there is no model 'order' here; did you mean 'orders'?\n"
    assert main(["chat", "base", "--url", server.url, "-m", "Hi", "--max-new-tokens", "5000"]) == 2
    assert "limits.max_new_tokens" in capsys.readouterr().err


def test_a_message_comes_from_stdin_too(server, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert main(["chat", "orders", "--url", server.url, "-m", "-", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out == "first \n"


def test_a_key_comes_from_the_environment(storage, tokenizer, capsys, monkeypatch):
    secret, key = make_key("alice")
    with running(Serving(storage=str(storage), keys=[key]), engine=Engine(), tokenizer=tokenizer) as server:
        words = ["chat", "base", "--url", server.url, "-m", "Hi", "--max-new-tokens", "1"]
        monkeypatch.delenv("FTRAY_API_KEY", raising=False)
        assert main(words) == 2
        assert "asks for a key; put a key into $FTRAY_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("FTRAY_API_KEY", "wrong")
        assert main(words) == 2
        assert "is not one of its keys" in capsys.readouterr().err
        monkeypatch.setenv("FTRAY_API_KEY", secret)
        assert main(words) == 0
        assert capsys.readouterr().out == "base \n"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9", "no server answers there"),
        ("ftp://127.0.0.1", "not a server's address"),
        ("http://", "not a server's address"),
        ("http://127.0.0.1:port", "not a server's address"),
    ],
)
def test_no_server_is_an_error_with_a_way_out(url, said, capsys):
    assert main(["chat", "orders", "--url", url, "-m", "Hi"]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def stranger():
    """Answers every request with the bytes in `says`."""

    class Handler(BaseHTTPRequestHandler):
        says = b""

        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.says)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (b'data: {"choices": [{"delta": {"content": "Hel"}}]}\n\n', "the answer broke off before its end"),
        (b"data: <html>\n\n", "does not speak as an ftray server does"),
        (b"", "the answer broke off before its end"),
    ],
)
def test_half_an_answer_is_an_error(stranger, says, told, capsys):
    handler, url = stranger
    handler.says = says
    assert main(["chat", "base", "--url", url, "-m", "Hi"]) == 2
    assert told in capsys.readouterr().err


def test_a_key_that_cannot_be_one_is_told(capsys, monkeypatch):
    monkeypatch.setenv("FTRAY_API_KEY", "ftray-\nabc")
    assert main(["chat", "base", "--url", "http://127.0.0.1:9", "-m", "Hi"]) == 2
    assert "holds characters that no key has" in capsys.readouterr().err


def test_an_error_in_the_middle_of_an_answer_is_told(server, capsys):
    server.engine.fail, server.engine.fail_after = ServeError("the engine broke"), 2
    try:
        assert main(["chat", "base", "--url", server.url, "-m", "Hi"]) == 2
    finally:
        server.engine.fail = None
    assert "the engine broke" in capsys.readouterr().err


def test_leaving_an_answer_ends_it_on_the_server(slow):
    async def leave_early() -> None:
        answer = Client(slow.url).answer(Question("base", ({"role": "user", "content": "Hi"},)))
        async for said in answer:
            if said.text:
                break
        await answer.aclose()

    asyncio.run(leave_early())
    eventually(lambda: slow.engine.cancelled == 1 and not slow.engine.running)


# one question, in this process


def test_in_this_process_it_answers_with_the_registry_as_it_is_now(local, storage):
    runner, speaker = local.runner, local.speaker
    settings = Settings(max_new_tokens=1)
    first, base = runner.run(ask(speaker, settings, ["refunds", "base"], "Hi"))
    assert [(one.version, one.text) for one in (first, base)] == [("refunds@v1", "money "), ("base", "base ")]
    publish(storage, "refunds-2", "newer")
    [second] = runner.run(ask(speaker, settings, ["refunds-2"], "Hi"))
    assert second.text == "newer "
    assert "refunds-2@v1" in runner.run(speaker.models())
    with pytest.raises(RequestError, match="did you mean 'refunds'"):
        runner.run(ask(speaker, settings, ["refund"], "Hi"))


def test_the_base_is_the_one_that_the_versions_card_names(tmp_path):
    root = tmp_path / "store"
    publish(root, "orders", "x", card={"base": "/data/some-base", "base_revision": "abc", "method": {"rank": 128}})
    serving = inprocess.serving_for("orders@v1", storage=str(root))
    assert (serving.model.base, serving.model.revision) == ("/data/some-base", "abc")
    assert serving.adapters.max_rank == 128
    moved = inprocess.serving_for("orders", storage=str(root), overrides=["model.base=/mnt/moved", "model.dtype=bf16"])
    assert (moved.model.base, moved.model.revision, moved.model.dtype) == ("/mnt/moved", None, "bf16")
    assert inprocess.serving_for("base", storage=str(root)).model.base == "builtin:tiny"
    assert inprocess.serving_for("Qwen/Qwen3-0.6B", storage=str(root)).model.base == "Qwen/Qwen3-0.6B"
    with pytest.raises(RegistryError, match="did you mean 'orders'"):
        inprocess.serving_for("order", storage=str(root))


def test_the_packaged_model_answers_in_this_process(tmp_path, capsys):
    words = ["chat", "builtin:tiny", "-m", "What is the capital of France?", "--max-new-tokens", "4", "--json"]
    assert main([*words, "--storage", str(tmp_path / "store")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["tokens"], told["finish"]) == ("base", 4, "length")
    assert told["answer"].strip()


# a conversation


def converse(local: Local, monkeypatch, *lines: str, model: str = "orders", **options) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    Chat(local.runner, local.speaker, model, Settings(max_new_tokens=1), **options).run()


def test_what_was_said_is_remembered_until_reset(local, monkeypatch, capsys):
    engine = local.engine
    converse(local, monkeypatch, "Hi", "Hi", "/reset", "Hi", "/system Be brief", "Hi")
    lengths = [len(request.prompt_ids) for request in engine.asked]
    assert lengths[0] < lengths[1]
    assert lengths[2] == lengths[0] < lengths[3]
    assert capsys.readouterr().out.count("first \n") == 4


def test_a_conversation_changes_models_and_compares(local, monkeypatch, capsys):
    converse(
        local, monkeypatch, "/model orders@v2", "Hi", "/compare", "Hi", "/compare", "/model nobody", "/model", "/what"
    )
    shown = capsys.readouterr().out
    assert "orders@v2 answers now" in shown
    assert shown.index("second") < shown.index("orders@v2:\nsecond") < shown.index("base:\nbase")
    assert "there is no model 'nobody' here" in shown
    assert "orders@v1\n" in shown  # the list
    assert "there is no /what; /help lists commands" in shown


def test_an_error_leaves_the_conversation_as_it_was(local, monkeypatch, capsys):
    engine = local.engine
    engine.fail = RequestError("not today")
    converse(local, monkeypatch, "Hi")
    assert "not today" in capsys.readouterr().out
    engine.fail = None
    converse(local, monkeypatch, "Hi", "//quit is no command", "a \\", "b", "/quit", "Hi")
    assert len(engine.asked) == 4
    assert len(engine.asked[1].prompt_ids) == len(engine.asked[0].prompt_ids)


def test_at_a_terminal_answers_stream_and_ctrl_c_stops_one(slow, terminal):
    chat = terminal("orders", "--url", slow.url)
    chat.until("orders@v1 on http://")
    chat.until("> ")
    chat.type("Hi\n")
    chat.until("first ")
    assert slow.engine.running == 1, "the answer is shown while it comes"
    chat.type("\x03")
    stopped = chat.until("Ctrl-C again or Ctrl-D leaves")
    assert "orders@v1 ·" in stopped
    assert "stopped" in stopped
    eventually(lambda: slow.engine.cancelled == 1)
    chat.until("> ")
    chat.type("/reset\n")
    chat.until("a new conversation")
    chat.until("> ")
    seen = len(chat.shown)
    assert chat.interrupt() == 0
    assert "Ctrl-C again or Ctrl-D leaves" in chat.shown[seen:]
    assert "Traceback" not in chat.shown


def test_ctrl_d_leaves(server, terminal):
    chat = terminal("base", "--url", server.url, "--max-new-tokens", "3")
    chat.until("> ")
    chat.type("Hi\n")
    chat.until("base · 3 tokens · ")
    chat.until("cut at the most tokens")
    chat.until("> ")
    chat.type("\x04")
    assert chat.wait() == 0


def test_a_wide_terminal_shows_both_answers_beside_each_other(server, terminal):
    chat = terminal("orders@v2", "--compare", "--url", server.url, "--max-new-tokens", "3", columns=120)
    chat.until("> ")
    chat.type("Hi\n")
    chat.until("orders@v2 · 3 tokens")
    chat.until("> ")
    line = next(line for line in chat.shown.splitlines() if "second" in line and "base" in line)
    assert line.index("second") < line.index("base")


# what is shown


def test_what_a_model_says_cannot_steer_the_terminal():
    assert printable("a\x1b]0;title\x07b\x9b31m\r\n\tc") == "a\ufffd]0;title\ufffdb\ufffd31m\ufffd\n\tc"


def test_the_figures_under_an_answer():
    answer = Answer("orders")
    for number, second in ((1, 0.5), (2, 1.0), (3, 1.5)):
        answer.add(Said("x", number, "orders@v2"), seconds=second)
    assert figures(answer) == "orders@v2 · 3 tokens · 2.0 tokens/s · first after 0.50 s · stopped"
    answer.add(Said("", 3, finish="stop"), seconds=1.5)
    assert figures(answer) == "orders@v2 · 3 tokens · 2.0 tokens/s · first after 0.50 s"
    at_once = Answer("base")
    at_once.add(Said("all of it", 8, "base", "stop"), seconds=2.0)
    assert at_once.tokens_per_s == 4.0
