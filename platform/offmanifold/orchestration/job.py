"""A job: from the command line to tables, figures and an exit code."""

import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray

from offmanifold.data import DataError, Source
from offmanifold.experiments.report import Report
from offmanifold.orchestration.artifacts import Artifacts, prepare_storage
from offmanifold.orchestration.command_line import parse
from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.session import Execution, connect, versions
from offmanifold.orchestration.sweep import SomeCell, sweep
from offmanifold.orchestration.tracking import TrackedRun, Tracking, git_commit
from offmanifold.orchestration.trial import Make
from offmanifold.result import Result

Config = TypeVar("Config")


@dataclass
class Job(Generic[Config]):
    """One run of an experiment. ``load`` its data, ``sweep`` its stages, ``report`` what they say."""

    name: str
    config: Config
    execution: Execution
    storage: Path
    tracking: Tracking
    resources: ExitStack
    started: float = field(default_factory=time.monotonic)
    failures: dict[str, str] = field(default_factory=dict)
    _source: Source | None = None
    _shared: Any = None
    _run: TrackedRun | None = None

    @property
    def folder(self) -> Path:
        """Where the tables and figures of this run are written."""
        return self.storage / "runs" / self.name

    def load(self, load: Callable[[Config], Source]) -> Source:
        """The data, then Ray and MLflow's run: nothing is started before the data is known to be there."""
        source = load(self.config)
        tags = {"data": source.name, "data.fingerprint": source.fingerprint, "git.commit": git_commit(), **versions()}
        params = {"config": dataclasses.asdict(self.config), "execution": dataclasses.asdict(self.execution)}  # type: ignore[call-overload]
        self.resources.enter_context(connect(self.execution))
        self._run = self.resources.enter_context(self.tracking.run(self.name, params, tags))
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(params, indent=2))
        self._run.attach(self.folder / "config.json")
        self._source, self._shared = source, ray.put(source)
        console.print(f"{self.name}: {source.name}, {len(source.pool):,} images to train on, {len(source.test):,} to test on")
        return source

    def sweep(self, stage: str, make: Make[SomeCell], cells: Sequence[SomeCell]) -> Mapping[SomeCell, Result]:
        """Every cell's result, found or made in parallel; what failed is named at the end, and the job then fails."""
        if self._run is None or self._source is None:
            raise RuntimeError("load the data before the first sweep")
        artifacts = Artifacts(str(self.storage))
        scratch = self.storage / "tune" / self.name
        outcome = sweep(stage, make, cells, self._shared, self._source.fingerprint, artifacts, self.execution, self._run, scratch)
        self.failures |= outcome.failures
        if not outcome.results:
            raise JobError(self._failed(f"nothing to go on with, all of {stage!r} failed"))
        return outcome.results

    def report(self, report: Report) -> None:
        """Prints the table and the conclusion; tables and figures become files and MLflow artifacts."""
        if self._run is None:
            raise RuntimeError("load the data before the report")
        files = _write_report(report, self.folder)
        console.print(f"\n{report}", markup=False)
        self._run.curves(report.metrics)
        self._run.attach(*files)

    def conclude(self) -> None:
        """Says where everything is, and raises if a trial failed."""
        console.print(f"results: {self.folder}   ({_minutes(time.monotonic() - self.started)})")
        console.print(f"compare: mlflow ui --backend-store-uri {self.tracking.uri}   (experiment {self.tracking.experiment})")
        if self.failures:
            raise JobError(self._failed("the others are kept and reported"))

    def _failed(self, rest: str) -> str:
        lines = [f"  {name}: {error}" for name, error in self.failures.items()]
        return "\n".join([f"{len(lines)} trial(s) failed, {rest}; tracebacks are under {self.storage / 'tune' / self.name}", *lines])


@contextmanager
def start(doc: str | None, presets: Mapping[str, Config]) -> Iterator[Job[Config]]:
    """The job of this script, with the config of its command line.

    Exit code 0; 1 with the error's line when data, storage or MLflow are missing or a trial failed; 2 for a bad config; 130 for Ctrl-C.
    """
    config, execution = parse(doc or "", presets)
    experiment = Path(sys.argv[0]).stem
    try:
        storage = prepare_storage(execution.storage)
        tracking = Tracking.open(execution.tracking_uri, storage, experiment)
        name = f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        with ExitStack() as resources:
            job = Job(name, config, execution, storage, tracking, resources)
            yield job
            job.conclude()
    except (DataError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def _write_report(report: Report, folder: Path) -> list[Path]:
    """What is shown as text, every table as parquet, figures as PNG and PDF; the files."""
    files = [folder / "report.txt"]
    files[0].write_text(f"{report}\n")
    for name, table in report.tables.items():
        files.append(folder / f"{name}.parquet")
        table.to_parquet(files[-1], index=False, compression="zstd")
    for name, figure in report.figures.items():
        for ending in ("png", "pdf"):
            files.append(folder / f"{name}.{ending}")
            figure.savefig(files[-1], dpi=150)
    return files


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"
