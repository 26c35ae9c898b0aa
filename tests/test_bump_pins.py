"""Moving pins: what changes in the two files and what never does, and the command with indexes made of real files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version as installed
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from bump_pins import PACKAGES  # noqa: E402
from pin_files import Constraints, Pyproject  # noqa: E402
from pins import Unfit  # noqa: E402

SECONDS = 50
RELEASES = ["2.13", "2.13.0", "2.13.1", "2.14.0", "2.14.0.post1", "2.15.0rc1", "2.15", "2.15.0", "2.16.1"]
OLD = RELEASES[:3]


@dataclass(frozen=True)
class Written:
    """A requirement for torch and what must become of it: the text around its bounds, and what they say."""

    subject: str
    bounds: str
    marker: str
    lower: str | None
    tested: str | None
    canonical: bool

    def expected(self, newest: str, pinned: str) -> str:
        upper = max(map(Version, filter(None, [newest, pinned, self.tested])))
        if self.canonical and Version(self.tested or "0") == upper:
            return self.subject + self.bounds + self.marker
        return f"{self.subject}>={self.lower or Version(pinned)},<={upper}{self.marker}"


@st.composite
def written(draw: st.DrawFn) -> Written:
    """All shapes of a pin that can be brought into form."""
    space = st.sampled_from(["", " ", "\t", "  "]) if draw(st.booleans()) else st.just("")
    lower = draw(st.sampled_from([None, *OLD]))
    operator = draw(st.sampled_from([">=", ">=", "~=", "==", "==*", "==+"])) if lower else None
    if operator == "~=" and lower and lower.count(".") < 1:
        operator = ">="
    tested = lower if operator in ("==", "==+") else None
    clauses = []
    if lower and operator:
        bare = operator[:2]
        clauses.append((bare, lower + {"==*": ".*", "==+": "+cpu"}.get(operator, "")))
        if draw(st.integers(0, 3)) == 0:
            # Another one below it.
            clauses.append((">=", "2.9"))
    upper = draw(st.sampled_from(["", "<", "<="]))
    if upper:
        bound = draw(st.sampled_from(RELEASES if upper == "<=" else ["2.14", "3", "2.15.0.dev0"]))
        clauses.append((upper, bound))
        if upper == "<=":
            tested = min(filter(None, [tested, bound]), key=Version)
    ordered = draw(st.permutations(clauses))
    separate = [f"{draw(space)}{sign}{draw(space)}{number}{draw(space)}" for sign, number in ordered]
    bounds = ",".join(separate)
    if bounds and draw(st.booleans()):
        bounds = f"{draw(space)}({bounds}){draw(space)}"
    canonical = [sign for sign, _ in ordered] == [">=", "<="] and not re.search(r"[\s()]", bounds)
    return Written(
        draw(st.sampled_from(["torch", "Torch", " torch", "torch[a]", "torch [ a , b-c ]", "TORCH[]"])),
        bounds,
        draw(
            st.sampled_from(["", "; sys_platform == 'linux'", ';python_version<"3.12"', ' ; "x" in extra  '])
        ).lstrip(),
        lower,
        tested,
        canonical,
    )


def literal(text: str, quotes: str) -> str:
    """A TOML string; what its quotes demand to be escaped is."""
    if "'" in quotes:
        # Nothing can be escaped in there.
        quotes = "'''" if "'" in text else quotes
        return f"{quotes}{text}{quotes}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f"{quotes}{escaped}{quotes}"


# Requirements and comments that are none of torch's pins, however like them they look.
DECOYS = ["torchvision>=2.13,<3", "my-torch>=2.13", "numpy>=2,<3", "numpy; extra == 'torch>=2.13,<3'"]
LIKE = ["torch>=2.13,<3", '"torch>=2.13,<3",', "é ☃", "]", "torch"]


@st.composite
def pyprojects(draw: st.DrawFn) -> list[str | Written]:
    """A pyproject.toml in pieces: text that must stay, and pins of torch, one at least."""
    pins = draw(st.lists(written(), min_size=1, max_size=3))
    lists: list[list[str | Written]] = [[], [], []]
    for pin in pins:
        lists[draw(st.integers(0, 2))].append(pin)
    first, second, third = (draw(array(entries)) for entries in lists)
    head = ["# torch>=2.13,<3\n", '[build-system]\nrequires = ["torch>=2.13,<3"]\n']
    tables = [
        ['[project]\nname = "torch>=2.13,<3"\nkeywords = ["torch>=2.13,<3"]\ndependencies = ', *first, "\n"],
        ["[project.optional-dependencies]\ndev = ", *second, '\n"torch>=2.13,<3" = ', *third, "  # torch\n"],
        ["[tool.some]\nx = [nan, inf, 1.0]\ntorch = ['torch>=2.13,<3', \"torch\"]\n[[tool.a.b]]\n[[tool.a .b]]\n"],
    ]
    dotted = [
        *("project.dependencies = ", *first, "\nproject.optional-dependencies.dev=", *second),
        *("\nproject.optional-dependencies.c=", *third, "\n", *head),
    ]
    inline = [
        "project = {dependencies = ",
        *first,
        ", optional-dependencies = {a=",
        *second,
        ", b=",
        *third,
        "}}\n",
        *head,
    ]
    shapes = [[*head, *chain.from_iterable(draw(st.permutations(tables)))], dotted]
    if not any("\n" in piece for piece in (*first, *second, *third) if isinstance(piece, str)):
        # Inline tables stand on one line.
        shapes.append(inline)
    pieces = draw(st.sampled_from(shapes))
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    return [piece.replace("\n", ending) if isinstance(piece, str) else piece for piece in pieces]


@st.composite
def array(draw: st.DrawFn, pins: list[Written]) -> list[str | Written]:
    """A list of requirements that holds these, on one line or on many, with decoys and comments between them."""
    entries = draw(st.permutations([*pins, *draw(st.lists(st.sampled_from(DECOYS), max_size=2))]))
    lines = draw(st.booleans())

    def gap() -> str:
        comment = draw(st.sampled_from(["", "", *(f" # {like}" for like in LIKE)]))
        return f"{comment}\n  " if lines else draw(st.sampled_from(["", " ", "\t"]))

    pieces: list[str | Written] = ["[", gap()]
    for index, entry in enumerate(entries):
        comma = "," if index + 1 < len(entries) or draw(st.booleans()) else ""
        pieces += [entry if isinstance(entry, Written) else literal(entry, '"'), gap(), comma, gap()]
    return [*pieces, "]"]


@given(
    pyprojects(),
    st.sampled_from(['"', "'", '"""', "'''"]),
    st.sampled_from(["2.13.1", "2.15.0", "2.17.0"]),
    st.sampled_from(["2.13.1", "2.14.0"]),
)
@settings(max_examples=400, deadline=None)
def test_the_bounds_of_pins_change_and_nothing_else(
    pieces: list[str | Written], quotes: str, newest: str, pinned: str
) -> None:
    def text(of: Callable[[Written], str]) -> str:
        return "".join(literal(of(piece), quotes) if isinstance(piece, Written) else piece for piece in pieces)

    pins = [piece for piece in pieces if isinstance(piece, Written)]
    old = text(lambda pin: pin.subject + pin.bounds + pin.marker)
    moved = Pyproject(old)
    changes = moved.bound("torch", Version(newest), Version(pinned))
    assert moved.text == text(lambda pin: pin.expected(newest, pinned))
    changed = [pin for pin in pins if pin.expected(newest, pinned) != pin.subject + pin.bounds + pin.marker]
    assert len(changes) == len(changed)
    again = Pyproject(moved.text)
    assert again.bound("torch", Version(newest), Version(pinned)) == []
    assert again.text == moved.text
    # What pip reads in it.
    for pin in pins:
        requirement = Requirement(pin.expected(newest, pinned))
        bounds = {clause.operator: Version(clause.version) for clause in requirement.specifier}
        assert set(bounds) == {">=", "<="}
        assert bounds["<="] >= max(Version(each) for each in (newest, pinned, pin.tested) if each)
        assert pin.lower is None or bounds[">="] == Version(pin.lower)
    assert tomllib.loads(moved.text).keys() == tomllib.loads(old).keys()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["torch==", "Torch == ", "  torch ==", "torch\t== "]),
            st.sampled_from(["2.13.0", "2.13.0+cpu", "2.13", "2.15", "2.15.0", "2.15.0+cpu", "2.16.0rc1"]),
            st.sampled_from(["", "  ", " # torch==2.13.0", "; sys_platform == 'linux'", " ; extra=='a' # torch==2.13"]),
        )
        | st.sampled_from(
            ["# torch==2.13.0", "torchvision==2.13.0", "", "-c torch==2.13.0", "my_torch==2.13.0 # torch"]
        ),
        max_size=6,
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_exact_pins_move_up_and_nothing_else(lines: list[tuple[str, str, str] | str], ending: str, ends: bool) -> None:
    def text(of: Callable[[str], str]) -> str:
        told = [line if isinstance(line, str) else f"{line[0]}{of(line[1])}{line[2]}" for line in lines]
        return ending.join(told) + ending * ends

    def expected(version: str) -> str:
        return "2.15.0" if version.startswith("2.13") else version

    moved = Constraints(text(str))
    pins = [line[1] for line in lines if isinstance(line, tuple)]
    if pins:
        assert moved.pinned("torch") == max(Version(version.partition("+")[0]) for version in pins)
    assert len(moved.move("torch", Version("2.15.0"))) == sum(version.startswith("2.13") for version in pins)
    assert moved.text == text(expected)
    assert moved.move("torch", Version("2.15.0")) == []


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        (">=2.13,<=2.15", ">=2.13,<=2.15"),
        (">=2.13,<=2.15.0", ">=2.13,<=2.15.0"),
        (">=2.13, <=2.15", ">=2.13,<=2.15.0"),
        ("<=2.15,>=2.13", ">=2.13,<=2.15.0"),
    ],
)
def test_a_bound_that_says_the_same_in_the_right_form_stays_as_written(bounds: str, expected: str) -> None:
    pyproject = Pyproject(f'project.dependencies = ["torch{bounds}"]')
    pyproject.bound("torch", Version("2.15.0"), Version("2.13.0"))
    assert pyproject.text == f'project.dependencies = ["torch{expected}"]'


