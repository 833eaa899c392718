"""A job: from the command line to tables, figures and an exit code."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import ray
from mlflow.exceptions import MlflowException

from offmanifold.data import Data, DataError
from offmanifold.data.shards import Plan
from offmanifold.experiments.report import Report
from offmanifold.orchestration.artifacts import Altered, Artifacts
from offmanifold.orchestration.command_line import parse
from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import JobError, Stopped, first_line
from offmanifold.orchestration.patience import TrackingLost
from offmanifold.orchestration.provenance import check_script, git_commit, versions
from offmanifold.orchestration.record import log_report, note_report, recording
from offmanifold.orchestration.runs import open_run
from offmanifold.orchestration.session import Execution, connect
from offmanifold.orchestration.shards import find_or_write
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.sweep import Outcome, Sweeps
from offmanifold.orchestration.tracking import Tracking
from offmanifold.orchestration.tracking_store import without_password
from offmanifold.orchestration.trial import Make, MakeResumable
from offmanifold.result import Result, SomeCell

Config = TypeVar("Config")
SomeData = TypeVar("SomeData", bound=Data)


@dataclass
class Job(Generic[Config]):
    """One run of an experiment. ``load`` its data, ``sweep`` its stages, ``report`` what they say."""

    experiment: str
    preset: str
    config: Config
    execution: Execution
    storage: Storage
    tracking: Tracking
    resources: ExitStack
    started: float = field(default_factory=time.monotonic)
    failures: dict[str, str] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    """What became of each stage, a line each."""
    _sweeps: Sweeps | None = None
    _on: dict[str, Sweeps] = field(default_factory=dict)
    """Fingerprint of other data than was loaded -> sweeps on it."""

    def load(self, load: Callable[[Config], SomeData]) -> SomeData:
        """The data, then Ray and the run: nothing is started before the data is known to be there."""
        source = load(self.config)
        tags = {"preset": self.preset, "data": source.name, "data.fingerprint": source.fingerprint}
        tags |= {"git.commit": git_commit(), "mlflow.source.git.commit": git_commit(), **versions()}
        tags |= {f"execution.{name}": without_password(str(value)) for name, value in dataclasses.asdict(self.execution).items()}
        params = {"config": dataclasses.asdict(self.config), "data": source.fingerprint}  # type: ignore[call-overload]
        self.resources.enter_context(connect(self.execution, self.storage))
        run = open_run(self.storage, self.tracking, self.execution.name, self.preset, params, tags, self.resources)
        self.resources.enter_context(recording(run.folder, run.tracked))
        self._sweeps = Sweeps(ray.put(source), source.fingerprint, Artifacts(self.storage), self.execution, run.folder, run.tracked)
        if run.goes_on:
            how = "ended well before: it is reported anew" if run.ended_well else "goes on: an earlier job began it"
            console.print(f"{run.folder.name} {how}", markup=False)
        run.folder.note(data=[source.name, source.fingerprint, source.says])
        run.tracked.saw(source.name, source.fingerprint, source.says)
        console.print(f"{run.folder.name}: {source.name}, {source.says}", markup=False)
        return source

    def sweep(
        self, stage: str, make: Make[SomeCell], cells: Sequence[SomeCell], on: Data | None = None, needed: bool = True
    ) -> Mapping[SomeCell, Result]:
        """Every cell's result, found or made in parallel; what failed is named at the end, and the job then fails.

        ``on``: the data that it works on, where that is not what was loaded. ``needed``: without any result of it, the job has nothing to
        go on with, and ends.
        """
        return self._results(stage, self._sweeps_on(on).stage(stage, make, cells), needed)

    def trainings(
        self, stage: str, make: MakeResumable[SomeCell], cells: Sequence[SomeCell], on: Data | None = None
    ) -> Mapping[SomeCell, Result]:
        """The same of networks that train long: each goes on from its last epoch, and several processes may share one."""
        return self._results(stage, self._sweeps_on(on).trainings(stage, make, cells))

    def chains(
        self, stage: str, make: MakeResumable[SomeCell], cells: Sequence[SomeCell], on: Data | None = None
    ) -> Mapping[SomeCell, Result]:
        """The same of Markov chains: an actor each, that goes on from its last segment where it is killed, on whatever machine there is."""
        return self._results(stage, self._sweeps_on(on).chains(stage, make, cells))

    def _sweeps_on(self, on: Data | None) -> Sweeps:
        sweeps = self._begun()
        if on is None:
            return sweeps
        if on.fingerprint not in self._on:
            self._on[on.fingerprint] = sweeps.on(on)
        return self._on[on.fingerprint]

    def _results(self, stage: str, outcome: Outcome, needed: bool = True) -> Mapping[Any, Result]:
        self.failures |= outcome.failures
        self.stages.append(outcome.summary)
        if needed and not outcome.results:
            self.summarise()
            raise JobError(self._failed(f"nothing to go on with, all of {stage!r} failed"))
        return outcome.results

    def write(self, plan: Plan, folder: str = "") -> str:
        """Where the data set is, found or written in parallel: in this folder, by default in the storage under its recipe's key."""
        self._begun()
        root = folder or self.storage.where(f"data/{plan.name}-{plan.key}")
        shards, summary = find_or_write(plan, root, self.execution, self.experiment)
        self.stages.append(summary)
        return shards.root

    def report(self, report: Report) -> None:
        """Prints the table and the conclusion; tables and figures become files and MLflow artifacts."""
        sweeps = self._begun()
        console.print(f"\n{report}", markup=False)
        with TemporaryDirectory() as folder:
            for file in _write_report(report, Path(folder)):
                sweeps.folder.write(file.name, file.read_bytes())
        note_report(sweeps.folder, report)
        with suppress(TrackingLost):  # it is logged at the job's end, or later
            log_report(sweeps.folder, sweeps.tracked)

    def conclude(self) -> None:
        """Says what ran and where everything is, and raises if a trial failed."""
        self.summarise()
        if self.failures:
            raise JobError(self._failed("the others are kept and reported"))

    def summarise(self) -> None:
        """Says what became of each stage, and where everything is."""
        uri = self.tracking.shown
        ui = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
        lines = ["", *self.stages, f"results: {self._begun().folder.where}   ({_minutes(time.monotonic() - self.started)})"]
        lines += [f"compare: {ui}   (experiment {self.tracking.experiment}, view offmanifold)"]
        console.print("\n".join(lines), markup=False)

    def _begun(self) -> Sweeps:
        if self._sweeps is None:
            raise RuntimeError("load the data first")
        return self._sweeps

    def _failed(self, rest: str) -> str:
        lines = [f"  {name}: {error}" for name, error in self.failures.items()]
        tracebacks = self.storage.where(self._begun().scratch)
        return "\n".join([f"{len(lines)} trial(s) failed, {rest}; tracebacks are under {tracebacks}", *lines])


