"""The direction of imports and the three borders are tests, so that they hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offmanifold

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "offmanifold"
LAYERS = [
    tuple(re.split(r"\s{2,}", line.strip())[0].split())
    for line in (offmanifold.__doc__ or "").partition("::")[2].splitlines()
    if line.startswith("    ")
]
"""As the package documents them, from the bottom up: a module imports its own layer and what stands above it in that list."""

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    name = module.split(".")[1]
    return next(index for index, names in enumerate(LAYERS) if name in names)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            found |= {f"{node.module}.{alias.name}" if node.module == "offmanifold" else node.module for alias in node.names}
    return found


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("file", [f for f in FILES if f.parent != PACKAGE or f.name != "__init__.py"], ids=module_of)
def test_imports_go_one_way(file):
    own = layer(module_of(file))
    for name in imports(file):
        if name.startswith("offmanifold."):
            assert layer(name) <= own, f"{module_of(file)} imports {name}, which lies above it"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_ray_and_mlflow_stop_at_orchestration(file):
    if "orchestration" not in file.parts:
        assert not {name.split(".")[0] for name in imports(file)} & {"ray", "mlflow", "tyro", "rich"}


def test_platform_is_a_source_root_and_the_standard_library_keeps_its_name():
    assert not (ROOT / "platform" / "__init__.py").exists()
    subprocess.run([sys.executable, "-c", "import platform; platform.system()"], cwd=ROOT, check=True)


def test_no_module_is_named_like_one_of_the_standard_library():
    names = {path.stem for path in [*(ROOT / "jobs").glob("*"), *(ROOT / "platform").glob("*")]}
    assert not names & sys.stdlib_module_names


def test_the_documented_layers_are_the_modules_that_there_are():
    there = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert {name for names in LAYERS for name in names} == there


def test_jobs_are_short_and_hold_no_plumbing():
    for job in (ROOT / "jobs").glob("*.py"):
        assert len(job.read_text().splitlines()) <= 60
        assert not {name.split(".")[0] for name in imports(job)} & {"ray", "mlflow", "torch"}
