"""Sweeps as the cluster tests start, watch and read them."""

import csv
import os
import subprocess
import sys
import time

from ftray.config.load import load_sweep
from ftray.store.paths import Storage
from ftray.sweep.records import SweepFolder


def swept(path, **options):
    from ftray.sweep.engine import sweep

    return sweep(load_sweep(path), as_json=True, **options)


def folder_of(path):
    asked = load_sweep(path)
    return SweepFolder(Storage(asked.run.storage), asked.name)


def driver_of(cluster, path):
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    return subprocess.Popen([sys.executable, "-m", "ftray.cli", "sweep", str(path), "--json"], env=environment)


def until(what, driver, timeout_s=900):
    end = time.monotonic() + timeout_s
    while not what():
        assert driver.poll() is None, "the driver ended"
        assert time.monotonic() < end
        time.sleep(0.2)


def table_of(folder):
    text = folder.storage.read_bytes(f"{folder.key}/report/trials.csv").decode()
    timed = ("seconds",)
    rows = [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(text.splitlines())]
    for row in rows:
        row["loss"] = round(float(row["loss"]), 5)
    return rows
