"""Reaching a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os

from ftray.errors import ClusterError


def connect(address: str | None) -> None:
    """Join the cluster at `address` or around us (RAY_ADDRESS, `ray job submit`), or start one on this machine."""
    import ray

    if ray.is_initialized():
        return
    # For a cluster that starts here: workers share their cores with Ray, so idle OpenMP threads give theirs away.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None if (address and address != "local") or "RAY_ADDRESS" in os.environ else False,
        )
    except Exception as error:  # a cluster that does not start, or answer, is told by Ray in bare Exceptions too
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"no Ray cluster at {where}: {said}; start one with `ray start --head`, "
            "or leave scale.address out to use this machine alone"
        ) from error
