"""Sonnet's mode in small programs: every order counted, free runs bounded, each unsafe holder beside its safe twins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command import Command, verdict
from precision_all import config_of, run

from trainer.audit import orders
from trainer.holders import keeps
from trainer.state.mechanisms import HOLDERS

MODES = ("process_global", "locked_global", "thread_local", "inherited", "explicit")
FIRST_CALLS = ("flag", "instance_set", "double_checked", "before_start")
WAIT = 30.0

# (program, mechanism, replicas) -> orders, and those in which each thing is seen. Counted by hand for two replicas: of
# the scope's read, write, look and restore the other's write comes after the first and before the last in three of
# five places; of (write, look) twice, four of six orders have a write between the other's two.
UNDER_THREADS: dict[tuple[str, str, int], tuple[int, dict[str, int]]] = {
    ("scope", "process_global", 2): (5, {"mode_wiped": 3, "mode_leak": 3, "precision_off": 1}),
    ("scope", "process_global", 3): (60, {"mode_wiped": 24, "mode_leak": 32, "precision_off": 20}),
    ("scope", "locked_global", 2): (4, {"mode_wiped": 2, "mode_leak": 2, "precision_off": 1}),
    ("scope", "locked_global", 3): (40, {"mode_wiped": 12, "mode_leak": 20, "precision_off": 16}),
    ("enable", "process_global", 2): (6, {"mode_leak": 4, "precision_off": 4}),
    ("enable", "process_global", 3): (90, {"mode_leak": 84, "precision_off": 84}),
    ("enable", "locked_global", 2): (6, {"mode_leak": 4, "precision_off": 4}),
    ("enable", "locked_global", 3): (90, {"mode_leak": 84, "precision_off": 84}),
    ("inherit", "process_global", 2): (2, {}),
    ("inherit", "locked_global", 2): (2, {}),
    ("inherit", "thread_local", 2): (1, {"precision_off": 1}),
    ("first_call", "flag", 2): (6, {"repeated_first_call": 4}),
    ("first_call", "flag", 3): (66, {"repeated_first_call": 60}),
    ("first_call", "instance_set", 2): (6, {"repeated_first_call": 4}),
    ("first_call", "instance_set", 3): (66, {"repeated_first_call": 60}),
    ("first_call", "double_checked", 2): (12, {}),
    ("first_call", "double_checked", 3): (258, {}),
}
# Replicas of MirroredStrategy meet in every program, inside the scope and inside the first call.
UNDER_MIRRORED: dict[tuple[str, str, int], tuple[int, dict[str, int]]] = {
    ("scope", "process_global", 2): (3, {"mode_wiped": 2, "mode_leak": 2, "precision_off": 1}),
    ("scope", "locked_global", 2): (2, {"mode_wiped": 1, "mode_leak": 1, "precision_off": 1}),
    ("enable", "process_global", 2): (4, {"mode_leak": 4, "precision_off": 4}),
    ("enable", "process_global", 3): (36, {"mode_leak": 36, "precision_off": 36}),
    ("enable", "locked_global", 2): (4, {"mode_leak": 4, "precision_off": 4}),
    ("inherit", "process_global", 2): (2, {}),
    ("inherit", "thread_local", 2): (1, {"precision_off": 1}),
    ("first_call", "flag", 2): (4, {"repeated_first_call": 4}),
    ("first_call", "flag", 3): (36, {"repeated_first_call": 36}),
    ("first_call", "instance_set", 2): (4, {"repeated_first_call": 4}),
    ("first_call", "double_checked", 2): (8, {"deadlock": 8}),
    ("first_call", "double_checked", 3): (60, {"deadlock": 60}),
}
# Where nothing is announced, because replicas share nothing, there is one order.
ALONE = (1, {})
EVERY = [
    *(
        (program, mechanism, number)
        for program in ("scope", "enable", "inherit")
        for mechanism in MODES
        for number in (2, 3)
    ),
    *(("first_call", mechanism, number) for mechanism in FIRST_CALLS for number in (2, 3)),
]


def key_of(program: str) -> str:
    return "first_call" if program == "first_call" else "precision"


def guarantee_of(program: str) -> str:
    return "initialized_once" if program == "first_call" else "precision_as_asked"


def expected(table: dict[Any, Any], program: str, mechanism: str, number: int) -> tuple[int, dict[str, int]] | None:
    """None where the table leaves out a case of three replicas."""
    if (program, mechanism, number) in table:
        found: tuple[int, dict[str, int]] = table[program, mechanism, number]
        return found
    shared = HOLDERS[key_of(program)][mechanism].safe == "never" or mechanism == "double_checked"
    if not shared and (program, mechanism) == ("inherit", "thread_local"):
        return 1, {"precision_off": 1}
    return None if shared else ALONE


def holds(
    found: dict[str, Any], strategy: str, program: str, mechanism: str, number: int, table: dict[Any, Any]
) -> None:
    """Hold what a search found to the table, and the verdict to the claims of the mechanisms."""
    wanted, guarantee = expected(table, program, mechanism, number), guarantee_of(program)
    config = config_of(strategy, program=program, state={key_of(program): mechanism}, num_replicas=number)
    held = HOLDERS[key_of(program)][mechanism]
    safe = keeps(config, held) and strategy in held.strategies
    assert found["kind"] == "all_orders"
    if wanted is not None:
        assert (found["orders"], found["seen"]) == wanted
    assert (guarantee in found["claimed"]) == safe
    if safe:
        assert (found["verdict"], found["anomalies"]) == ("upheld", {})
        assert found["statuses"][guarantee] == found["statuses"]["no_deadlock"] == "upheld"
    else:
        # What main has enabled for good, all threads see in a process-wide mode: that nothing shows proves nothing.
        silent = program == "inherit" and mechanism != "thread_local"
        assert found["verdict"] == ("inconclusive" if silent else "anomaly")
        assert bool(found["anomalies"]) != silent
        assert all(found["remedies"].values())


@cache
def searched(program: str, mechanism: str, number: int) -> dict[str, Any]:
    return run("threads", program=program, state={key_of(program): mechanism}, num_replicas=number, schedule="search")


@pytest.mark.parametrize(("program", "mechanism", "number"), EVERY)
def test_every_order_of_plain_threads_is_counted(program: str, mechanism: str, number: int) -> None:
    found = searched(program, mechanism, number)
    holds(found, "threads", program, mechanism, number, UNDER_THREADS)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize(
    ("program", "kind"), [("scope", "mode_wiped"), ("enable", "mode_leak"), ("first_call", "repeated_first_call")]
)
def test_what_replicas_saw_and_what_the_history_tells_agree_in_every_order(
    program: str, kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mechanism = "flag" if program == "first_call" else "process_global"
    both = searched(program, mechanism, number)["seen"][kind]
    monkeypatch.setattr(orders, "anomalies", lambda history: [])
    seen_alone = run(
        "threads", program=program, state={key_of(program): mechanism}, num_replicas=number, schedule="search"
    )
    assert seen_alone["seen"][kind] == both


def test_the_smallest_order_that_wipes_a_setting_is_the_documents_own() -> None:
    """A is inside its scope, B enables, A leaves and puts back that there was none."""
    found = searched("scope", "process_global", 2)
    assert found["preemptions"]["mode_wiped"] == 1
    told, _, lanes = found["telling"]["mode_wiped"].partition("\n")
    assert told == (
        "replica 1's step 0 enabled 'float32' in precision mode as version 2; replica 0's step 0 put back 'none' at "
        "the end of its scope, which it had found before: what was enabled is gone"
    )
    done = [" ".join(line.strip("> ").split()) for line in lines_of(lanes)]
    assert done[1:6] == [
        "read precision mode @0",
        "write precision mode @1 = float16 (from 0)",
        "read precision mode @1",
        "write precision mode @2 = float32, enabled (from nothing)",
        "write precision mode @3 = none (from 1)",
    ]


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_a_setting_of_float32_that_is_wiped_out_changes_nothing_that_is_computed_and_one_of_bfloat16_does() -> None:
    """The document's own modes: without a mode layers compute in float32, too."""
    of_float32 = searched("scope", "process_global", 2)["seen"]
    of_bfloat16 = run(
        "threads",
        program="scope",
        state={"precision": "process_global"},
        dtypes=["float16", "bfloat16"],
        schedule="search",
    )["seen"]
    assert (of_float32["mode_wiped"], of_float32["precision_off"]) == (3, 1)
    assert (of_bfloat16["mode_wiped"], of_bfloat16["precision_off"]) == (3, 3)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("schedule", "program", "unsafe", "cure", "kinds"),
    [
        ("scope_leak", "scope", "process_global", "inherited", {"mode_leak", "mode_wiped"}),
        ("scope_leak", "enable", "locked_global", "thread_local", {"mode_leak"}),
        ("wrong_precision", "inherit", "thread_local", "inherited", {"precision_off"}),
        ("repeated_first_call", "first_call", "instance_set", "double_checked", {"repeated_first_call"}),
    ],
)
def test_a_recipe_ends_at_the_first_order_that_shows_it_and_its_token_shows_it_again(
    schedule: str, program: str, unsafe: str, cure: str, kinds: set[str], safe: bool
) -> None:
    case = {"program": program, "state": {key_of(program): cure if safe else unsafe}}
    found = run("threads", **case, schedule=schedule)
    if safe:
        assert (found["kind"], found["seen"], found["verdict"]) == ("all_orders", {}, "upheld")
        return
    assert (found["kind"], found["orders"]) == ("replayed", 1)
    assert kinds <= set(found["seen"])
    for token in found["tokens"].values():
        again = run("threads", **case, schedule="replay", token=token)
        assert (again["seen"], again["telling"]) == (found["seen"], found["telling"])


