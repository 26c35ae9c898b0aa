"""The cache of compiled steps: what is stored is found again bit for bit or not at all, whatever happens to it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import pwd
import resource
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.cache import store as stores
from trainer.cache.entry import GRAPH, LIBRARY, Array, Entry, Unusable, pack, unpack
from trainer.cache.folder import Untrusted, default_folder, opened
from trainer.cache.library import load_library
from trainer.cache.store import MEBIBYTE, Store, Wanted, file_name
from trainer.schedule.locks import modelled
from trainer.schedule.order import Abandoned, Order
from trainer.schedule.search import ORDERS, Search
from trainer.schedule.turnstile import Turnstile
from trainer.state.compile_ids import COMPILE_IDS, DEFAULT_BITS
from trainer.whole_file import put, whole

WAIT = 30.0
VERSIONS = {"torch": "2.13.0", "format": "1"}
ENTRY = Entry(
    "step$1",
    "step",
    "step_1",
    GRAPH,
    "c0ffee",
    VERSIONS,
    1.5,
    b"def step_1(x0, c0):\n    return aten.add(x0, c0)\n",
    (Array("float32", (2, 3), bytes(range(24))), Array("bfloat16", (0,), b""), Array("int64", (), bytes(8))),
)
OTHER = replace(ENTRY, content="facade", code=b"def step_1(x0, c0):\n    return aten.mul(x0, c0)\n" * 7)
WANTED = Wanted("step", "c0ffee", VERSIONS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def file_of(store: Store, id: str = ENTRY.id) -> Path:
    assert store.folder is not None
    return store.folder / file_name(id)


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def in_child(body: Callable[[], Any]) -> Any:
    """What a body returns in a forked child, as JSON; None if the child was killed."""
    return began_in_child(body)()


def began_in_child(body: Callable[[], Any]) -> Callable[[], Any]:
    """Begin a body in a forked child; call what is returned to wait for it."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(into, json.dumps(body()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(into)

    def wait() -> Any:
        with os.fdopen(out, "rb") as stream:
            said = stream.read()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or status == 0
        return json.loads(said) if said else None

    return wait


# What is stored.


def test_what_is_saved_is_loaded_by_another_store(folder: Path) -> None:
    one, other = Store(folder), Store(folder)
    assert one.load(ENTRY.id, WANTED) is None
    assert one.save(ENTRY)
    assert other.load(ENTRY.id, WANTED) == ENTRY
    assert (one.statistics.misses, one.statistics.saves) == (1, 1)
    assert (other.statistics.hits, other.statistics.foreign, other.statistics.seconds_saved) == (1, 0, 1.5)
    assert other.statistics.told == "1 of 1 compiled steps found, 1.5 s of compiling saved"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(one).stat().st_mode) == 0o600
    assert left(folder) == [file_name(ENTRY.id)]


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Entry,
        *[st.text()] * 3,
        st.sampled_from([GRAPH, LIBRARY]),
        st.text(),
        st.dictionaries(st.text(), st.text()),
        st.floats(0, allow_infinity=False),
        st.binary(),
        st.lists(st.builds(Array, st.text(), st.lists(st.integers(0)).map(tuple), st.binary())).map(tuple),
    )
)
def test_every_entry_is_read_as_it_was_written(entry: Entry) -> None:
    assert unpack(pack(entry)) == entry


def undigested(data: bytes) -> Entry:
    """As `unpack`, whatever the digest is."""
    head = pack(ENTRY).index(b"\n") + 1
    rest = data[head + 65 :]
    return unpack(data[:head] + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)


def read(reader: Callable[[bytes], Entry], data: bytes) -> Entry | None:
    try:
        return reader(data)
    except Unusable:
        return None


