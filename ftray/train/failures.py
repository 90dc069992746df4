"""How often to checkpoint: the interval that loses the least time to failures, by formula and by simulation. Pure.

A checkpoint stops training for `save_s`; a failure comes after `mtbf_s` on average, loses what was done since the last
checkpoint, and costs `restart_s` until training goes on. All in seconds.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

GPU_MTBF_H = 50_000
"""Hours between failures of one GPU with its share of host and network: 419 unexpected interruptions in 54 days on
16,384 H100s (Llama 3, arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class Outcome:
    """A simulated run. `wall_s` is all of it; the rest of it beside the work itself, by cause."""

    wall_s: float
    saving_s: float
    repeated_s: float
    restarting_s: float
    failures: int


def mtbf_s(gpus: int, *, gpu_mtbf_h: float = GPU_MTBF_H) -> float:
    """Of a group in which each failure stops all: failures of GPUs that fail independently add up."""
    return gpu_mtbf_h * 3600 / gpus


def young_daly_s(*, save_s: float, mtbf_s: float) -> float:
    """The best interval, to first order: sqrt(2 save mtbf) (Young 1974; Daly 2006, equation 1). At most `mtbf_s`."""
    return min(math.sqrt(2 * save_s * mtbf_s), mtbf_s)


def expected_s(work_s: float, *, interval_s: float, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """Expected wall time with exponential failures, also while saving and restarting (Daly 2006, equation 20).

    M e^(R/M) (e^((t+d)/M) - 1) W/t for interval t, saving d, restart R, mean time between failures M, work W.
    """
    segment = math.expm1((interval_s + save_s) / mtbf_s)
    return mtbf_s * math.exp(restart_s / mtbf_s) * segment * work_s / interval_s


def best_interval_s(*, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """What makes `expected_s` least, by golden section: better than Young's formula where failures are frequent."""
    low, high = math.log(max(save_s, 1e-3) / 10), math.log(mtbf_s * 10)
    ratio = (math.sqrt(5) - 1) / 2

    def cost(log_s: float) -> float:
        interval = math.exp(log_s)
        if (interval + save_s) / mtbf_s > 500:
            return math.inf
        return expected_s(1.0, interval_s=interval, save_s=save_s, restart_s=restart_s, mtbf_s=mtbf_s)

    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if cost(left) <= cost(right) else (left, high)
    return math.exp((low + high) / 2)


def simulate(
    work_s: float, *, interval_s: float, save_s: float, restart_s: float, mtbf_s: float, seed: int = 0
) -> Outcome:
    """One run with failures drawn from an exponential distribution; they strike while saving and restarting too."""
    chance = random.Random(seed)
    saved = wall = saving = repeated = restarting = 0.0
    failures = 0
    next_failure = chance.expovariate(1 / mtbf_s)
    while saved < work_s:
        step = min(interval_s, work_s - saved)
        last = saved + step >= work_s
        end = wall + step + (0 if last else save_s)
        if next_failure >= end:
            wall, saved = end, saved + step
            saving += 0 if last else save_s
            continue
        repeated += next_failure - wall
        wall = next_failure
        while True:  # a restart that fails is begun again
            failures += 1
            next_failure = wall + chance.expovariate(1 / mtbf_s)
            if next_failure >= wall + restart_s:
                wall, restarting = wall + restart_s, restarting + restart_s
                break
            restarting += next_failure - wall
            wall = next_failure
    return Outcome(wall, saving, repeated, restarting, failures)


def lost_gpu_hours(outcome: Outcome, *, gpus: int) -> float:
    return (outcome.saving_s + outcome.repeated_s + outcome.restarting_s) * gpus / 3600