def test_the_projects_own_pins_fit() -> None:
    constraints = Constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pyproject = Pyproject(text)
    for name in PACKAGES:
        assert pyproject.names(name)
        pinned = constraints.pinned(name)
        pyproject.bound(name, pinned, pinned)
    was, now = (
        {entry.name: entry.specifier for entry in map(Requirement, tomllib.loads(each)["project"]["dependencies"])}
        for each in (text, pyproject.text)
    )
    assert {name for name in was if was[name] != now[name]} <= set(PACKAGES)
    assert {clause.operator for name in PACKAGES for clause in now[name]} == {">=", "<="}
    assert len(text.splitlines()) == len(pyproject.text.splitlines())


@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        (
            "torch!=2.14,>=2.13",
            "an exclusion has no place in >=LOWER,<=UPPER; put the lower bound above it, or remove it",
        ),
        ("torch>2.13", "> does not name the first release that fits; write >= and that release"),
        ("torch===2.13.0", "=== compares letters; write == and a version"),
        ("torch @ file:///torch.whl", "a URL has no bounds; name the package and its versions"),
        ("torch>=2.16", "no release reaches the lower bound; the newest is 2.15.0"),
        ("torch>=2.13<3", "that is no requirement; "),
    ],
)
def test_a_pin_that_cannot_be_brought_into_form_says_why(requirement: str, reason: str) -> None:
    pyproject = Pyproject(f'project.dependencies = ["{requirement}"]')
    with pytest.raises(Unfit) as told:
        pyproject.bound("torch", Version("2.15.0"), Version("2.13.0"))
    assert str(told.value).startswith(f"pyproject.toml: {requirement}: {reason}")
    assert "\n" not in str(told.value)


