"""Programs that run beside the tests: they mostly wait, and other tests need not wait for them."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread


@dataclass
class Program:
    """One program, and what it said."""

    command: Sequence[str]
    root: Path
    """Its own folder."""
    given: str = ""
    """Its standard input."""
    environment: Mapping[str, str] | None = None
    limit: float = 1500.0
    """Seconds that it may take."""
    output: str = ""
    errors: str = ""
    code: int | None = None
    done: Event = field(default_factory=Event)

    def said(self) -> str:
        """Its standard output, when it has ended well."""
        assert self.done.wait(timeout=3 * self.limit), f"{self.command} did not end"
        assert self.code == 0, self.output + self.errors
        return self.output

    def run(self, aside: "Aside") -> None:
        """From its beginning to its end."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        aside.process = subprocess.Popen(self.command, env=self.environment, cwd=Path(__file__).parents[1], **pipes)
        try:
            self.output, self.errors = aside.process.communicate(self.given, timeout=self.limit)
        except subprocess.TimeoutExpired:
            end(aside.process)
            self.output, self.errors = aside.process.communicate()
        self.code = aside.process.returncode
        self.done.set()


@dataclass
class Aside:
    """Programs, one after another."""

    programs: Mapping[str, Program]
    process: subprocess.Popen | None = None
    stopped: bool = False

    def start(self) -> None:
        """The first of them."""
        Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """What still runs is ended, what has not begun does not begin."""
        self.stopped = True
        if self.process is not None:
            end(self.process)

    def _run(self) -> None:
        for program in self.programs.values():
            if not self.stopped:
                program.run(self)


def end(process: subprocess.Popen) -> None:
    """By Ctrl-C first: it has started others, and ends them."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