@pytest.mark.parametrize("reader", [unpack, undigested])
def test_one_flipped_bit_anywhere_is_noticed_and_without_the_digest_runs_another_body(
    reader: Callable[[bytes], Entry],
) -> None:
    data = pack(ENTRY)
    wrong = 0
    for at, bit in itertools.product(range(len(data)), range(8)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        wrong += read(reader, bytes(damaged)) not in (None, ENTRY)
    assert (wrong > 0) == (reader is undigested)
    if reader is undigested:
        assert wrong > 8 * len(ENTRY.code)  # each bit of the code, and more


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_file_that_was_cut_extended_or_overwritten_anywhere_is_whole_or_nothing(draws: st.DataObject) -> None:
    data = pack(ENTRY)
    begin, end = sorted(draws.draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    damaged = data[:begin] + draws.draw(st.binary(max_size=80)) + data[end:]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        file_of(store).write_bytes(damaged)
        found = store.load(ENTRY.id, WANTED)
        assert found == (ENTRY if damaged == data else None)
        assert len(store.statistics.warnings) == (damaged != data)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(["id", "symbol", "kind", "versions", "compile_seconds", "code_size", "arrays"]),
    st.binary(),
)
def test_a_header_that_says_anything_is_read_or_refused(value: Any, key: str, payload: bytes) -> None:
    header = json.loads(pack(ENTRY).split(b"\n")[2])
    for forged in (value, {**header, key: value}):
        rest = json.dumps(forged).encode() + b"\n" + payload
        found = read(undigested, pack(ENTRY).split(b"\n")[0] + b"\n" + b"0" * 64 + b"\n" + rest)
        assert found is None or isinstance(found, Entry)


def test_a_deeply_nested_header_is_refused() -> None:
    rest = b"[" * 100_000 + b"\n"
    with pytest.raises(Unusable, match="cannot be read"):
        undigested(pack(ENTRY).split(b"\n")[0] + b"\n" + b"0" * 64 + b"\n" + rest)


# What is believed.


@pytest.mark.parametrize(
    ("mechanism", "bits", "foreign", "hits"),
    [
        ("content", DEFAULT_BITS, 0, 1),
        ("uuid", DEFAULT_BITS, 0, 0),
        ("random_offset", DEFAULT_BITS, 0, 0),
        ("random_offset", 0, 3, 3),
        ("counter", DEFAULT_BITS, 3, 3),
    ],
)
def test_the_store_believes_the_id_and_counts_what_was_another_step(
    folder: Path, mechanism: str, bits: int, foreign: int, hits: int
) -> None:
    """One process stores three steps; another looks up three, of which the last is the first one's first."""
    ids, later = (COMPILE_IDS[mechanism](bits) for _ in range(2))
    for content in "abc":
        Store(folder).save(replace(ENTRY, id=ids.id_of("step", content), content=content, code=content.encode()))
    store = Store(folder)
    wrong = 0
    for content in "xya":
        found = store.load(later.id_of("step", content), Wanted("step", content, VERSIONS))
        wrong += found is not None and found.code != content.encode()
    assert (wrong, store.statistics.foreign, store.statistics.hits) == (foreign, foreign, hits)


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ({"versions": {"torch": "2.12.0", "format": "1"}}, "was made with torch 2.12.0"),
        ({"versions": {"torch": "2.13.0"}}, "was made with less"),
        ({"name": "other"}, "is graph step$1 of other"),
        ({"kind": LIBRARY}, "is library step$1 of step"),
        ({"id": "step$2"}, "is graph step$2 of step"),
    ],
)
def test_a_step_made_with_other_versions_or_under_another_name_is_compiled_again(
    folder: Path, stored: dict[str, Any], problem: str
) -> None:
    store = Store(folder)
    store.save(ENTRY)
    file_of(store).write_bytes(pack(replace(ENTRY, **stored)))
    assert store.load(ENTRY.id, WANTED) is None
    name = file_name(ENTRY.id)
    assert store.statistics.warnings == [f"compiled step {name} in {folder} {problem}; it is compiled again"]
    assert store.save(ENTRY)
    assert store.load(ENTRY.id, WANTED) == ENTRY


# Damage, and what is in the way.


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other_format(path: Path) -> None:
    path.write_bytes(pack(ENTRY).replace(b"format 1\n", b"format 2\n", 1))


