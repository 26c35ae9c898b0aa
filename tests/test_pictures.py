"""The pictures in the event files: what they show is what the record and the verdicts say."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_factory import (
    SAFE,
    UNSAFE,
    add_broken,
    add_references,
    add_run,
    complete,
    end,
    make_config,
    make_record,
    make_verdict,
    seen,
)

from trainer.audit.read import read
from trainer.audit.records import Reference, RunRecord
from trainer.audit.verdict import Error, Verdict
from trainer.report import board, cosines, elements, grid, kept_updates, tensorboard
from trainer.report.grid import Cell, Grid


def run_of(replicas: int = 2, steps: int = 45) -> RunRecord:
    record = make_record(make_config(replicas=replicas, steps=steps))
    complete(record, steps)
    return record


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB")).astype(int)


def texts(what: Grid) -> list[list[str]]:
    return [[cell.text for cell in row] for row in what.cells]


def refer(record: RunRecord, step: int, *gradients: list[float]) -> None:
    """Keep these gradients of a step, each given by its first values."""
    for own, values in enumerate(gradients):
        vector = np.zeros(record.layout.read_size, np.float32)
        span = record.layout.read_segments[0].span
        vector[span.start : span.start + len(values)] = values
        record.references.append(Reference(own, step, vector, vector, vector))


def test_cosines_are_those_between_the_replicas_gradients() -> None:
    record = run_of(3)
    refer(record, 0, [1, 0], [0, 2], [-3, 0])
    refer(record, 20, [1, 1], [1, 0], [0, 0])
    found = cosines.matrices(record)
    assert found is not None
    assert found.groups == ["step 0", "step 20"]
    assert texts(found) == [
        ["1.00", "0.00", "-1.00", "1.00", "0.71", "?"],
        ["0.00", "1.00", "0.00", "0.71", "1.00", "?"],
        # A gradient of nothing has no direction.
        ["-1.00", "0.00", "1.00", "?", "?", "?"],
    ]
    assert "least -1.00" in found.title
    colours = [cell.colour for cell in found.cells[0][:3]]
    assert colours == [grid.BLUE, grid.PAPER, grid.ORANGE]


@pytest.mark.parametrize(("replicas", "steps"), [(2, [0, 20, 44]), (5, [0, 20, 44]), (6, [0, 44]), (8, [44])])
def test_more_replicas_leave_room_for_fewer_steps(replicas: int, steps: list[int]) -> None:
    record = run_of(replicas)
    for step in (0, 10, 20, 30, 44):
        refer(record, step, *([[1.0]] * replicas))
    found = cosines.matrices(record)
    assert found is not None
    assert found.groups == [f"step {step}" for step in steps]
    assert len(found.columns) == replicas * len(steps)


def test_one_replica_alone_has_no_cosines() -> None:
    record = run_of(1)
    refer(record, 0, [1.0])
    assert cosines.matrices(record) is None


def test_kept_updates_are_the_least_that_any_end_and_copy_of_a_variable_holds() -> None:
    record = run_of(2)
    end(record, 45, 45)
    assert record.copies is not None
    safe = kept_updates.by_variable(record)
    assert safe is not None
    assert texts(safe) == [["45", "45"], ["45", "45"]]
    assert "0 of 2 variables" in safe.title
    record.copies = np.repeat(record.copies, 2, axis=0)
    kernel, bias = record.layout.canaries
    record.copies[1, kernel[1, 0]] = 12  # its tail, replica 0, in one copy
    record.copies[0, bias[0, 1]] = 90  # replica 1's updates were added twice
    unsafe = kept_updates.by_variable(record)
    assert unsafe is not None
    assert texts(unsafe) == [["12", "45"], ["45", "90"]]
    assert unsafe.cells[1][1].colour == grid.LILAC
    assert unsafe.rows == ["kernel", "bias"]
    assert "1 of 2 variables lost some" in unsafe.title


def test_a_count_that_is_no_number_is_not_told_as_one() -> None:
    record = run_of(2)
    end(record, 45, 45)
    assert record.copies is not None
    record.copies[0, record.layout.canaries[0, 0]] = np.nan, np.inf
    found = kept_updates.by_variable(record)
    assert found is not None
    assert texts(found) == [["?", "?"], ["45", "45"]]


def test_a_run_that_did_not_end_has_no_kept_updates() -> None:
    assert kept_updates.by_variable(run_of()) is None


def conserved(off: dict[int, float]) -> RunRecord:
    """A run with every element's sum; elements of the kernel that are off, by their place."""
    record = run_of()
    size = record.layout.size
    record.initial, record.added = np.zeros(size, np.float32), np.ones(size)
    record.magnitudes, record.copies = np.ones(size), np.ones((1, size), np.float32)
    kernel = record.layout.segments[0]
    for place, value in off.items():
        record.copies[0, kernel.values + place] += value
    return record


