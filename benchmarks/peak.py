"""What the benchmarks share: how much memory other processes take."""

import threading
from pathlib import Path


class Peak:
    """Largest resident memory of the processes whose command line has these words, in MiB, looked at ten times a second."""

    def __init__(self, *words: str) -> None:
        self.largest = dict.fromkeys(words, 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, float]:
        """The peaks, by words."""
        self._ended.set()
        self._thread.join()
        return self.largest

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    called = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
                except (OSError, StopIteration):
                    continue
                for words in self.largest:
                    if words in called:
                        self.largest[words] = max(self.largest[words], int(resident.split()[1]) / 1024)
