"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "ftray"

# Each part and the parts it may import, inside functions too. A part that is not here may import nothing.
ARROWS = {
    "errors": set(),
    "ray_cluster": {"errors"},
    "plain_template": set(),
    "config": {"errors"},
    "store": {"errors", "config"},
    "data": {"errors", "plain_template", "config", "store"},
    "models": {"errors", "config", "store"},
    "objectives": {"errors", "config", "store", "data", "models"},
    "evaluate": {"errors", "config", "store", "data", "models", "objectives"},
    "train": {"errors", "ray_cluster", "plain_template", "config", "store", "data", "models", "objectives", "evaluate"},
    "sweep": {"errors", "config", "store", "data", "models", "evaluate", "train"},
    "serve": {"errors", "ray_cluster", "plain_template", "config", "store", "models"},
    "submit": {"errors", "config"},
    "doctor": {"errors", "ray_cluster", "config", "store", "models", "train"},
    "cli": {
        "errors",
        "config",
        "store",
        "data",
        "models",
        "objectives",
        "evaluate",
        "train",
        "sweep",
        "serve",
        "submit",
        "doctor",
    },
}
HEAVY = ("torch", "ray", "transformers", "peft", "deepspeed", "datasets", "pyarrow")


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{package}: relative import on line {node.lineno}; write it out"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "ftray")


@pytest.mark.parametrize("path", sorted(CODE.rglob("*.py")), ids=lambda path: str(path.relative_to(CODE)))
def test_a_module_imports_only_what_lies_below_it(path):
    part = path.relative_to(CODE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    allowed = ARROWS.get(part, set()) | {part, "__version__"}
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), str(path)):
        if name.startswith("ftray."):
            assert name.split(".")[1] in allowed, f"{part} imports {name}"


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_the_config_brings_in_no_torch_and_no_ray():
    loaded = modules_after("import ftray.config.schema, ftray.config.load, ftray.config.init, ftray.errors")
    assert loaded.isdisjoint(HEAVY)


def test_importing_the_command_line_brings_in_no_pydantic_either():
    loaded = modules_after("import ftray.cli; ftray.cli.parser.build().format_help()")
    assert loaded.isdisjoint({*HEAVY, "pydantic", "yaml", "numpy", "rich"})


def test_importing_the_store_brings_in_no_torch_and_no_ray():
    loaded = modules_after("import ftray.store.paths, ftray.store.runs, ftray.store.checkpoints, ftray.store.registry")
    assert loaded.isdisjoint(HEAVY)


def test_importing_the_objectives_brings_in_no_peft():
    """Which takes seconds, and every driver imports them to check its run."""
    assert "peft" not in modules_after("import ftray.objectives, ftray.models.generate")


def test_a_command_of_the_registry_loads_neither_torch_nor_ray(tmp_path):
    loaded = modules_after(f"from ftray.cli import main\nmain(['adapters', 'list', '--storage', {str(tmp_path)!r}])")
    assert loaded.isdisjoint({"torch", "ray", "transformers", "peft"})