INEXACT = [
    "torch",
    "torch>=2",
    "torch==2.*",
    "torch===2.13.0",
    "torch==2,<3",
    "torch == ",
    "torch==what",
    "torch[a]==2",
]
OTHER = [
    "torch==2.13.0 --hash=x",
    "torch==2.13.0 ; extra == 'a' --hash=x",
    "torch==2.13.0#a",
    "torch @ file:///torch.whl",
]


@pytest.mark.parametrize("line", INEXACT + OTHER)
def test_a_constraint_that_is_no_exact_pin_is_told(line: str) -> None:
    for take in (lambda it: it.pinned("torch"), lambda it: it.move("torch", Version("2.15.0"))):
        with pytest.raises(Unfit) as told:
            take(Constraints(f"keras==3\n{line}  # why\n"))
        assert str(told.value) == f"constraints.txt: {line}  # why: that is not an exact pin; write torch==VERSION"


def test_a_pin_in_escapes_is_told_and_one_in_plain_letters_beside_it_is_not() -> None:
    escaped = Pyproject('project.dependencies = ["torch\\u003e=2.13"] # torch>=2.13')
    with pytest.raises(Unfit, match=r"^pyproject\.toml: torch>=2\.13: its name or bounds are written with escapes"):
        escaped.bound("torch", Version("2.15.0"), Version("2.13.0"))
    plain = Pyproject('project.dependencies = ["torch>=2.13"] # torch>=2.13')
    plain.bound("torch", Version("2.15.0"), Version("2.13.0"))
    assert plain.text == 'project.dependencies = ["torch>=2.13,<=2.15.0"] # torch>=2.13'


