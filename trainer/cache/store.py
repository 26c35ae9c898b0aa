"""Where compiled steps are found again: one file for each id, in a folder that processes share.

Guaranteed: what `load` returns is what some `save` was given under that id, bit for bit, however many processes write
at once, wherever one of them is killed and whatever happens to the file. Not guaranteed: that it is the step which the
caller wants. The store believes the id, as caches do; an id that two steps share gets one of them the other's body
(`trainer/state/compile_ids.py` says which mechanisms give such ids), and `Statistics.foreign` counts that.

Loads and saves take no lock. A file is written under a name of its own and then renamed, so two that save at once
replace each other's file whole. `Store.alone` is a lock for who would compile what somebody else is compiling. The
folder is kept below its limit by leaving out what was not used for longest, at every save.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.cache.entry import GRAPH, Entry, Unusable, pack, unpack
from trainer.cache.folder import Untrusted, check_own, opened
from trainer.schedule.operations import CACHE, READ, WRITE
from trainer.schedule.point import point
from trainer.whole_file import put

log = logging.getLogger(__name__)

SUFFIX = ".step"
LOCK_SUFFIX = ".lock"  # behind the other
MEBIBYTE = 1 << 20
DEFAULT_LIMIT_MEBIBYTES = 256
# After which what a killed process was writing is taken for left behind: no write takes that long.
LEFT_BEHIND_SECONDS = 3600.0
# Opening one that is no file must not wait for anybody.
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Not inherited: a compiler that outlives the process that started it must not keep the others waiting.
_LOCKABLE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Wanted:
    """What a step that is looked up is to be.

    Attributes:
        content: its digest. Not what it is found by: one that differs is counted, and returned all the same.
        versions: one made with others is not returned.
    """

    name: str
    content: str
    versions: Mapping[str, str]
    kind: str = GRAPH


@dataclass
class Statistics:
    """What became of look-ups and saves, in this process.

    Attributes:
        foreign: hits whose content was another than the one wanted.
        seconds_saved: what it took to compile what was found.
        warnings: of files and folders that could not be used, as they were logged.
    """

    hits: int = 0
    misses: int = 0
    foreign: int = 0
    seconds_saved: float = 0.0
    saves: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        asked = self.hits + self.misses
        return f"{self.hits:,} of {asked:,} compiled steps found, {self.seconds_saved:.3g} s of compiling saved"


class Store:
    """Compiled steps in a folder.

    Args:
        folder: made when something is first saved; None keeps nothing.
        limit_mebibytes: of all files together.

    Thread-safety: any number of threads and processes may load and save at once.
    """

    def __init__(self, folder: Path | None, limit_mebibytes: float = DEFAULT_LIMIT_MEBIBYTES) -> None:
        self.folder = folder
        self._limit = int(limit_mebibytes * MEBIBYTE)
        self.statistics = Statistics()
        self._counting = threading.Lock()
        self._told: set[str] = set()

    def load(self, id: str, wanted: Wanted) -> Entry | None:
        """The step that is stored under an id; None where there is none that can be used."""
        point(READ, "compiled steps", of=CACHE)
        entry = None
        with suppress(FileNotFoundError):
            try:
                entry = self._read(id, wanted)
            except Unusable as problem:
                self._warn(f"compiled step {file_name(id)} in {self.folder} {problem}; it is compiled again")
            except Untrusted as problem:
                self._warn(f"{problem}; compiled steps in {self.folder} are not used")
        with self._counting:
            if entry is None:
                self.statistics.misses += 1
                return None
            self.statistics.hits += 1
            self.statistics.foreign += entry.content != wanted.content
            self.statistics.seconds_saved += entry.compile_seconds
        return entry

    def save(self, entry: Entry) -> bool:
        """Store a step under its id, in place of what was there. Whether it could be."""
        if self.folder is None:
            return False
        data = pack(entry)
        point(WRITE, "compiled steps", of=CACHE)
        try:
            with opened(self.folder, create=True) as folder:
                self._make_room(folder, len(data))
                put(data, file_name(entry.id), folder)
        except (OSError, Unusable, Untrusted) as problem:
            why = problem.strerror if isinstance(problem, OSError) else problem
            self._warn(f"{why}; compiled step {file_name(entry.id)} is not kept in {self.folder}")
            return False
        with self._counting:
            self.statistics.saves += 1
        return True

    @contextmanager
    def alone(self, id: str) -> Iterator[bool]:
        """While a step is made: others that want to make it wait here. Whether this one had to, and should look again.

        Whatever ends a process lets the next one in: the system does. Where there can be no such lock, nobody waits,
        and each makes its own.
        """
        descriptor = None
        try:
            descriptor = self._lock_file(id)
            waited = descriptor is not None and _lock(descriptor, id)
        except (OSError, Untrusted) as problem:
            why = problem.strerror if isinstance(problem, OSError) else problem
            self._warn(f"{why}; processes that share {self.folder} may compile a step at the same time")
            waited = False
        try:
            yield waited
        finally:
            if descriptor is not None:
                os.close(descriptor)  # which unlocks it

    def _lock_file(self, id: str) -> int | None:
        if self.folder is None:
            return None
        with opened(self.folder, create=True) as folder:
            return os.open(file_name(id) + LOCK_SUFFIX, _LOCKABLE, 0o600, dir_fd=folder)

    def _read(self, id: str, wanted: Wanted) -> Entry | None:
        if self.folder is None:
            return None
        try:
            with opened(self.folder) as folder:
                entry = unpack(self._bytes(file_name(id), folder))
        except FileNotFoundError:
            raise
        except OSError as problem:
            raise Unusable(f"cannot be read ({problem.strerror})") from problem
        if (entry.id, entry.name, entry.kind) != (id, wanted.name, wanted.kind):
            raise Unusable(f"is {entry.kind} {entry.id} of {entry.name}")
        if dict(entry.versions) != dict(wanted.versions):
            made, here = ({f"{name} {each}" for name, each in by.items()} for by in (entry.versions, wanted.versions))
            raise Unusable(f"was made with {', '.join(sorted(made - here)) or 'less'}")
        return entry

    def _bytes(self, name: str, folder: int) -> bytes:
        descriptor = os.open(name, _READ_ONLY, dir_fd=folder)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise Unusable("is no file")
            if found.st_size > self._limit:
                raise Unusable(f"has {found.st_size:,} bytes, more than the whole folder may have")
            check_own(f"compiled step {name}", found)
            with os.fdopen(os.dup(descriptor), "rb") as stream:
                data = stream.read(self._limit + 1)
            # The time of its last change is that of its last use: what is left out first goes by it.
            with suppress(OSError):
                os.utime(descriptor)
            return data
        finally:
            os.close(descriptor)

    def _make_room(self, folder: int, size: int) -> None:
        """Leave out what was not used for longest, until there is room for `size` bytes more."""
        if size > self._limit:
            raise Unusable(f"{size:,} bytes are more than the whole folder may have")
        now, kept = time.time(), []
        for name in os.listdir(folder):
            with suppress(FileNotFoundError):  # another process leaves out, too
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if name.endswith(SUFFIX):
                    kept.append((found.st_mtime_ns, name, found.st_size))
                elif SUFFIX in name and now - found.st_mtime > LEFT_BEHIND_SECONDS:
                    os.unlink(name, dir_fd=folder)
        total = size + sum(each for _, _, each in kept)
        for _, name, each in sorted(kept):
            if total <= self._limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            total -= each

    def _warn(self, line: str) -> None:
        """Say it, once."""
        with self._counting:
            if line in self._told:
                return
            self._told.add(line)
            self.statistics.warnings.append(line)
        log.warning("%s", line)


def _lock(descriptor: int, id: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("compiled step %s: another process is compiling it; waiting", id)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    return False


def file_name(id: str) -> str:
    """Of any id: ids have characters that names of files have not, and may be too long for one."""
    return hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()[:40] + SUFFIX
