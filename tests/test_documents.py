"""What the documents and samples say is so: run files parse, commands exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ftray.cli import main, parser
from ftray.cli.serving import file_and_overrides
from ftray.config.explain import sections_of
from ftray.config.load import load_run, load_runs, load_serving, load_sweep, run_from
from ftray.config.methods import Method
from ftray.config.objectives import Objective
from ftray.config.schema import Run
from ftray.config.serving import Serving
from ftray.config.sweeping import Sweep

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SAMPLES = sorted((ROOT / "jobs" / "runs").glob("*.yaml"))
SWEEP_SAMPLES = sorted((ROOT / "jobs" / "sweeps").glob("*.yaml"))
SERVE_SAMPLES = sorted((ROOT / "jobs").glob("*.yaml"))
METHODS, OBJECTIVES = sections_of(Method), sections_of(Objective)
# In two pieces, so that this list does not find itself.
REGISTRY_HOSTS = ["pypi" + ".org", "python" + "hosted", "npm" + "js.", "deb." + "debian", "conda" + ".anaconda"]


def fences(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def files(under: str = "") -> list[tuple[str, str]]:
    """(document, YAML file in it); a block with `---` holds several."""
    found = []
    for path in DOCUMENTS:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(under):
            found += [(name, one) for block in fences(path, "yaml") for one in re.split(r"^---\n", block, flags=re.M)]
    return found


def commands(start: str) -> list[list[str]]:
    """The words after `start` of every such command in the documents, in fences and in running text."""
    found = set()
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        lines = [line.partition(" # ")[0] for block in fences(path, "bash") for line in block.splitlines()]
        spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
        found |= {line.strip() for line in [*lines, *spans] if line.startswith(f"{start} ")}
    return [shlex.split(line)[1:] for line in sorted(found)]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_sample_parses_and_says_what_it_is_for(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert all(run.evaluate.gate for run in load_runs(path))


@pytest.mark.parametrize("path", SERVE_SAMPLES, ids=lambda path: path.name)
def test_a_sample_of_a_serve_file_parses_and_says_what_it_is_for(path):
    assert load_serving(path).storage
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", SWEEP_SAMPLES, ids=lambda path: path.name)
def test_a_sample_of_a_sweep_file_parses_and_says_what_it_is_for(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_sweep(path).count > 1
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_there_is_a_sample_for_every_method_and_objective():
    runs = [run for path in SAMPLES for run in load_runs(path)]
    assert {run.method.kind for run in runs} == {section.model_fields["kind"].default for section in METHODS}
    assert any(run.method.kind == "lora" and run.method.bits == 4 for run in runs)
    assert {run.objective.kind for run in runs} == {kind.model_fields["kind"].default for kind in OBJECTIVES}
    assert len({run.name for run in runs}) == len(runs), "two samples would resume each other"


def test_the_readme_names_every_method():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [kind for section in METHODS if f"| `{(kind := section.model_fields['kind'].default)}` |" not in text]


@pytest.mark.parametrize("words", commands("ftray"), ids=" ".join)
def test_a_command_in_the_documents_parses(words):
    if len(words) == 1:  # only named in running text: it is enough that it has help
        with pytest.raises(SystemExit, match="0"):
            parser.parse([*words, "--help"])
        return
    overrides = getattr(parser.parse(words), "overrides", [])
    if words[0] in ("serve", "chat"):
        load_serving(None, file_and_overrides(overrides)[1])
    elif words[0] != "sweep":
        if words[0] == "doctor":  # the run file is among them, since it may be left out
            overrides = file_and_overrides(overrides)[1]
        run_from({"name": "a", "data": {"sources": "a"}}, overrides)


def test_the_readme_has_commands():
    assert len(commands("ftray")) > 10
    assert ["demo"] in commands("make")


@pytest.mark.parametrize(("name", "block"), files())
def test_a_file_in_the_documents_parses(name, block, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(block, encoding="utf-8")
    if "\nspace:" in block:
        (tmp_path / "run.yaml").write_text("name: a\ndata: {sources: a.jsonl}\n", encoding="utf-8")
        assert isinstance(load_sweep(path), Sweep)
    elif re.search("^name:", block, re.MULTILINE):
        assert load_runs(path)
    elif re.search("^(data|objective):", block, re.MULTILINE):  # a part of a run
        data = "" if "data:" in block else "data: {sources: a.jsonl}\n"
        path.write_text(f"name: a\n{data}{block}", encoding="utf-8")
        assert isinstance(load_run(path), Run)
    else:
        assert isinstance(load_serving(path), Serving)


def test_the_pages_of_objectives_have_a_run_file_for_each(tmp_path):
    shown = set()
    for _, block in files("docs/objectives/"):
        if re.search("^name:", block, re.MULTILINE):
            path = tmp_path / "file.yaml"
            path.write_text(block, encoding="utf-8")
            shown.add(load_run(path).objective.kind)
    assert shown == {kind.model_fields["kind"].default for kind in OBJECTIVES}


def test_the_first_steps_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = next(block for block in fences(ROOT / "README.md", "bash") if "ftray init" in block)
    line = next(line for line in block.splitlines() if line.startswith("ftray init"))
    assert main(shlex.split(line.partition(" # ")[0])[1:]) == 0
    assert load_run("run.yaml").name == "my-orders"


def test_every_make_command_in_the_documents_is_a_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands("make"):
        for word in words:
            assert word in targets, f"make {word}"


def test_files_that_the_documents_name_exist():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
        spans = re.findall(r"`((?:jobs|ftray|tests|docs|cluster|k8s|benchmarks)/[\w./-]+)`", text)
        scripts = re.findall(r"python (\S+\.py)(?: (\S+\.yaml))?", text)
        for name in links:
            assert (path.parent / name).exists(), f"{path.name} links to {name}"
        for name in [*spans, *(part for pair in scripts for part in pair if part)]:
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_no_tracked_file_names_a_package_registry():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".safetensors", ".png", ".gz") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not [host for host in REGISTRY_HOSTS if host in text], name