def _foreign(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 something else")


def _pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95cos\nsystem\n")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def _writable(path: Path) -> None:
    path.chmod(0o666)


def _huge(path: Path) -> None:
    os.truncate(path, 300 * MEBIBYTE)  # of which next to nothing is on disk


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_empty, "is torn or no compiled step"),
        (_other_format, "was written by another version"),
        (_foreign, "is torn or no compiled step"),
        (_pickle, "is torn or no compiled step"),
        (_folder, "is no file"),
        (_pipe, "is no file"),
        (_link, "cannot be read (Too many levels of symbolic links)"),
        (_writable, "can be written by others (mode 666)"),
        (_huge, "has 314,572,800 bytes, more than the whole folder may have"),
    ],
)
def test_what_is_no_compiled_step_costs_a_compilation_and_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], problem: str
) -> None:
    store = Store(folder)
    store.save(ENTRY)
    damage(file_of(store))
    with caplog.at_level(logging.WARNING):
        assert store.load(ENTRY.id, WANTED) is None
        assert store.load(ENTRY.id, WANTED) is None
    (line,) = store.statistics.warnings
    assert problem in line
    assert caplog.messages == [line]
    assert "\n" not in line
    # What is in the way is replaced, but for a folder.
    assert store.save(ENTRY) == (damage is not _folder)
    assert store.load(ENTRY.id, WANTED) == (None if damage is _folder else ENTRY)


