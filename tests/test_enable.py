"""A precision mode that is enabled for good: by itself, in the audit, and inside training steps with every holder."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.audit.anomalies import anomalies
from trainer.config import Config, Precision
from trainer.proofs import config_of
from trainer.schedule.operations import ENABLED, MODE, READ, UPDATE, WRITE, Event, History, Operation
from trainer.schedule.order import Order
from trainer.schedule.replay import hash_of
from trainer.schedule.turnstile import Turnstile
from trainer.state.mechanisms import HOLDERS
from trainer.state.precision import PRECISION_HOLDERS
from trainer.workloads.torch_module import NativeAutocast

WAIT = 20.0
MODES = [name for name in HOLDERS["precision"] if name != "explicit"]


def in_a_thread(function: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(WAIT)


# By itself.


@pytest.mark.parametrize("name", MODES)
def test_what_is_enabled_stays_until_another_is_enabled(name: str) -> None:
    holder = PRECISION_HOLDERS[name]()
    holder.enable("bfloat16")
    with holder.scope("float16"):
        assert holder.current() == "float16"
    assert holder.current() == "bfloat16"
    holder.enable("float32")
    assert holder.current() == "float32"
    holder.enable(None)
    assert holder.current() is None


@pytest.mark.parametrize("name", MODES)
def test_a_scope_takes_back_what_was_enabled_inside_of_it(name: str) -> None:
    holder = PRECISION_HOLDERS[name]()
    with holder.scope("float16"):
        holder.enable("bfloat16")
        assert holder.current() == "bfloat16"
    assert holder.current() is None


def test_where_the_dtype_is_passed_there_is_nothing_to_enable() -> None:
    holder = PRECISION_HOLDERS["explicit"]()
    holder.enable("bfloat16")
    assert holder.current() is None


@pytest.mark.parametrize("name", MODES)
def test_what_a_replica_enables_is_its_own_or_everybodys(name: str) -> None:
    holder = PRECISION_HOLDERS[name]()
    runner = holder.hand_over()
    in_a_thread(lambda: runner(lambda: holder.enable("bfloat16")))
    assert holder.current() == ("bfloat16" if HOLDERS["precision"][name].safe == "never" else None)


@pytest.mark.parametrize("name", MODES)
def test_what_main_has_enabled_in_a_replica_that_it_starts(name: str) -> None:
    holder = PRECISION_HOLDERS[name]()
    holder.enable("bfloat16")
    runner = holder.hand_over()
    assert in_a_thread(lambda: runner(holder.current)) == (None if name == "thread_local" else "bfloat16")


def test_autocast_that_is_enabled_is_the_threads_own_and_keeps_no_casts() -> None:
    holder, layer, x = NativeAutocast(), torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2)

    def replica() -> list[Any]:
        holder.enable("bfloat16")
        found = [holder.current(), layer(x).dtype, torch.is_autocast_cache_enabled()]
        holder.enable("float32")
        found += [holder.current(), layer(x).dtype]
        holder.enable("float16")
        holder.clear()
        return [*found, holder.current()]

    assert in_a_thread(replica) == ["bfloat16", torch.bfloat16, False, None, torch.float32, None]
    assert in_a_thread(holder.current) is None


def test_autocast_that_nobody_enabled_is_left_as_it_is() -> None:
    def replica() -> bool:
        NativeAutocast().clear()
        return torch.is_autocast_cache_enabled()

    assert in_a_thread(replica)


@pytest.mark.parametrize(("name", "kind"), [("process_global", WRITE), ("locked_global", UPDATE), ("inherited", None)])
def test_enabling_is_announced_as_such(name: str, kind: str | None) -> None:
    holder = PRECISION_HOLDERS[name]()
    order = Order(1, lambda order: order.able()[0])
    Turnstile(order).run([lambda: holder.enable("bfloat16")])
    done = [(event.operation.told, event.operation.value) for event in order.history.events]
    assert done == ([] if kind is None else [(f"{kind} precision mode", f"bfloat16, {ENABLED}")])


# In the audit.


def history(*done: tuple[int, str, int, int, str]) -> History:
    """Of (replica, kind, version, base, value) at one mode."""
    events = [
        Event(own, 0, Operation(kind, "m", ("m",), MODE, value), (version,), () if kind == READ else (base,))
        for own, kind, version, base, value in done
    ]
    return History(2, events)


BFLOAT16 = f"bfloat16, {ENABLED}"


@pytest.mark.parametrize(
    ("done", "kinds"),
    [
        # What was enabled stays on, and may: a mode that was set in a scope may not.
        ([(0, WRITE, 1, -1, BFLOAT16)], []),
        ([(0, WRITE, 1, -1, "bfloat16")], ["mode_leak"]),
        # Enabled before the scope began, in it, and after it.
        (
            [
                (1, WRITE, 1, -1, BFLOAT16),
                (0, READ, 1, 0, ""),
                (0, WRITE, 2, 1, "float16"),
                (0, WRITE, 3, 2, "bfloat16"),
            ],
            [],
        ),
        (
            [(0, READ, 0, 0, ""), (0, WRITE, 1, 0, "float16"), (1, WRITE, 2, -1, BFLOAT16), (0, WRITE, 3, 1, "none")],
            ["mode_wiped"],
        ),
        ([(0, READ, 0, 0, ""), (0, WRITE, 1, 0, "float16"), (0, WRITE, 2, 1, "none"), (1, WRITE, 3, -1, BFLOAT16)], []),
        # In exchanges, as under a lock.
        ([(0, UPDATE, 1, 0, "float16"), (1, UPDATE, 2, 1, BFLOAT16), (0, UPDATE, 3, 2, "none")], ["mode_wiped"]),
        ([(0, UPDATE, 1, 0, "float16"), (0, UPDATE, 2, 1, "none"), (1, UPDATE, 3, 2, BFLOAT16)], []),
        # One's own scope may take back what one has enabled in it.
        ([(0, READ, 0, 0, ""), (0, WRITE, 1, 0, "float16"), (0, WRITE, 2, 1, BFLOAT16), (0, WRITE, 3, 2, "none")], []),
        # Read back: one's own, and another's.
        ([(0, WRITE, 1, -1, BFLOAT16), (0, READ, 1, 0, ""), (1, WRITE, 2, -1, f"float32, {ENABLED}")], []),
        ([(0, WRITE, 1, -1, BFLOAT16), (1, WRITE, 2, -1, f"float32, {ENABLED}"), (0, READ, 2, 0, "")], ["mode_leak"]),
        ([(0, WRITE, 1, -1, BFLOAT16), (1, WRITE, 2, -1, BFLOAT16), (0, READ, 2, 0, "")], []),
    ],
)
def test_a_mode_that_is_enabled_is_to_stay_and_a_scope_is_not(
    done: list[tuple[int, str, int, int, str]], kinds: list[str]
) -> None:
    found = anomalies(history(*done))
    assert [each.kind for each in found] == kinds
    assert {each.guarantee for each in found} <= {"precision_as_asked"}


def test_the_witness_of_a_wiped_setting_is_the_look_before_it_the_setting_and_its_end() -> None:
    done = [(0, READ, 0, 0, ""), (0, WRITE, 1, 0, "float16"), (1, WRITE, 2, -1, BFLOAT16), (0, WRITE, 3, 1, "none")]
    (found,) = anomalies(history(*done))
    assert found.events == (0, 2, 3)
    assert found.because == (
        "replica 1's step 0 enabled 'bfloat16' in m as version 2; replica 0's step 0 put back 'none' at the end of its "
        "scope, which it had found before: what was enabled is gone"
    )


def test_tokens_from_before_there_was_the_key_stay_good() -> None:
    config = Config()
    fields = dataclasses.asdict(config)["precision"]
    assert fields.pop("enabled_by") == "scope"
    enabling = dataclasses.replace(config, precision=Precision(enabled_by="enable"))
    assert hash_of(enabling) != hash_of(config)
    overrides = ("update_mode=locked", "model=linear", "train.steps=1", "schedule=search")
    assert hash_of(config_of(overrides)) == "d3e1bf"  # as docs/schedules.md has it


# In training steps.

STEPS = 12
ENABLING = ["mixed_bfloat16", {"enabled_in": "replica", "enabled_by": "enable"}]
BY_MAIN = ["mixed_bfloat16", {"enabled_by": "enable"}]
SYNCHRONIZED = ["cnn", {"filters": [4], "normalization": "sync_batch"}]
MIXED = {"precision": ENABLING, "num_replicas": 4, "train": {"evaluators": 1}}
HELD = list(HOLDERS["precision"])
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "threads": {
        **{f"replica {name}": {**MIXED, "state": {"precision": name}} for name in HELD},
        **{f"main {name}": {"precision": BY_MAIN, "state": {"precision": name}} for name in HELD},
        **{
            f"captured {name}": {**MIXED, "state": {"precision": name}, "train": {"evaluators": 1, "capture": "always"}}
            for name in ("inherited", "thread_local")
        },
        **{
            f"autocast {name}": {
                "model": ["custom", {"_target_": "brought.module"}],
                "precision": ENABLING,
                "state": {"precision": name},
            }
            for name in ("thread_local", "inherited")
        },
    },
    "mirrored": {
        **{f"replica {name}": {**MIXED, "model": SYNCHRONIZED, "state": {"precision": name}} for name in HELD},
        **{f"main {name}": {"precision": BY_MAIN, "state": {"precision": name}} for name in HELD},
        **{
            f"first call {capture}": {
                "model": SYNCHRONIZED,
                "precision": ["mixed_bfloat16", {}],
                "state": {"first_call": "flag"},
                "train": {"capture": capture},
            }
            for capture in ("never", "always")
        },
    },
}
slow = pytest.mark.slow
patient = pytest.mark.timeout(200)  # whichever test comes first runs everything
both = pytest.mark.parametrize("strategy", ["threads", "mirrored"])
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("enable")
    outcomes = {}
    for strategy, backend in (("threads", "torch"), ("mirrored", "tensorflow")):
        cases, output = folder / f"{strategy}.json", folder / f"{strategy}_found.json"
        cases.write_text(json.dumps(CASES[strategy]))
        command = [sys.executable, str(Path(__file__).with_name("hold_all.py")), strategy, str(cases), str(output)]
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=environment, check=False, timeout=180, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outcomes[strategy] = json.loads(output.read_text())
    return outcomes


@slow
@patient
@both
@pytest.mark.parametrize("name", ["explicit", "inherited", "thread_local"])
def test_replicas_that_enable_modes_of_their_own_compute_in_them(
    found: dict[str, Found], strategy: str, name: str
) -> None:
    outcome = found[strategy][f"replica {name}"]
    assert (outcome["statuses"]["precision_as_asked"], outcome["anomalies"]) == ("upheld", {})
    assert outcome["verdict"] == "upheld"


@slow
@patient
@pytest.mark.parametrize("name", ["process_global", "locked_global"])
def test_three_trainers_compute_in_the_mode_that_the_evaluator_enables_in_every_mirrored_step(
    found: dict[str, Found], name: str
) -> None:
    """Each enables its own and meets the others in the first synchronized layer; the last one's is what they find."""
    outcome = found["mirrored"][f"replica {name}"]
    assert "precision_as_asked" not in outcome["claimed"]
    assert outcome["anomalies"]["precision_off"] == [3 * STEPS, 4 * STEPS]
    where = f"replica 0: {STEPS}, replica 1: {STEPS}, replica 2: {STEPS}, replica 3: 0 |"
    assert outcome["witnesses"]["precision_off"].startswith(where)
    # It was enabled for good, so that it is still on is as it should be.
    assert "mode_left_on" not in outcome["anomalies"]


