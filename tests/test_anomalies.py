"""The checker of histories: every kind of anomaly with a safe twin, every order of small programs, an oracle."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import BLIND, Do, Program, Run, Transaction, orders, program, run, steps

from trainer.audit.anomalies import Found, anomalies, guarantees_broken
from trainer.audit.dependencies import Graph, shortest_cycles
from trainer.audit.lanes import picture
from trainer.audit.lineage import Lineage
from trainer.schedule.operations import (
    ABORT,
    ACQUIRE,
    COMPUTE,
    LOCK,
    MODE,
    READ,
    RELEASE,
    UPDATE,
    VARIABLE,
    WRITE,
    Event,
    History,
    Operation,
)

_LINE = re.compile(r"(\d+)(?:\.(\d+))? (\w+)(?: (?:(\w+):: ?)?(\S+?)(?:@(\d+))?(?:<(-?\d+))?(?:=(\S*))?)?")


def history(text: str, *, joint: bool = False, copies: bool = False) -> History:
    """`0 read a@0; 1.2 write mode::precision@2<0=bfloat16`: replica, step, kind, what it is, place, versions, value."""
    events = []
    for line in text.split(";"):
        found = _LINE.fullmatch(line.strip())
        assert found is not None, line
        replica, step, kind, of, place, version, base, value = found.groups()
        mark = kind in (COMPUTE, ABORT, ACQUIRE, RELEASE)
        places = (place,) if place else ()
        operation = Operation(kind, place or "", places, LOCK if mark else of or VARIABLE, value or "")
        versions = () if version is None else (int(version),)
        bases = () if base is None else (int(base),)
        events.append(Event(int(replica), int(step or 0), operation, versions, bases))
    return History(1 + max(event.replica for event in events), events, joint, copies)


@dataclass
class Case:
    kind: str
    guarantee: str
    unsafe: str
    safe: str
    events: tuple[int, ...]
    because: str
    joint: bool = False
    copies: bool = False


CASES = [
    Case(
        "lost_update",
        "no_lost_updates",
        "0 read a@0; 1 read a@0; 0 write a@1<0; 1 write a@2<0",
        "0 read a@0; 0 write a@1<0; 1 read a@1; 1 write a@2<1",
        (1, 2, 3),
        "replica 1's step 0 wrote a from version 0, which it read before replica 0's step 0 wrote version 1, so "
        "version 2 does not hold replica 0's update",
    ),
    Case(
        "lost_update",
        "no_lost_updates",
        "0 read a@0; 0 write a@1<0; 1 write a@2<-1; 0.1 read a@2; 0.1 write a@3<2",
        "0 read a@0; 0 write a@1<0; 1 read a@1; 1 write a@2<1; 0.1 read a@2; 0.1 write a@3<2",
        (1, 2),
        "replica 1's step 0 wrote a without reading it, over version 1 by replica 0's step 0, so version 2 does not "
        "hold replica 0's update",
    ),
    Case(
        "dropped_update",
        "no_lost_updates",
        "0 read a@0; 0 compute; 0 update a@1<0; 1 read a@1; 1 compute",
        "0 read a@0; 0 compute; 0 update a@1<0; 1 read a@1; 1 compute; 1 update a@2<1",
        (2, 4),
        "replica 1's step 0 never wrote a, so version 1 of it, the last, does not hold replica 1's update",
    ),
    Case(
        "dropped_update",
        "no_lost_updates",
        "0 read a@0; 0 compute; 0 write a@1<0; 1 read a@1; 1 compute",
        "0 read a@0; 1 read a@0; 0 compute; 1 compute; 0 write a@1<0",
        (2, 4),
        "replica 0's step 0 wrote a for all without replica 1's step 0, so version 1 does not hold replica 1's update",
        joint=True,
    ),
    Case(
        "dropped_update",
        "no_lost_updates",
        "0 read a@0; 1 read a@0; 0 compute; 1 compute; 0 write contribution::c0@1<-1; 0 read contribution::c0@1; "
        "0 read contribution::c1@0; 0 write a@1<0; 1 write contribution::c1@1<-1",
        "0 read a@0; 1 read a@0; 0 compute; 1 compute; 0 write contribution::c0@1<-1; 1 write contribution::c1@1<-1; "
        "0 read contribution::c0@1; 0 read contribution::c1@1; 0 write a@1<0",
        (3, 7),
        "replica 0's step 0 wrote a for all without replica 1's step 0, so version 1 does not hold replica 1's update",
        joint=True,
    ),
    Case(
        "write_cycle",
        "atomic_updates",
        "0 update a@1<0; 1 update a@2<1; 1 update b@1<0; 0 update b@2<1",
        "0 update a@1<0; 0 update b@1<0; 1 update a@2<1; 1 update b@2<1",
        (0, 1, 2, 3),
        "replica 1's step 0 wrote a version 2 after replica 0's step 0 wrote version 1, and replica 0's step 0 wrote b "
        "version 2 after replica 1's step 0 wrote version 1: so each comes before the other",
    ),
    Case(
        "aborted_read",
        "atomic_updates",
        "0 update a@1<0; 1 update a@2<1; 0 abort",
        "0 read a@0; 0 abort; 1 update a@1<0",
        (0, 1, 2),
        "replica 1's step 0 updated a version 1, which replica 0's step 0 wrote, and aborted",
    ),
    Case(
        "aborted_read",
        "no_torn_reads",
        "0 read a@0; 0 update a@1<0; 1 read a@1; 1 compute; 0 abort; 2 read a@0; 2 write a@2<0; 1 update a@3<2",
        "0 read a@0; 0 abort; 2 read a@0; 2 write a@1<0; 1 read a@1; 1 compute; 1 update a@2<1",
        (1, 2, 4),
        "replica 1's step 0 read a version 1, which replica 0's step 0 wrote, and aborted",
    ),
    Case(
        "aborted_read",
        "atomic_updates",
        "0 update a@1<0; 0 abort",
        "0 read a@0; 0 abort; 1 update a@1<0",
        (0, 1),
        "replica 0's step 0 aborted, but a ends at version 1, which it wrote",
    ),
    Case(
        "intermediate_read",
        "atomic_updates",
        "0 update a@1<0; 1 read a@1; 0 update a@2<1; 1 update b@1<0",
        "0 update a@1<0; 0 update a@2<1; 1 read a@2; 1 update b@1<0",
        (0, 1, 2),
        "replica 1's step 0 read a version 1, which replica 0's step 0 wrote before its last word, version 2",
    ),
    Case(
        "intermediate_read",
        "no_torn_reads",
        "0 update a@1<0; 1 read a@1; 0 update a@2<1",
        "0 update a@1<0; 0 update a@2<1; 1 read a@2",
        (0, 1, 2),
        "replica 1's step 0 read a version 1, which replica 0's step 0 wrote before its last word, version 2",
    ),
    Case(
        "circular_information_flow",
        "atomic_updates",
        "0 update a@1<0; 1 update b@1<0; 0 read b@1; 1 read a@1",
        "0 update a@1<0; 0 read b@0; 1 update b@1<0; 1 read a@1",
        (0, 1, 2, 3),
        "replica 1's step 0 read a version 1, which replica 0's step 0 wrote, and replica 0's step 0 read b version 1, "
        "which replica 1's step 0 wrote: so each comes before the other",
    ),
    Case(
        "circular_information_flow",
        "no_torn_reads",
        "0 update a@1<0; 1 update b@1<0; 0 read b@1; 0 compute; 1 read a@1; 1 compute",
        "0 update a@1<0; 0 read b@0; 0 compute; 0 update b@1<0; 1 update b@2<1; 1 read a@1; 1 compute; 1 update a@2<1",
        (0, 1, 2, 4),
        "",
    ),
    Case(
        "circular_information_flow",
        "no_torn_reads",
        "0 read a@0; 0 compute; 0 write a@1<0; 1 read a@1; 1 compute; 1 write b@1<-1; 1 write a@2<1",
        "0 read a@0; 1 read a@0; 0 compute; 1 compute; 0 write a@1<0; 1 write b@1<-1",
        (2, 3),
        "replica 1's step 0 read a version 1, which replica 0's step 0 wrote for all before replica 1 had computed its "
        "part",
        joint=True,
    ),
    Case(
        "single_anti_dependency",
        "no_lost_updates",
        "0 read a@0; 1 update a@1<0; 1 update b@1<0; 0 read b@1; 0 update c@1<0",
        "1 update a@1<0; 1 update b@1<0; 0 read a@1; 0 read b@1; 0 update c@1<0",
        (0, 1, 2, 3),
        "replica 0's step 0 read a version 0 before replica 1's step 0 wrote version 1, and replica 0's step 0 read b "
        "version 1, which replica 1's step 0 wrote: so each comes before the other",
    ),
    Case(
        "single_anti_dependency",
        "no_lost_updates",
        "0 read a@0; 0 compute; 1 read a@0; 1 compute; 0 write a@1<0; 1 write a@2<0",
        "0 read a@0; 0 compute; 0 write a@1<0; 1 read a@1; 1 compute; 1 write a@2<1",
        (2, 4, 5),
        "",
    ),
    Case(
        "single_anti_dependency",
        "fresh_gradients",
        "0 read a@0; 0 compute; 1 read a@0; 1 compute; 1 update a@1<0; 0 update a@2<1",
        "0 read a@0; 0 compute; 0 update a@1<0; 1 read a@1; 1 compute; 1 update a@2<1",
        (0, 4, 5),
        "replica 0's step 0 read a version 0 before replica 1's step 0 wrote version 1, and replica 0's step 0 wrote a "
        "version 2 after replica 1's step 0 wrote version 1: so each comes before the other",
    ),
    Case(
        "write_skew",
        "no_lost_updates",
        "0 read b@0; 1 read a@0; 0 update a@1<0; 1 update b@1<0",
        "0 read b@0; 0 update a@1<0; 1 read a@1; 1 update b@1<0",
        (0, 1, 2, 3),
        "replica 0's step 0 read b version 0 before replica 1's step 0 wrote version 1, and replica 1's step 0 read a "
        "version 0 before replica 0's step 0 wrote version 1: so each comes before the other",
    ),
    Case(
        "write_skew",
        "fresh_gradients",
        "0 read b@0; 0 compute; 1 read a@0; 1 compute; 0 update a@1<0; 1 update b@1<0",
        "0 read b@0; 0 compute; 0 update a@1<0; 1 update b@1<0",
        (0, 2, 4, 5),
        "",
    ),
    Case(
        "anti_dependency_cycle",
        "no_lost_updates",
        "0 read b@0; 1 read c@0; 2 read a@0; 0 update a@1<0; 1 update b@1<0; 2 update c@1<0",
        "0 read b@0; 1 read c@0; 0 update a@1<0; 2 read a@1; 1 update b@1<0; 2 update c@1<0",
        (0, 1, 2, 3, 4, 5),
        "replica 0's step 0 read b version 0 before replica 1's step 0 wrote version 1, replica 1's step 0 read c "
        "version 0 before replica 2's step 0 wrote version 1, and replica 2's step 0 read a version 0 before replica "
        "0's step 0 wrote version 1: so each comes before the next, and the last before the first",
    ),
    Case(
        "fractured_read",
        "no_torn_reads",
        "0 update a@1<0; 1 read a@1; 1 read b@0; 0 update b@1<0",
        "0 update a@1<0; 0 update b@1<0; 1 read a@1; 1 read b@1",
        (0, 1, 2, 3),
        "replica 1's step 0 read a version 1, which replica 0's step 0 wrote, but b version 0, older than version 1, "
        "which replica 0's step 0 wrote",
    ),
    Case(
        "torn_tensor",
        "no_torn_reads",
        "1 read a[0]@0; 0 update a[0]@1<0; 0 update a[1]@1<0; 1 read a[1]@1",
        "1 read a[0]@0; 1 read a[1]@0; 0 update a[0]@1<0; 0 update a[1]@1<0",
        (0, 2, 3, 1),
        "replica 1's step 0 read a[1] version 1, which replica 0's step 0 wrote, but a[0] version 0, older than "
        "version 1, which replica 0's step 0 wrote",
    ),
    Case(
        "internal_inconsistency",
        "no_torn_reads",
        "0 update a@1<0; 1 update a@2<1; 0 read a@2",
        "0 update a@1<0; 0 read a@1; 1 update a@2<1",
        (0, 1, 2),
        "replica 0's step 0 wrote a version 1 and then read version 2, which replica 1's step 0 wrote",
    ),
    Case(
        "stale_gradient",
        "fresh_gradients",
        "0 read a@0; 0 compute; 1 update a@1<0; 1.1 update a@2<1; 0 update a@3<2",
        "1 update a@1<0; 0 read a@1; 0 compute; 0 update a@2<1; 1.1 update a@3<2",
        (0, 2, 4),
        "replica 0's step 0 computed its gradient from a version 0 and wrote version 3: 2 versions by others came "
        "between, the first by replica 1's step 0",
    ),
    Case(
        "divergence",
        "replicas_identical",
        "0 update 0:a@1<0; 1 update 1:a@1<0",
        "0 update 0:a@1<0; 1 update 0:a@2<1; 0 update 1:a@1<0; 1 update 1:a@2<1",
        (0, 1),
        "0:a ends with the update of replica 0's step 0 in it and 1:a ends without",
        copies=True,
    ),
    Case(
        "mode_leak",
        "precision_as_asked",
        "0 read mode::m@0; 0 write mode::m@1<0=bfloat16; 1 read mode::m@1; 1 write mode::m@2<1=bfloat16; "
        "0 write mode::m@3<1=none; 1 write mode::m@4<2=bfloat16",
        "0 read mode::m@0; 0 write mode::m@1<0=bfloat16; 0 write mode::m@2<1=none; 1 read mode::m@2; "
        "1 write mode::m@3<2=bfloat16; 1 write mode::m@4<3=none",
        (1, 2, 5),
        "replica 1's step 0 wrote m version 4, the last: it ends as 'bfloat16', which is what it had found: version 1, "
        "set by replica 0's step 0, not as it was at first",
    ),
    Case(
        "mode_leak",
        "precision_as_asked",
        "0 read mode::m@0; 0 write mode::m@1<0=bfloat16; 1 read mode::m@1; 1 write mode::m@2<1=float32; "
        "0 read mode::m@2; 1 write mode::m@3<2=bfloat16; 0 write mode::m@4<2=none",
        "0 read mode::m@0; 0 write mode::m@1<0=bfloat16; 1 read mode::m@1; 1 write mode::m@2<1=bfloat16; "
        "0 read mode::m@2; 1 write mode::m@3<2=bfloat16; 0 write mode::m@4<2=none",
        (1, 3, 4),
        "replica 0's step 0 set m to 'bfloat16' and then read version 2, 'float32', which replica 1's step 0 wrote",
    ),
    Case(
        "duplicate_sample",
        "samples_once",
        "0 read cursor::c@0; 1 read cursor::c@0; 0 write cursor::c@1<0=0; 1 write cursor::c@2<0=0",
        "0 read cursor::c@0; 0 write cursor::c@1<0=0; 1 read cursor::c@1; 1 write cursor::c@2<1=1",
        (0, 1, 2, 3),
        "replica 1's step 0 advanced c from version 0, from which replica 0's step 0 had advanced it already: both "
        "took the same batch",
    ),
    Case(
        "skipped_sample",
        "samples_once",
        "0 update cursor::c@1<0=0; 1 update cursor::c@2<1=2",
        "0 update cursor::c@1<0=0; 1 update cursor::c@2<1=1",
        (0, 1),
        "replica 1's step 0 advanced c from 0 to 2: 1 in between given to nobody",
    ),
    Case(
        "repeated_first_call",
        "initialized_once",
        "0 read flag::f@0; 1 read flag::f@0; 0 write flag::f@1<0; 1 write flag::f@2<0",
        "0 read flag::f@0; 1 read flag::f@0; 0 read flag::f@0; 0 write flag::f@1<0; 1 read flag::f@1",
        (0, 1, 2, 3),
        "replica 1's step 0 set f from version 0, which it read before replica 0's step 0 set it: both made the first "
        "call",
    ),
    Case(
        "mixed_gradient",
        "gradients_unmixed",
        "0 write buffer::g@1<-1; 1 write buffer::g@2<-1; 0 update buffer::g@3<2; 0 read buffer::g@3; "
        "1 update buffer::g@4<3; 1 read buffer::g@4",
        "0 write buffer::g@1<-1; 0 update buffer::g@2<1; 0 read buffer::g@2; 1 write buffer::g@3<-1; "
        "1 update buffer::g@4<3; 1 read buffer::g@4",
        (2, 4, 5),
        "replica 1's step 0 put its gradient into g and read version 4, which has replica 0's step 0's in it",
    ),
    Case(
        "mixed_gradient",
        "gradients_unmixed",
        "0 write buffer::g@1<-1; 0 update buffer::g@2<1; 1 write buffer::g@3<-1; 0 read buffer::g@3",
        "0 write buffer::g@1<-1; 0 update buffer::g@2<1; 0 read buffer::g@2; 1 write buffer::g@3<-1",
        (1, 2, 3),
        "replica 0's step 0 put its gradient into g and read version 3, after replica 1's step 0 had cleared it",
    ),
    Case(
        "mixed_gradient",
        "gradients_unmixed",
        "0 write buffer::g@1<-1; 1 write buffer::g@2<-1; 0 read buffer::g@2",
        "0 write buffer::g@1<-1; 0 read buffer::g@1; 1 write buffer::g@2<-1; 1 read buffer::g@2",
        (0, 1, 2),
        "replica 0's step 0 put its gradient into g and read version 2, which has replica 1's step 0's in it",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.guarantee}")
def test_each_anomaly_is_found_with_its_smallest_witness_and_not_in_the_safe_twin(case: Case) -> None:
    unsafe, safe = (history(text, joint=case.joint, copies=case.copies) for text in (case.unsafe, case.safe))
    found = [each for each in anomalies(unsafe) if (each.kind, each.guarantee) == (case.kind, case.guarantee)]
    assert [each.events for each in found[:1]] == [tuple(sorted(case.events))]
    assert not case.because or case.because in {each.because for each in found}
    assert found[0].transactions == tuple(dict.fromkeys(unsafe.events[index][:2] for index in sorted(case.events)))
    assert anomalies(safe) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.guarantee}")
def test_a_witness_shows_its_anomaly_by_itself_in_a_picture(case: Case) -> None:
    unsafe = history(case.unsafe, joint=case.joint, copies=case.copies)
    for each in anomalies(unsafe):
        lines = picture(unsafe, each.events).splitlines()
        assert sum(line.startswith(">") for line in lines) == len(each.events)
        assert max(map(len, lines)) <= 80
        assert all(map(str.isascii, lines))


def test_staleness_is_counted_in_versions() -> None:
    (found,) = (
        each
        for each in anomalies(history("0 read a@0; 0 compute; 1 update a@1<0; 1.1 update a@2<1; 0 update a@3<2"))
        if each.kind == "stale_gradient"
    )
    assert found.versions == 2


def test_an_attempt_that_was_thrown_away_does_not_count() -> None:
    kept = "0 read a@0; 0 read b@0; 0 compute; 1 update a@1<0; 1 update b@1<0; {} 0 update a@2<1; 0 update b@2<1"
    assert anomalies(history(kept.format("0 read a@1; 0 read b@1; 0 compute;"))) == []
    assert {each.guarantee for each in anomalies(history(kept.format("")))} == {"fresh_gradients"}


def test_an_all_reduce_shows_nothing_and_one_without_its_second_barrier_does() -> None:
    step = (
        "0.{s} read a@{s}; 0.{s} read b@{s}; 1.{s} read a@{s}; 1.{s} read b@{s}; 0.{s} compute; 1.{s} compute; "
        "0.{s} write a@{n}<{s}; 1.{s} write b@{n}<{s}"
    )
    whole = "; ".join(step.format(s=s, n=s + 1) for s in range(2))
    assert anomalies(history(whole, joint=True)) == []
    early = (
        "0 read a@0; 0 read b@0; 1 read a@0; 1 read b@0; 0 compute; 1 compute; 0 write a@1<0; 0.1 read a@1; "
        "0.1 read b@0; 1 write b@1<0; 0.1 compute; 1.1 read a@1; 1.1 read b@1; 1.1 compute; 0.1 write a@2<1; "
        "1.1 write b@2<1"
    )
    assert "fractured_read" in {each.kind for each in anomalies(history(early, joint=True))}


def test_joint_updates_of_copies_are_in_all_of_them() -> None:
    text = (
        "0 read 0:a@0; 1 read 1:a@0; 0 compute; 1 compute; 0 update 0:a@1<0; 1 update 1:a@1<0; 0.1 read 0:a@1; "
        "1.1 read 1:a@1; 0.1 compute; 1.1 compute; 0.1 update 0:a@2<1; 1.1 update 1:a@2<1"
    )
    assert anomalies(history(text, joint=True, copies=True)) == []
    kinds = {each.kind for each in anomalies(history(text, copies=True))}
    assert kinds == {"dropped_update", "divergence"}


def test_a_history_whose_versions_do_not_follow_one_another_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("event 1 (write a) installs version 3 of a from 0, where 2 is")):
        anomalies(history("0 write a@1<0; 1 write a@3<0"))


# Every order of small programs.


def each_of(text: str, names: str) -> str:
    return ", ".join(text.replace("?", name) for name in names)


def pair(text: str, number: int = 1) -> list[Program]:
    return [steps(text, number)] * 2


SNAPSHOT = each_of("read ?", "ab") + ", compute, "
MODES = {
    "overwrite": pair(SNAPSHOT + each_of("write ?", "ab")),
    "write_locked": pair(SNAPSHOT + f"acquire L, {each_of('write ?', 'ab')}, release L"),
    "lock_free": pair(SNAPSHOT + each_of("update ?", "ab")),
    "lock_free in pieces": pair(SNAPSHOT + each_of("read ?, write ?", "ab")),
    "per_variable_lock": pair(
        each_of("acquire L?, read ?, release L?", "ab")
        + ", compute, "
        + each_of("acquire L?, update ?, release L?", "ab")
    ),
    "locked without its first lock": pair(SNAPSHOT + f"acquire L, {each_of('update ?', 'ab')}, release L"),
    "locked": pair(
        f"acquire L, {each_of('read ?', 'ab')}, release L, compute, acquire L, {each_of('update ?', 'ab')}, release L"
    ),
    "serialized": pair(f"acquire L, {SNAPSHOT}{each_of('read ?, write ?', 'ab')}, release L"),
    "1 variable": pair("read a, compute, write a"),
    "1 variable, 2 steps": pair("read a, compute, write a", 2),
    "3 variables": pair(each_of("read ?", "abc") + ", compute, " + each_of("write ?", "abc")),
    "3 replicas": [steps("read a, compute, write a", 1)] * 3,
}


def lost(done: Run) -> bool:
    """By arithmetic: each transaction of these programs adds 1 to every variable."""
    transactions = {(event.replica, event.step) for event in done.history.events}
    return any(counts.get(each, 0) != 1 for counts in done.values.values() for each in transactions)


@pytest.mark.parametrize(
    ("name", "number", "lossy", "fractured", "cycles"),
    [
        ("1 variable", 6, 4, 0, 0),
        ("1 variable, 2 steps", 70, 64, 0, 0),
        ("3 variables", 924, 914, 122, 392),
        ("overwrite", 70, 66, 12, 20),
        ("write_locked", 56, 46, 18, 0),
        ("lock_free", 70, 0, 12, 20),
        ("lock_free in pieces", 924, 664, 58, 322),
        ("per_variable_lock", 18_646, 0, 84, 884),
        ("locked without its first lock", 56, 0, 18, 0),
        ("locked", 6, 0, 0, 0),
        ("serialized", 2, 0, 0, 0),
        ("3 replicas", 90, 84, 0, 0),
    ],
)
def test_in_every_order_versions_arithmetic_and_canaries_agree(
    name: str, number: int, lossy: int, fractured: int, cycles: int
) -> None:
    counts: Counter[str] = Counter()
    for order in orders(MODES[name]):
        done = run(MODES[name], order)
        found = {(each.kind, each.guarantee) for each in anomalies(done.history)}
        shown = (
            ("lost_update", "no_lost_updates") in found,
            ("fractured_read", "no_torn_reads") in found,
            ("write_cycle", "atomic_updates") in found,
        )
        assert shown == (lost(done), done.torn, done.overtaken), order
        lineage = Lineage(done.history)
        for variable, values in done.values.items():
            assert lineage.kept(variable) == {each for each, count in values.items() if count}
        counts.update(orders=1, lossy=shown[0], fractured=shown[1], cycles=shown[2])
    assert counts == {"orders": number, "lossy": lossy, "fractured": fractured, "cycles": cycles}


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("serialized", set()),
        ("locked", {"fresh_gradients"}),
        ("locked without its first lock", {"fresh_gradients", "no_torn_reads"}),
        ("write_locked", {"fresh_gradients", "no_torn_reads", "no_lost_updates"}),
        ("per_variable_lock", {"fresh_gradients", "no_torn_reads", "atomic_updates"}),
        ("lock_free", {"fresh_gradients", "no_torn_reads", "atomic_updates"}),
        ("overwrite", {"fresh_gradients", "no_torn_reads", "atomic_updates", "no_lost_updates"}),
    ],
)
def test_a_mode_breaks_what_it_does_not_claim_and_nothing_else(name: str, broken: set[str]) -> None:
    seen: set[str] = set()
    for order in orders(MODES[name]):
        seen |= set(guarantees_broken(run(MODES[name], order).history))
    assert seen == broken


def test_a_mode_that_leaks_is_found_in_every_order_whether_or_not_anybody_used_a_wrong_one() -> None:
    """Each replica saves the mode, sets its own, uses it and restores what it saved."""
    counts: Counter[str] = Counter()
    for order in set(itertools.permutations([0] * 4 + [1] * 4)):
        scopes = _Scopes(order)
        found = [each.because for each in anomalies(scopes.history)]
        assert any("the last" in because for because in found) == (scopes.mode != "none")
        assert any("then read" in because for because in found) == scopes.used_wrong
        counts.update(orders=1, leaks=scopes.mode != "none", unseen=scopes.mode != "none" and not scopes.used_wrong)
    # The look at the end is needed: in most of the orders that leak every use saw the right mode.
    assert counts == {"orders": 70, "leaks": 18, "unseen": 12}


class _Scopes:
    """Runs save, set, use, restore of one mode by two replicas."""

    def __init__(self, order: Sequence[int]) -> None:
        self.history = History(2)
        self.mode = "none"
        self.used_wrong = False
        self._version = 0
        self._read = [0, 0]
        at, saved = [0, 0], ["", ""]
        for own in order:
            match at[own]:
                case 0:
                    saved[own] = self._use(own)
                case 1:
                    self._set(own, "bfloat16")
                case 2:
                    self.used_wrong |= self._use(own) != "bfloat16"
                case 3:
                    self._set(own, saved[own])
            at[own] += 1

    def _use(self, own: int) -> str:
        self._read[own] = self._version
        self.history.events.append(Event(own, 0, Operation(READ, "mode", ("mode",), MODE), (self._version,)))
        return self.mode

    def _set(self, own: int, mode: str) -> None:
        self._version += 1
        self.mode = mode
        operation = Operation(WRITE, "mode", ("mode",), MODE, mode)
        self.history.events.append(Event(own, 0, operation, (self._version,), (self._read[own],)))
        self._read[own] = self._version


# Random programs, held to an oracle that tries every serial order.

Tag = tuple[int, int, int]
Value = tuple[Tag, ...]


@dataclass
class Seen:
    """What one execution made of values that are lists of the writes in them.

    Attributes:
        reads: (replica, step, index of the operation) -> the value that it read.
    """

    reads: dict[Tag, Value]
    final: dict[str, Value]


def execute(transactions: dict[Transaction, list[Do]], sequence: Sequence[Tag]) -> Seen:
    """Run operations one after another; each is named by its transaction and its place in it."""
    seen = Seen({}, {})
    last: dict[tuple[Transaction, str], Value] = {}
    for tag in sequence:
        by, do = tag[:2], transactions[tag[:2]][tag[2]]
        current = seen.final.get(do.name, ())
        if do.kind in (READ, UPDATE):
            seen.reads[tag] = last[by, do.name] = current
        if do.kind in (WRITE, UPDATE, BLIND):
            base = () if do.kind == BLIND else last.get((by, do.name), ())
            seen.final[do.name] = last[by, do.name] = (*base, tag)
    return seen


def base_reads(by: Transaction, dos: list[Do]) -> Iterator[Tag]:
    """The reads that must be explained: updates, reads after the gradient, and what writes are based on."""
    computed = max((index for index, do in enumerate(dos) if do.kind == COMPUTE), default=-1)
    if not any(do.kind in (WRITE, UPDATE, BLIND) for do in dos):
        return
    for index, do in enumerate(dos):
        if do.kind == UPDATE or (do.kind == READ and index > computed):
            yield (*by, index)
        if do.kind == WRITE:
            before = [at for at in range(index) if dos[at].name == do.name and dos[at].kind != COMPUTE]
            if before and dos[before[-1]].kind == READ:
                yield (*by, before[-1])


def is_explained(transactions: dict[Transaction, list[Do]], sequence: Sequence[Tag]) -> bool:
    """Whether one order of whole transactions gives the same base reads and the same end, with every update in it."""
    real = execute(transactions, sequence)
    committed = [by for by, dos in transactions.items() if all(do.kind != ABORT for do in dos)]
    compared = [read for by in committed for read in base_reads(by, transactions[by])]
    for by in committed:
        written = {do.name for do in transactions[by] if do.kind in (WRITE, UPDATE, BLIND)}
        if any(by not in {tag[:2] for tag in real.final[name]} for name in written):
            return False

    def tried(serial: tuple[Transaction, ...]) -> bool:
        """Every order that begins like this; none where a base read is off already."""
        other = execute(transactions, [(*by, index) for by in serial for index in range(len(transactions[by]))])
        if any(other.reads[read] != real.reads[read] for read in compared if read in other.reads):
            return False
        if len(serial) == len(committed):
            return other.final == real.final
        return any(tried((*serial, by)) for by in committed if by not in serial)

    return tried(())


NAMES = st.sampled_from("abc")
GRADIENT = st.just(Do(COMPUTE))
# Reads and updates alone lose nothing, so that what only a cycle tells is not hidden behind lost updates.
ALPHABETS = [
    st.one_of(st.builds(Do, st.sampled_from([READ, UPDATE]), NAMES), GRADIENT),
    st.one_of(st.builds(Do, st.sampled_from([READ, READ, WRITE, WRITE, UPDATE, BLIND]), NAMES), GRADIENT),
]


@st.composite
def some_transaction(draw: st.DrawFn, alphabet: st.SearchStrategy[Do]) -> list[Do]:
    """Up to six operations, those from some place on under the lock, perhaps thrown away at the end."""
    dos = draw(st.lists(alphabet, min_size=1, max_size=6))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(dos)))
        dos = [*dos[:at], Do(ACQUIRE, "L"), *dos[at:], Do(RELEASE, "L")]
    return [*dos, Do(ABORT)] if draw(st.integers(0, 5)) == 0 else dos


@st.composite
def some_run(draw: st.DrawFn) -> tuple[list[Program], list[int]]:
    """Programs for two or three replicas and an order in which they can be run."""
    alphabet = draw(st.sampled_from(ALPHABETS))
    programs = [
        tuple(
            do._replace(step=step)
            for step, dos in enumerate(draw(st.lists(some_transaction(alphabet), min_size=1, max_size=2)))
            for do in dos
        )
        for _ in range(draw(st.integers(2, 3)))
    ]
    counted = [[do for do in each if do.kind not in (COMPUTE, ABORT)] for each in programs]
    order: list[int] = []
    at, holder = [0] * len(programs), None
    while True:
        able = [
            own
            for own, each in enumerate(counted)
            if at[own] < len(each) and not (each[at[own]].kind == ACQUIRE and holder is not None)
        ]
        if not able:
            return programs, order
        own = draw(st.sampled_from(able))
        kind = counted[own][at[own]].kind
        holder = own if kind == ACQUIRE else None if kind == RELEASE else holder
        at[own] += 1
        order.append(own)


def as_transactions(programs: list[Program], done: History) -> tuple[dict[Transaction, list[Do]], list[Tag]]:
    """What each transaction does, and the order in which it was done; locks have done their part."""
    transactions: dict[Transaction, list[Do]] = {}
    for own, each in enumerate(programs):
        for do in each:
            if do.kind not in (ACQUIRE, RELEASE):
                transactions.setdefault((own, do.step), []).append(do)
    at: Counter[Transaction] = Counter()
    sequence = []
    for event in done.events:
        by = (event.replica, event.step)
        if event.operation.kind not in (ACQUIRE, RELEASE):
            sequence.append((*by, at[by]))
            at[by] += 1
    return transactions, sequence


def of_updates(found: list[Found]) -> list[Found]:
    """What no serial order explains. That a gradient never reached a variable is no question of order."""
    guarantees = ("no_lost_updates", "atomic_updates")
    return [each for each in found if each.guarantee in guarantees and each.kind != "dropped_update"]


@settings(max_examples=1_500, deadline=None)
@given(some_run())
def test_updates_show_an_anomaly_if_and_only_if_no_serial_order_explains_them(
    drawn: tuple[list[Program], list[int]],
) -> None:
    programs, order = drawn
    done = run(programs, order)
    found = of_updates(anomalies(done.history))
    assert (not found) == is_explained(*as_transactions(programs, done.history)), found


@settings(max_examples=300, deadline=None)
@given(some_run())
def test_what_the_lineage_keeps_is_what_the_values_hold(drawn: tuple[list[Program], list[int]]) -> None:
    done = run(*drawn)
    lineage = Lineage(done.history)
    for variable, values in done.values.items():
        assert lineage.kept(variable) == {by for by, count in values.items() if count}


@settings(max_examples=300, deadline=None)
@given(some_run())
def test_a_cycle_is_closed_meets_nobody_twice_and_is_told_with_its_own_operations(
    drawn: tuple[list[Program], list[int]],
) -> None:
    done = run(*drawn)
    graph = Graph(Lineage(done.history))
    for neighbours in (graph.base, graph.full):
        for kind, edges in shortest_cycles(neighbours).items():
            ends = [edge.target for edge in edges]
            assert [edge.source for edge in edges] == [ends[-1], *ends[:-1]]
            assert len(set(ends)) == len(ends)
            assert kind.anti_dependencies == min(2, sum(edge.kind == "rw" for edge in edges))
            assert kind.snapshot == any(edge.snapshot for edge in edges)
    for each in anomalies(done.history):
        assert list(each.events) == sorted(set(each.events))
        assert set(each.transactions) == {done.history.events[index][:2] for index in each.events}


# The picture.


def test_the_picture_of_a_lost_update() -> None:
    done = run(pair("read kernel, compute, write kernel"), [0, 1, 0, 1]).history
    (found,) = (each for each in anomalies(done) if each.kind == "lost_update")
    assert picture(done, found.events).splitlines() == [
        "  replica 0                              replica 1",
        "  read kernel @0",
        "  compute",
        ">                                        read kernel @0",
        "                                         compute",
        "> write kernel @1 (from 0)",
        ">                                        write kernel @2 (from 0)",
    ]


def test_a_long_history_is_shown_as_its_witness_and_what_was_left_out() -> None:
    done = run(pair("read kernel, compute, write kernel", 9), [0] * 9 + [1] * 18 + [0] * 9).history
    found = next(each for each in anomalies(done) if each.kind == "lost_update")
    lines = picture(done, found.events).splitlines()
    assert len(lines) < 20
    assert "  ..." in lines
    assert any(line.strip() == "step 0:" for line in lines)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8, 64])
def test_a_picture_of_any_number_of_replicas_has_every_operation_on_a_line(num_replicas: int) -> None:
    done = run([steps("read dense/kernel, compute, write dense/kernel", 1)] * num_replicas, [])
    order = list(range(num_replicas)) * 2
    done = run([steps("read dense/kernel, compute, write dense/kernel", 1)] * num_replicas, order)
    lines = picture(done.history).splitlines()
    assert sum("write dense/kernel" in line for line in lines) == num_replicas
    assert max(map(len, lines)) <= 80
    if num_replicas > 3:
        assert lines[-1].split()[:3] == ["replica", str(num_replicas - 1), "write"]


def test_programs_are_written_as_text() -> None:
    assert program("acquire L, read a, compute") == (Do(ACQUIRE, "L"), Do(READ, "a"), Do(COMPUTE))
