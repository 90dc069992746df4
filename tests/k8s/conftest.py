"""The manifests as files, and as Kustomize puts them together."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = [f"overlays/{name}" for name in ("dev", "dev/jobs", "team", "team/jobs", "prod", "prod/jobs")]
PARTS = ["base/common", "base/serving", "base/cluster", "base/jobs"]
CLUSTERS = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
    "RayCronJob": ("spec", "jobTemplate", "rayClusterSpec"),
}


@cache
def rendered(folder):
    """The text of a folder's kustomization; skips where there is no Kustomize."""
    for words in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(words[0]):
            done = subprocess.run([*words, str(K8S / folder)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout
    pytest.skip("neither kustomize nor kubectl is installed here")


def objects(folder):
    return [one for one in yaml.safe_load_all(rendered(folder)) if one]


def clusters(folder):
    """(kind/name, the Ray cluster's spec) of every Ray object."""
    for one in objects(folder):
        if one["kind"] in CLUSTERS:
            spec = one
            for key in CLUSTERS[one["kind"]]:
                spec = spec[key]
            yield f"{one['kind']}/{one['metadata']['name']}", spec


def groups(cluster):
    """(name, group) of head and worker groups."""
    yield "head", cluster["headGroupSpec"]
    yield from ((group["groupName"], group) for group in cluster["workerGroupSpecs"])


def pods(folder):
    """(where, pod spec) of everything that makes pods."""
    for name, cluster in clusters(folder):
        yield from ((f"{name} {group}", content["template"]["spec"]) for group, content in groups(cluster))
    for one in objects(folder):
        if one["kind"] in ("StatefulSet", "Deployment"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def files():
    """Every manifest as it lies there, Kustomize's own and lists of patches apart."""
    for path in sorted(K8S.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        first = next(yaml.safe_load_all(text))
        if isinstance(first, dict) and first.get("kind") not in (None, "Kustomization", "Component"):
            yield path
