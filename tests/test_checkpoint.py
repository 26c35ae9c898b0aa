"""The file and the folder of checkpoints: whole or not there, whatever ends a writer; damaged ones are passed over."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from trainer import whole_file
from trainer.checkpoint import files, sealed, store
from trainer.checkpoint.files import Loaded, encode, load, save
from trainer.config import ConfigError

KEEP = 2


def arrays(step: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"copies": np.full((2, 40), step, np.float32), "rows": np.arange(step, dtype=np.int64)}


def write(folder: Path, step: int) -> None:
    save(arrays(step), {"of": f"step {step}"}, step, folder, keep=KEEP)


def steps(folder: Path) -> list[int]:
    return store.steps_in(folder)


def assert_whole(found: Loaded, step: int) -> None:
    assert (found.step, found.facts) == (step, {"of": f"step {step}", "step": step})
    for name, expected in arrays(step).items():
        np.testing.assert_array_equal(found.arrays[name], expected)


def test_what_is_saved_is_loaded_and_older_ones_go(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        write(tmp_path, step)
        assert_whole(load(tmp_path), step)
    assert steps(tmp_path) == [9, 6]


# Crashes. What the writer asks of the system is done for real up to some point, and nothing after it.


class Crash(BaseException):
    """The process is no more."""


class System:
    """Calls of the operating system that a writer makes; from call `crash_at` on there is no process to make them.

    Args:
        torn: of that call, a write, half is done.
    """

    CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, crash_at: int | None = None, *, torn: bool = False) -> None:
        self.made: list[str] = []
        self._crash_at, self._torn = crash_at, torn
        self._open: list[int] = []
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if self._crash_at is not None and len(self.made) >= self._crash_at:
                if self._torn and name == "write" and len(self.made) == self._crash_at:
                    real(given[0], given[1][: len(given[1]) // 2])
                self.made.append("crashed")
                raise Crash
            self.made.append(name if name != "fsync" else f"fsync {self._kind(given[0])}")
            found = real(*given, **named)
            if name == "open":
                self._open.append(found)
            if name == "close":
                self._open.remove(given[0])
            return found

        return call

    @staticmethod
    def _kind(descriptor: int) -> str:
        return "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"

    def ended(self) -> None:
        """What the system does for a process that is gone: it closes its files."""
        for descriptor in self._open:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def written_under(folder: Path, step: int, crash_at: int | None = None, *, torn: bool = False) -> list[str]:
    """Write a checkpoint, up to a crash if there is to be one; the calls that were made."""
    with pytest.MonkeyPatch.context() as patched:
        system = System(patched, crash_at, torn=torn)
        with contextlib.suppress(Crash):
            write(folder, step)
    system.ended()
    return system.made


def test_a_new_checkpoint_is_on_the_disk_before_it_has_its_name_and_before_an_old_one_goes(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    made = written_under(tmp_path, 3)
    assert made == ["open", "open", "write", "fsync file", "close", "replace", "fsync folder", "unlink", "close"]
    other = tmp_path / "first"
    other.mkdir()
    # The folder's own name, too.
    assert written_under(other, 1)[:4] == ["mkdir", "open", "fsync folder", "close"]


CALLS_MADE = 9


@pytest.mark.parametrize("torn", [False, True], ids=["whole calls", "a torn write"])
@pytest.mark.parametrize("before", [[], [1], [1, 2]], ids=["none before", "one before", "as many as are kept"])
def test_a_crash_at_any_call_leaves_the_checkpoint_before_or_the_new_one_whole(
    tmp_path: Path, before: list[int], torn: bool
) -> None:
    outcomes = []
    for crash_at in range(CALLS_MADE + 4):
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        for step in before:
            write(folder, step)
        made = written_under(folder, 3, crash_at, torn=torn)
        kept = steps(folder)
        outcomes.append(kept)
        if kept:
            assert_whole(load(folder), kept[0])
        else:
            assert not before
            with pytest.raises(ConfigError, match="has no checkpoints/step_STEP"):
                load(folder)
        # Nothing that was to be kept is missing: those before go only once the new one is there.
        assert kept[-len(before) :] == before[::-1] or (kept[0] == 3 and kept[1:] == before[::-1][: KEEP - 1])
        # The next writer gets through, and takes away what was left half written.
        write(folder, 4)
        assert_whole(load(folder), 4)
        assert sorted(os.listdir(folder / store.FOLDER)) == [store.name_of(step) for step in reversed(steps(folder))]
        if "crashed" not in made:
            break
    else:
        raise AssertionError("a writer makes more calls than were looked at")
    # Both outcomes were there, so that the loop has crossed the moment at which the new one counts.
    assert before[::-1] in outcomes
    assert outcomes[-1] == [3, *before[::-1]][:KEEP]


def test_a_name_that_comes_before_its_content_would_be_caught(tmp_path: Path) -> None:
    """The twin: a writer that writes under the name itself leaves what is neither the old one nor the new one."""

    def straight(data: bytes, name: str, folder: int) -> None:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder)
        os.write(descriptor, data)
        os.close(descriptor)

    write(tmp_path, 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "put", straight)
        written_under(tmp_path, 3, 2, torn=True)
    assert steps(tmp_path) == [3, 1]
    found = load(tmp_path)
    assert_whole(found, 1)
    assert found.skipped[0].startswith("step_00000003.safetensors is truncated: ")


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to make files larger than this, as it refuses where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_has_no_room_leaves_nothing_and_the_one_before_stays(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with files_up_to(300), pytest.raises(OSError, match="File too large"):
        write(tmp_path, 2)
    assert os.listdir(tmp_path / store.FOLDER) == [store.name_of(1)]
    assert_whole(load(tmp_path), 1)


# Bad files.


def newest_of(folder: Path) -> Path:
    return folder / store.FOLDER / store.name_of(steps(folder)[0])


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    data = encode(arrays(3), {"of": "step 3", "step": 3})
    sealed.facts_of(data)
    header = sealed.SIZE_BYTES + int.from_bytes(data[:8], "little")
    for at in [*range(header + 40), *range(header + 40, len(data), 7)]:
        for bit in (0, 5):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(sealed.Unusable):
                sealed.facts_of(bytes(flipped))
    for size in range(0, len(data), 5):
        with pytest.raises(sealed.Damaged, match=r"is (truncated|damaged)"):
            sealed.facts_of(data[:size])


def other_format(version: str, made_by: str = sealed.FORMAT) -> bytes:
    about = sealed.metadata({"step": 9}) | {"version": version, "format": made_by}
    return sealed.seal(safetensors.numpy.save(arrays(9), about))


BAD = {
    "empty": (b"", "is truncated: 0 bytes, less than its header"),
    "text": (b"to whom it may concern, this is a letter", "is truncated: 40 bytes, less than its header"),
    "zeros": (bytes(4096), "is damaged: its header is no JSON"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "is damaged: its header is no JSON object"),
    "of others": (
        safetensors.numpy.save(arrays(9), {"format": "pt"}),
        "is a safetensors file, but no checkpoint of this program",
    ),
    "no metadata": (safetensors.numpy.save(arrays(9)), "is a safetensors file, but no checkpoint of this program"),
    "no version": (other_format("one"), "is damaged: its version is 'one'"),
    "unsealed": (
        safetensors.numpy.save(arrays(9), sealed.metadata({"step": 9})),
        "is damaged: its content does not have its sha256",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_good_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, what: str) -> None:
    data, why = BAD[what]
    write(tmp_path, 3)
    (tmp_path / store.FOLDER / store.name_of(9)).write_bytes(data)
    found = load(tmp_path)
    assert_whole(found, 3)
    assert found.skipped == [f"step_00000009.safetensors {why}"]
    (tmp_path / store.FOLDER / store.name_of(3)).unlink()
    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"resume={tmp_path} has no checkpoint that can be used: step_00000009.safetensors {why}. Start the run anew."
    )


def test_a_newer_versions_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = tmp_path / store.FOLDER / store.name_of(9)
    path.write_bytes(other_format("2"))
    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"resume={tmp_path}: {path} has format 2, and this version of the program reads up to 1. Resume with the "
        "version that wrote it, or remove it to go on from the one before."
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist. Give the folder of a run that was made with checkpoint.every=STEPS."),
        (Path.touch, "is no folder. Give the folder of a run that was made with checkpoint.every=STEPS."),
        (
            Path.mkdir,
            "has no checkpoints/step_STEP.safetensors. Give the folder of a run that was made with "
            "checkpoint.every=STEPS and came so far.",
        ),
    ],
    ids=["nothing", "a file", "no checkpoints"],
)
def test_a_folder_without_checkpoints_is_told_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "run"
    make(folder)
    with pytest.raises(ConfigError) as error:
        load(folder)
    assert str(error.value) == f"resume={folder} {message}"


def test_nothing_of_a_checkpoint_is_executed(tmp_path: Path) -> None:
    """All of it is JSON and numbers: the header says where each array is, and its dtype is one of safetensors'."""
    write(tmp_path, 3)
    data = newest_of(tmp_path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert {name: each["dtype"] for name, each in header.items() if name != "__metadata__"} == {
        "copies": "F32",
        "rows": "I64",
    }
    with pytest.raises(safetensors.SafetensorError):
        files.encode({"object": np.array([print], object)}, {})


def test_a_writer_uses_the_systems_calls_that_are_watched_here() -> None:
    """`System` stands on both modules taking these from `os` when they call them."""
    assert whole_file.os is os
    assert store.os is os