def test_several_rounds_in_one_order_begin_with_no_mode_each() -> None:
    """Two rounds of two replicas: what is left of the first round's mode is turned off before the second."""
    case = {"program": "scope", "state": {"precision": "process_global"}, "steps": 2}
    found = run("threads", **case, schedule="search")
    # Of five orders of a round three wipe: all but 2 x 2 of 5 x 5 do in one round or the other.
    assert (found["kind"], found["orders"], found["seen"]["mode_wiped"]) == ("all_orders", 25, 21)


# Free runs.


@pytest.mark.stress
@pytest.mark.parametrize("number", [80, 200])
@pytest.mark.parametrize("mechanism", MODES)
def test_many_free_threads_enable_modes(mechanism: str, number: int) -> None:
    steps = 5
    found = run("threads", program="enable", state={"precision": mechanism}, num_replicas=number, steps=steps)
    if HOLDERS["precision"][mechanism].safe == "never":
        assert found["verdict"] in ("anomaly", "inconclusive")
        assert set(found["anomalies"]) <= {"mode_leak", "precision_off"}
        for count, of in found["anomalies"].values():
            assert 0 < count <= of == number * steps
    else:
        assert (found["verdict"], found["anomalies"]) == ("upheld", {})
        assert f"{number * steps:,} of {number * steps:,} calls" in found["evidence"]["precision_as_asked"]


