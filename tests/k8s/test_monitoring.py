"""The dashboard and the alerts name metrics that the server and Ray really export."""

import json
import re
from pathlib import Path

import yaml

from ftray.serve.metrics import Metrics
from tests.k8s.conftest import K8S

MONITORING = K8S / "components" / "monitoring"


def expressions():
    dashboard = json.loads((MONITORING / "ftray.json").read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    yield from (rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"])


def names():
    return {name for text in expressions() for name in re.findall(r"\b(?:ftray|ray)_[a-z_]+", text)} - {
        "ray_train_controller_state"  # a label too
    }


def test_metrics_of_the_server_are_exported():
    page = Metrics().page([], stale_s=0.0).decode()
    exported = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    exported |= {f"{name}_bucket" for name in exported}
    wanted = {name for name in names() if name.startswith("ftray_")}
    assert len(wanted) > 10
    assert wanted <= exported


def test_metrics_of_ray_are_in_its_sources():
    import ray

    folder = Path(ray.__file__).parent
    sources = [
        *(folder / "train/v2/_internal/metrics").glob("*.py"),
        *(folder / "dashboard/modules/reporter").glob("*.py"),
    ]
    text = "\n".join(path.read_text() for path in sources)
    for name in (name for name in names() if name.startswith("ray_")):
        assert f'"{name.removeprefix("ray_")}"' in text, name
