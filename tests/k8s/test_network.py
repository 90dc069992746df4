"""Who may talk to whom, by reading the NetworkPolicies as Kubernetes does."""

import ipaddress

import pytest

from tests.k8s.conftest import objects

HERE = "ftray"


def ray(component, kind, port=None):
    labels = {
        "app.kubernetes.io/part-of": "ftray",
        "app.kubernetes.io/component": component,
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": kind,
    }
    return {"namespace": {"kubernetes.io/metadata.name": HERE}, "labels": labels, "port": port}


def other(namespace, port=None, *, labels=None, **namespace_labels):
    marks = {"kubernetes.io/metadata.name": namespace, **namespace_labels}
    return {"namespace": marks, "labels": labels or {}, "port": port}


def outside(address, port=None):
    return {"address": address, "port": port}


OPERATOR = other("kuberay-operator", labels={"app.kubernetes.io/name": "kuberay-operator"})
REDIS = {"app.kubernetes.io/part-of": "ftray", "app.kubernetes.io/component": "redis"}
GATEWAY = other("ingress", **{"ftray/gateway": "true"})
CASES = [
    ("dev", ray("serving", "worker"), ray("serving", "head", 6379), True),
    ("dev", ray("serving", "head"), ray("serving", "worker", 31234), True),
    ("dev", OPERATOR, ray("serving", "head", 8265), True),
    ("dev", OPERATOR, ray("serving", "worker", 8265), False),
    ("dev", other("default"), ray("serving", "head", 8265), False),
    ("dev", other("default"), ray("serving", "worker", 8000), False),
    ("dev", GATEWAY, ray("serving", "worker", 8000), True),
    ("dev", GATEWAY, ray("serving", "head", 8265), False),
    ("dev", GATEWAY, ray("cluster", "head", 8000), False),
    ("dev", outside("203.0.113.9"), ray("serving", "head", 8265), False),
    ("dev", ray("cluster", "worker"), outside("203.0.113.9", 443), True),
    ("dev", ray("cluster", "worker"), outside("203.0.113.9", 22), False),
    ("dev", ray("cluster", "worker"), outside("169.254.169.254", 80), False),
    ("dev", ray("cluster", "worker"), other("kube-system", 53), True),
    ("dev", ray("cluster", "head"), outside("10.0.0.1", 6443), False),
    ("team", ray("cluster", "head"), outside("10.0.0.1", 6443), True),
    ("team", ray("cluster", "worker"), outside("10.0.0.1", 6443), False),
    ("team", other("monitoring"), ray("cluster", "worker", 8080), True),
    ("team", other("monitoring"), ray("cluster", "head", 8265), False),
    ("prod", ray("serving", "head"), other(HERE, 6379, labels=REDIS), True),
    ("prod", ray("serving", "worker"), other(HERE, 6379, labels=REDIS), False),
    ("prod", other("default"), other(HERE, 6379, labels=REDIS), False),
]


@pytest.mark.parametrize(("overlay", "source", "target", "allowed"), CASES)
def test_only_those_talk_that_should(overlay, source, target, allowed):
    policies = [one["spec"] for one in objects(f"overlays/{overlay}") if one["kind"] == "NetworkPolicy"]
    assert (passes(policies, source, target, "Egress") and passes(policies, target, source, "Ingress")) is allowed


def passes(policies, subject, peer, direction):
    """Whether `subject`'s policies let it send to `peer` (Egress) or hear from it (Ingress)."""
    if subject.get("namespace", {}).get("kubernetes.io/metadata.name") != HERE:
        return True  # policies hold in their own namespace
    mine = [p for p in policies if direction in p["policyTypes"] and selects(p["podSelector"], subject["labels"])]
    rules = [rule for policy in mine for rule in policy.get(direction.lower(), [])]
    port = peer["port"] if direction == "Egress" else subject["port"]
    return not mine or any(opens(rule, peer, port, "to" if direction == "Egress" else "from") for rule in rules)


def opens(rule, peer, port, side):
    ports = rule.get("ports")
    return (not ports or any(one["port"] == port for one in ports)) and any(is_peer(one, peer) for one in rule[side])


def is_peer(rule, peer):
    if "ipBlock" in rule:
        if "address" not in peer:
            return False
        address = ipaddress.ip_address(peer["address"])
        inside = address in ipaddress.ip_network(rule["ipBlock"]["cidr"])
        return inside and not any(address in ipaddress.ip_network(one) for one in rule["ipBlock"].get("except", []))
    if "address" in peer:
        return False
    if "namespaceSelector" in rule:
        if not selects(rule["namespaceSelector"], peer["namespace"]):
            return False
    elif peer["namespace"]["kubernetes.io/metadata.name"] != HERE:
        return False
    return selects(rule.get("podSelector", {}), peer["labels"])


def selects(selector, labels):
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()
