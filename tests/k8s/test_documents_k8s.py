"""The commands of docs/kubernetes.md: what they name exists, and what they select is rendered."""

import re
import shlex

from tests.k8s.conftest import K8S, ROOT, objects

TEXT = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def commands(program):
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT.replace("\\\n", ""), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(f"{program} ")]
    return [shlex.split(line.removesuffix("&")) for line in lines]


def after(words, option):
    return words[words.index(option) + 1] if option in words else None


def test_what_is_applied_is_rendered_and_what_is_selected_is_there():
    applied = [words for words in commands("kubectl") if "apply" in words]
    assert len(applied) >= 2
    for words in applied:
        found = objects(after(words, "-k").removeprefix("k8s/"))
        if selector := after(words, "-l"):
            key, chosen = re.fullmatch(r"(\S+) in \((.*)\)", selector).groups()
            labels = {one["metadata"].get("labels", {}).get(key) for one in found}
            assert set(chosen.split(", ")) <= labels


def test_what_is_watched_and_forwarded_has_the_names_of_the_manifests():
    named = {one["metadata"]["name"] for folder in ("dev", "dev/jobs") for one in objects(f"overlays/{folder}")}
    for words in commands("kubectl"):
        if "rayjob" in words:
            assert after(words, "rayjob") in named
        if "port-forward" in words:
            assert after(words, "port-forward").removeprefix("service/").removesuffix("-serve-svc") in named


def test_the_secrets_have_the_names_that_the_manifests_ask_for():
    asked = "\n".join(path.read_text() for path in K8S.rglob("*.yaml"))
    for words in (words for words in commands("kubectl") if "secret" in words):
        assert words[words.index("generic") + 1] in asked


def test_files_that_commands_name_exist():
    for program, option in (("helm", "--values"), ("docker", "-f")):
        for words in commands(program):
            if (name := after(words, option)) and "/" in name:
                assert (ROOT / name).exists()


def test_every_component_is_described():
    for folder in (K8S / "components").iterdir():
        assert f"| `{folder.name}` |" in TEXT
