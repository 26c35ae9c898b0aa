"""`workload=compile_cache`: whose body runs and what is found again, by exact counts, with safe ids and with others."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from command import Command, verdict

from trainer.audit.records import ReplicaRecord, RunRecord
from trainer.config import CompileCache, Config, ConfigError, State, Train
from trainer.experiments import FOLDER, experiments
from trainer.rules import validate
from trainer.state.compile_ids import COMPILE_IDS
from trainer.state.layout import EMPTY
from trainer.state.mechanisms import HOLDERS
from trainer.strategies.hosting import RunBroken
from trainer.workloads.compile_cache import bodies, workload
from trainer.workloads.compile_cache.judge import Generation, Seen, expected_collisions, judge
from trainer.workloads.compile_cache.plan import Ran
from trainer.workloads.compile_cache.rules import claims

MECHANISMS = tuple(COMPILE_IDS)


class Unwatched:
    def progress(self, record: RunRecord) -> None:
        """Nobody looks."""


def config_of(mechanism: str = "counter", *, steps: int = 2, num_replicas: int = 2, **keys: Any) -> Config:
    return Config(
        workload=CompileCache(**keys),
        num_replicas=num_replicas,
        state=State(compile_ids=mechanism),
        train=Train(steps=steps, batch_size=4),
    )


def run(config: Config, stop: threading.Event | None = None) -> tuple[RunRecord, dict[str, Any]]:
    """What a run in this process records and finds; its siblings are processes all the same."""
    validate(config)
    steps = config.train.steps
    record = RunRecord(EMPTY, steps, [ReplicaRecord.empty(own, 0, 0) for own in range(config.num_replicas)])
    found = workload.run(config, record, Unwatched(), stop or threading.Event())  # type: ignore[arg-type]
    return record, found


def counts(found: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(each.kind, each.count, each.of) for finding in found.values() for each in finding.anomalies]


@pytest.fixture(autouse=True)
def _leaves_no_process() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


# The experiments. N siblings of k steps, started twice: 2 N k steps are run. Of those that have one id in a family,
# N - 1 find another's body.
COUNTED = {
    "counter": ("anomaly", 8, 16, 4, 4),
    "content": ("upheld", 0, 16, 8, 0),
    "uuid": ("upheld", 0, 16, 0, 0),
    # A parent that runs 6 steps, and 8 of its siblings'; of the latter 2 are not compiled before the fork.
    "compile_then_fork": ("anomaly", 2, 28, 19, 1),
}


def of_experiment(name: str) -> Config:
    """The configuration that an experiment's file makes."""
    keys = yaml.safe_load((FOLDER / f"compile_cache_{name}.yaml").read_text())
    assert keys.pop("defaults") == [{"override /strategy": "threads"}, {"override /workload": "compile_cache"}]
    parts = {"workload": CompileCache, "state": State, "train": Train}
    return Config(
        **{
            "workload": CompileCache(),
            **{key: parts[key](**each) if key in parts else each for key, each in keys.items()},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_an_experiment_counts_exactly(name: str) -> None:
    _, wrong, of, spared, collided = COUNTED[name]
    record, found = run(of_experiment(name))
    # By digests of what was found, and by the bits that it gave.
    assert counts(found) == ([("foreign_step", wrong, of), ("mixed_gradient", wrong, of)] if wrong else [])
    metrics = record.metrics
    assert (metrics["steps_spared"], metrics["ids_collided"]) == (spared, collided)
    assert metrics["ids_collided_expected"] == collided
    assert (metrics["compiling_seconds_saved"] > 0) == (spared > 0)
    told = f"{spared} of {of} were found as another process had compiled them, which saved "
    assert told in found["own_compiled_step"].evidence
    assert [replica.steps_done for replica in record.replicas] == [record.steps] * record.num_replicas


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["counter", "content"])
def test_the_command_ends_in_a_verdict_with_these_counts(command: Command, name: str) -> None:
    word, wrong, of, spared, _ = COUNTED[name]
    ended = command(f"experiment=compile_cache_{name}", "hydra.run.dir=run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = verdict(command.folder / "run")
    assert found["verdict"] == word
    shown = [(each["kind"], each["count"], each["of"]) for each in found["anomalies"]]
    assert sorted(shown) == ([("foreign_step", wrong, of), ("mixed_gradient", wrong, of)] if wrong else [])
    assert found["metrics"]["steps_spared"] == spared
    claimed = {each["name"] for each in found["guarantees"] if each["claimed"]}
    assert claimed == ({"own_compiled_step", "gradients_unmixed"} if word == "upheld" else set())
    assert found["run"]["state"] == {"compile_ids": name}
    assert found["run"]["engine"] == "torchscript"


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.timeout(120)
def test_random_offsets_in_a_small_space_collide_about_as_often_as_arithmetic_says() -> None:
    config = of_experiment("random_offset")
    record, found = run(config)
    steps, space = config.train.steps, 2**config.workload.offset_bits
    pairs = config.workload.rounds * config.num_replicas * (config.num_replicas - 1) // 2
    expected = pairs * steps**2 / space
    assert record.metrics["ids_collided_expected"] == expected == 13.5
    # Of the number of ids that two runs of `steps` on a circle of `space` have in common.
    variance = sum((steps - abs(apart)) ** 2 for apart in range(-steps + 1, steps)) / space - (steps**2 / space) ** 2
    assert abs(record.metrics["ids_collided"] - expected) <= 5 * math.sqrt(pairs * variance)
    (kind, foreign, _), (other, wrong, _) = counts(found)
    assert (kind, other) == ("foreign_step", "mixed_gradient")
    assert foreign == wrong > 0


def test_every_mechanism_and_way_to_start_is_shown_by_an_experiment() -> None:
    shown = {name.removeprefix("compile_cache_") for name in experiments() if name.startswith("compile_cache_")}
    assert shown == {*MECHANISMS, "compile_then_fork"}
    assert set(HOLDERS["compile_ids"]) == set(MECHANISMS)


# The other ways to start.


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_spawned_siblings_that_all_count_from_zero_are_no_safer_than_forked_ones() -> None:
    _, found = run(config_of("counter", steps=1, start="spawn"))
    assert counts(found) == [("foreign_step", 2, 4), ("mixed_gradient", 2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("after_fork", "wrong"), [(0, 0), (1, 4), (2, 8)])
def test_a_step_is_safe_if_it_is_really_called_before_the_fork(after_fork: int, wrong: int) -> None:
    """Of 3 siblings, 2 run another's body of each step that was not, and again when all is started later."""
    record, found = run(config_of("counter", num_replicas=3, start="compile_then_fork", after_fork=after_fork))
    before = 3 * (2 - after_fork)
    of = 2 * (before + 6)
    assert counts(found) == ([("foreign_step", wrong, of), ("mixed_gradient", wrong, of)] if wrong else [])
    assert record.metrics["ids_collided"] == record.metrics["ids_collided_expected"] == 3 * after_fork


@pytest.mark.slow
def test_a_folder_that_is_kept_spares_the_next_run_all_compiling_and_a_counter_spares_it_the_right_steps(
    tmp_path: Path,
) -> None:
    spared, wrong = {}, {}
    for mechanism in ("content", "counter"):
        for _ in range(2):
            record, found = run(config_of(mechanism, folder=str(tmp_path / mechanism)))
            spared[mechanism] = record.metrics["steps_spared"]
            wrong[mechanism] = sum(count for kind, count, _ in counts(found) if kind == "foreign_step")
    assert (spared["content"], wrong["content"]) == (8, 0)
    assert (spared["counter"], wrong["counter"]) == (4, 4)


@pytest.mark.slow
def test_a_folder_that_others_can_write_to_costs_time_and_a_line_and_runs_nobody_elses_body(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    record, found = run(config_of("counter", steps=1, folder=str(tmp_path / "open")))
    assert counts(found) == []
    assert record.metrics["steps_spared"] == 0
    assert list((tmp_path / "open").iterdir()) == []
    assert any("can be written by others (mode 777)" in line for line in caplog.messages)
    assert found["own_compiled_step"].evidence.endswith("warnings of the cache")


# Ends.


@pytest.mark.slow
def test_a_run_that_is_stopped_says_nothing_and_leaves_nothing() -> None:
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    _, found = run(config_of(rounds=1000), stop)
    assert found == {}


def test_a_family_that_fails_breaks_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "FAMILY", "trainer.workloads.compile_cache.nobody")
    with pytest.raises(RunBroken, match=r"^a sibling failed: status 1; console\.log has what it said$"):
        run(config_of())


@pytest.mark.slow
def test_siblings_that_do_not_come_to_an_end_break_the_run() -> None:
    config = config_of()
    config.watchdog.seconds = 0.01
    with pytest.raises(RunBroken, match=r"^no generation of siblings ended for watchdog\.seconds=0\.01$"):
        run(config)


# Bodies.


def test_all_bodies_have_one_name_and_no_two_have_one_gradient_or_one_content() -> None:
    inputs = bodies.inputs(8, seed=0)
    steps = [bodies.step_of(bodies.body(serial)) for serial in range(60)]
    assert len({step.__qualname__ for step in steps}) == 1
    assert len({step(*inputs)[1].numpy().tobytes() for step in steps}) == 60
    contents = {bodies.content_of(bodies.body(serial), 8) for serial in range(60)}
    assert len(contents) == 60
    assert bodies.content_of(bodies.body(0), 8) in contents
    assert bodies.content_of(bodies.body(0), 9) not in contents
    assert bodies.content_of(bodies.body(0), 8, {**bodies.VERSIONS, "torch": "2.12.0"}) not in contents


@pytest.mark.parametrize("serial", range(6))
def test_a_compiled_body_has_the_bits_of_its_own_and_of_no_other(serial: int) -> None:
    inputs = bodies.inputs(8, seed=0)
    _, step, seconds = bodies.compiled(bodies.body(serial), inputs, "step_1")
    same = [all(map(torch.equal, step(*inputs), bodies.step_of(bodies.body(other))(*inputs))) for other in range(6)]
    assert same == [other == serial for other in range(6)]
    assert seconds > 0


# Arithmetic and claims.


def drawn(starts: tuple[int, ...], steps: int, before: int, space: int) -> Generation:
    """Two siblings' ids, if the parent and they start to count there."""
    parent, *own = starts
    return Generation(
        [
            [
                Ran(
                    str((parent + sibling * before + number if number < before else start + number - before) % space),
                    f"{sibling}.{number}",
                    "",
                    True,
                    0.0,
                )
                for number in range(steps)
            ]
            for sibling, start in enumerate(own)
        ]
    )


@pytest.mark.parametrize(
    ("bits", "steps", "before"), [(2, 1, 0), (3, 2, 0), (4, 3, 0), (3, 3, 1), (3, 3, 3), (4, 3, 2)]
)
def test_the_expected_number_of_collisions_is_the_mean_over_all_starts(bits: int, steps: int, before: int) -> None:
    space = 2**bits
    starts = list(itertools.product(range(space), repeat=3))
    mean = sum(drawn(each, steps, before, space).collided for each in starts) / len(starts)
    keys = {"start": "compile_then_fork", "after_fork": steps - before} if before else {}
    config = config_of("random_offset", steps=steps, offset_bits=bits, **keys)
    validate(config)
    assert expected_collisions(config) == mean


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_only_ids_that_cannot_be_anothers_are_claimed_to_be_safe(mechanism: str) -> None:
    safe = HOLDERS["compile_ids"][mechanism].safe == "always"
    assert safe == (mechanism in ("content", "uuid"))
    config = config_of(mechanism)
    assert claims(config) == (frozenset(("own_compiled_step", "gradients_unmixed")) if safe else frozenset())
    # One foreign body is an anomaly, whoever claims what.
    seen = Seen()
    seen.add(0, Generation([[Ran("step$0", "a", "b", False, 1.0)]]), Generation([[Ran("step$0", "a", "a", True, 1.0)]]))
    found = judge(config, seen)
    assert counts(found) == [("foreign_step", 1, 2), ("mixed_gradient", 1, 2)]
    assert (seen.siblings.saved, seen.later.saved) == (0.0, 1.0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"start": "thread"}, "workload.start must be one of fork, compile_then_fork, spawn; got 'thread'."),
    (
        {"start": "forks"},
        "workload.start must be one of fork, compile_then_fork, spawn; got 'forks'. Did you mean 'fork'?",
    ),
    ({"rounds": 0}, "workload.rounds must be from 1 to 10,000; got 0."),
    ({"rounds": 10_001}, "workload.rounds must be from 1 to 10,000; got 10001."),
    ({"mechanism": "random_offset", "offset_bits": 65}, "workload.offset_bits must be from 0 to 64; got 65."),
    ({"mechanism": "random_offset", "offset_bits": -1}, "workload.offset_bits must be from 0 to 64; got -1."),
    (
        {"offset_bits": 8},
        "workload.offset_bits=8 needs state.compile_ids=random_offset: no other draws an offset.",
    ),
    (
        {"after_fork": 1},
        "workload.after_fork=1 needs workload.start=compile_then_fork: with workload.start=fork every step is compiled "
        "in the sibling.",
    ),
    (
        {"start": "compile_then_fork", "after_fork": 3},
        "workload.after_fork must be from 0 to train.steps; got 3.",
    ),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[str(keys) for keys, _ in REFUSED])
def test_what_it_cannot_do_is_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config_of(**keys))
    assert str(refused.value) == message


def test_training_takes_the_key_where_it_keeps_what_it_compiles_and_nowhere_else() -> None:
    for mechanism in MECHANISMS:
        with pytest.raises(ConfigError, match=f"^state.compile_ids={mechanism} needs train.engine=inductor"):
            validate(Config(state=State(compile_ids=mechanism)))
        validate(Config(state=State(compile_ids=mechanism), train=Train(engine="inductor")))
    validate(config_of("safe"))