def as_somebody(body: Callable[[Path], Any]) -> Any:
    """What a body returns to a user who is not root, in a folder of that user's own."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() == 0:
            os.chown(name, 65534, 65534)

        def as_other() -> Any:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            return body(Path(name))

        return in_child(as_other)


@pytest.mark.parametrize(("mode", "of"), [(0, "file"), (0, "folder"), (0o500, "folder")])
def test_without_permission_the_step_is_compiled_and_not_kept(mode: int, of: str) -> None:
    def body(folder: Path) -> Any:
        store = Store(folder / "cache")
        assert store.save(ENTRY)
        os.chmod(file_of(store) if of == "file" else folder / "cache", mode)
        found = store.load(ENTRY.id, WANTED)
        kept = store.save(ENTRY)
        os.chmod(folder / "cache", 0o700)
        return [found == ENTRY, kept, [line.replace(str(folder), "") for line in store.statistics.warnings]]

    found, kept, warnings = as_somebody(body)
    denied = "cannot be read (Permission denied); it is compiled again"
    refused = f"Permission denied; compiled step {file_name(ENTRY.id)} is not kept in /cache"
    looked = f"compiled step {file_name(ENTRY.id)} in /cache {denied}"
    if of == "file":  # others' permissions are the folder's: the file can be replaced
        assert (found, kept, warnings) == (False, True, [looked])
    else:
        assert (found, kept) == (mode == 0o500, False)
        assert warnings == [*([] if found else [looked]), refused]


def test_a_folder_that_vanishes_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(folder)
    assert store.save(ENTRY)
    shutil.rmtree(folder)
    assert store.load(ENTRY.id, WANTED) is None
    assert store.save(ENTRY)
    assert store.load(ENTRY.id, WANTED) == ENTRY
    assert store.statistics.warnings == []
    # Between finding room and writing.
    monkeypatch.setattr(store, "_make_room", lambda *_: shutil.rmtree(folder))
    assert not store.save(ENTRY)
    assert store.load(ENTRY.id, WANTED) is None
    assert store.statistics.warnings == [
        f"No such file or directory; compiled step {file_name(ENTRY.id)} is not kept in {folder}"
    ]


def test_a_store_without_a_folder_keeps_nothing_and_says_nothing() -> None:
    store = Store(None)
    assert not store.save(ENTRY)
    assert store.load(ENTRY.id, WANTED) is None
    assert (store.statistics.misses, store.statistics.warnings) == (1, [])


# A full disk.


def locked_out(store: Store) -> bool:
    """Whether somebody is making the step."""
    with open(store.folder / (file_name(ENTRY.id) + stores.LOCK_SUFFIX)) as stream:  # type: ignore[operator]
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_one_makes_a_step_and_who_waited_finds_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mine, yours = Store(folder), Store(folder)
    found: list[Entry | None] = []

    def wait() -> None:
        with yours.alone(ENTRY.id) as waited:
            found.append(yours.load(ENTRY.id, WANTED) if waited else None)

    waiter = threading.Thread(target=wait)
    with mine.alone(ENTRY.id) as waited, mine.alone(OTHER.id + "2"):  # another step is another lock
        assert not waited
        waiter.start()
        until = time.monotonic() + WAIT
        while "waiting" not in caplog.text and time.monotonic() < until:
            waiter.join(0.01)
        assert "another process is compiling it; waiting" in caplog.text
        assert not found
        mine.save(ENTRY)
    waiter.join(WAIT)
    assert found == [ENTRY]
    assert not locked_out(mine)


def test_a_killed_process_lets_the_next_one_make_its_step(folder: Path) -> None:
    store = Store(folder)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with store.alone(ENTRY.id):
            os.write(writer, b"in")
            signal.pause()
    try:
        assert os.read(reader, 2) == b"in"
        assert locked_out(store)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    with store.alone(ENTRY.id) as waited:
        assert not waited


def test_what_a_maker_starts_does_not_hold_its_lock(folder: Path) -> None:
    store = Store(folder)
    with store.alone(ENTRY.id):
        outlives = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
        assert locked_out(store)
    try:
        assert not locked_out(store)
    finally:
        outlives.communicate(timeout=WAIT)


@pytest.mark.parametrize("without", ["a folder", "locks"])
def test_without_locks_nobody_waits(without: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    store = Store(None if without == "a folder" else folder)
    monkeypatch.setattr("fcntl.flock", unable)
    with store.alone(ENTRY.id) as waited:
        assert not waited
    told = f"No locks available; processes that share {folder} may compile a step at the same time"
    assert store.statistics.warnings == ([] if without == "a folder" else [told])


def test_a_full_disk_leaves_the_step_that_was_there(folder: Path) -> None:
    """A limit on the size of files is a real one: the write comes to its end half way, and then fails."""
    store = Store(folder)
    store.save(ENTRY)
    large = replace(OTHER, code=b"#" * 100_000)

    def body() -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return [store.save(large), store.statistics.warnings]

    kept, warnings = in_child(body)
    assert not kept
    assert warnings == [f"File too large; compiled step {file_name(ENTRY.id)} is not kept in {folder}"]
    assert left(folder) == [file_name(ENTRY.id)]
    assert store.load(ENTRY.id, WANTED) == ENTRY


def test_without_descriptors_nothing_is_kept_and_nothing_raised(folder: Path) -> None:
    Store(folder).save(ENTRY)

    def body() -> Any:
        store = Store(folder)
        free = os.open("/", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))
        return [store.load(ENTRY.id, WANTED) is None, store.save(OTHER), len(store.statistics.warnings)]

    assert in_child(body) == [True, False, 2]
    assert Store(folder).load(ENTRY.id, WANTED) == ENTRY


# Ends at every system call.

CALLS = ("open", "mkdir", "fstat", "listdir", "stat", "write", "fsync", "close", "replace", "unlink")


@contextmanager
def interrupted(act: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Has `act` called before each system call that changes or looks at files."""
    originals = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str, *args: Any, **kwargs: Any) -> Any:
        act(name, args)
        return originals[name](*args, **kwargs)

    for name in CALLS:
        setattr(os, name, partial(wrapped, name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def save_in_place(store: Store, entry: Entry) -> bool:
    """Unsafe: as one would write any file."""
    assert store.folder is not None
    with opened(store.folder, create=True) as folder:
        descriptor = os.open(file_name(entry.id), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=folder)
        data = pack(entry)
        os.write(descriptor, data[:100])
        os.write(descriptor, data[100:])
        os.close(descriptor)
    return True


SAVES: list[Callable[[Store, Entry], bool]] = [Store.save, save_in_place]


def calls_of(save: Callable[[Store, Entry], bool], folder: Path) -> list[str]:
    made: list[str] = []
    with interrupted(lambda name, args: made.append(name)):
        assert save(Store(folder), OTHER)
    return made


@pytest.mark.parametrize("before", [None, ENTRY], ids=["nothing there", "a step there"])
@pytest.mark.parametrize("save", SAVES)
def test_a_process_killed_at_any_system_call_leaves_the_old_or_the_new_step(
    tmp_path: Path, save: Callable[[Store, Entry], bool], before: Entry | None
) -> None:
    found = []
    number = len(calls_of(save, tmp_path / "counted"))
    assert number > 5
    for last in range(number):
        folder = tmp_path / f"{last}"
        if before is not None:
            Store(folder).save(before)
        in_child(lambda folder=folder, last=last: killed_at(last, save, folder))
        after = Store(folder)
        entry = after.load(ENTRY.id, WANTED)
        assert entry in (None, before, OTHER)
        found.append(entry)
        lost = before is not None and entry is None
        assert bool(after.statistics.warnings) <= (save is save_in_place)
        assert not lost or save is save_in_place
        # Whatever was left behind, the next one gets its step in.
        assert Store(folder).save(ENTRY)
        assert Store(folder).load(ENTRY.id, WANTED) == ENTRY
    if before is not None:
        # In place, what was there is gone from the first call to the last; else it is there until the new one is.
        assert (None in found) == (save is save_in_place)
        assert OTHER in found


def killed_at(last: int, save: Callable[[Store, Entry], bool], folder: Path) -> None:
    count = itertools.count()

    def act(name: str, args: tuple[Any, ...]) -> None:
        if next(count) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    with interrupted(act):
        save(Store(folder), OTHER)


@pytest.mark.parametrize("before", [None, ENTRY], ids=["nothing there", "a step there"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ENOENT, errno.EACCES])
def test_an_error_at_any_system_call_is_never_raised_and_leaves_the_old_or_the_new_step(
    tmp_path: Path, before: Entry | None, code: int
) -> None:
    for last in range(len(calls_of(Store.save, tmp_path / "counted"))):
        folder = tmp_path / f"{last}"
        if before is not None:
            Store(folder).save(before)
        store, count = Store(folder), itertools.count()

        def act(name: str, args: tuple[Any, ...], count: Iterator[int] = count, last: int = last) -> None:
            if next(count) == last and name != "close":  # which closes all the same
                raise OSError(code, os.strerror(code))

        with interrupted(act):
            kept = store.save(OTHER)
        found = Store(folder).load(ENTRY.id, WANTED)
        assert found in ((OTHER,) if kept else (before, OTHER))
        assert len(store.statistics.warnings) == (not kept)
        assert [name for name in left(folder) if name.startswith(".")] == []


def test_a_step_is_on_disk_before_it_has_its_name_and_its_name_before_save_returns(folder: Path) -> None:
    made = calls_of(Store.save, folder)
    assert made[made.index("write") :][:5] == ["write", "fsync", "close", "replace", "fsync"]


def test_short_writes_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: original(descriptor, data[:7]))
    store = Store(folder)
    assert store.save(ENTRY)
    assert store.load(ENTRY.id, WANTED) == ENTRY


def test_what_a_killed_process_left_behind_is_removed_once_it_is_old(folder: Path) -> None:
    store = Store(folder)
    store.save(ENTRY)
    old, new = (folder / f".{file_name(ENTRY.id)}.{token}" for token in ("0" * 16, "1" * 16))
    for path in (old, new):
        path.write_bytes(b"torn")
    os.utime(old, (time.time() - 2 * stores.LEFT_BEHIND_SECONDS,) * 2)
    store.save(OTHER)
    assert left(folder) == sorted([new.name, file_name(ENTRY.id)])


# Writers at once.


def test_two_that_put_one_file_at_once_in_processes_of_one_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes in two containers that share a folder may have the same number, as two threads of one process do."""
    monkeypatch.setattr(os, "getpid", lambda: 17)
    one, other = pack(ENTRY), pack(OTHER)
    original, nested = os.write, []
    with opened(tmp_path) as folder:

        def write_and_let_another_in(descriptor: int, data: memoryview) -> int:
            if nested:
                return original(descriptor, data)
            nested.append(True)
            half = original(descriptor, data[: len(data) // 2])
            put(other, "step", folder)
            assert (tmp_path / "step").read_bytes() == other
            return half

        monkeypatch.setattr(os, "write", write_and_let_another_in)
        put(one, "step", folder)
    assert (tmp_path / "step").read_bytes() == one
    assert left(tmp_path) == ["step"]


def test_two_that_write_one_whole_file_at_once_in_processes_of_one_number_lose_it(tmp_path: Path) -> None:
    """The unsafe twin: their partial file is one, and whoever is first takes it away from the other."""
    path = tmp_path / "step"

    def both() -> None:
        with whole(path) as first:
            first.write_bytes(pack(ENTRY))
            with whole(path) as second:
                second.write_bytes(pack(OTHER))

    with pytest.raises(FileNotFoundError):
        both()
    assert path.read_bytes() == pack(OTHER)


@pytest.mark.stress
def test_processes_and_threads_that_save_one_id_at_once_never_make_a_mixture(folder: Path) -> None:
    entries = [replace(ENTRY, content=f"{own}", code=f"{own}".encode() * 200_000) for own in range(4)]
    Store(folder).save(entries[0])
    ended = threading.Event()
    wrong: list[str] = []
    loads = 0

    def write(own: int) -> int:
        store = Store(folder)
        return sum(store.save(entries[own]) for _ in range(40))

    def read() -> None:
        nonlocal loads
        store = Store(folder)
        while not ended.is_set():
            found = store.load(ENTRY.id, WANTED)
            loads += 1
            if found not in entries:
                wrong.append(str(found and found.content))
        wrong.extend(store.statistics.warnings)

    # Before there are threads, which a fork would not take along.
    children = [began_in_child(partial(write, own)) for own in (0, 1)]
    reader, *writers = [threading.Thread(target=each) for each in (read, partial(write, 2), partial(write, 3))]
    for thread in (reader, *writers):
        thread.start()
    try:
        for thread in writers:
            thread.join(WAIT)
            assert not thread.is_alive()
        assert [wait() for wait in children] == [40, 40]
    finally:
        ended.set()
        reader.join(WAIT)
    assert not reader.is_alive()
    assert loads > 10
    assert wrong == []
    assert left(folder) == [file_name(ENTRY.id)]


# Threads at once, in every order.


@pytest.mark.parametrize(
    ("mechanism", "steps", "expected"),
    [
        # Both have the same step. In 4 of the 6 orders of look up and save both compile it, which costs time only.
        ("content", "aa", {"compiled twice": 4, "ran another's": 0}),
        # Two steps: each is compiled once, and in 4 of 6 orders nobody would have noticed a wrong id.
        ("content", "ab", {"compiled twice": 6, "ran another's": 0}),
        # One id for both: whoever comes second runs what the first one compiled.
        ("counter", "ab", {"compiled twice": 4, "ran another's": 2}),
    ],
)
def test_two_threads_that_look_up_and_compile_at_once(mechanism: str, steps: str, expected: dict[str, int]) -> None:
    search = Search()
    while search.unfinished:
        with modelled(), tempfile.TemporaryDirectory() as folder:
            order, store, labels = Order(2, search.choose), Store(Path(folder)), []
            # Each thread brings its id along: who gets which is what `tests/test_compile_ids.py` is about.
            ids = [COMPILE_IDS[mechanism](DEFAULT_BITS).id_of("step", content) for content in steps]
            compiled: list[int] = []

            def ask(own: int, store: Store = store, ids: Sequence[str] = ids, compiled: list[int] = compiled) -> None:
                entry = store.load(ids[own], Wanted("step", steps[own], VERSIONS))
                if entry is None:
                    compiled.append(own)
                    store.save(replace(ENTRY, id=ids[own], content=steps[own]))

            try:
                Turnstile(order, WAIT).run([partial(ask, own) for own in range(2)])
            except Abandoned:
                search.cut()
                continue
            labels += ["compiled twice"] * (len(compiled) == 2) + ["ran another's"] * (store.statistics.foreign > 0)
            search.complete(labels)
    assert {
        "compiled twice": search.found["compiled twice"],
        "ran another's": search.found["ran another's"],
    } == expected
    assert search.found[ORDERS] == 6


# The folder.


def refused(folder: Path) -> str:
    """Why a folder is not trusted; nothing if it is."""
    try:
        with opened(folder, create=True):
            return ""
    except Untrusted as problem:
        return str(problem)


@pytest.mark.parametrize(
    ("mode", "trusted"), [(0o700, True), (0o755, True), (0o750, True), (0o770, False), (0o707, False), (0o1777, False)]
)
def test_a_folder_that_others_can_write_to_is_refused(folder: Path, mode: int, trusted: bool) -> None:
    store = Store(folder)
    store.save(ENTRY)
    folder.chmod(mode)
    assert store.load(ENTRY.id, WANTED) == (ENTRY if trusted else None)
    assert store.save(OTHER) == trusted
    why = f"folder {folder} can be written by others (mode {mode:o})"
    assert store.statistics.warnings == (
        []
        if trusted
        else [
            f"{why}; compiled steps in {folder} are not used",
            f"{why}; compiled step {file_name(ENTRY.id)} is not kept in {folder}",
        ]
    )


@pytest.mark.parametrize(
    ("mode", "trusted"), [(0o755, True), (0o775, True), (0o1777, True), (0o777, False), (0o757, False)]
)
def test_a_folder_above_that_anybody_can_write_to_is_refused_but_for_a_sticky_one(
    tmp_path: Path, mode: int, trusted: bool
) -> None:
    above = tmp_path / "above"
    (above / "between" / "cache").mkdir(parents=True, mode=0o700)
    (above / "between" / "cache").chmod(0o700)
    above.chmod(mode)
    why = "" if trusted else f"folder {above}, above it, can be written by others (mode {mode:o})"
    assert refused(above / "between" / "cache") == why


def test_somebody_elses_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(folder) == ""
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert "belongs to another user" in refused(folder)


def test_a_link_is_held_to_what_it_leads_to(tmp_path: Path) -> None:
    private, public = tmp_path / "private", tmp_path / "public"
    private.mkdir(mode=0o700)
    public.mkdir()
    public.chmod(0o777)
    for to in (private, public):
        (tmp_path / f"to_{to.name}").symlink_to(to)
    assert refused(tmp_path / "to_private" / "cache") == ""
    assert refused(tmp_path / "to_private") == ""
    assert "public, above it, can be written by others" in refused(tmp_path / "to_public" / "cache")
    assert "to_public can be written by others" in refused(tmp_path / "to_public")


@pytest.mark.parametrize("way", ["opened", "path"])
def test_a_folder_that_is_exchanged_after_it_was_looked_at(tmp_path: Path, way: str) -> None:
    """What was looked at is what is used; a path would lead to the other one by then."""
    mine, theirs = tmp_path / "cache", tmp_path / "theirs"
    for folder, entry in ((mine, ENTRY), (theirs, OTHER)):
        Store(folder).save(entry)
    name = file_name(ENTRY.id)
    with opened(mine) as descriptor:
        mine.rename(tmp_path / "away")
        theirs.rename(mine)
        if way == "opened":
            with open(name, "rb", opener=partial(os.open, dir_fd=descriptor)) as stream:
                found = unpack(stream.read())
        else:
            found = unpack((mine / name).read_bytes())
    assert found == (ENTRY if way == "opened" else OTHER)


def test_a_link_put_in_place_of_a_folder_on_the_way_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above" / "cache").mkdir(parents=True, mode=0o700)
    (tmp_path / "theirs" / "cache").mkdir(parents=True, mode=0o700)
    resolved = os.path.realpath(tmp_path / "above" / "cache")

    def exchanged(path: Path) -> str:
        (tmp_path / "above").rename(tmp_path / "away")
        (tmp_path / "above").symlink_to("theirs")
        return resolved

    monkeypatch.setattr(os.path, "realpath", exchanged)
    with pytest.raises(NotADirectoryError), opened(tmp_path / "above" / "cache"):
        pytest.fail("a link was followed")


def test_a_file_in_the_way_of_a_folder_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    store = Store(tmp_path / "cache")
    assert store.load(ENTRY.id, WANTED) is None
    assert not store.save(ENTRY)
    assert [line.split(";")[0].split("(")[-1] for line in store.statistics.warnings] == [
        "Not a directory)",
        "Not a directory",
    ]


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_folder() == Path("/elsewhere/replica-trainer")
    for ignored in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_folder() == Path("/home/somebody/.cache/replica-trainer")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # a user whom nobody has heard of, as in containers
    assert default_folder() is None


# How large it gets.


def test_what_was_not_used_for_longest_is_left_out(folder: Path) -> None:
    size = len(pack(ENTRY)) + 100_000
    store = Store(folder, limit_mebibytes=3.5 * size / MEBIBYTE)

    def large(own: int) -> Entry:
        return replace(ENTRY, id=f"{own}", code=bytes(100_000 + len(ENTRY.code)))

    for own in range(3):
        assert store.save(large(own))
        os.utime(file_of(store, f"{own}"), (own, own))
    assert store.load("0", WANTED) == large(0)  # now the one that was used last
    assert store.save(large(3))
    assert [store.load(f"{own}", WANTED) is not None for own in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3.5 * size
    assert store.statistics.warnings == []


def test_a_step_that_is_larger_than_the_limit_is_not_kept_and_leaves_the_others(folder: Path) -> None:
    store = Store(folder, limit_mebibytes=0.01)
    assert store.save(ENTRY)
    assert not store.save(replace(ENTRY, id="large", code=bytes(11_000)))
    assert store.load(ENTRY.id, WANTED) == ENTRY
    (line,) = store.statistics.warnings
    assert "bytes are more than the whole folder may have; compiled step" in line


# Machine code.

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def compiled(folder: Path, body: int) -> bytes:
    """A library whose `step` asks its own `part`, which says `body`."""
    source, made = folder / f"{body}.c", folder / f"{body}.so"
    source.write_text(f"int part(void) {{ return {body}; }}\nint step(void) {{ return part(); }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-O0", "-o", made, source], check=True, timeout=WAIT)
    return made.read_bytes()


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    folder = tmp_path_factory.mktemp("libraries")
    return [
        replace(ENTRY, id=f"{body}", symbol="step", kind=LIBRARY, code=compiled(folder, body), arrays=())
        for body in (1, 2, 3)
    ]


def by_reused_number(entry: Entry) -> ctypes.CDLL:
    """Unsafe: the descriptor is closed, so that the next library gets its number, which is its path."""
    descriptor = os.memfd_create("step")
    os.write(descriptor, entry.code)
    try:
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@needs_compiler
@pytest.mark.parametrize(("load", "expected"), [(load_library, [1, 2, 3]), (by_reused_number, [1, 1, 1])])
def test_libraries_that_are_loaded_one_after_the_other_run_their_own_bodies(
    libraries: list[Entry], load: Callable[[Entry], ctypes.CDLL], expected: list[int]
) -> None:
    assert in_child(lambda: [load(entry).step() for entry in libraries]) == expected


def made_global(entry: Entry) -> ctypes.CDLL:
    """Unsafe: the first library's symbols answer for all."""
    descriptor = os.memfd_create("step")
    os.write(descriptor, entry.code)
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}", mode=ctypes.RTLD_GLOBAL)


