"""The head of a cluster dies and comes back: a run resumes by its name, a server answers all the while."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from ftray.config.load import load_run
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from tests.cluster.conftest import curve, free_port, repeated, rows
from tests.cluster.own_cluster import OwnCluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INTERVAL = 5
OUTAGE_S = 8


@pytest.fixture
def own(tmp_path):
    cluster = OwnCluster(tmp_path, workers=2, cpus=1)
    yield cluster
    cluster.close()


def wait(what, timeout_s=200):
    end = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < end, f"not seen in {timeout_s} s"
        time.sleep(0.2)
    return found


def test_a_run_goes_on_by_its_name_after_its_head_and_driver_were_lost(own, run_file, undisturbed):
    path = run_file(scale__address=own.address)
    run = load_run(path)
    folder = RunFolder(Storage(run.storage), run.name)
    command = [sys.executable, "-m", "ftray.cli", "train", str(path)]

    def start():
        return subprocess.Popen(
            command, env=os.environ | own.token, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    driver = start()
    wait(lambda: any(row["step"] >= 12 for row in rows(folder, "train")) or driver.poll() is not None)
    assert driver.poll() is None, driver.stderr.read()
    driver.kill()
    own.kill_head()
    driver.wait()
    began = time.monotonic()
    own.start_head()
    again = start()
    wait(lambda: len(rows(folder, "started")) > 1 or again.poll() is not None)
    print(f"head: training again after {time.monotonic() - began:.0f} s")
    assert again.wait(200) == 0, again.stderr.read()
    resumed = rows(folder, "started")[1]
    assert resumed["resumed"]
    assert repeated(folder) <= INTERVAL
    made = curve(folder)  # without what the driver had not fetched when it died
    assert made.keys() >= {*range(resumed["step"] + 1, 31)}
    assert made == pytest.approx({step: undisturbed[step] for step in made}, abs=1e-5)


class Asking:
    """A client that asks the server five times a second and notes (when, status, lost or another error's name)."""

    def __init__(self, url):
        self.url, self.answers, self.over = url, [], threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)
        self.thread.start()

    def _ask(self):
        body = json.dumps({"model": "base", "prompt": "two lattes", "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"content-type": "application/json"})
        while not self.over.wait(0.2):
            began = time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    told = answer.status
            except urllib.error.HTTPError as error:
                told = error.code
            except OSError as error:
                lost = isinstance(error, ConnectionError) or isinstance(error.__context__, ConnectionError)
                told = "lost" if lost else type(error).__name__
            self.answers.append((began, told))

    def since(self, moment):
        return [told for began, told in self.answers if began >= moment]

    def end(self):
        self.over.set()
        self.thread.join()


def test_a_server_answers_while_its_head_is_gone_and_is_whole_again_afterwards(own, small_base, tmp_path):
    from ftray.config.serving import Serving
    from ftray.serve.deploy import serve_config

    port = free_port()
    serving = Serving.model_validate(
        {
            "storage": str(tmp_path / "store"),
            "model": {"base": str(small_base), "dtype": "fp32"},
            "engine": {"kind": "bank", "threads": 1},
            "http": {"port": port},
            "scale": {"replicas": 1, "cpus_per_replica": 0.5},
        }
    )
    own.applications(serve_config(serving))
    url = f"http://127.0.0.1:{port}"
    asking = Asking(url)
    try:
        wait(lambda: asking.since(time.monotonic() - 5)[-5:] == [200] * 5)
        lost = time.monotonic()
        own.kill_head()
        time.sleep(OUTAGE_S)
        during = asking.since(lost)
        own.start_head()
        back = time.monotonic()
        wait(lambda: [app["status"] for app in own.applications().values()] == ["RUNNING"])
        others = sorted({str(told) for told in during if told != 200})
        print(f"head gone for {back - lost:.0f} s: {during.count(200)} of {len(during)} answered, the others {others}")
        print(f"Ray Serve whole again {time.monotonic() - back:.0f} s later")
        wait(lambda: asking.since(time.monotonic() - 5)[-5:] == [200] * 5)
        assert during.count(200) > len(during) / 2
        assert not [told for told in asking.since(lost) if told not in (200, 503, "lost")]
    finally:
        asking.end()
