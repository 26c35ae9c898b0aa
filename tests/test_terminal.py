"""What a terminal, a pipe and a shell make of the command: width, colour, completion."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from command import ROOT, Command

from trainer.config import OPTIONS
from trainer.experiments import experiments
from trainer.usage import GROUPS

ESCAPE = "\x1b"
# Foregrounds and backgrounds, of 16 colours and of more.
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7])(?:;\d+)*m")


@contextmanager
def terminal(columns: int) -> Iterator[tuple[int, int]]:
    """Both ends of a terminal that is so wide."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


def shown(command: Command, columns: int, *arguments: str, **environment: str) -> str:
    """What a command writes to a terminal."""
    with terminal(columns) as (master, slave):
        variables = {**command.environment(), "TERM": "xterm-256color", "NO_COLOR": "", **environment}
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *arguments], cwd=command.folder, env=variables, stdout=slave, stderr=slave
        )
        text = b""
        while process.poll() is None or readable(master):
            if readable(master):
                text += os.read(master, 1 << 16)
        assert process.wait(30) == 0, text
    return text.decode().replace("\r\n", "\n")


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0.05)[0])


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("arguments", [["--help"], ["show", "modes"], ["show", "state"]])
def test_lines_are_as_wide_as_the_terminal_at_most(command: Command, columns: int, arguments: list[str]) -> None:
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown(command, columns, *arguments)).splitlines()
    assert columns / 2 < max(map(len, lines)) <= columns


def test_colour_is_for_terminals_that_want_it(command: Command) -> None:
    asked = ("show", "modes")
    assert COLOUR.search(shown(command, 120, *asked))
    assert not COLOUR.search(shown(command, 120, *asked, NO_COLOR="1"))
    assert ESCAPE not in shown(command, 120, *asked, TERM="dumb")
    assert ESCAPE not in command(*asked).stdout


def test_help_says_of_each_group_what_it_chooses(command: Command) -> None:
    assert set(GROUPS) == set(OPTIONS)
    said = command("--help").stdout
    for group, text in GROUPS.items():
        assert re.search(rf"^  {group} +{re.escape(text[:40])}", said, re.MULTILINE)
    assert f"{len(experiments())} of them (show experiments)" in said


def test_bash_completes_what_the_entry_point_takes(command: Command) -> None:
    entry = command.folder / "bin" / "trainer"
    entry.parent.mkdir()
    entry.write_text(f"#!{sys.executable}\nimport sys\nfrom trainer.__main__ import main\nsys.exit(main())\n")
    entry.chmod(entry.stat().st_mode | stat.S_IXUSR)
    lines = ["update_mode=lock", "train.st", "experiment=tour_3"]
    script = 'eval "$(trainer -sc install=bash)"\n' + "".join(
        f'COMP_LINE="trainer {line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=(trainer {line}); COMP_CWORD=1; '
        'hydra_bash_completion; echo "${COMPREPLY[*]}"\n'
        for line in lines
    )
    path = os.pathsep.join((str(entry.parent), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=command.folder,
        env=command.environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "update_mode=lock_free update_mode=locked",
        "train.steps=",
        "experiment=tour_3_threads_overwrite",
    ], done.stderr
    assert (ROOT / "pyproject.toml").read_text().count('trainer = "trainer.__main__:main"') == 1
