"""What a sweep's own event file says: which run was hurt, where and by how much, all runs beside each other.

It lies in the sweep's folder, above those of the runs. TensorBoard shows its tags first, for their name. It has a
picture, the same in words with every witness, and the table of update modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.audit.guarantees import GUARANTEES
from trainer.audit.read import Unreadable, read
from trainer.audit.verdict import WORDS, Verdict
from trainer.report import grid, markdown, words
from trainer.report.events import EventFile
from trainer.report.grid import Cell, Grid
from trainer.report.tags import DESCRIPTIONS

SUFFIX = ".at_a_glance"
# A picture of more runs would be too high to be looked at: then the worst are drawn.
MOST_RUNS = 40
# Runs that are told of with their witnesses.
MOST_TOLD = 20
COLOURS = {
    "upheld": "#56B4E9",
    "not_seen": "#D9D9D9",
    "anomaly": "#E69F00",
    "violated": "#D55E00",
    "broken": "#000000",
    "inconclusive": "#CC79A7",
}
# Where there is no number to tell.
WORDS_OF_STATUS = {"upheld": "held", "not_seen": "not seen", "anomaly": "broken", "violated": "broken"}
LEGEND = (
    (COLOURS["upheld"], "held"),
    (COLOURS["anomaly"], "broken"),
    (COLOURS["violated"], "broken, though claimed"),
    (COLOURS["not_seen"], "not seen"),
)


@dataclass(frozen=True)
class Measure:
    """A column of the picture: what was measured of a guarantee; one that is not `always` there only where it broke."""

    title: str
    guarantee: str
    value: Callable[[Verdict], str]
    always: bool = False


def _lost(what: Verdict) -> str:
    kept, made = (what.metrics.get(f"updates_{name}") for name in ("kept", "expected"))
    return _percent(made - kept, made) if kept is not None and made else ""


def _torn(what: Verdict) -> str:
    torn, made = what.metrics.get("torn_reads"), what.metrics.get("updates_expected")
    return _percent(torn, made) if torn is not None and made else ""


def _off(what: Verdict) -> str:
    steps = sum(row.steps for row in what.precision)
    return _percent(sum(row.steps_off for row in what.precision), steps) if steps else ""


def _metric(name: str) -> Callable[[Verdict], str]:
    def value(what: Verdict) -> str:
        found = words.number(what.metrics.get(name), 2)
        return "" if found == "-" else found

    return value


def _percent(count: float, of: float) -> str:
    share = 100 * count / of
    return "<1 %" if 0 < share < 0.5 else f"{share:.0f} %"


MEASURES = (
    Measure("lost updates", "no_lost_updates", _lost, always=True),
    Measure("torn reads", "no_torn_reads", _torn, always=True),
    Measure("largest staleness", "fresh_gradients", _metric("staleness_max"), always=True),
    Measure("joint gradient error", "joint_gradient", _metric("gradient_error_max")),
    Measure("copies apart", "replicas_identical", _metric("replica_divergence_max")),
    Measure("steps off precision", "precision_as_asked", _off),
    *(
        Measure(name.replace("_", " "), name, lambda what: "")
        for name in GUARANTEES
        if name
        not in (
            *("no_lost_updates", "no_torn_reads", "fresh_gradients", "joint_gradient", "replicas_identical"),
            "precision_as_asked",
        )
    ),
)


def write(folder: Path, names: Sequence[str]) -> None:
    """Write the sweep's event file, in place of an older one.

    Args:
        names: the runs' folders, below the sweep's, in their order; one whose verdict cannot be read is counted only.

    Raises:
        OSError: it cannot be written.
    """
    verdicts = {}
    for name in names:
        with suppress(Unreadable):
            verdicts[name] = read(folder / name)
    if not verdicts:
        return
    drawn, said = grid.png(picture(verdicts)), told(verdicts, len(names) - len(verdicts))
    file = EventFile(folder, DESCRIPTIONS, SUFFIX)
    file.images(0, {"at_a_glance/runs": drawn})
    file.text(0, "at_a_glance/runs_in_words", said)
    file.text(0, "at_a_glance/update_modes", markdown.modes())
    file.close()
    for older in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        if older != file.path:
            older.unlink(missing_ok=True)


def hurt(what: Verdict) -> bool:
    """Whether something was seen that ought not to be, or the run broke; one that was refused did not run."""
    return _word(what) in ("broken", "violated", "anomaly")


def _word(what: Verdict) -> str:
    return "refused" if what.error is not None and what.error.kind == "refused" else what.verdict


def picture(verdicts: Mapping[str, Verdict]) -> Grid:
    """The runs one below the other: what was measured of each guarantee, and the verdict."""
    worst = sorted(verdicts, key=lambda name: WORDS.index(verdicts[name].verdict))[:MOST_RUNS]
    shown = {name: what for name, what in verdicts.items() if name in worst}
    statuses = {name: {each.name: each.status for each in what.guarantees} for name, what in shown.items()}
    measures = [
        measure
        for measure in MEASURES
        if measure.always or any(own.get(measure.guarantee) in ("anomaly", "violated") for own in statuses.values())
    ]
    left_out = "" if len(shown) == len(verdicts) else f"The {len(shown)} with the worst verdicts."
    return Grid(
        title=f"{sum(map(hurt, verdicts.values()))} of {len(verdicts)} runs were hurt: where, by how much",
        caption=left_out,
        rows=list(shown),
        columns=[*(measure.title for measure in measures), "verdict"],
        cells=[
            [*(_cell(measure, what, statuses[name]) for measure in measures), _verdict(what)]
            for name, what in shown.items()
        ],
        legend=LEGEND,
    )


def _cell(measure: Measure, what: Verdict, statuses: Mapping[str, str]) -> Cell:
    status = statuses.get(measure.guarantee, "not_checked")
    text = measure.value(what) or WORDS_OF_STATUS.get(status, "")
    if status == "not_applicable":
        # Staleness says something also where nobody minds it.
        return Cell(text if measure.guarantee == "fresh_gradients" else "n/a")
    return Cell(text or "-", COLOURS.get(status, grid.PAPER))


def _verdict(what: Verdict) -> Cell:
    return Cell(_word(what), COLOURS.get(_word(what), grid.PAPER))


def told(verdicts: Mapping[str, Verdict], without: int = 0) -> str:
    """Which runs were hurt, each with what was seen, its witness, its remedy and its command; then all in a table.

    Args:
        without: further runs whose verdict cannot be read, or which have none yet.
    """
    found = {name: what for name, what in verdicts.items() if hurt(what)}
    parts = [f"**{len(found)} of {len(verdicts)} runs were hurt.**" if found else "**No run was hurt.**"]
    for name, what in list(found.items())[:MOST_TOLD]:
        parts.append(f"#### {name}: {what.verdict}")
        if what.error is not None:
            parts.append(markdown.cell(words.error(what.error)))
        parts += [markdown.anomaly(each) for each in what.anomalies]
        parts.append(f"```\n{what.run.get('command', '')}\n```")
    if len(found) > MOST_TOLD:
        parts.append(f"And {len(found) - MOST_TOLD} more, below.")
    if without:
        parts.append(f"Of {without} more there is no verdict to read.")
    head = ("run", "verdict", "updates kept", "staleness", "loss", "accuracy", "micro-steps/s")
    parts.append(markdown.table(head, [_row(name, what) for name, what in verdicts.items()]))
    return "\n\n".join(parts)


def _row(name: str, what: Verdict) -> tuple[str, ...]:
    metrics = what.metrics
    return (
        f"`{name}`",
        f"**{_word(what)}**",
        words.share(metrics.get("updates_kept"), metrics.get("updates_expected")),
        f"{words.number(metrics.get('staleness_mean'), 3)}, at most {words.number(metrics.get('staleness_max'))}",
        *(words.number(metrics.get(key)) for key in ("loss", "accuracy", "micro_steps_per_second")),
    )