@pytest.mark.stress
@pytest.mark.parametrize("mechanism", FIRST_CALLS)
def test_many_free_threads_make_first_calls(mechanism: str) -> None:
    number, steps = 80, 5
    found = run("threads", program="first_call", state={"first_call": mechanism}, num_replicas=number, steps=steps)
    if HOLDERS["first_call"][mechanism].safe == "never":
        assert found["verdict"] in ("anomaly", "inconclusive")
        assert set(found["anomalies"]) <= {"repeated_first_call"}
        for count, of in found["anomalies"].values():
            assert 0 < count <= (number - 1) * steps < of
    else:
        assert (found["verdict"], found["anomalies"]) == ("upheld", {})
        by = "the main thread, before there were replicas" if mechanism == "before_start" else "replicas"
        assert found["evidence"]["initialized_once"] == f"5 first calls in 5 rounds, by {by}"


@pytest.mark.stress
@pytest.mark.parametrize("mechanism", MODES)
def test_free_threads_enable_and_leave_a_scope(mechanism: str) -> None:
    found = run("threads", program="scope", state={"precision": mechanism}, num_replicas=2, steps=200)
    if HOLDERS["precision"][mechanism].safe == "never":
        assert set(found["anomalies"]) <= {"mode_wiped", "mode_leak", "precision_off"}
        for kind, (count, of) in found["anomalies"].items():
            assert 0 < count <= 200 <= of, kind
    else:
        assert (found["verdict"], found["anomalies"]) == ("upheld", {})


