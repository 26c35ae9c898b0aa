"""Which release of a package is the newest, asked of pip and thereby of the indexes that the user has set up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.version import Version
from pins import public

# Above --json, which the pip that comes with Python 3.11 does not have.
VERSIONS = re.compile(r"^Available versions: (.*)$", re.MULTILINE)
# pip goes on without a source that does not answer, and says so in its log alone. That a source answers, but does not
# have the package, is no gap: 404, and 403 from storage that does not tell the two apart.
GAP = re.compile(r"(Could not fetch URL (?!.*: 40[34] Client Error).*|The repository .* is being ignored)")


class NoAnswer(Exception):
    """Why it cannot be known which release is the newest, on one line."""


def newest(name: str) -> Version:
    """The newest release that is final, not yanked, and has a file for this Python on this platform.

    That is a wheel from pip 26.0 on; an older pip counts source distributions, too.

    Raises:
        NoAnswer: a source of packages did not answer, or none has a release that fits.
    """
    output, log = _ask(name)
    if gap := GAP.search(log):
        raise NoAnswer(f"{name}: pip: {gap[0]}")
    found = VERSIONS.search(output)
    versions = map(public, found[1].split(", ")) if found else ()
    # Whatever pip's own settings say of pre-releases.
    final = [version for version in versions if not version.is_prerelease]
    if not final:
        errors = re.findall(r"(?:ERROR: |No module ).*", output)
        raise NoAnswer(f"{name}: pip: {errors[-1] if errors else 'no final release for this Python'}")
    return max(final)


def _ask(name: str) -> tuple[str, str]:
    """What pip prints, and what it logs."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = ["--log", str(log), "--no-input", "--no-color", "--only-binary", ":all:"]
        ended = subprocess.run(
            [sys.executable, "-m", "pip", "index", "versions", name, *options],
            # A setting that makes pip quiet would silence the answer.
            env={**os.environ, "PIP_QUIET": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return ended.stdout, log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