@contextmanager
def start(doc: str | None, presets: Mapping[str, Config]) -> Iterator[Job[Config]]:
    """The job of this script, with the config of its command line.

    Exit code 0; 1 with the error's line when data, storage or MLflow are missing or a trial failed; 2 for a bad config; 130 for Ctrl-C, 143
    for SIGTERM.
    """
    config, execution, preset = parse(doc or "", presets)
    experiment = Path(sys.argv[0]).stem
    try:
        check_script(Path(sys.argv[0]))
        storage = Storage.open(execution.storage)
        tracking = Tracking.open(execution.tracking_uri, storage, experiment, execution.tracking_patience)
        with ExitStack() as resources:
            job = Job(experiment, preset, config, execution, storage, tracking, resources)
            yield job
            job.conclude()
    except (DataError, JobError, Altered) as error:
        advice = "; the same command makes it again" if isinstance(error, Altered) else ""
        print(f"error: {error}{advice}", file=sys.stderr)
        raise SystemExit(1) from None
    except MlflowException as error:
        where = f"the results are in {execution.storage}"
        print(f"error: MLflow's store did not take what the job says ({first_line(error)}); {where}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, Stopped) as stop:
        how, code = ("interrupted", 130) if isinstance(stop, KeyboardInterrupt) else ("stopped", 143)
        print(f"{how}; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(code) from None


def _write_report(report: Report, folder: Path) -> list[Path]:
    """What is shown as text, every table as parquet, figures as PNG and PDF; the files."""
    files = [_written(folder / "report.txt", f"{report}\n".encode())]
    files += [_written(folder / name, content.encode()) for name, content in report.files.items()]
    for name, table in report.tables.items():
        files.append(folder / f"{name}.parquet")
        table.to_parquet(files[-1], index=False, compression="zstd")
    for name, figure in report.figures.items():
        for ending in ("png", "pdf"):
            files.append(folder / f"{name}.{ending}")
            figure.savefig(files[-1], dpi=150)
            figure.set_layout_engine("none")  # laid out once: the second file takes half as long
    return files


def _written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"
