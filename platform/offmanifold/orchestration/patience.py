"""An MLflow that does not answer: it is waited for, and then done without."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from textwrap import shorten
from typing import TypeVar

from mlflow.exceptions import MlflowException

from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import JobError, first_line
from offmanifold.orchestration.tracking_store import without_password
from offmanifold.progress import duration

Answer = TypeVar("Answer")

OUTAGES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED")
"""MLflow's names for: no connection, a time-out, "later" (429) and 5xx; a database that is away or busy; a gateway's time-out."""
DATABASE = "BAD_REQUEST"
"""Its name for what its database refuses: what another job has written at the same moment, or what would be refused again."""
BLIP, PAUSE = 0.3, 3.0
"""Seconds before the second try, of which nothing is said, and between the later ones."""
REFUSAL = 60.0
"""Seconds after which a call that fails, while others are answered, is taken to be refused."""
LOOK = 60.0
"""Seconds between two looks at an MLflow that was given up."""


class TrackingLost(JobError):
    """MLflow has not answered for longer than it is waited for; the message says since when."""


@dataclass
class Patience:
    """What calls to MLflow go through: one of a job, and of whatever else talks to a store."""

    uri: str
    minutes: float = 10.0
    """How long it is waited for, each time that it goes away."""
    missed: bool = False
    """Was anything not told to it?"""
    _lost: str = ""
    """Since when it is given up, in words."""
    _looked: float = 0.0

    def ask(self, call: Callable[[], Answer], answers: Callable[[], bool]) -> Answer:
        """The call's answer, tried again while MLflow is away; ``answers`` says whether it answers anything at all.

        ``TrackingLost`` where patience is at its end, and at once from then on, but for a look now and then. A refusal is not waited for.
        """
        if self._lost and not self._is_back(answers):
            self.missed = True
            raise TrackingLost(self._lost)
        began = time.time()
        call = partial(twice, call)
        try:
            try:
                return call()
            except MlflowException as error:
                if not is_outage(error):
                    raise
                with _interruptible():
                    return self._wait(call, answers, began)
        except KeyboardInterrupt:
            self.minutes = 0  # who interrupts does not want to wait while the runs are ended
            raise

    def look_again(self) -> None:
        """The next call finds out whether it is back."""
        self._looked = 0.0

    def _wait(self, call: Callable[[], Answer], answers: Callable[[], bool], began: float) -> Answer:
        answering, said, pause = 0.0, False, BLIP
        while (left := began + 60 * self.minutes - time.time()) > 0:
            time.sleep(min(pause, left))
            pause = PAUSE
            try:
                answer = call()
            except MlflowException as error:
                if not is_outage(error):
                    raise
                answering = (answering or time.time()) if answers() else 0.0
                if answering and time.time() - answering > REFUSAL:
                    raise
                if not said:
                    said = True
                    console.print(
                        f"{self._where} does not answer ({shorten(first_line(error), 120)}); waits up to {self.minutes:g} minutes",
                        markup=False,
                    )
            else:
                if said:
                    console.print(f"{self._where} answers again, after {duration(time.time() - began)}", markup=False)
                return answer
        self._give_up(began)
        console.print(f"{self._lost}; the work goes on without it", markup=False)
        raise TrackingLost(self._lost)

    def _give_up(self, began: float) -> None:
        self._lost = f"{self._where} has not answered since {time.strftime('%Y-%m-%d %H:%M', time.localtime(began))}"
        self._looked = time.monotonic()
        self.missed = True

    def _is_back(self, answers: Callable[[], bool]) -> bool:
        if time.monotonic() - self._looked < LOOK and self._looked:
            return False
        self._looked = time.monotonic()
        if not answers():
            return False
        console.print(f"{self._where} answers again", markup=False)
        self._lost = ""
        return True

    @property
    def _where(self) -> str:
        return f"MLflow at {without_password(self.uri)}"


def twice(call: Callable[[], Answer]) -> Answer:
    """Once more where the database refused it: the second time, what another has written is found."""
    try:
        return call()
    except MlflowException as error:
        if getattr(error, "error_code", "") != DATABASE:
            raise
        return call()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C interrupts: Tune's handler, in whose callbacks this waits, would only take note of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def is_outage(error: MlflowException) -> bool:
    """Is it away, rather than of another opinion?"""
    return getattr(error, "error_code", "") in OUTAGES  # one whose code MLflow does not know has none