@pytest.mark.parametrize("mechanism", MODES)
def test_all_of_80_threads_have_enabled_their_mode_before_any_looks(mechanism: str) -> None:
    """The worst that can come of the document's 80 threads and four modes: one mode is left, which 20 have set."""
    tallies = overlapping("enable", {"precision": mechanism}, 80)
    wrong = sum(call.wrong for tally in tallies for call in tally.calls)
    assert wrong == (60 if HOLDERS["precision"][mechanism].safe == "never" else 0)


@pytest.mark.parametrize(("mechanism", "firsts"), [("flag", 80), ("instance_set", 80), ("before_start", 0)])
def test_all_of_80_threads_are_in_the_call_before_any_is_through(mechanism: str, firsts: int) -> None:
    tallies = overlapping("first_call", {"first_call": mechanism}, 80)
    assert sum(len(tally.firsts) for tally in tallies) == firsts
    computed = [call.computed for tally in tallies for call in tally.calls]
    assert computed == ["float32" if firsts else "float16"] * 80


def overlapping(program: str, state: dict[str, str], number: int) -> Any:
    """One round of free threads that all pause until the last has come."""
    from trainer.workloads.precision.calls import Layer
    from trainer.workloads.precision.program import Stops
    from trainer.workloads.precision.rounds import Rounds

    rounds = Rounds(config_of("threads", program=program, state=state, num_replicas=number), Layer())
    meeting = threading.Barrier(number, timeout=WAIT)
    stops = Stops(pause=meeting.wait, meet=meeting.wait)
    rounds.start()
    threads = [threading.Thread(target=rounds.take, args=(own, 0, stops), daemon=True) for own in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    return rounds.tallies


# MirroredStrategy, in a process of its own.


FREE: dict[str, dict[str, Any]] = {
    **{
        f"free {program} {mechanism}": {
            "program": program,
            "state": {"precision": mechanism},
            "num_replicas": 4,
            "steps": 3,
            **({"dtypes": ["float16", "bfloat16"]} if program == "scope" else {}),
        }
        for program in ("scope", "enable", "inherit")
        for mechanism in MODES
    },
    **{
        f"free first_call {mechanism}": {
            "program": "first_call",
            "state": {"first_call": mechanism},
            "num_replicas": 4,
            "steps": 3,
        }
        for mechanism in ("flag", "instance_set", "before_start")
    },
    # Last: its threads are left behind.
    "free first_call double_checked": {
        "program": "first_call",
        "state": {"first_call": "double_checked"},
        "watchdog_seconds": 2.0,
    },
}
SEARCHED = {
    f"{program} {mechanism} {number}": {
        "program": program,
        "state": {key_of(program): mechanism},
        "num_replicas": number,
        "schedule": "search",
    }
    for program, mechanism, number in EVERY
    if number == 2 or expected(UNDER_MIRRORED, program, mechanism, number) is not None
}


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("precision")
    cases, output = folder / "cases.json", folder / "found.json"
    cases.write_text(json.dumps({**SEARCHED, **FREE}))
    command = [sys.executable, str(Path(__file__).with_name("precision_all.py")), "mirrored", str(cases), str(output)]
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, check=False, timeout=170, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return found


slow = pytest.mark.slow
patient = pytest.mark.timeout(200)  # whichever test comes first runs everything


@slow
@patient
@pytest.mark.parametrize(("program", "mechanism", "number"), [tuple(name.split()) for name in SEARCHED])
def test_every_order_of_mirrored_replicas_is_counted(
    mirrored: dict[str, dict[str, Any]], program: str, mechanism: str, number: str
) -> None:
    found = mirrored[f"{program} {mechanism} {number}"]
    holds(found, "mirrored", program, mechanism, int(number), UNDER_MIRRORED)


@slow
@patient
@pytest.mark.parametrize(
    ("program", "broken"),
    [
        # Each round replica 0 finds what the others have enabled inside its scope, and takes it from all three.
        ("scope", {"mode_leak": [3, 3], "mode_wiped": [9, 9], "precision_off": [12, 12]}),
        # The last one's mode is what all four find; two of the other three compute in another dtype for it.
        ("enable", {"mode_leak": [9, 12], "precision_off": [6, 12]}),
        ("inherit", {}),
    ],
)
@pytest.mark.parametrize("mechanism", MODES)
def test_under_mirrored_it_happens_in_every_round_or_in_none(
    mirrored: dict[str, dict[str, Any]], program: str, mechanism: str, broken: dict[str, list[int]]
) -> None:
    found = mirrored[f"free {program} {mechanism}"]
    if HOLDERS["precision"][mechanism].safe == "never":
        assert found["anomalies"] == broken
        assert found["verdict"] == ("anomaly" if broken else "inconclusive")
    elif (program, mechanism) == ("inherit", "thread_local"):
        assert found["anomalies"] == {"precision_off": [12, 12]}
        assert "precision_as_asked" not in found["claimed"]
    else:
        assert (found["verdict"], found["anomalies"]) == ("upheld", {})


@slow
@patient
@pytest.mark.parametrize("mechanism", ["flag", "instance_set", "before_start"])
def test_every_mirrored_replica_makes_the_first_call_or_main_does(
    mirrored: dict[str, dict[str, Any]], mechanism: str
) -> None:
    found = mirrored[f"free first_call {mechanism}"]
    broken = mechanism != "before_start"
    assert found["anomalies"] == ({"repeated_first_call": [9, 12]} if broken else {})
    assert found["verdict"] == ("anomaly" if broken else "upheld")


@slow
@patient
def test_a_lock_held_across_a_cross_replica_call_hangs_and_says_where(mirrored: dict[str, dict[str, Any]]) -> None:
    found = mirrored["free first_call double_checked"]
    kind, message = found["error"]
    assert (found["verdict"], kind, found["claimed"]) == ("broken", "deadlock", [])
    assert message.startswith("no round was finished for 2 s (watchdog.seconds): replica 0 waits at 'tf.distribute")
    assert "replica 1 waits at 'with self._lock:' (trainer/state/first_call.py:" in message
    assert "\n" not in message


# The command.


@slow
@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        (["experiment=precision_scope_wipes_setting", "schedule=search", "train.steps=1"], {"mode_wiped"}),
        (
            ["experiment=precision_enable_loses", "num_replicas=2", "schedule=scope_leak", "train.steps=1"],
            {"mode_leak"},
        ),
        (["experiment=precision_thread_local", "train.steps=3"], {"precision_off"}),
        (["experiment=precision_mirrored_scope", "train.steps=3"], {"mode_wiped", "mode_leak", "precision_off"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_experiment_shows_what_it_is_named_for(command: Command, arguments: list[str], kinds: set[str]) -> None:
    ended = command(*arguments, "hydra.run.dir=run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = verdict(command.folder / "run")
    assert found["verdict"] == "anomaly"
    assert kinds <= {each["kind"] for each in found["anomalies"]}
    assert all(each["remedy"] for each in found["anomalies"])


@slow
@patient
def test_the_lock_hangs_freely_and_in_the_replay_of_an_order(
    command: Command, mirrored: dict[str, dict[str, Any]]
) -> None:
    experiment = "experiment=precision_lock_across_merge_call"
    freely = command(experiment, "watchdog.seconds=2", "hydra.run.dir=free")
    found = verdict(command.folder / "free")
    assert (freely.returncode, found["verdict"], found["error"]["kind"]) == (3, "broken", "deadlock")
    assert "with self._lock:" in (command.folder / "free" / "console.log").read_text()
    searched = mirrored["first_call double_checked 2"]
    assert searched["telling"]["deadlock"].startswith(
        "replica 0 waits at merge_call, which 2 replicas have to reach; replica 1 waits for first call lock"
    )
    token = f"schedule.token={searched['tokens']['deadlock']}"
    replayed = command(experiment, "train.steps=1", "schedule=replay", token, "hydra.run.dir=replay")
    found = verdict(command.folder / "replay")
    assert (replayed.returncode, found["error"]["kind"]) == (3, "deadlock")
    (anomaly,) = found["anomalies"]
    assert (anomaly["kind"], anomaly["remedy"].partition(" ")[0]) == ("deadlock", "state.first_call=before_start")


REFUSED = [
    (
        ["workload.program=scop"],
        "workload.program must be one of scope, enable, inherit, first_call; got 'scop'. Did you mean 'scope'?",
    ),
    (
        ["workload.dtypes=[float64]"],
        "workload.dtypes must be one of float16, float32, bfloat16, none; got 'float64'. Did you mean 'float16'?",
    ),
    (
        ["workload.dtypes=[float16,float16]"],
        "workload.program=enable needs two different modes in workload.dtypes; got [float16,float16].",
    ),
    (
        ["workload.program=inherit", "workload.dtypes=[none,float16]"],
        "workload.dtypes has to begin with the mode that workload.program=inherit turns on; got [none,float16]. Try "
        "[float16,bfloat16].",
    ),
    (
        ["state.first_call=flag"],
        "state.first_call=flag does not go with workload.program=enable, which is about state.precision. Leave it out.",
    ),
    (
        ["workload.program=first_call", "state.precision=inherited"],
        "state.precision=inherited does not go with workload.program=first_call, which is about state.first_call. "
        "Leave it out.",
    ),
    (["num_replicas=1"], "workload=precision needs num_replicas of at least 2; got 1."),
    (["num_replicas=1025"], "num_replicas must be between 1 and 1024; got 1025."),
    (
        ["strategy=mirrored", "num_replicas=80"],
        "num_replicas must be between 2 and 64 under strategy=mirrored; got 80.",
    ),
    (
        ["audit.repeat=2"],
        "audit.repeat=2 needs schedule=replay with workload=precision: a free run makes its round train.steps times. "
        "Leave audit.repeat out.",
    ),
    (
        ["precision=mixed_bfloat16"],
        "precision=mixed_bfloat16 does not go with workload=precision, which does not heed it. Leave it out.",
    ),
    (
        ["state.gradients=shared"],
        "state.gradients=shared does not go with workload=precision, which does not heed it. Leave it out.",
    ),
    (
        ["require=[samples_once]"],
        "require=samples_once cannot be checked by this run, which checks precision_as_asked, initialized_once, "
        "no_deadlock. Leave workload out to check the others.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_the_programs_cannot_use_is_refused_in_one_line(
    command: Command, arguments: list[str], message: str
) -> None:
    ended = command("workload=precision", *arguments)
    assert (ended.returncode, ended.stderr) == (2, f"trainer: {message}\n")
    assert command.left() == []


def test_only_this_workload_may_hang_mirrored_strategy(command: Command) -> None:
    ended = command("strategy=mirrored", "state.first_call=double_checked")
    assert ended.returncode == 2
    assert "a lock held across a cross-replica call hangs MirroredStrategy" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
