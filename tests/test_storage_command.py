"""``offmanifold list | prune | forget | collect``: in a folder and in a bucket."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from bench import Squared

from offmanifold.orchestration import storage_command
from offmanifold.orchestration.artifacts import Artifacts, folder
from offmanifold.orchestration.runs import CONFIG, RunFolder
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking
from offmanifold.result import Result, recipe_key


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs ``offmanifold`` with these arguments; (exit code, what it printed)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["offmanifold", *map(str, arguments)])
        code = 0
        try:
            storage_command.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def key(number):
    return recipe_key(Squared(number), "data")


@pytest.fixture
def filled(storage):
    """Results 1, 2, 3, of which the run a uses 1 and b uses 1 and 2; and 4, which was being written when its maker was killed."""
    artifacts = Artifacts(storage)
    for number in (1, 2, 3):
        made = {"run": "a", "at": "1700000000", "seconds": "2.5"}
        artifacts.save(Squared(number), "data", Result(pd.DataFrame({"x": [1]}), {"w": np.zeros(10_000)}), made)
    storage.write(f"{folder(Squared(4), 'data')}/table.parquet", b"...")
    for name, numbers in (("a", [1]), ("b", [1, 2])):
        run = RunFolder(storage, "tests", name)
        run.write(CONFIG, b"{}")
        run.refer("first", [key(number) for number in numbers])
        run.refer("second", [])
    return storage


def there(storage):
    return {entry.name.split("/")[1] for entry in storage.files("recipes")}


def size(storage, *numbers):
    total = sum(entry.bytes for entry in storage.files("recipes") for number in numbers if key(number) in entry.name)
    return [f"{total / 1000:.3g}", "kB"]


def test_list_says_size_maker_and_users(filled, program):
    code, said = program("list", "--storage", filled.root)
    assert code == 0
    lines = {number: next(line for line in said.splitlines() if key(number) in line) for number in (1, 2, 3, 4)}
    assert lines[1].split()[1:] == ["square", "of", "1", *size(filled, 1), "a", "2023-11-14", "22:13", "2.5", "tests/a,", "tests/b"]
    assert lines[2].endswith("tests/b")
    assert lines[3].endswith("no run")
    assert "(half-written)" in lines[4]
    assert "4 results" in said
    assert f"2 of them, {' '.join(size(filled, 3, 4))}, are used by no run" in said


def test_prune_removes_what_no_run_uses_and_nobody_is_making(filled, program):
    code, said = program("prune", "--storage", filled.root)
    assert (code, there(filled)) == (0, {key(number) for number in (1, 2, 3, 4)})
    unused, made = " ".join(size(filled, 3, 4)), " ".join(size(filled, 3))
    assert f"2 results, {unused}: would be removed; add --yes" in said
    with filled.lock(key(4)):
        _, said = program("prune", "--storage", filled.root, "--yes")
    assert f"{key(4)}: is being made; left" in said
    assert f"1 results, {made}: removed" in said
    assert there(filled) == {key(1), key(2), key(4)}
    program("prune", "--storage", filled.root, "--yes")
    assert there(filled) == {key(1), key(2)}
    assert "every result is used by a run" in program("prune", "--storage", filled.root)[1]


def test_what_another_version_wrote_is_listed_and_never_pruned(filled, program):
    name = f"{folder(Squared(3), 'data')}/manifest.json"
    manifest = json.loads(filled.read(name)) | {"format": 99}
    filled.write(name, json.dumps(manifest).encode())
    filled.write("runs/of-another-layout/config.json", b"{}")
    assert "(of another version)" in program("list", "--storage", filled.root)[1]
    program("prune", "--storage", filled.root, "--yes")
    assert there(filled) == {key(1), key(2), key(3)}


def test_a_forgotten_run_uses_nothing(filled, program):
    assert program("forget", "tests/b", "--storage", filled.root) == (0, "tests/b: forgotten\n")
    program("prune", "--storage", filled.root, "--yes")
    assert there(filled) == {key(1)}
    code, said = program("forget", "tests/b", "--storage", filled.root)
    assert (code, said) == (1, f"error: {filled.root} has no run tests/b; there are: tests/a\n")
    assert program("forget", "--storage", filled.root) == (1, f"error: {filled.root} has no run without a name; there are: tests/a\n")
    with filled.lock("runs/tests/a"):
        assert program("forget", "tests/a", "--storage", filled.root) == (1, "error: tests/a is running\n")


def test_a_storage_that_is_not_there_is_not_made(program, tmp_path):
    assert program("list", "--storage", tmp_path / "x") == (1, f"error: --storage {tmp_path}/x: there is no such folder\n")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_collect_writes_the_table(ending, program, tmp_path):
    tracking = Tracking.open("", Storage.open(str(tmp_path)), "collected")
    job = tracking.start("one", {"config": {"epsilons": (0.1, 0.2)}}, {})
    job.child("cell", {"epsilon": 0.1}, {"stage": "attack"}).log({"changed": 0.5})
    file = tmp_path / f"table.{ending}"
    assert program("collect", "collected", "--to", file, "--tracking-uri", tracking.uri) == (0, f"1 trials: {file}\n")
    table = pd.read_parquet(file) if ending == "parquet" else pd.read_csv(file)
    assert table[["run", "epsilon", "changed", "config.epsilons"]].values.tolist() == [["one", 0.1, 0.5, "(0.1, 0.2)"]]
    code, said = program("collect", "collected", "--to", tmp_path / "table.xls")
    assert (code, said) == (1, f"error: --to {tmp_path}/table.xls: a .parquet or .csv file is needed\n")
