"""The server on Ray Serve: what is deployed, started and stopped.

```text
client -> Serve's proxy -> Ingress (app, catalog, tokenizer) -> AdapterRouter -> EngineReplica (residency, engine)
```
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from ftray.config.serving import Serving, VllmEngine
from ftray.errors import ClusterError, ServeError
from ftray.models import chain
from ftray.ray_cluster import connect
from ftray.serve.processes import EngineReplica, Ingress
from ftray.store.paths import Storage

APPLICATION = "ftray.serve.deploy:application"
START_S = 600.0
DELETE_S = 30.0
POLL_S = 0.2
DRAIN_LOOP_S = 0.5
"""How often a stopping replica looks whether its requests are done; it has got the last of them by the first look."""
INGRESS_REQUESTS = 10_000
"""An ingress holds a request while it streams, which costs it little; replicas say when it is too much."""
ROUTER = "ftray.serve.routing.AdapterRouter"
ROUTER_STATS_S = 1.0
TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""How Serve's processes talk: 32 streams took 0.15 ms of an ingress's time a piece so, and 0.38 ms by Ray's defaults.
Set for the processes started here; a cluster's own proxies follow the environment of its nodes."""


def application(args: dict[str, Any]) -> Any:
    """The Serve application of a serve file's content; Serve configs and KubeRay's RayService name this function."""
    serving = Serving.model_validate(args)
    if serving.model.version:  # one version for all replicas, wherever its alias moves
        serving = chain.pinned(serving, Storage(serving.storage))
    content = serving.model_dump(mode="json")
    low, high = _replicas(serving)
    engine = ray_serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=_most_requests(serving),
        ray_actor_options=_resources(serving),
        health_check_timeout_s=30,
        request_router_config=RequestRouterConfig.model_validate(
            {"request_router_class": ROUTER, "request_routing_stats_period_s": ROUTER_STATS_S}
        ),
        **_scaling(serving, low, high),
        **_life(serving),
    )
    ingress = ray_serve.deployment(
        ray_serve.ingress()(Ingress),
        name="ingress",
        num_replicas=serving.scale.ingresses,
        max_ongoing_requests=INGRESS_REQUESTS,
        max_surge_percent=100,  # it takes no CPU: the new one is there before the old one leaves
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _environment()}},
        **_life(serving),
    )
    return ingress.bind(content, engine.bind(content))  # type: ignore[attr-defined]


