"""Drills with real processes: many writers at once, and `kill -9` before every single file operation.

Runs as a script in a process of its own, so that the heavy imports happen once and children are forked from a process
without threads. Prints {drill: what went wrong, or null}.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ftray.errors import RegistryError, StorageError
from ftray.store.checkpoints import Checkpoints
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder

FORK = multiprocessing.get_context("fork")
FILE_OPERATIONS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def save_adapter(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    module = "base_model.model.layers.0.q_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.full((2, 8), value),
        f"{module}.lora_B.weight": torch.full((8, 2), value),
    }
    safetensors.torch.save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "builtin:tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# many writers at once


def together(count: int, work) -> list:
    """Runs work(0), …, work(count - 1) in processes that start at the same moment; an exception is its result."""
    barrier, results = FORK.Barrier(count), FORK.Queue()

    def child(index: int) -> None:
        barrier.wait()
        try:
            results.put((index, work(index)))
        except Exception as error:
            results.put((index, error))

    processes = [FORK.Process(target=child, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [found[index] for index in range(count)]


def one_writer_creates_a_file(root: Path) -> None:
    storage = Storage(str(root))
    for turn in range(10):
        won = together(4, lambda index, turn=turn: storage.create(f"race/{turn}", str(index).encode()))
        assert sorted(won) == [False, False, False, True], won
        assert storage.read_bytes(f"race/{turn}") == str(won.index(True)).encode()


def publishers_claim_different_numbers(root: Path) -> None:
    registry = Registry(Storage(str(root / "store")))
    folders = [save_adapter(root / f"out{index}", index + 1.0) for index in range(6)]
    versions = together(6, lambda index: registry.publish("bot", folders[index], {"n": index}, key=f"run-{index}"))
    assert sorted(version.number for version in versions) == [1, 2, 3, 4, 5, 6], versions
    for index, version in enumerate(versions):
        assert registry.resolve(version.id).card["n"] == index
        assert safetensors.torch.load_file(registry.fetch(version) / "adapter_model.safetensors")
    assert len(registry.versions("bot")) == 6


def one_publication_makes_one_version(root: Path) -> None:
    folder = save_adapter(root / "out")
    for turn in range(10):
        registry = Registry(Storage(str(root / f"store{turn}")))
        versions = together(4, lambda index, r=registry: r.publish("bot", folder, {"by": index}, key="run-1"))
        assert len(set(map(str, versions))) == 1, versions
        assert registry.versions("bot") == [versions[0]]
        assert registry.publish("bot", folder, {}, key="run-1") == versions[0]
        left = [name for name in registry.storage.list("adapters/bot") if name.startswith("v")]
        assert left == [f"v{versions[0].number}"], left


def one_of_many_moves_wins(root: Path) -> None:
    registry = Registry(Storage(str(root / "store")))
    for number in (1, 2):
        registry.publish("bot", save_adapter(root / "out", number), {}, key=f"run-{number}")
    for turn in range(10):
        seen = registry.aliases("bot")["prod"].number if turn else 0
        moves = together(4, lambda index, seen=seen: registry.promote(f"bot@v{index % 2 + 1}", expect=seen))
        won = [move for move in moves if not isinstance(move, Exception)]
        lost = [move for move in moves if isinstance(move, RegistryError)]
        assert (len(won), len(lost)) == (1, 3), moves
        assert registry.aliases("bot")["prod"] == won[0]
    assert [state.number for state in registry.history("bot")] == list(range(1, 11))


def a_version_in_use_is_not_deleted(root: Path) -> None:
    """Deleting against promoting and holding: whoever was told "yes" is right."""
    registry = Registry(Storage(str(root / "store")))
    deleted = 0
    for turn in range(24):
        version = registry.publish("bot", save_adapter(root / "out", turn), {}, key=f"run-{turn}")

        def work(index: int, ref: str = version.id, turn: int = turn):
            if index == 0:
                return registry.delete(ref)
            time.sleep(turn % 6 * 0.0003)  # so that each side is first at times
            return registry.promote(ref, by=str(index)) if index == 1 else registry.hold(ref, "replica", ttl_s=60)

        removed, promoted, held = (not isinstance(result, RegistryError) for result in together(3, work))
        exists = version in registry.versions("bot")
        prod = registry.aliases("bot").get("prod")
        assert removed != exists
        assert not (removed and (promoted or held)), (removed, promoted, held)
        assert not promoted or prod.main == version.number
        assert prod is None or registry.resolve("bot@prod")
        deleted += removed
        if exists:
            registry.release(version.id, "replica")
    print(f"{deleted} of 24 deletions were first", file=sys.stderr)


def one_driver_follows_a_dead_one(root: Path) -> None:
    run = RunFolder(Storage(str(root)), "demo")
    for turn in range(5):
        dead = FORK.Process(target=_hold_and_die, args=(run,))
        dead.start()
        dead.join()
        assert dead.exitcode == -signal.SIGKILL
        release = FORK.Event()

        def drive(index: int, release=release) -> str:
            with run.lease({"driver": index}):
                release.wait(20)
                return "held"

        # Whoever holds stays until all the others were refused.
        refused = FORK.Value("i", 0)

        def attempt(index: int, refused=refused, release=release, drive=drive):
            try:
                return drive(index)
            except StorageError as error:
                with refused.get_lock():
                    refused.value += 1
                    if refused.value == 3:
                        release.set()
                return str(error)

        begun = time.monotonic()
        results = together(4, attempt)
        assert results.count("held") == 1, (turn, results)
        assert sum("run demo is being trained by pid" in result for result in results) == 3, results
        assert time.monotonic() - begun < 10
        assert run.holder() is None


def _hold_and_die(run: RunFolder) -> None:
    with run.lease():
        os.kill(os.getpid(), signal.SIGKILL)


def a_live_driver_is_not_followed_and_a_killed_one_is_at_once(root: Path) -> None:
    run = RunFolder(Storage(str(root)), "demo")
    ready = FORK.Event()

    def drive() -> None:
        with run.lease({}, beat_s=0.05):
            ready.set()
            time.sleep(60)

    driver = FORK.Process(target=drive)
    driver.start()
    assert ready.wait(20)
    for signal_ in (0, signal.SIGSTOP):
        os.kill(driver.pid, signal_)
        time.sleep(0.5)  # ten missed beats: a stopped process of this machine is not dead
        with pytest.raises(StorageError, match=f"run demo is being trained by pid {driver.pid} on host"):
            run.lease({}).__enter__()
    os.kill(driver.pid, signal.SIGKILL)  # not waited for: a zombie is dead too
    begun = time.monotonic()
    while run.holder() is not None and time.monotonic() - begun < 5:
        time.sleep(0.01)
    with run.lease({}):
        assert run.holder()["pid"] == os.getpid()
    assert time.monotonic() - begun < 5
    driver.join()


def metrics_of_several_writers_are_whole(root: Path) -> None:
    run = RunFolder(Storage(str(root)), "demo")

    def write(index: int) -> None:
        for step in range(50):
            run.append_metrics([{"kind": f"w{index}", "step": step, "text": "x" * 300}])

    assert together(4, write) == [None] * 4
    assert len(run.metrics()) == 200


# kill -9 before every file operation


def killed_everywhere(root: Path, *, prepare, act, after_crash, after_repeat) -> int:
    """Kills a process that does `act` before its first file operation, then its second, …, until it gets through.

    After each kill `after_crash` looks at what is left; then `act` is repeated and `after_repeat` looks again.
    """
    before = root.with_name("before")
    before.mkdir(parents=True)
    prepare(before)
    number = 0
    while True:
        number += 1
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        killed = _forked(lambda n=number: (_kill_before(n, root), act(root)))
        after_crash(root)
        act(root)
        after_repeat(root)
        if not killed:
            return number


def _forked(work) -> bool:
    """True if the child was killed, False if it got through."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _kill_before(number: int, root: Path) -> None:
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and any(str(root) in str(argument) for argument in arguments[:2]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def a_killed_publisher_leaves_a_version_or_none(root: Path) -> None:
    source = save_adapter(root / "out")

    def registry(store: Path) -> Registry:
        return Registry(Storage(str(store)))

    def prepare(store: Path) -> None:
        registry(store).publish("bot", source, {}, key="earlier")
        registry(store).promote("bot@v1")

    def whole(store: Path) -> list[str]:
        versions = registry(store).versions("bot")
        for version in versions:
            assert safetensors.torch.load_file(registry(store).fetch(version) / "adapter_model.safetensors")
        assert registry(store).resolve("bot").number == 1
        return [version.card["publication"] for version in versions]

    def after_crash(store: Path) -> None:
        assert whole(store) in (["earlier"], ["earlier", "run"])

    def after_repeat(store: Path) -> None:
        assert whole(store) == ["earlier", "run"]
        folders = {name for name in os.listdir(store / "adapters/bot") if name.startswith("v")}
        assert folders == {f"v{version.number}" for version in registry(store).versions("bot")}

    def act(store: Path) -> None:
        registry(store).publish("bot", source, {}, key="run")

    kills = killed_everywhere(
        root / "store", prepare=prepare, act=act, after_crash=after_crash, after_repeat=after_repeat
    )
    assert kills > 20, kills


def a_killed_promotion_moved_the_alias_or_not(root: Path) -> None:
    source = save_adapter(root / "out")

    def registry(store: Path) -> Registry:
        return Registry(Storage(str(store)))

    def prepare(store: Path) -> None:
        for number in (1, 2):
            registry(store).publish("bot", source, {}, key=str(number))
        registry(store).promote("bot@v1")

    def after_crash(store: Path) -> None:
        assert registry(store).resolve("bot@prod").number in (1, 2)

    def after_repeat(store: Path) -> None:
        assert registry(store).resolve("bot@prod").number == 2
        assert registry(store).rollback("bot").targets == {1: 1.0}

    def act(store: Path) -> None:
        registry(store).promote("bot@v2")

    killed_everywhere(root / "store", prepare=prepare, act=act, after_crash=after_crash, after_repeat=after_repeat)


def a_killed_deletion_is_finished_by_repeating_it(root: Path) -> None:
    source = save_adapter(root / "out")

    def registry(store: Path) -> Registry:
        return Registry(Storage(str(store)))

    def prepare(store: Path) -> None:
        for number in (1, 2):
            registry(store).publish("bot", source, {}, key=str(number))
        registry(store).hold("bot@v2", "past", ttl_s=-1)

    def after_crash(store: Path) -> None:
        for version in registry(store).versions("bot"):
            registry(store).fetch(version)
            registry(store).promote(version.id, alias="canary")  # a dead deleter blocks nobody
            registry(store).drop_alias("bot", "canary")

    def after_repeat(store: Path) -> None:
        assert [version.number for version in registry(store).versions("bot")] == [1]
        assert not (store / "adapters/bot/v2").exists()
        assert registry(store).publish("bot", source, {}, key="3").number == 3

    def act(store: Path) -> None:
        registry(store).delete("bot@v2")

    killed_everywhere(root / "store", prepare=prepare, act=act, after_crash=after_crash, after_repeat=after_repeat)


def a_killed_checkpoint_leaves_the_one_before(root: Path) -> None:
    def checkpoints(store: Path) -> Checkpoints:
        return Checkpoints(Storage(str(store)), "demo")

    def write(store: Path, step: int) -> None:
        folder = checkpoints(store).folder(step, os.urandom(4).hex())
        parts = [
            checkpoints(store).write_part(folder, f"rank{rank}", {f"w{rank}": torch.full((64,), float(step))})
            for rank in range(2)
        ]
        checkpoints(store).commit(folder, step, parts, {"position": step})
        checkpoints(store).prune(1)

    def value(store: Path) -> float:
        newest = checkpoints(store).newest()
        tensors = checkpoints(store).read(newest)
        assert sorted(tensors) == ["w0", "w1"]
        assert newest.meta == {"position": newest.step}
        assert all(tensor.eq(newest.step).all() for tensor in tensors.values())
        return newest.step

    def after_crash(store: Path) -> None:
        assert value(store) in (10, 20)

    def after_repeat(store: Path) -> None:
        assert value(store) == 20
        write(store, 30)
        folder = store / "runs/demo/checkpoints"
        assert len(os.listdir(folder)) == 1, os.listdir(folder)

    killed_everywhere(
        root / "store",
        prepare=lambda store: write(store, 10),
        act=lambda store: write(store, 20),
        after_crash=after_crash,
        after_repeat=after_repeat,
    )


def a_killed_fresh_start_resumes_nothing_of_before(root: Path) -> None:
    def run(store: Path) -> RunFolder:
        return RunFolder(Storage(str(store)), "demo")

    def checkpoint(store: Path, step: int) -> None:
        checkpoints = Checkpoints(Storage(str(store)), "demo")
        folder = checkpoints.folder(step, "a")
        checkpoints.commit(folder, step, [checkpoints.write_part(folder, "all", {"w": torch.ones(4)})], {})

    def prepare(store: Path) -> None:
        run(store).begin({"life": 1}, fresh=False)
        for step in (1, 2):
            checkpoint(store, step)
        run(store).append_metrics([{"kind": "train", "step": 1}])

    def after_crash(store: Path) -> None:
        if run(store).resolved() == {"life": 1}:  # nothing happened yet, or all of the old run would be there
            steps = [found.step for found in Checkpoints(Storage(str(store)), "demo").complete()]
            assert steps == [2, 1]
            return
        run(store).begin({"life": 3}, fresh=False)
        assert Checkpoints(Storage(str(store)), "demo").newest() is None
        assert run(store).metrics() == []

    def after_repeat(store: Path) -> None:
        assert run(store).resolved() == {"life": 2}
        assert run(store).state()["status"] == "preparing"
        assert Checkpoints(Storage(str(store)), "demo").newest() is None

    killed_everywhere(
        root / "store",
        prepare=prepare,
        act=lambda store: run(store).begin({"life": 2}, fresh=True),
        after_crash=after_crash,
        after_repeat=after_repeat,
    )


def a_killed_driver_never_locks_the_run(root: Path) -> None:
    def run(store: Path) -> RunFolder:
        return RunFolder(Storage(str(store)), "demo")

    def act(store: Path) -> None:
        with run(store).lease({}, beat_s=60):
            run(store).set_state(status="training", step=3)

    def after_crash(store: Path) -> None:
        assert run(store).holder() is None
        assert run(store).state().get("step") in (None, 3)

    def after_repeat(store: Path) -> None:
        assert run(store).state()["status"] == "training"
        assert run(store).holder() is None

    killed_everywhere(
        root / "store",
        prepare=lambda store: _forked(lambda: _hold_and_die(run(store))),
        act=act,
        after_crash=after_crash,
        after_repeat=after_repeat,
    )


DRILLS = [
    one_writer_creates_a_file,
    publishers_claim_different_numbers,
    one_publication_makes_one_version,
    one_of_many_moves_wins,
    a_version_in_use_is_not_deleted,
    one_driver_follows_a_dead_one,
    a_live_driver_is_not_followed_and_a_killed_one_is_at_once,
    metrics_of_several_writers_are_whole,
    a_killed_publisher_leaves_a_version_or_none,
    a_killed_promotion_moved_the_alias_or_not,
    a_killed_deletion_is_finished_by_repeating_it,
    a_killed_checkpoint_leaves_the_one_before,
    a_killed_fresh_start_resumes_nothing_of_before,
    a_killed_driver_never_locks_the_run,
]


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk to wait for
    found = {}
    for drill in DRILLS:
        if names and drill.__name__ not in names:
            continue
        with tempfile.TemporaryDirectory(dir=memory, prefix="drill-") as folder:
            begun = time.monotonic()
            try:
                drill(Path(folder))
                found[drill.__name__] = None
            except BaseException:
                found[drill.__name__] = traceback.format_exc()
            print(f"{drill.__name__}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