# From here on the command, as a process of its own.

PYPROJECT = """\
[project]
name = "some"
version = "1"
requires-python = ">=3.11,<3.12" # torch>=2.13,<3
dependencies = [
  "keras>=3.15,<4", # models
  'torch[opt]>=2.13,<3',
]
"""
CONSTRAINTS = "# Tested together.\nkeras==3.15.1\ntorch==2.13.0"
BUMPED = PYPROJECT.replace("2.13,<3'", "2.13,<=2.15.0'").replace("3.15,<4", "3.15,<=3.16.0")
BUMPED_CONSTRAINTS = CONSTRAINTS.replace("2.13.0", "2.15.0").replace("3.15.1", "3.16.0")


def wheel(folder: Path, name: str, version: str, tags: str = "py3-none-any") -> str:
    """A wheel that installs nothing; its file's name."""
    stem = f"{name.replace('-', '_')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-{tags}.whl", "w") as file:
        head = f"{stem}.dist-info"
        file.writestr(f"{head}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{head}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n")
        file.writestr(f"{head}/RECORD", "")
    return f"{stem}-{tags}.whl"


@dataclass
class Project:
    """A folder with both files, and one that pip finds releases in."""

    folder: Path
    releases: Path
    settings: dict[str, str] = field(default_factory=dict)

    def __call__(self, *arguments: str, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        return subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            preexec_fn=limit,
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / "bump_pins.py"), "--folder", str(self.folder), *arguments]

    def environment(self) -> dict[str, str]:
        # Whatever pip is told of the machine's indexes, it is not told here.
        plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        own = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(self.releases), "PIP_RETRIES": "0"}
        return {**plain, **own, **(self.settings or {"PIP_NO_INDEX": "1"})}

    def write(self, pyproject: str, constraints: str = CONSTRAINTS) -> None:
        (self.folder / "pyproject.toml").write_bytes(pyproject.encode())
        (self.folder / "constraints.txt").write_bytes(constraints.encode())

    def holds(self, pyproject: str, constraints: str = CONSTRAINTS) -> None:
        """Assert that there are these two texts, and nothing else."""
        found = {path.name: path.read_bytes().decode() for path in self.folder.iterdir()}
        assert found == {"pyproject.toml": pyproject, "constraints.txt": constraints}

    def offer(self, name: str, *versions: str) -> None:
        for version in versions:
            wheel(self.releases, name, version)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two pins for which there are newer releases."""
    (tmp_path / "project").mkdir()
    made = Project(tmp_path / "project", tmp_path / "releases")
    made.write(PYPROJECT)
    made.offer("keras", "3.15.1", "3.16.0")
    made.offer("torch", "2.13.0", "2.13.0+cpu", "2.15.0")
    return made


def refused(ended: subprocess.CompletedProcess[str]) -> str:
    """What the command said, on one line, when it refused."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stdout == ""
    assert re.fullmatch(r"bump_pins: .+\n", ended.stderr), ended.stderr
    return ended.stderr.removeprefix("bump_pins: ").rstrip("\n")


