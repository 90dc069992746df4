"""The launcher files satisfy Ray's own check; keys of clouds, which it passes over, are listed here."""

import copy
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(CLUSTER.glob("*.yaml"))
CLOUDS = [path for path in FILES if path.stem != "onprem"]
PROVIDER = {
    "aws": {"type", "region", "use_internal_ips", "cache_stopped_nodes"},
    "gcp": {"type", "region", "availability_zone", "project_id", "use_internal_ips"},
    "azure": {"type", "location", "resource_group", "use_internal_ips"},
    "local": {"type", "head_ip", "worker_ips"},
}
MACHINE = {
    "aws": {"InstanceType", "IamInstanceProfile", "BlockDeviceMappings", "InstanceMarketOptions"},
    "gcp": {"machineType", "disks", "serviceAccounts", "scheduling"},
    "azure": {"azure_arm_parameters"},
}


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_there_is_a_file_for_every_place():
    assert {path.stem for path in FILES} == {"aws", "azure", "gcp", "onprem"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launcher_file_passes_rays_check(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(load(path))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_keys_that_rays_check_passes_over_are_known(path):
    config = load(path)
    kind = config["provider"]["type"]
    assert set(config["provider"]) <= PROVIDER[kind]
    for node in config.get("available_node_types", {}).values():
        assert set(node["node_config"]) <= MACHINE[kind]


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_workers_scale_to_zero_and_spot_comes_first(path):
    types = load(path)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert all(types[name]["min_workers"] == 0 for name in ("gpu", "gpu-spot"))
    assert types["gpu-spot"]["priority"] > types["gpu"]["priority"]
    assert {types[name]["labels"]["ray.io/market-type"] for name in ("head", "gpu")} == {"on-demand"}
    assert types["gpu-spot"]["labels"]["ray.io/market-type"] == "spot"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nodes_ask_for_the_token_and_install_nothing(path):
    config = load(path)
    assert config["setup_commands"] == []  # Ray's default is a nightly build
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("RAY_AUTH_MODE=token" in command and "ray start" in command for command in config[key])


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("Dockerfile.*")), ids=lambda path: path.name)
def test_images_are_pinned_run_as_nobody_special_and_carry_no_secret(path):
    text = path.read_text(encoding="utf-8")
    source = re.search(r"^FROM (\S+)$", text, re.MULTILINE)[1]
    assert re.search(r":\d+\.\d+", source)
    assert text.index("\nUSER 1000") > text.index("\nRUN pip install")
    assert "ray[default]==2.60.0" in text
    for copied in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert set(copied.split()[:-1]) <= {"pyproject.toml", "README.md", "LICENSE", "ftray", "jobs"}
    assert not re.search(r"(?i)token|password|secret", text)


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_shell(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
