"""Processes that are lost: no fault of what they make, unless it happens time and again before they get on."""

from collections import Counter

from ray.exceptions import OutOfMemoryError, RayActorError


class ProcessLost(Exception):
    """One of the processes that make a cell together did not end well; the message says why."""


LOST = (RayActorError, OutOfMemoryError, ProcessLost)
"""How it is said that a process, or its machine, was lost."""
FRUITLESS = 5
"""Times that a cell's process may be lost in a row without anything kept: a machine that is too small for it loses it for ever."""


class Losses:
    """Of a stage's cells, by their names."""

    def __init__(self) -> None:
        self.fruitless: Counter[str] = Counter()

    def keeps(self, cell: str) -> None:
        """It has got on."""
        self.fruitless[cell] = 0

    def loses(self, cell: str, error: BaseException) -> str:
        """Why it must not begin again, if so. A machine that was taken away with notice says nothing against the cell."""
        self.fruitless[cell] += not getattr(error, "preempted", False)
        if self.fruitless[cell] < FRUITLESS:
            return ""
        # Ray's last line is the one that says how it went
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return f"its process was lost {FRUITLESS} times in a row, for want of memory perhaps: {said[-1]}"
