"""What a person sees of a sweep: a live line in a terminal, a plain line now and then where output goes to a file."""

import threading
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from offmanifold.progress import duration

PLAIN_EVERY = 10.0
"""Seconds between plain lines; three times that where each running trial has one, too."""

console = Console(soft_wrap=True, highlight=False)


@dataclass
class SweepDisplay:
    """Counts of one stage's trials. ``update`` after each change."""

    stage: str
    total: int
    each: bool = False
    """Is what each running trial says shown in plain lines, too?"""
    waits: str = ""
    """What a line says while no trial runs."""
    found: int = 0
    """Results that were there already."""
    done: int = 0
    failed: int = 0
    running: dict[str, str] = field(default_factory=dict)
    """Name of a running trial -> the last that it said."""
    started: float = field(default_factory=time.monotonic)
    others: set[str] = field(default_factory=set)
    """Running trials whose results were found after all."""
    _last_done: float = 0.0
    """Seconds after the start at which a trial last ended: between two ends, the time left counts down."""
    _live: Live | None = None
    _ticking: threading.Thread | None = None
    _closed: threading.Event = field(default_factory=threading.Event)

    def start(self, name: str) -> None:
        """A trial has begun."""
        self.running[name] = ""
        self.update()

    def say(self, name: str, words: str) -> None:
        """What a trial says of itself."""
        self.running[name] = words
        self.update()

    def wait(self, name: str) -> None:
        """A trial waits to be begun again."""
        self.running.pop(name, None)
        self.update()

    def found_meanwhile(self, name: str) -> None:
        """A trial's result was made by another run."""
        self.others.add(name)

    def finish(self, name: str, failed: bool = False) -> None:
        """A trial has ended."""
        self.running.pop(name, None)
        if name in self.others and not failed:
            self.found += 1
        else:
            self.done, self.failed = self.done + (not failed), self.failed + failed
        self._last_done = time.monotonic() - self.started
        self.update()

    def update(self) -> None:
        """Shows where the sweep is: live, or as a line if the last is old enough."""
        if console.is_terminal:
            if self._live is None:
                self._live = Live(get_renderable=self._lines, console=console, refresh_per_second=2, transient=True)
                self._live.start()
        elif self._ticking is None:
            self._ticking = threading.Thread(target=self._tick, daemon=True)
            self._ticking.start()

    def close(self) -> None:
        """Ends the live display and leaves one line."""
        self.running.clear()
        self._closed.set()
        if self._live is not None:
            self._live.stop()
        console.print(self.line().partition(", about")[0])

    def summary(self) -> str:
        """``train: 10 made, 2 found, 0 failed, 1m20s``"""
        return f"{self.stage}: {self.done} made, {self.found} found, {self.failed} failed, {duration(time.monotonic() - self.started)}"

    def _tick(self) -> None:
        """A line now and then, also while no trial says anything."""
        while not self._closed.wait(PLAIN_EVERY * (3 if self.each else 1)):
            console.print(self._lines() if self.each else self.line())

    def _lines(self) -> Text:
        said = [f"    {name}: {words}" for name, words in list(self.running.items()) if words]  # rich asks from a thread of its own
        return Text("\n".join([self.line(), *said]), overflow="ellipsis", no_wrap=True)

    def states(self) -> dict[str, int]:
        """How many trials are waiting, running, done, found, failed."""
        left = self.total - self.found - self.done - self.failed - len(self.running)
        return {"waiting": left, "running": len(self.running), "done": self.done, "found": self.found, "failed": self.failed}

    def line(self) -> str:
        """``train: 12/40 done, 2 running, 8 found, 0 failed, 1m20s, 3m10s left``"""
        elapsed = time.monotonic() - self.started
        left = self.total - self.found - self.done - self.failed
        parts = [f"{self.stage}: {self.found + self.done}/{self.total} done"]
        if self.running or (self.waits and left and not self._closed.is_set()):
            parts += [f"{len(self.running)} running" if self.running else self.waits]
        parts += [f"{self.found} found"] if self.found else []
        parts += [f"{self.failed} failed", duration(elapsed)]
        if self.done and left:
            expected = self._last_done / self.done * left - (elapsed - self._last_done)
            parts += [f"about {duration(max(expected, 0))} left"]
        return ", ".join(parts)
