"""`report.html`: one page about a folder of runs that needs nothing but itself, neither files nor the network.

What is on it is gathered here; how it looks is `page.html`. Whatever a run says is text there: Jinja escapes all of it,
and the page's own policy forbids a browser to run or fetch anything, should a name get past that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.audit.verdict import WORDS, Anomaly, PrecisionRow
from trainer.report import matrix, story, table, words
from trainer.report.groups import Group, group
from trainer.report.planned import jobs_of, planned
from trainer.report.plot import caption, svg, title
from trainer.report.rows import Row
from trainer.report.series import Chart, chart
from trainer.whole_file import whole

PAGE_NAME = "report.html"
TEMPLATES = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Witness:
    """An anomaly as the page tells it: the smallest that a group's runs have, and how often they had it.

    Attributes:
        runs: of how many, in words; nothing where there is one.
        told: what was seen, on one line.
        picture: the lines below it, of which every space counts.
        replay: the command that makes that very order again, where it is known.
    """

    kind: str
    runs: str
    job: str
    seen: str
    told: str
    picture: str
    remedy: str
    replay: str


@dataclass(frozen=True)
class Off:
    """A replica that computed in another precision than it was asked for."""

    job: str
    group: str
    row: PrecisionRow


def write(rows: list[Row], folders: Sequence[Path], path: Path) -> None:
    """Make the page, so that a reader sees the whole file or none.

    Args:
        folders: in which the rows were found; the plans of their sweeps say how many runs there were to be.

    Raises:
        OSError: it cannot be written.
    """
    text = render(rows, folders)
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def render(rows: list[Row], folders: Sequence[Path]) -> str:
    # A seventh of a second, which whoever only asks for a table need not wait for.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = _code
    return environment.get_template("page.html").render(_content(rows, folders)) + "\n"


def _content(rows: list[Row], folders: Sequence[Path]) -> dict[str, Any]:
    groups, shown, sweeps = group(rows), chart(rows), planned(folders)
    jobs, letters = table.jobs_of(rows)
    picture, why_none = _picture(shown)
    kind = "Sweep" if len(sweeps) == 1 else "Run" if len(rows) == 1 else "Runs"
    return {
        "title": f"{kind} {', '.join(folder.resolve().name for folder in folders)}",
        "folders": [str(each) for each in folders],
        "opening": story.opening(rows, jobs_of(sweeps, folders)),
        "findings": story.findings(groups),
        "picture": picture,
        "why_none": why_none,
        "plot_title": title(shown) if picture else "",
        "caption": caption(shown) if picture else [],
        "matrix": matrix.matrix(groups),
        "meaning": matrix.MEANING,
        "signs": matrix.SIGNS,
        "witnesses": [(each, list(_witnesses(each)), _again(each), _free(each)) for each in groups if each.kinds],
        "off": list(_off(groups)),
        "asked": any(job.row.precision for each in groups for job in each.jobs),
        "columns": _columns(rows, jobs),
        "runs": list(zip(jobs, rows, strict=True)),
        "classes": [_class(row) for row in rows],
        "left": ("strategy", "mode", "model"),
        "letters": letters,
        "sweeps": sweeps,
        "environment": _environment(rows),
    }


def _picture(shown: Chart) -> tuple[str, str]:
    """The plot as an `<svg>` element, or why there is none."""
    from markupsafe import Markup

    if not shown.series:
        return "", "No run that ended by itself has numbers to draw."
    try:
        # The one thing that is not escaped: matplotlib draws letters as paths, and escapes what it says in comments.
        return Markup(svg(shown)), ""
    except Exception as problem:
        # As for `sweep.png`: whatever state the user's matplotlib is in, the rest of the page stands.
        return "", " ".join(f"Drawing it failed: {type(problem).__name__}: {problem}".split())


def _witnesses(group: Group) -> Iterator[Witness]:
    for kind in group.kinds:
        seen = group.with_kind(kind)
        job, smallest = seen[0]
        told, _, picture = smallest.witness.partition("\n")
        yield Witness(
            kind,
            f"{len({job.name for job, _ in seen})} of {len(group.ended)} runs" if len(group.ended) > 1 else "",
            job.name,
            words.seen(smallest),
            told,
            picture,
            _remedy(seen),
            smallest.replay or "",
        )


def _again(group: Group) -> list[str]:
    """The commands of the runs from which the witnesses are that cannot be replayed."""
    smallest = [group.with_kind(kind)[0] for kind in group.kinds]
    commands = [str(job.row.run.get("command") or "") for job, anomaly in smallest if not anomaly.replay]
    return [each for each in dict.fromkeys(commands) if each]


def _free(group: Group) -> bool:
    """Whether its runs were in an order that nobody knows, of several that there are."""
    return any(each.covers.kind == "this_run" for job in group.ended for each in job.row.guarantees)


def _remedy(seen: Sequence[tuple[object, Anomaly]]) -> str:
    return next((each.remedy for _, each in seen if each.remedy), "")


def _off(groups: Sequence[Group]) -> Iterator[Off]:
    for each in groups:
        for job in each.jobs:
            for row in job.row.precision:
                if row.steps_off:
                    yield Off(job.name, each.name, row)


def _columns(rows: list[Row], jobs: list[str]) -> dict[str, list[str]]:
    columns = table.columns_of(rows, jobs)
    del columns["job"]
    # What is the same in all runs is said in the plot's title.
    return {name: cells for name, cells in columns.items() if name in ("mode", "N") or len(set(cells)) > 1}


def _class(row: Row) -> str:
    """What a verdict looks like; a word that there is none of looks like one that cannot be read."""
    return row.word if row.word in (*WORDS, "none") else "unreadable"


def _environment(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What the runs ran on: versions, engines, cores; each value that there is."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        versions = row.run.get("versions")
        told = {**(versions if isinstance(versions, dict) else {}), "engine": row.run.get("engine")}
        for name, value in {**told, "cores": row.run.get("cores")}.items():
            if value is not None:
                found.setdefault(str(name), {})[str(value)] = None
    return [(name, ", ".join(values)) for name, values in found.items()]


def _code(text: str) -> str:
    """A sentence whose names stand between backticks, as HTML that sets them apart."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