def test_an_element_that_is_off_stands_where_it_is_in_the_tensor() -> None:
    (kernel,) = elements.maps(conserved({7: -0.25}))
    assert (kernel.name, kernel.shape, kernel.count) == ("kernel", (4, 3), 1)
    # Row 2, column 1 of 4 x 3, which is drawn lying.
    assert np.argwhere(kernel.off).tolist() == [[1, 2]]
    assert kernel.off[1, 2] == 0.25
    drawn = pixels(elements.png([kernel]))
    dark = np.argwhere((drawn == tuple(bytes.fromhex(elements.DARKEST[1:]))).all(axis=2))
    inside = dark[dark[:, 1] < grid.MARGIN + 4 * elements.ELEMENT]
    assert set((inside[:, 1] - grid.MARGIN) // elements.ELEMENT) == {2}
    assert len(inside) == elements.ELEMENT**2


def test_rounding_is_no_loss_and_what_is_not_a_number_is() -> None:
    (largest,) = elements.maps(conserved({0: 1e-7}))
    assert (largest.name, largest.count) == ("kernel", 0)
    (kernel,) = elements.maps(conserved({0: float("nan"), 1: 0.5}))
    assert kernel.count == 2
    drawn = pixels(elements.png([kernel]))[-grid.MARGIN - grid.LINE - elements.ELEMENT * 3 :, grid.MARGIN + 5 :]
    dark = (drawn == tuple(bytes.fromhex(elements.DARKEST[1:]))).all(axis=2)
    # The one without a distance, and the largest distance that there is.
    assert dark.sum() > 1.5 * elements.ELEMENT**2


def test_one_element_of_a_million_that_is_off_is_seen() -> None:
    off = np.zeros((1000, 1000))
    off[617, 423] = 1e-3
    drawn = pixels(elements.png([elements.Map("kernel", (1000, 1000), off, 1)]))
    dark = (drawn == tuple(bytes.fromhex(elements.DARKEST[1:]))).all(axis=2)
    assert dark[4 * grid.LINE :].any()
    assert not (pixels(elements.png([elements.Map("kernel", (1000, 1000), 0 * off, 0)]))[6 * grid.LINE :] < 30).all()


def test_nothing_is_drawn_of_elements_without_their_sums() -> None:
    record = run_of()
    end(record, 45, 45)
    assert elements.maps(record) == []
    assert set(tensorboard.pictures(record)) == {"precision/heatmap", "updates/kept_by_variable"}


def test_every_cell_has_its_colour_and_names_lie_beside_it() -> None:
    cells = [[Cell("1", grid.BLUE), Cell("0", grid.ORANGE)], [Cell("-", grid.GREY), Cell("2", grid.LILAC)]]
    what = Grid("title", "caption", ["a name that is much too long for the picture it is in", "b"], ["x", "y"], cells)
    drawn = pixels(grid.png(what))
    assert drawn.shape[1] == grid.PIXELS_WIDE
    bottom = len(drawn) - grid.MARGIN
    for row, y in enumerate((bottom - 2 * grid.CELL_HIGH, bottom - grid.CELL_HIGH)):
        for column, part in enumerate((0.55, 0.9)):
            colour = tuple(bytes.fromhex(cells[row][column].colour[1:]))
            at = drawn[y + 8, int(part * grid.PIXELS_WIDE) - 30]
            # A picture of 256 colours may have one that is next to it.
            assert np.abs(at - colour).max() <= 8, (row, column)
    assert (drawn[:, : grid.MARGIN // 2] == 255).all()  # nothing is cut off


def verdict_of(mode: str, *, kept: int | None = None) -> Verdict:
    config = make_config(mode)
    record = run_of()
    return make_verdict(config, record, kept=kept)


def test_the_board_says_which_run_was_hurt_where_and_by_how_much() -> None:
    found = board.picture({"0_locked": verdict_of(SAFE), "1_overwrite": verdict_of(UNSAFE, kept=45)})
    assert found.title.startswith("1 of 2 runs were hurt")
    assert found.columns == ["lost updates", "torn reads", "largest staleness", "verdict"]
    safe, unsafe = found.cells
    assert (safe[0], safe[-1].text) == (Cell("0 %", board.COLOURS["upheld"]), "upheld")
    assert (unsafe[0], unsafe[-1]) == (
        Cell("50 %", board.COLOURS["anomaly"]),
        Cell("anomaly", board.COLOURS["anomaly"]),
    )


def test_a_guarantee_has_a_column_of_its_own_where_a_run_broke_it() -> None:
    hurt = verdict_of(SAFE)
    for each in hurt.guarantees:
        if each.name == "samples_once":
            each.status = "violated"
    found = board.picture({"0": verdict_of(SAFE), "1": hurt})
    assert "samples once" in found.columns
    column = found.columns.index("samples once")
    assert found.cells[1][column] == Cell("broken", board.COLOURS["violated"])
    assert found.cells[0][column] == Cell("held", board.COLOURS["upheld"])


def test_of_many_runs_the_worst_are_drawn() -> None:
    verdicts = {str(number): verdict_of(SAFE) for number in range(board.MOST_RUNS + 5)}
    verdicts["44"] = verdict_of(UNSAFE, kept=0)
    found = board.picture(verdicts)
    assert len(found.rows) == board.MOST_RUNS
    assert "44" in found.rows
    assert len(pixels(grid.png(found))) < 2000


def test_broken_runs_are_told_of_too(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    add_run(tmp_path, 1, UNSAFE, kept=30, anomalies=[seen("torn_tensor", 3, 90)])
    add_broken(tmp_path, 2, "crash", "RuntimeError: no")
    names = sorted(path.parent.name for path in tmp_path.glob("*/verdict.json"))
    said = board.told({name: read(tmp_path / name) for name in names})
    assert said.startswith("**2 of 3 runs were hurt.**")
    assert "crash: RuntimeError: no" in said
    assert "- witness: somewhere" in said


def test_a_page_takes_the_place_of_the_one_before_and_counts_runs_without_a_verdict(tmp_path: Path) -> None:
    add_run(tmp_path, 0, SAFE)
    board.write(tmp_path, ["0_threads_locked_2"])
    (older,) = tmp_path.glob("events.out.tfevents.*")
    others = tmp_path / "events.out.tfevents.1.host"
    others.touch()
    board.write(tmp_path, ["0_threads_locked_2", "1_under_way"])
    assert not older.exists()
    assert others.exists()
    (newer,) = tmp_path.glob(f"events.out.tfevents.*{board.SUFFIX}")
    assert b"Of 1 more there is no verdict to read." in newer.read_bytes()


def test_a_run_that_was_refused_is_not_hurt() -> None:
    refused = Verdict("broken", {"command": "c"}, Error("refused", "no"))
    found = board.picture({"0": verdict_of(SAFE), "1": refused})
    assert found.title.startswith("0 of 2 runs were hurt")
    assert found.cells[1][-1] == Cell("refused")
    assert "| `1` | **refused** |" in board.told({"1": refused})


def test_a_sweep_that_hurt_nobody_says_so() -> None:
    said = board.told({"0": verdict_of(SAFE)})
    assert said.startswith("**No run was hurt.**")
    unclear = replace(verdict_of(SAFE), verdict="inconclusive")
    assert board.told({"0": unclear}).startswith("**No run was hurt.**")


def test_pictures_of_a_whole_run_are_small_files() -> None:
    record = conserved({3: 0.5})
    add_references(record)
    found = tensorboard.pictures(record)
    assert set(found) == {
        "precision/heatmap",
        "gradients/cosines",
        "updates/kept_by_variable",
        "updates/kept_by_element",
    }
    assert all(len(png) < 60_000 for png in found.values())
