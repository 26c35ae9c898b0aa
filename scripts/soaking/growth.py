"""Whether a process that lives long grows: descriptors, threads, children, memory."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

# Of the samples, the share at either end that is compared: a process that has just begun has not all that it needs.
SKIPPED, COMPARED = 0.25, 0.25
MOST_DESCRIPTORS = 2
MOST_THREADS = 1  # which watches over the run of the moment, if there is one
MOST_BYTES = 24 * 2**20
FEWEST_SAMPLES = 8


@dataclass(frozen=True)
class Sample:
    descriptors: int
    threads: int
    bytes: int


@dataclass
class Growth:
    """Looks at a process every now and then, in a thread of its own, from `start` to `stop`."""

    pid: int
    every_seconds: float = 0.25
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="growth", daemon=True)

    def __enter__(self) -> Growth:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            while not self._done.wait(self.every_seconds):
                self.samples.append(Sample(process.num_fds(), process.num_threads(), process.memory_info().rss))

    def problems(self, most_bytes: int = MOST_BYTES) -> Iterator[str]:
        """What grew: the median of the last samples is above the most of those after the beginning."""
        if len(self.samples) < FEWEST_SAMPLES:
            return
        number = len(self.samples)
        early = self.samples[int(SKIPPED * number) : int((SKIPPED + COMPARED) * number)]
        late = self.samples[-len(early) :]
        for what, most in (("descriptors", MOST_DESCRIPTORS), ("threads", MOST_THREADS), ("bytes", most_bytes)):
            before = max(getattr(each, what) for each in early)
            # Not the least: a process that ends has given some of it back.
            after = int(statistics.median(getattr(each, what) for each in late))
            if after > before + most:
                yield f"growth: {what} of process {self.pid} from {before:,} to {after:,}"
