"""Replicas of MirroredStrategy in order after order, for `test_turn_table.py`.

    KERAS_BACKEND=tensorflow python tests/turn_all.py programs|cases OUTPUT.json

`programs`: a few lines of user code each, whose outcome in every order can be told beforehand. `cases`: the training
step. Writes, by name, what `test_turn_table.py` looks at.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf
from hold_all import config_of
from train_all import Nobody

from trainer.audit import copies
from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.schedule.operations import ACQUIRE, LOCK, READ, RELEASE, UPDATE, WRITE
from trainer.schedule.order import Abandoned, Deadlock, Order
from trainer.schedule.point import point
from trainer.schedule.search import Search
from trainer.schedule.turn_table import TurnTable
from trainer.schedule.turnstile import Failed, Stalled, Turnstile
from trainer.schedule.visible_variable import VisibleVariable
from trainer.state.settings import ASKED_BY, snapshot
from trainer.strategies import mirrored
from trainer.strategies.in_replica import replica_id
from trainer.strategies.reduction import DirectReduction

# It warns that eager replicas are slow.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

Facts = dict[str, Any]
STEPS = 8
MIXED = ["mixed_bfloat16", {"enabled_in": "replica"}]
SYNCHRONIZED = ["cnn", {"filters": [4], "normalization": "sync_batch"}]
SMALL = ["mlp", {"hidden": [4]}]


def strategy_of(num_replicas: int) -> Any:
    devices = [f"/cpu:{own}" for own in range(num_replicas)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=DirectReduction())


def covered(num_replicas: int, run: Callable[[Order], list[str]], **options: Any) -> Facts:
    """Every order of what `run` does in one: how many, and how many with each of the labels that it returns."""
    search = Search(options.pop("preemptions", None))
    while search.unfinished:
        order = Order(num_replicas, search.choose, **options)
        try:
            labels = run(order)
        except Abandoned:
            search.cut()
        except Deadlock as deadlock:
            search.complete([deadlock.told])
        else:
            search.complete(labels)
    return {"found": dict(search.found), "runs": search.runs}


def outcome_of(num_replicas: int, replica_fn: Callable[[], Any], choose: Callable[[Order], int]) -> Facts:
    """What one order comes to."""
    order = Order(num_replicas, choose)
    table, started = TurnTable(order, 2.0), time.perf_counter()
    stacks: dict[int, str] = {}
    try:
        told = f"returned {table.run(strategy_of(num_replicas), replica_fn)}"
    except (Abandoned, Deadlock, Failed, Stalled) as error:
        stacks = getattr(error, "stacks", stacks)
        told = f"{type(error).__name__}: {error}"
    return {
        "told": told,
        "seconds": time.perf_counter() - started,
        "stacks": stacks,
        "done": [f"{event.replica} {event.operation.told}" for event in order.history.events],
    }


def first(order: Order) -> int:
    return order.able()[0]


def in_turn(order: Order) -> int:
    """Whoever has not gone last."""
    return next((own for own in order.able() if own != order.last), order.able()[0])


class Programs:
    """User code: replicas that share a number, a lock, an all-reduce."""

    def __init__(self) -> None:
        self.shared = 0

    def add(self) -> None:
        point(READ, "x")
        found = self.shared
        point(WRITE, "x")
        self.shared = found + 1

    def added(self, num_replicas: int, replica_fn: Callable[[], Any]) -> Facts:
        """Every order of a function that adds: how many orders end in which number."""
        strategy = strategy_of(num_replicas)

        def run(order: Order) -> list[str]:
            self.shared = 0
            TurnTable(order).run(strategy, replica_fn)
            return [str(self.shared)]

        return covered(num_replicas, run)

    def add_twice(self) -> None:
        self.add()
        self.add()

    def add_round_all_reduce(self) -> None:
        """A real all-reduce within, and another within the backward pass of the gradient that it is part of."""
        context, value = tf.distribute.get_replica_context(), tf.constant(1.0 + replica_id())
        with tf.GradientTape() as tape:
            tape.watch(value)
            self.add()
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, value * value)
            self.add()
            loss = total * value
        gradient = float(tape.gradient(loss, value))
        # d/dv of total * v, and v * 2v * the sum of what reaches `total` in all replicas.
        assert abs(gradient - (5.0 + 3.0 * 2.0 * float(value))) < 1e-5, gradient

    def locks(self) -> None:
        for name in ("a", "b") if replica_id() == 0 else ("b", "a"):
            point(ACQUIRE, name, of=LOCK)
        for name in ("a", "b"):
            point(RELEASE, name, of=LOCK)

    def raises(self) -> None:
        self.add()
        if replica_id() == 1:
            raise ValueError("not today")
        self.add()

    def raises_at_once(self) -> None:
        if replica_id() == 0:
            raise ValueError("not today")
        self.add()

    def raises_in_collective(self) -> None:
        self.add()
        try:
            tf.distribute.get_replica_context().merge_call(lambda strategy: 1 // 0)
        finally:
            self.add()

    def ignores_the_end(self) -> None:
        try:
            self.raises()
        finally:
            tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(1.0))

    def reduces_in_one(self) -> None:
        if replica_id() == 1:
            tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(1.0))

    def traces(self) -> None:
        tf.function(self.add, autograph=False)()


def on_plain_threads(change: Callable[[VisibleVariable], Any], *, splits_updates: bool = False) -> Facts:
    """Every order of two plain threads that each change one variable: how many orders end in which value."""

    def run(order: Order) -> list[str]:
        variable = tf.Variable([0.0, 0.0])
        visible = VisibleVariable(variable, "total", splits_updates=splits_updates)
        Turnstile(order).run([lambda: change(visible)] * 2)
        return [str(variable.numpy().tolist())]

    return covered(2, run)


def programs() -> dict[str, Any]:
    used, real_lock = Programs(), threading.Lock()

    def holds_a_real_lock() -> None:
        point(READ, "y")
        with real_lock:
            used.add()

    def abandon(order: Order) -> int:
        if len(order.granted) == 3:
            raise Abandoned
        return first(order)

    found = {
        "2 x (read, write)": used.added(2, used.add),
        "3 x (read, write)": used.added(3, used.add),
        "2 x 2 (read, write)": used.added(2, used.add_twice),
        "all_reduce": used.added(2, used.add_round_all_reduce),
        "locks": used.added(2, used.locks),
        "deadlock": outcome_of(2, used.locks, in_turn),
        "abandoned": outcome_of(2, used.add_twice, abandon),
        "raises": outcome_of(2, used.raises, first),
        "raises at once": outcome_of(3, used.raises_at_once, first),
        "raises in collective": outcome_of(2, used.raises_in_collective, first),
        "ignores the end": outcome_of(3, used.ignores_the_end, in_turn),
        "reduces in one": outcome_of(2, used.reduces_in_one, first),
        "traces": outcome_of(2, used.traces, first),
        "in turn": outcome_of(2, used.add_twice, in_turn),
        "returns": outcome_of(3, replica_id, first),
        "real lock": outcome_of(2, holds_a_real_lock, in_turn),
        "assign": on_plain_threads(lambda variable: variable.assign(variable + 1.0)),
        "assign_add": on_plain_threads(lambda variable: variable.assign_add([1.0, 1.0])),
        "assign_add in pieces": on_plain_threads(lambda variable: variable.assign_add([1.0, 1.0]), splits_updates=True),
        "assign_sub": on_plain_threads(lambda variable: variable.assign_sub([-1.0, -1.0])),
    }
    found["left behind"] = {"merge_call": "merge_call" in vars(tf.distribute.ReplicaContext)}
    return found


# The training step.


class Cases:
    def __init__(self, steps: int, fields: dict[str, Any]) -> None:
        from trainer.strategies.controlled_mirrored import MirroredCase
        from trainer.workloads.train import Training

        train = {"steps": steps, "batch_size": 4, "capture": "never"}
        self.config = config_of("mirrored", {"model": SMALL, "train": train, **fields})
        self.steps = steps
        self.training = Training(self.config)
        self.case = MirroredCase(self.config, self.training, Nobody(), threading.Event())
        self.options = {"joint": self.case.joint, "copies": self.case.copies}

    def record(self) -> RunRecord:
        replicas = [
            ReplicaRecord.empty(own, self.steps, self.config.num_replicas) for own in range(self.config.num_replicas)
        ]
        record = RunRecord(self.training.layout, self.steps, replicas, initial=self.training.initial, batch_size=4)
        record.settings_asked = {**snapshot(), **ASKED_BY["mirrored"]}
        return record

    def labels(self, order: Order) -> list[str]:
        record = self.record()
        self.case.run(order, record)
        references = record.references
        assert len(references) == self.steps * self.config.num_replicas
        return [
            f"bits {copies.outcome(record)[:16]}",
            f"canaries {record.copies[:, self.training.layout.canaries[0, 0]].astype(int).tolist()}",
            f"computed {[list(each.computed) for each in record.replicas]}",
            f"mode left {record.mode_left}",
            f"unmixed {all((each.recomputed == each.contribution).all() for each in references)}",
            f"joint {all(close(each.applied, each.joint, self.training.layout) for each in references)}",
            f"settings {record.settings}",
        ]

    def covered(self, **options: Any) -> Facts:
        return covered(self.config.num_replicas, self.labels, **self.options, **options)

    def one(self) -> Facts:
        order = Order(self.config.num_replicas, in_turn, **self.options)
        return {
            "labels": self.labels(order),
            "done": [f"{event.replica} {event.operation.told}" for event in order.history.events],
            "last versions": {
                place: version
                for event in order.history.events
                for place, version in zip(event.operation.places, event.versions, strict=False)
                if event.operation.kind in (WRITE, UPDATE)
            },
        }

    def free(self) -> str:
        """The bits that a free run of the same ends in, step by step from Python."""
        record = self.record()
        self.training.renew()
        mirrored.train(self.config, self.training, record, Nobody(), threading.Event())
        return f"bits {copies.outcome(record)[:16]}"


def close(applied: Any, joint: Any, layout: Any) -> bool:
    given, wanted = (layout.values_of(each, kinds=("weight",)) for each in (applied, joint))
    return bool(abs(given - wanted).max() <= 1e-5 * max(1e-3, abs(wanted).max()))


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode in ("all_reduce", "unscaled_sum", "unreduced", "first_replica", "reassigned_sum"):
        fields = {"update_mode": [mode, {}], "audit": ["full", {"reference_every": 1}]}
        found[mode] = Cases(1, fields).covered()
        many = Cases(STEPS, fields)
        found[f"{mode}, many steps"] = {**many.one(), "free": many.free()}
    every = {"audit": ["counters", {"reference_every": 1}]}
    found["3 replicas"] = Cases(1, {**every, "num_replicas": 3}).covered()
    found["2 steps"] = Cases(2, every).covered()
    shared = {"state": {"cursor": "shared_iterator"}, "update_mode": ["unreduced", {}]}
    found["cursor"] = Cases(2, {**every, **shared}).one()
    for name in ("process_global", "inherited"):
        fields = {**every, "model": SYNCHRONIZED, "precision": MIXED, "state": {"precision": name}}
        found[name] = Cases(1, fields).covered(preemptions=0)
    return found


def main(what: str, output: str) -> None:
    mirrored.prepare(3, 1)
    found = {"programs": programs, "cases": cases}[what]()
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3])
