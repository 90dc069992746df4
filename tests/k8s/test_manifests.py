"""Every manifest is valid, and what no schema sees is so too: security, resources, names, patches, configurations."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ftray.cli import parser
from ftray.config.load import load_run, load_serving
from tests.k8s.conftest import K8S, OVERLAYS, PARTS, ROOT, clusters, files, groups, objects, pods, rendered

SHARED = ROOT.parent / "shared"
THIRD_PARTY = "PodMonitor,PrometheusRule,LocalQueue,ClusterQueue,ResourceFlavor,Queue"
SECRETS = {"ftray-token", "ftray-redis", "ftray-s3", "ftray-metrics", "ftray-tls"}  # made by whoever runs it
PATCHED = {"replace", "add", "remove"}


def validate(paths, *more):
    validator = SHARED / "validate_k8s.py"
    if not validator.exists():
        pytest.skip("the folder with the schemas of Ray's kinds lies outside the project and is not here")
    for module in ("kubernetes_validate", "jsonschema"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[dev]'")
    command = [sys.executable, str(validator), *map(str, paths), "--crds", str(SHARED / "kuberay-crds"), "-q"]
    command += ["--gates", "RayCronJob", "--skip-kinds", f"Kustomization,Component,{THIRD_PARTY}", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_valid():
    validate([path for path in files() if path.parent.name != "platform" and path.name != "raycronjob.yaml"])


def test_every_overlay_is_valid_for_the_schemas_and_for_the_operator(tmp_path):
    for number, folder in enumerate([*PARTS, *OVERLAYS]):
        (tmp_path / f"{number}.yaml").write_text(rendered(folder), encoding="utf-8")
    validate([tmp_path], "--operator-rules")


@pytest.mark.parametrize("component", sorted(path.name for path in (K8S / "components").iterdir()))
def test_a_component_is_used_by_an_overlay(component):
    texts = [path.read_text() for path in (K8S / "overlays").rglob("kustomization.yaml")]
    assert any(f"components/{component}\n" in text for text in texts)


def test_ray_objects_are_patched_by_json6902_only():
    """A merge patch would replace the whole list of worker groups."""
    for path in K8S.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text())
        assert "patchesStrategicMerge" not in content
        for patch in content.get("patches", []):
            text = patch.get("patch") or (path.parent / patch["path"]).read_text()
            operations = yaml.safe_load(text)
            assert isinstance(operations, list), path
            assert {operation["op"] for operation in operations} <= PATCHED, path


def test_a_component_leaves_containers_and_groups_as_they_are():
    for overlay, base in (("team", "cluster"), ("prod", "serving"), ("team/jobs", "jobs")):
        before, after = dict(clusters(f"base/{base}")), dict(clusters(f"overlays/{overlay}"))
        assert before.keys() <= after.keys()
        for name, cluster in before.items():
            for (group, old), (same, new) in zip(groups(cluster), groups(after[name]), strict=True):
                assert group == same
                old, new = old["template"]["spec"]["containers"], new["template"]["spec"]["containers"]
                assert [one["resources"] for one in old] == [one["resources"] for one in new], f"{name} {group}"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_are_restricted(folder):
    found = list(pods(folder))
    assert found
    for where, pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), where
        assert all("hostPath" not in volume for volume in pod.get("volumes", [])), where
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"], where


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_say_what_they_need_and_memory_is_never_oversold(folder):
    for where, pod in pods(folder):
        for container in pod["containers"]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests["cpu"], where
            assert requests["memory"] == limits["memory"], where
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"), where


@pytest.mark.parametrize("folder", OVERLAYS)
def test_ray_clusters_are_locked_pinned_and_have_shared_memory(folder):
    for name, cluster in clusters(folder):
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ftray-token"}, name
        assert cluster["headGroupSpec"]["resources"] == {"CPU": "0"}, name
        for group, content in groups(cluster):
            pod = content["template"]["spec"]
            assert any(volume.get("emptyDir", {}).get("medium") == "Memory" for volume in pod["volumes"]), name
            for container in pod["containers"]:
                tag = container["image"].partition(":")[2]
                assert f"-ray{cluster['rayVersion']}" in tag, name
            if container["resources"]["limits"].get("nvidia.com/gpu"):
                assert any(one["key"] == "nvidia.com/gpu" for one in pod["tolerations"]), f"{name} {group}"


@pytest.mark.parametrize("folder", OVERLAYS)
def test_what_the_objects_name_is_there_or_a_secret_of_the_operators(folder):
    here = {(one["kind"], one["metadata"]["name"]) for one in objects(folder)}
    wanted, secrets = set(), set()
    for _, pod in pods(folder):
        if "serviceAccountName" in pod:
            wanted.add(("ServiceAccount", pod["serviceAccountName"]))
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
            if "persistentVolumeClaim" in volume:
                wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for container in pod["containers"]:
            secrets |= {one["secretRef"]["name"] for one in container.get("envFrom", [])}
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("configMapKeyRef"):
                    wanted.add(("ConfigMap", reference["name"]))
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    secrets.add(reference["name"])
    assert wanted <= here
    assert secrets <= SECRETS


def test_no_secret_lies_in_the_manifests():
    assert not [path for path in files() for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "Secret"]


@pytest.mark.parametrize("folder", [folder for folder in OVERLAYS if folder.endswith("jobs")])
def test_a_job_can_be_read_by_the_command_line_has_deadlines_and_resumes_on_a_new_cluster(folder):
    runs = next(one for one in objects(folder) if one["metadata"]["name"] == "ftray-runs")["data"]
    for one in objects(folder):
        if one["kind"] not in ("RayJob", "RayCronJob"):
            continue
        spec = one["spec"] if one["kind"] == "RayJob" else one["spec"]["jobTemplate"]
        python, script, file, *words = spec["entrypoint"].split()
        assert python == "python"
        command = Path(script).stem
        assert Path(file).name in runs
        if command != "sweep":  # its file has a schema of its own
            parser.parse([command, file, *words])
        assert spec["submissionMode"] == "HTTPMode"
        assert spec["backoffLimit"] > 0
        assert spec["shutdownAfterJobFinishes"]
        assert "deletionStrategy" not in spec
        assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0


@pytest.mark.parametrize(
    "path",
    [K8S / "base/jobs/runs/train.yaml", K8S / "overlays/prod/jobs/train.yaml"],
    ids=lambda path: path.parent.name,
)
def test_a_run_file_of_the_jobs_parses(path):
    assert load_run(path).scale.workers <= 8


@pytest.mark.parametrize("folder", ["base/serving", "overlays/dev", "overlays/prod"])
def test_what_is_served_is_what_the_serve_file_beside_it_says(folder):
    from ftray.config.document import dump
    from ftray.serve.deploy import serve_config

    serving = load_serving(K8S / folder / "serve.yaml")
    service = next(one for one in objects(folder) if one["kind"] == "RayService")
    assert service["spec"]["serveConfigV2"] == dump(serve_config(serving))
    settings = [one for one in objects(folder) if one["metadata"]["name"] == "ftray-settings"]
    assert all(one["data"]["storage"] == serving.storage for one in settings)
    assert serving.adapters.preload == serving.adapters.pin == []  # versions are data, not spec
    assert serving.keys


def test_nodes_of_the_server_talk_as_the_server_does_elsewhere():
    from ftray.serve.deploy import TRANSPORT

    for _, cluster in clusters("overlays/prod"):
        for name, group in groups(cluster):
            given = {one["name"]: one.get("value") for one in group["template"]["spec"]["containers"][0]["env"]}
            assert given.items() >= TRANSPORT.items(), name