@slow
@patient
@pytest.mark.stress
@pytest.mark.parametrize("name", ["process_global", "locked_global"])
def test_threads_that_enable_modes_may_compute_in_each_others(found: dict[str, Found], name: str) -> None:
    outcome = found["threads"][f"replica {name}"]
    assert outcome["statuses"]["precision_as_asked"] in ("anomaly", "not_seen")
    assert set(outcome["anomalies"]) <= {"precision_off", "gradient_precision_off", "not_joint"}
    assert outcome["verdict"] in ("anomaly", "inconclusive")


@slow
@patient
@both
@pytest.mark.parametrize("name", HELD)
def test_what_main_enables_is_there_in_replicas_but_where_it_is_thread_local(
    found: dict[str, Found], strategy: str, name: str
) -> None:
    outcome = found[strategy][f"main {name}"]
    if name == "thread_local":
        off = [2 * STEPS, 2 * STEPS]
        assert outcome["anomalies"] == {"precision_off": off, "gradient_precision_off": off}
    else:
        assert outcome["anomalies"] == {}
        # Nothing is put back, so that nothing can go wrong with it; a process-wide mode claims nothing all the same.
        safe = HOLDERS["precision"][name].safe == "always"
        assert outcome["verdict"] == ("upheld" if safe else "inconclusive")


