"""What Prometheus reads at /metrics. Labels are routes and registered versions, never what a client made up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ftray.serve.call import Call
from ftray.serve.fleet import ReplicaState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_GAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_REPLICA_GAUGES = {
    "running": "requests in work",
    "waiting": "requests that wait",
    "cache_tokens": "tokens in the cache",
    "cache_capacity": "tokens that fit into the cache",
    "step_s": "seconds of the last step, smoothed",
}
_REPLICA_COUNTERS = {
    "prompt_tokens": "prompt tokens",
    "cached_prompt_tokens": "prompt tokens that were not computed again",
    "generated_tokens": "tokens generated",
    "steps": "steps of the engine",
}


class Metrics:
    """Of this process; where several speak HTTP, each has its own and Prometheus adds them up."""

    def __init__(self) -> None:
        made = CollectorRegistry()
        self.in_flight = Gauge("ftray_requests_in_flight", "requests being answered", registry=made)
        self.gap = Histogram(
            "ftray_inter_token_seconds", "between two tokens of a stream", buckets=_GAPS, registry=made
        )
        self._requests = Counter(
            "ftray_requests", "by route, version and status", ["route", "version", "status"], registry=made
        )
        self._errors = Counter("ftray_errors", "by what went wrong", ["code"], registry=made)
        self._seconds = Histogram("ftray_request_seconds", "whole requests", ["route"], buckets=_SECONDS, registry=made)
        self._first = Histogram(
            "ftray_time_to_first_token_seconds",
            "of a stream, from the request to its first piece",
            ["route"],
            buckets=_SECONDS,
            registry=made,
        )
        self._prompt = Counter("ftray_prompt_tokens", "tokens of prompts", ["version"], registry=made)
        self._cached = Counter("ftray_cached_prompt_tokens", "of those, not computed again", ["version"], registry=made)
        self._new = Counter("ftray_new_tokens", "tokens generated", ["version"], registry=made)
        self._made = made
        self._moves = Counter(
            "ftray_adapter_moves", "by what was asked and how it ended", ["action", "outcome"], registry=made
        )

    def record(self, call: Call, *, route: str) -> None:
        """A request that is over."""
        self._requests.labels(route, call.version, str(call.status)).inc()
        self._seconds.labels(route).observe(call.elapsed_s)
        if call.error is not None:
            self._errors.labels(call.error).inc()
        if call.stream and call.ttft_s is not None:  # an answer that is not streamed may come as one piece
            self._first.labels(route).observe(call.ttft_s)
        if call.prompt_tokens:
            self._prompt.labels(call.version).inc(call.prompt_tokens)
            self._cached.labels(call.version).inc(call.cached_tokens)
            self._new.labels(call.version).inc(call.new_tokens)

    def moved(self, action: str, outcome: str) -> None:
        """`outcome`: ok, or the error's code."""
        self._moves.labels(action, outcome).inc()

    def page(self, states: Sequence[ReplicaState] | None, *, stale_s: float) -> bytes:
        """The text that Prometheus reads. `states` None: the fleet gave no answer; `stale_s` is the catalog's."""
        own = generate_latest(self._made)
        now = CollectorRegistry()
        now.register(_Snapshot(states, stale_s))
        return own + generate_latest(now)


class _Snapshot(Collector):
    """The replicas as they are now: one that is gone is not told of any more."""

    def __init__(self, states: Sequence[ReplicaState] | None, stale_s: float):
        self._states = states
        self._stale_s = stale_s

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("ftray_registry_stale_seconds", "since it could be read last; 0: it can", self._stale_s)
        yield GaugeMetricFamily("ftray_replicas", "that answer", len(self._states or ()))
        yield from _engines(self._states or ())
        yield from _residents(self._states or ())


def _engines(states: Sequence[ReplicaState]) -> Iterable[Metric]:
    for name, text in _REPLICA_GAUGES.items():
        gauge = GaugeMetricFamily(f"ftray_replica_{name}", text, labels=["replica"])
        for state in states:
            gauge.add_metric([state.id], getattr(state.stats, name))
        yield gauge
    for name, text in _REPLICA_COUNTERS.items():
        counter = CounterMetricFamily(f"ftray_replica_{name}", text, labels=["replica"])
        for state in states:
            counter.add_metric([state.id], getattr(state.stats, name))
        yield counter


def _residents(states: Sequence[ReplicaState]) -> Iterable[Metric]:
    resident = GaugeMetricFamily(
        "ftray_resident_version", "1 for each version in a replica", labels=["replica", "version", "state", "room"]
    )
    in_use = GaugeMetricFamily("ftray_version_in_use", "requests that use it", labels=["replica", "version"])
    load = GaugeMetricFamily("ftray_version_load_seconds", "how long it took to load", labels=["replica", "version"])
    for state in states:
        for held in state.residents:
            where = [state.id, held.version.id]
            resident.add_metric([*where, held.state, held.room or ""], 1)
            in_use.add_metric(where, held.in_use)
            if held.load_s is not None:
                load.add_metric(where, held.load_s)
    yield from (resident, in_use, load)
