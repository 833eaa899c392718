"""A job's stages and data sets, made in this process: the same cells and parts, without Ray. And what a job left in MLflow."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mlflow.tracking import MlflowClient

from offmanifold.data import Data
from offmanifold.data.shards import MANIFEST, Closing, Plan, Shards, manifest, without, write_shard
from offmanifold.progress import Memory, silent

CPU = torch.device("cpu")


@dataclass
class Local:
    """Stages; what was made is found again."""

    source: Data
    made: dict = field(default_factory=dict)

    def sweep(self, stage, make, cells, on=None, needed=True, **more):
        data = on or self.source
        for cell in cells:
            if cell not in self.made:
                self.made[cell] = make(cell, data, [self.made[needed] for needed in cell.inputs], CPU, silent, **more)
        return {cell: self.made[cell] for cell in cells}

    def chains(self, stage, make, cells, on=None):
        return self.sweep(stage, lambda *args: make(*args, Memory()), cells, on)

    def write(self, plan, folder=""):
        raise AssertionError("no data set is written here")


def written(plan: Plan, root: Path) -> str:
    """The data set in this folder, as ``orchestration.shards`` writes it; AssertionError with what its closing says is wrong."""
    root.mkdir(parents=True, exist_ok=True)
    contents = plan.prepare()
    parts = [contents.make(json.loads(json.dumps(part)), CPU) for part in plan.parts]
    shards: dict[str, Any] = {name: write_shard(table) for part in parts for name, table in part.tables.items()}
    closing = contents.close([note for part in parts for note in part.notes]) if contents.close else Closing({}, {}, {})
    assert not closing.error, closing.error
    shards |= {name: without(shards[name].content, rows) for name, rows in closing.dropped.items()}
    files = {**contents.files, **closing.files}
    for name, content in {**{name: shard.content for name, shard in shards.items()}, **files}.items():
        (root / name).write_bytes(content)
    entries = {name: shard.entry for name, shard in shards.items()}
    (root / MANIFEST).write_bytes(manifest(plan, {**contents.about, **closing.about}, files, entries, {}))
    return Shards.open(str(root)).root


def files_of(storage: Path, experiment: str, run: str = "tiny") -> set[str]:
    """What MLflow has of a run that has finished."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], f"attributes.run_name = '{run}'")
    assert found.info.status == "FINISHED"
    return {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