LINES = """\
pyproject.toml: keras>=3.15,<4 -> keras>=3.15,<=3.16.0
constraints.txt: keras==3.15.1 -> keras==3.16.0
pyproject.toml: torch[opt]>=2.13,<3 -> torch[opt]>=2.13,<=2.15.0
constraints.txt: torch==2.13.0 -> torch==2.15.0
"""


def test_check_and_dry_run_say_what_a_run_does(project: Project, tmp_path: Path) -> None:
    check = project("keras", "torch", "--check")
    assert (check.returncode, check.stdout, check.stderr) == (1, LINES, "")
    dry = project("keras", "torch", "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    project.holds(PYPROJECT)
    patched = Project(tmp_path / "patched", project.releases)
    shutil.copytree(project.folder, patched.folder)
    subprocess.run(["git", "apply"], cwd=patched.folder, input=dry.stdout, text=True, check=True, timeout=SECONDS)
    patched.holds(BUMPED, BUMPED_CONSTRAINTS)
    run = project("keras", "torch")
    assert (run.returncode, run.stdout, run.stderr) == (0, LINES, "")
    project.holds(BUMPED, BUMPED_CONSTRAINTS)
    for options in ([], ["--check"]):
        again = project("keras", "torch", *options)
        assert (again.returncode, again.stdout, again.stderr) == (0, "nothing to change\n", "")
    project.holds(BUMPED, BUMPED_CONSTRAINTS)


def test_packages_limit_it(project: Project) -> None:
    assert project("Torch").returncode == 0
    project.holds(
        PYPROJECT.replace("2.13,<3'", "2.13,<=2.15.0'"),
        CONSTRAINTS.replace("2.13.0", "2.15.0"),
    )


def test_pip_takes_the_releases_that_were_written(project: Project) -> None:
    project("keras", "torch")
    written = tomllib.loads((project.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    install = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--constraint"]
    ended = subprocess.run(
        [*install, "constraints.txt", *written],
        cwd=project.folder,
        env=project.environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert "Would install keras-3.16.0 torch-2.15.0\n" in ended.stdout, ended.stdout + ended.stderr


def test_all_five_are_moved_in_this_project(project: Project) -> None:
    for file in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, project.folder)
    for name in PACKAGES:
        project.offer(name, "999.1")
    ended = project()
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 2 * len(PACKAGES)
    constraints = (project.folder / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in constraints if "999" in line} == {f"{name}==999.1" for name in PACKAGES}


def test_bytes_that_are_no_pin_stay(project: Project) -> None:
    text = PYPROJECT.replace("\n", "\r\n").replace("# models", "# modèles \u2028 torch>=2.13,<3") + "# no line end"
    constraints = CONSTRAINTS.replace("\n", "\r\n")
    bumped = text.replace("2.13,<3'", "2.13,<=2.15.0'"), constraints.replace("2.13.0", "2.15.0")
    project.write(text, constraints)
    dry = subprocess.run(
        project.command("torch", "--dry-run"),
        env=project.environment(),
        capture_output=True,
        timeout=SECONDS,
        check=True,
    )
    assert project("torch").returncode == 0
    project.holds(*bumped)
    # The diff has the bytes, too.
    project.write(text, constraints)
    subprocess.run(["git", "apply"], cwd=project.folder, input=dry.stdout, check=True, timeout=SECONDS)
    project.holds(*bumped)


def test_an_index_that_is_behind_lowers_nothing(project: Project) -> None:
    text = PYPROJECT.replace("2.13,<3'", "2.13,<=2.99.0'")
    constraints = CONSTRAINTS.replace("2.13.0", "2.98.0")
    project.write(text, constraints)
    assert project("torch").stdout == "nothing to change\n"
    project.holds(text, constraints)


def link(folder: Path, file: str, **attributes: str) -> None:
    """Add a file to the page of an index that lists torch."""
    page = folder / "simple" / "torch" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    told = "".join(f' data-{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    with page.open("a", encoding="utf-8") as stream:
        stream.write(f'<a href="../../{file}"{told}>{file}</a>\n')


@pytest.mark.parametrize(
    ("version", "tags", "attributes", "newest"),
    [
        ("2.16.0", "py3-none-any", {}, "2.16.0"),
        ("2.16.0", "py3-none-any", {"yanked": "wrong numbers"}, "2.15.0"),
        ("2.16.0", "py3-none-any", {"requires_python": "&gt;=3.12"}, "2.15.0"),
        ("2.16.0", "cp312-cp312-any", {}, "2.15.0"),
        ("2.16.0rc1", "py3-none-any", {}, "2.15.0"),
        ("2.15.0+cpu", "py3-none-any", {}, "2.15.0"),
        ("2.15.0.post1", "py3-none-any", {}, "2.15.0.post1"),
    ],
)
def test_only_a_final_release_with_a_file_for_this_python_counts(
    project: Project, version: str, tags: str, attributes: dict[str, str], newest: str
) -> None:
    root = project.folder.parent / "index"
    link(root, wheel(root, "torch", "2.15.0"))
    link(root, wheel(root, "torch", version, tags), **attributes)
    # The user's own settings, which are no reason to take another release, or to say nothing.
    project.settings = {"PIP_INDEX_URL": (root / "simple").as_uri(), "PIP_PRE": "1", "PIP_QUIET": "1"}
    assert project("torch").returncode == 0
    project.holds(PYPROJECT.replace("2.13,<3'", f"2.13,<={newest}'"), CONSTRAINTS.replace("2.13.0", newest))


@pytest.mark.skipif(Version(installed("pip")) < Version("26.0"), reason="this pip counts source distributions, too")
def test_a_release_without_a_wheel_does_not_count(project: Project) -> None:
    (project.releases / "torch-2.16.0.tar.gz").touch()
    assert "torch[opt]>=2.13,<=2.15.0" in project("torch").stdout


def test_no_release_at_all_is_told(project: Project) -> None:
    shutil.rmtree(project.releases)
    project.offer("keras", "3.16.0")
    project.settings = {"PIP_NO_INDEX": "1", "FORCE_COLOR": "1"}
    assert refused(project("keras", "torch")) == "torch: pip: ERROR: No matching distribution found for torch"
    project.holds(PYPROJECT)


def test_an_index_that_cannot_be_reached_is_told_whatever_others_answer(project: Project) -> None:
    with socket.socket() as closed:
        # Bound and not listening: nobody else can take this port, and nobody answers at it.
        closed.bind(("127.0.0.1", 0))
        project.settings = {"PIP_INDEX_URL": f"http://127.0.0.1:{closed.getsockname()[1]}/simple"}
        told = refused(project("torch"))
    assert told.startswith("torch: pip: Could not fetch URL http://127.0.0.1:")
    project.holds(PYPROJECT)


@contextmanager
def serving(answer: Callable[[], int]) -> Iterator[str]:
    """An index that has nothing; `answer` is called at each request and gives the status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer())
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(SECONDS)
        assert not thread.is_alive()


@pytest.mark.parametrize(("status", "complete"), [(404, True), (403, True), (401, False), (500, False)])
def test_an_index_without_the_package_is_no_gap_and_one_that_fails_is(
    project: Project, status: int, complete: bool
) -> None:
    with serving(lambda: status) as index:
        project.settings = {"PIP_INDEX_URL": index}
        ended = project("torch")
    if complete:
        assert ended.returncode == 0, ended.stderr
        assert "torch==2.15.0" in ended.stdout
    else:
        assert "Could not fetch URL" in refused(ended)
        project.holds(PYPROJECT)


def test_what_somebody_writes_meanwhile_is_kept(project: Project) -> None:
    theirs = PYPROJECT + "# theirs\n"

    def edit() -> int:
        project.write(theirs)
        return 404

    with serving(edit) as index:
        project.settings = {"PIP_INDEX_URL": index}
        assert refused(project("torch")) == "the files were written by somebody else meanwhile; run it again"
    project.holds(theirs)


def test_ctrl_c_leaves_everything_as_it_was(project: Project) -> None:
    asked, end = threading.Event(), threading.Event()

    def wait() -> int:
        asked.set()
        assert end.wait(SECONDS)
        return 404

    with serving(wait) as index:
        project.settings = {"PIP_INDEX_URL": index}
        process = subprocess.Popen(
            project.command("torch"),
            env=project.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert asked.wait(SECONDS)
            os.killpg(process.pid, signal.SIGINT)
            assert process.communicate(timeout=SECONDS) == ("", "")
        finally:
            end.set()
            process.kill()
    assert process.returncode == 130
    project.holds(PYPROJECT)


def test_a_write_that_breaks_off_leaves_both_files_as_they_were(project: Project) -> None:
    text = PYPROJECT + f"# {'.' * 300_000}\n"
    project.write(text)
    # constraints.txt, which is short, can be written; pyproject.toml cannot.
    assert "File too large" in refused(project("torch", largest_file=200_000))
    project.holds(text)
    assert project("torch", largest_file=400_000).returncode == 0
    project.holds(text.replace("2.13,<3'", "2.13,<=2.15.0'"), CONSTRAINTS.replace("2.13.0", "2.15.0"))


def test_a_link_stays_a_link_and_permissions_stay(project: Project, tmp_path: Path) -> None:
    real = tmp_path / "constraints-real.txt"
    shutil.move(project.folder / "constraints.txt", real)
    (project.folder / "constraints.txt").symlink_to(real)
    (project.folder / "pyproject.toml").chmod(0o640)
    assert project("torch").returncode == 0
    assert (project.folder / "constraints.txt").readlink() == real
    assert "torch==2.15.0" in real.read_text(encoding="utf-8")
    assert (project.folder / "pyproject.toml").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("pyproject", "constraints", "message"),
    [
        ("[project\n", CONSTRAINTS, "pyproject.toml is not TOML; "),
        ("project = 1\n", CONSTRAINTS, "pyproject.toml: project must be a table"),
        ("[project]\ndependencies = 'torch'\n", CONSTRAINTS, "pyproject.toml: project.dependencies and each of "),
        ("[project]\ndependencies = [1, 'numpy']\n", CONSTRAINTS, "pyproject.toml does not name torch"),
        ("[tool]\ndependencies = ['torch']\n", CONSTRAINTS, "pyproject.toml does not name torch"),
        (PYPROJECT.replace("<3.12", "<3.11"), CONSTRAINTS, "requires-python is >=3.11,<3.11; run this with such a "),
        (PYPROJECT.replace("<3.12", "what"), CONSTRAINTS, "pyproject.toml: requires-python: "),
        (PYPROJECT.replace("2.13,<3'", "2.13,!=2.14'"), CONSTRAINTS, "pyproject.toml: torch[opt]>=2.13,!=2.14: an "),
        (PYPROJECT, "keras==3.15.1\n", "constraints.txt: torch is not pinned; add a line torch==VERSION"),
        (PYPROJECT, "torch>=2 # why\n", "constraints.txt: torch>=2 # why: that is not an exact pin; write torch=="),
    ],
)
def test_a_mistake_is_told_on_one_line(project: Project, pyproject: str, constraints: str, message: str) -> None:
    project.write(pyproject, constraints)
    assert refused(project("torch")).startswith(message)
    project.holds(pyproject, constraints)


def test_a_file_that_is_missing_or_no_text_is_told(project: Project) -> None:
    (project.folder / "constraints.txt").write_bytes(b"torch==2.13.0 # \xff")
    assert refused(project("torch")).startswith("constraints.txt must be UTF-8; ")
    (project.folder / "constraints.txt").unlink()
    assert "No such file" in refused(project("torch"))
    assert [path.name for path in project.folder.iterdir()] == ["pyproject.toml"]


def test_no_framework_is_imported() -> None:
    code = "import bump_pins, sys; print({'torch', 'tensorflow', 'keras', 'hydra', 'numpy'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert found.stdout == "set()\n"