@needs_compiler
@pytest.mark.parametrize(("load", "expected"), [(load_library, [1, 2, 3]), (made_global, [1, 1, 1])])
def test_identical_symbols_with_different_bodies_stay_apart_unless_made_global(
    libraries: list[Entry], load: Callable[[Entry], ctypes.CDLL], expected: list[int]
) -> None:
    """What siblings with one counter leave behind, in a process that loads the files of all."""
    assert in_child(lambda: [load(entry).step() for entry in libraries]) == expected


@needs_compiler
@pytest.mark.parametrize(("way", "expected"), [("load_library", 1), ("path", 2)])
def test_what_is_loaded_is_what_was_checked(folder: Path, libraries: list[Entry], way: str, expected: int) -> None:
    """Between the look at a file and its loading another one is put there."""
    store = Store(folder)
    checked, other = libraries[:2]
    store.save(checked)

    def body() -> int:
        entry = store.load(checked.id, Wanted("step", checked.content, VERSIONS, LIBRARY))
        assert entry is not None
        path = folder / "step.so"
        path.write_bytes(other.code)  # put there by somebody else
        library = load_library(entry) if way == "load_library" else ctypes.CDLL(str(path))
        return int(library.step())

    assert in_child(body) == expected


@needs_compiler
def test_nobody_can_change_what_is_loaded_any_more(libraries: list[Entry]) -> None:
    def body() -> list[str]:
        load_library(libraries[0])
        own = (f"/proc/self/fd/{number}" for number in range(200))
        (path,) = [each for each in own if os.path.lexists(each) and "compiled step" in os.readlink(each)]
        problems = []
        for flags in (os.O_WRONLY, os.O_WRONLY | os.O_TRUNC):
            try:
                os.write(os.open(path, flags), b"x")
            except OSError as problem:
                problems.append(errno.errorcode[problem.errno or 0])
        return problems

    assert in_child(body) == ["EPERM", "EPERM"]


def test_what_is_no_library_is_not_loaded_and_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="/proc/self/fd/"):
        load_library(replace(ENTRY, kind=LIBRARY, code=b"no library"))
    assert len(os.listdir("/proc/self/fd")) == before