@slow
@patient
@pytest.mark.parametrize("name", ["inherited", "thread_local"])
def test_a_captured_step_that_enables_its_mode_leaves_none_on_in_main(found: dict[str, Found], name: str) -> None:
    outcome = found["threads"][f"captured {name}"]
    assert (outcome["verdict"], outcome["anomalies"]) == ("upheld", {})
    assert outcome["engine"] == "torchscript"


@slow
@patient
@pytest.mark.parametrize("name", ["thread_local", "inherited"])
def test_autocast_that_replicas_enable_is_what_they_asked_for(found: dict[str, Found], name: str) -> None:
    outcome = found["threads"][f"autocast {name}"]
    assert outcome["anomalies"] == {}, outcome["witnesses"]
    assert outcome["statuses"]["precision_as_asked"] == outcome["statuses"]["settings_as_asked"] == "upheld"


@slow
@patient
@pytest.mark.parametrize(("capture", "off"), [("never", None), ("always", [2 * (STEPS - 1), 2 * STEPS])])
def test_a_first_call_that_every_mirrored_replica_makes_is_an_anomaly_of_its_holder(
    found: dict[str, Found], capture: str, off: list[int] | None
) -> None:
    """A graph keeps the first call's float32, which the precision holder is not to blame for; eager steps do not."""
    outcome = found["mirrored"][f"first call {capture}"]
    assert outcome["anomalies"]["repeated_first_call"] == [1, 2]
    assert outcome["anomalies"].get("precision_off") == off
    assert outcome["statuses"]["gradients_unmixed"] == "upheld"  # computed again as a first call
    assert outcome["verdict"] == "anomaly"
