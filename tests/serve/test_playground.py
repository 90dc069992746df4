"""The playground's page: what it may load, what it may run, and that it sets what models say as text only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from app_server import Engine, running

from ftray.config.serving import Serving
from ftray.serve import playground


@dataclass(frozen=True)
class Served:
    status: int
    headers: Mapping[str, str]
    text: str


@pytest.fixture(scope="module")
def served(server):
    with urlopen(f"{server.url}/") as response:
        return Served(response.status, response.headers, response.read().decode())


@pytest.fixture(scope="module")
def script(served):
    [script] = re.findall(r"<script>(.*?)</script>", served.text, re.DOTALL)
    return script


def test_the_page_is_served_with_a_policy_that_lets_nothing_else_in(served):
    assert served.status == 200
    assert served.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in served.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"  # innerHTML and its like throw, whatever the script does
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind]), policy[kind]
    assert served.headers["x-content-type-options"] == "nosniff"


def test_the_policy_follows_the_page():
    before, after = (playground.policy(f"<style>a</style><script>{code}</script>") for code in ("1", "2"))
    assert before != after


def test_nothing_is_loaded_from_elsewhere(served):
    assert not re.findall(r"https?:|//[\w-]+\.\w|@import|url\(", served.text)
    assert re.findall(r'(?:src|href)="([^"]*)"', served.text) == ["data:,"]


def test_what_a_model_says_never_becomes_markup(served, script):
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc", "eval(",
                "new Function", "createContextualFragment", "setHTML"):  # fmt: skip
        assert way not in script, way
    assert not re.findall(r"\son\w+=", served.text.replace(script, "")), "the policy would not run it"
    assert not re.findall(r"\sstyle=", served.text), "the policy would not apply it"


def test_a_key_is_kept_for_the_tab_only(script):
    assert "localStorage" not in script
    assert "document.cookie" not in script


def test_every_element_that_the_script_names_is_there(served, script):
    wanted = set(re.findall(r"\$\(\"([\w-]+)\"\)", script))
    there = set(re.findall(r'\bid="([\w-]+)"', served.text))
    assert wanted - there == set()


def test_every_field_has_a_label(served):
    page = re.sub(r"<script>.*</script>", "", served.text, flags=re.DOTALL)
    labelled = set(re.findall(r'<label[^>]*for="([\w-]+)"', page))
    for label in re.findall(r"<label.*?</label>", page, re.DOTALL):
        labelled |= set(re.findall(r'id="([\w-]+)"', label))
    assert set(re.findall(r'<(?:input|textarea|select)[^>]*id="([\w-]+)"', page)) == labelled


def test_pages_under_a_prefix_call_their_own_server(script):
    paths = re.findall(r"call\(\"([^\"]+)\"", script)
    assert paths
    assert not [path for path in paths if path.startswith("/")]


def test_it_is_not_there_where_the_serve_file_says_no(tokenizer, tmp_path):
    serving = Serving(storage=str(tmp_path / "store"), http={"playground": False})
    with running(serving, engine=Engine(), tokenizer=tokenizer) as without, pytest.raises(HTTPError, match="404"):
        urlopen(f"{without.url}/")
