"""What a job needs on the cluster, and no more: its file, the data that lies beside it, and this ftray."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import yaml

import ftray
from ftray.config.load import load_runs, load_serving, load_sweep
from ftray.config.schema import Run
from ftray.errors import ConfigError

LIMIT_BYTES = 100 * 2**20  # what a Ray dashboard takes in one upload; the archive is not compressed
_SCRIPT = '"""{nonce}"""\n\nimport sys\n\nfrom ftray.cli import job\n\nsys.exit(job.run("{command}"))\n'


@dataclass(frozen=True)
class Wanted:
    """A job as it was asked for. `files` are relative to the folder it is submitted from."""

    command: str
    name: str
    file: str
    files: tuple[str, ...]


def wanted(file: str, overrides: Sequence[str], *, command: str | None, root: Path) -> Wanted:
    """Reads the file and finds what it names. ConfigError for what would not be found on the cluster."""
    path = _inside(Path(file), root, f"{file}: submit from the folder that holds it")
    raw = _raw(Path(file))
    command = command or ("sweep" if "run" in raw else "train" if {"data", "stages"} & raw.keys() else "serve")
    if command == "serve":
        serving = load_serving(file, overrides)
        _shared(file, "storage", serving.storage)
        return Wanted(command, serving.name, path, (path,))
    if command == "sweep":
        sweep = load_sweep(file, overrides)
        runs, name, mine = [sweep.run], sweep.name, (path, *_run_file(raw.get("run"), Path(file), root))
    else:
        runs = load_runs(file, overrides)
        name, mine = runs[-1].name, (path,)
    _shared(file, "storage", runs[0].storage)
    found = [one for run in runs for text in _asked(run) for one in _beside(text, root)]
    return Wanted(command, name, path, tuple(dict.fromkeys([*mine, *found])))


@contextmanager
def bundled(job: Wanted, root: Path) -> Iterator[Path]:
    """A folder with just that while the block runs: what becomes the job's working folder.

    ConfigError where it is more than a cluster takes.
    """
    with TemporaryDirectory(prefix="ftray-submit-") as temporary:
        folder = Path(temporary)
        package = Path(ftray.__file__).parent
        shutil.copytree(package, folder / "ftray", ignore=shutil.ignore_patterns("__pycache__"))
        # New each time: Ray names an upload by its content, and may delete it for the job before while it skips ours.
        (folder / "job.py").write_text(_SCRIPT.format(command=job.command, nonce=uuid4().hex), encoding="utf-8")
        for name in job.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > LIMIT_BYTES:
            largest = max(job.files, key=lambda name: (root / name).stat().st_size)
            problem = f"{size / 2**20:.0f} MiB to upload, {largest} the largest; a cluster takes 100"
            raise ConfigError(
                job.file, [("", f"{problem}. Put it into storage, and name it by an absolute path or URI")]
            )
        yield folder


def _asked(run: Run) -> list[str]:
    """What a run names that may lie beside its file."""
    sources = [source.path for source in (*run.data.sources, *run.data.eval_sources)]
    forgetting = [run.evaluate.forgetting] if isinstance(run.evaluate.forgetting, str) else []
    tasks = [run.evaluate.lm_eval.folder] if run.evaluate.lm_eval.folder else []
    return [*sources, *forgetting, *tasks, *([] if run.model.version else [run.model.base])]


def _run_file(named: object, sweep: Path, root: Path) -> list[str]:
    """The file that `run:` of a sweep file names, if it is no section: from here, or from the sweep file's folder."""
    if not isinstance(named, str):
        return []
    found = Path(named) if Path(named).exists() else sweep.parent / named
    return [_inside(found, root, f"{named}: lies outside the folder that is submitted")]


def _raw(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {"data": None}  # load_run says what is wrong
    return content if isinstance(content, dict) else {"data": None}


def _shared(file: str, key: str, storage: str) -> None:
    if "://" not in storage and not Path(storage).is_absolute():
        problem = f"{storage} would be a folder of the job alone, and gone with it"
        raise ConfigError(file, [(key, f"{problem}; say s3://…, gs://…, or an absolute path that every node has")])


def _beside(text: str, root: Path) -> list[str]:
    """The files that a relative path, folder or glob means; none for URIs, absolute paths, and names of the Hub."""
    if "://" in text or text.startswith("builtin:") or Path(text).expanduser().is_absolute():
        return []
    matches = [Path(text)] if Path(text).exists() else [Path(one) for one in sorted(glob.glob(text, recursive=True))]
    inside = [file for one in matches for file in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    outside = f"{text}: lies outside the folder that is submitted"
    return [_inside(file, root, outside) for file in inside if file.is_file()]


def _inside(path: Path, root: Path, otherwise: str) -> str:
    try:
        return str(path.resolve().relative_to(root.resolve()))
    except ValueError:
        raise ConfigError(str(path), [("", f"{otherwise}, {root}")]) from None
