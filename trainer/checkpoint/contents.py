"""What a checkpoint holds of a run's record, so that the verdict on a resumed run speaks of all its steps. NumPy only.

Not among it: a trace (`audit.trace_steps`), for its times are of another process.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.audit.records import Average, Digests, Evaluation, Floats, Reference, ReplicaRecord, RunRecord
from trainer.checkpoint.files import Arrays
from trainer.state.settings import Difference

VECTORS = ("snapshot", "contribution", "applied")  # of a reference, before it is computed again


@dataclass(frozen=True)
class Snapshot:
    """A run at the end of a step that every replica has taken and none has gone beyond.

    Attributes:
        step: steps that are done.
        seconds: that they took.
        arrays, facts: the strategy's own; all shared variables as `copies`, float32 [num_copies, layout.size].
        done: of each replica, rows that are complete: `step`, or as many as another process has told.
        computed: of each replica, by dtype, the steps read off so far.
        witnesses: of each replica, step and canaries of its first snapshot that was not whole, if there was one.
        references: those of the steps that are done.
        compared: what processes have told each other of their copies.
    """

    step: int
    seconds: float
    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]
    done: list[int]
    computed: list[dict[str, int]]
    witnesses: list[tuple[int, Floats] | None]
    references: Sequence[Reference]
    compared: Mapping[str, Any]


def snapshot(
    record: RunRecord,
    step: int,
    seconds: float,
    arrays: Mapping[str, NDArray[Any]],
    facts: Mapping[str, Any],
    references: Sequence[Reference],
) -> Snapshot:
    """A snapshot of a record at `step`, to be taken while no replica writes to it.

    Its rows are not copied: a row that is complete never changes.
    """
    computed = [dict(replica.computed) for replica in record.replicas]
    witnesses = [replica.torn_witness for replica in record.replicas]
    done = [replica.steps_done for replica in record.replicas]
    compared = {
        "digests_compared": record.digests_compared,
        "digests_off": [[each.step, list(each.found)] for each in record.digests_off],
        "averages": [list(each) for each in record.averages],
    }
    return Snapshot(step, seconds, arrays, facts, done, computed, witnesses, references, compared)


def pack(record: RunRecord, taken: Snapshot, evaluations: Sequence[Evaluation]) -> tuple[Arrays, dict[str, Any]]:
    """A snapshot with the record's rows, as arrays and facts; at any time after it was taken.

    Args:
        evaluations: those that a run which goes on from there does not make again.
    """
    arrays: Arrays = {f"strategy.{name}": array for name, array in taken.arrays.items()}
    for replica, done, witness in zip(record.replicas, taken.done, taken.witnesses, strict=True):
        own = f"replica_{replica.replica_id}"
        arrays |= {f"{own}.{name}": rows[:done] for name, rows in _rows(replica).items()}
        if witness is not None:
            arrays[f"{own}.torn_witness"] = witness[1]
    arrays |= {f"references.{name}": _vectors(record, taken, name) for name in VECTORS}
    facts = {
        "strategy": dict(taken.facts),
        "seconds": taken.seconds,
        "done": taken.done,
        "computed": taken.computed,
        "torn_steps": [None if witness is None else witness[0] for witness in taken.witnesses],
        "references": [[each.replica_id, each.step, each.batch, each.asked] for each in taken.references],
        "evaluations": [dataclasses.asdict(each) for each in evaluations],
        "compared": dict(taken.compared),
        "settings": {own: [dataclasses.asdict(each) for each in list(found)] for own, found in record.settings.items()},
    }
    return arrays, facts


def _rows(replica: ReplicaRecord) -> dict[str, NDArray[Any]]:
    """The arrays that have a row a step, by name."""
    return {name: value for name, value in vars(replica).items() if isinstance(value, np.ndarray)}


def _vectors(record: RunRecord, taken: Snapshot, name: str) -> Floats:
    found = [getattr(each, name) for each in taken.references]
    return np.stack(found) if found else np.zeros((0, record.layout.read_size), np.float32)


def unpack(arrays: Arrays, facts: Mapping[str, Any], record: RunRecord) -> None:
    """Put what a checkpoint holds of a record into an empty one, as if its own run had come to that step."""
    for replica, done in zip(record.replicas, facts["done"], strict=True):
        own = f"replica_{replica.replica_id}"
        for name, rows in _rows(replica).items():
            rows[:done] = arrays[f"{own}.{name}"]
        torn = facts["torn_steps"][replica.replica_id]
        if torn is not None:
            replica.torn_witness = (torn, arrays[f"{own}.torn_witness"])
        replica.computed = Counter(facts["computed"][replica.replica_id])
        replica.steps_done = done
    vectors = zip(*(arrays[f"references.{name}"] for name in VECTORS), strict=True)
    record.references = [
        Reference(own, at, before, found, applied, batch=batch, asked=asked)
        for (own, at, batch, asked), (before, found, applied) in zip(facts["references"], vectors, strict=True)
    ]
    record.evaluations = [Evaluation(**each) for each in facts["evaluations"]]
    record.settings = {int(own): [Difference(**each) for each in found] for own, found in facts["settings"].items()}
    record.duration_seconds = facts["seconds"]
    compared = facts["compared"]
    record.digests_compared = compared["digests_compared"]
    record.digests_off = [Digests(at, tuple(found)) for at, found in compared["digests_off"]]
    record.averages = [Average(*each) for each in compared["averages"]]