def serve_config(serving: Serving) -> dict[str, Any]:
    """A Ray Serve config: for `serve deploy`, and as KubeRay's `serveConfigV2`."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": serving.http.host, "port": serving.http.port or 8000, **_timeouts(serving)},
        "applications": [
            {
                "name": serving.name,
                "route_prefix": "/",
                "import_path": APPLICATION,
                "args": serving.model_dump(mode="json"),
            }
        ],
    }


def serve(serving: Serving) -> int:
    """Serves until it is interrupted or terminated; then requests in work are finished, up to `scale.drain_s`."""
    with running(serving) as url:
        print(f"serving on {url}   (Ctrl-C stops it)", flush=True)
        stop = threading.Event()
        before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stop.wait(1.0):
                _check_running(serving.name)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        print("stopping: requests in work are finished first", flush=True)
    return 0


@contextlib.contextmanager
def running(serving: Serving):
    """The server while the block runs, on the cluster around us or one of its own; gives its address.

    ServeError when it does not come up, with what its replicas said.
    """
    connected = ray.is_initialized()
    if not connected:
        for name, value in TRANSPORT.items():  # for a cluster that starts here
            os.environ.setdefault(name, value)
        connect(serving.scale.address)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it says below that is said here too
    try:
        port = _start_proxies(serving)
        if serving.name in ray_serve.status().applications:
            raise ClusterError(
                f"name: an application {serving.name!r} is served on this cluster already; give this one another name, "
                f"or end that one with `serve delete {serving.name}`"
            )
        try:
            _deploy(serving)
            host = {"0.0.0.0": "127.0.0.1"}.get(serving.http.host, serving.http.host)
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        finally:
            _delete(serving)
    finally:
        if not connected:  # Serve goes with a cluster of our own; its own shutdown is slower, and says that it failed
            ray.shutdown()


def _start_proxies(serving: Serving) -> int:
    """The port where they listen. ClusterError when Serve runs already and listens elsewhere: it cannot be moved."""
    from ray.serve.context import _get_global_client

    http = serving.http
    there = _get_global_client(raise_if_no_controller_running=False)
    if there is None:
        if serving.scale.address in (None, "local") and "RAY_ADDRESS" not in os.environ:
            _check_port(serving)
        port = http.port or _free_port()
        loopback = http.host in ("127.0.0.1", "localhost", "::1")
        ray_serve.start(
            proxy_location="HeadOnly" if loopback else "EveryNode",
            http_options=HTTPOptions(host=http.host, port=port, **_timeouts(serving)),
            logging_config=LoggingConfig(enable_access_log=False),
        )
        return port
    at = there.http_config
    if at.host != http.host or http.port not in (0, at.port):
        raise ClusterError(
            f"http: Ray Serve runs on this cluster already and listens at {at.host}:{at.port}, not "
            f"{http.host}:{http.port}; say so in the serve file, or end it with `serve shutdown`"
        )
    return at.port


def _timeouts(serving: Serving) -> dict[str, Any]:
    """The proxy gives up only after the app would have answered."""
    return {"request_timeout_s": serving.limits.timeout_s + 30, "keep_alive_timeout_s": 90}


def _replicas(serving: Serving) -> tuple[int, int]:
    asked = serving.scale.replicas
    return (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])


def _scaling(serving: Serving, low: int, high: int) -> dict[str, Any]:
    if low == high:
        return {"num_replicas": low}
    scale = serving.scale
    return {
        "autoscaling_config": {
            "min_replicas": low,
            "max_replicas": high,
            "target_ongoing_requests": scale.target_ongoing,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": max(2.0, min(30.0, scale.upscale_delay_s)),
        }
    }


def _most_requests(serving: Serving) -> int:
    """Above what the replica itself refuses with 429, so that nothing waits where nobody sees it."""
    return serving.limits.max_queue + getattr(serving.engine, "max_batch", 64) + 64


def _resources(serving: Serving) -> dict[str, Any]:
    scale, engine = serving.scale, serving.engine
    gpus = scale.gpus_per_replica
    if gpus == "auto":
        has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
        gpus = engine.tensor_parallel if isinstance(engine, VllmEngine) else int(has_gpus and engine.kind != "encoder")
    cpus = 1 if scale.cpus_per_replica == "auto" else scale.cpus_per_replica
    threads = getattr(engine, "threads", "auto")
    variables = {"OMP_NUM_THREADS": str(max(1, int(cpus)) if threads == "auto" else threads)}
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables | _environment()}}


def _environment() -> dict[str, str]:
    """Where a process finds the base, and how it talks."""
    return TRANSPORT | {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}


def _life(serving: Serving) -> dict[str, Any]:
    """How any replica is watched and stopped. Requests are logged by the app, once."""
    return {
        "graceful_shutdown_timeout_s": serving.scale.drain_s,
        "graceful_shutdown_wait_loop_s": DRAIN_LOOP_S,
        "health_check_period_s": 2,
        "logging_config": LoggingConfig(enable_access_log=False),
    }


def _deploy(serving: Serving) -> None:
    """Returns once the application answers. ServeError where it does not come up, with what its replicas said."""
    target = ray_serve.RunTarget(application(serving.model_dump(mode="json")), name=serving.name, route_prefix="/")
    try:
        ray_serve.run_many([target], wait_for_applications_running=False)
    except RayServeException as error:
        raise ServeError(f"Ray Serve refuses the application: {getattr(error, 'cause', error)}") from None
    end = time.monotonic() + START_S
    while True:
        app = ray_serve.status().applications.get(serving.name)
        if app is not None and app.status == "RUNNING":
            return
        if app is not None and _has_failed(app):
            raise ServeError(f"the server does not come up: {_reason(app)}")
        if time.monotonic() > end:
            raise ServeError(f"the server is not up after {START_S:.0f} s: {_reason(app) if app else 'no answer'}")
        time.sleep(POLL_S)


def _has_failed(app: Any) -> bool:
    """Serve tries three times before it says so; the first try says enough to whoever waits for it."""
    started = any("failed to start" in one.message for one in app.deployments.values())
    return started or app.status in ("DEPLOY_FAILED", "UNHEALTHY")


def _delete(serving: Serving) -> None:
    """Returns once its requests are finished, or their time is over."""
    ray_serve.delete(serving.name, _blocking=False)
    end = time.monotonic() + serving.scale.drain_s + DELETE_S
    while serving.name in ray_serve.status().applications and time.monotonic() < end:
        time.sleep(POLL_S)


def _check_running(name: str) -> None:
    """ServeError where somebody else took the application away."""
    with contextlib.suppress(ray.exceptions.RayError):
        if name not in ray_serve.status().applications:
            raise ServeError(f"the application {name!r} was deleted by somebody else")


def _reason(app: Any) -> str:
    """The last line of what the replicas, or else Serve, said."""
    said = [*(one.message for one in app.deployments.values()), app.message]
    last = next((line.strip() for text in said for line in reversed(text.splitlines()) if line.strip()), "?")
    return re.sub(r"^ftray\.errors\.\w+: ", "", last)


def _check_port(serving: Serving) -> None:
    """ClusterError when another program listens there; Serve would say so in a log only."""
    if not serving.http.port:
        return
    family = socket.AF_INET6 if ":" in serving.http.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.http.host, serving.http.port))
        except OSError as error:
            raise ClusterError(
                f"http.port: {serving.http.host}:{serving.http.port} cannot be used ({error.strerror}); stop what "
                "listens there, or say http.port=0 for a free one"
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
