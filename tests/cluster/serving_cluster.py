"""A server on the tests' cluster, as KubeRay brings it up, and what it and Ray Serve say of it."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import aiohttp

from tests.cluster.serving_clients import PATIENCE_S, Client, until

START_S = 240.0


def apply(cluster, serving):
    """A Ray Serve config over REST. Its proxies would be on every node, which are one machine here."""
    from ftray.serve.deploy import serve_config

    config = serve_config(serving)
    config["proxy_location"] = "HeadOnly"
    config["http_options"]["host"] = "127.0.0.1"
    body = json.dumps(config).encode()
    request = urllib.request.Request(dashboard(cluster), body, {"content-type": "application/json"}, method="PUT")
    urllib.request.urlopen(request, timeout=PATIENCE_S).close()


def dashboard(cluster):
    return f"http://{cluster.head_node.webui_url}/api/serve/applications/"


def deployments(cluster, app="ftray"):
    """What Ray Serve says of an app: replicas with their states and pids, by deployment."""
    with urllib.request.urlopen(dashboard(cluster), timeout=PATIENCE_S) as answer:
        apps = json.load(answer)["applications"]
    return {name: one["replicas"] for name, one in apps[app]["deployments"].items()} if app in apps else {}


def wait_until_ready(url, *, replicas):
    async def ready():
        async with Client(url) as client:

            async def there():
                try:
                    document = await client.get("/ready")
                except (aiohttp.ClientError, OSError):  # no proxy yet, or no app behind it
                    return False
                return document["status"] == "ready" and document["replicas"] == replicas

            await until(there, timeout_s=START_S)

    asyncio.run(ready())


def is_dead(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def engines(cluster):
    return [one for one in deployments(cluster)["engine"] if one["state"] == "RUNNING"]


async def idle(client):
    """Waits until no request is in any replica."""

    async def nothing():
        stats = [replica["stats"] for replica in await client.replicas()]
        return stats and not any(one["running"] + one["waiting"] for one in stats)

    await until(nothing)


def generated(replicas):
    return sum(replica["stats"]["generated_tokens"] for replica in replicas)


def residents(replicas, name):
    """Which versions of a name lie in which replica."""
    return {
        replica["id"]: {
            one["version"]
            for one in replica["residents"]
            if one["version"].startswith(f"{name}@") and one["state"] == "loaded"
        }
        for replica in replicas
    }
