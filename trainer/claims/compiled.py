"""S3: compile caches of processes that were forked, and who names what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from trainer.claims.claim import Claim, Measured, Ran, of

_STEPS = "compiled steps"


def _foreign(ran: Ran) -> tuple[int, int]:
    """Steps that ran another's body; and in all, from the words of the guarantee when there are none."""
    count, total = ran.anomaly("foreign_step")
    return (count, total) if total else (0, int(ran.metric("steps_run")))


def _collides(ran: Sequence[Ran]) -> Measured:
    (counted,) = ran
    wrong, mixed = _foreign(counted), counted.anomaly("mixed_gradient")
    return Measured(
        "reproduced" if wrong[0] and mixed == wrong else "refuted",
        f"{of(wrong, _STEPS)} ran another's body; as many gradients had other bits",
    )


def _rare(ran: Sequence[Ran]) -> Measured:
    silent = ran[0].held("own_compiled_step") and ran[0].verdict["verdict"] == "inconclusive"
    expected = ran[0].metric("ids_collided_expected")
    return Measured(
        "reproduced" if silent and 0 < expected < 1e-9 else "refuted",
        f"48 bits: none seen, {expected:.1e} pairs expected, so `inconclusive`, not `upheld`",
    )


def _rare_in_a_small_space(ran: Sequence[Ran]) -> str:
    seen, expected = (ran[0].metric(name) for name in ("ids_collided", "ids_collided_expected"))
    return f"a space of 32: {seen} pairs of ids collided, {expected:g} expected; {of(_foreign(ran[0]), _STEPS)} wrong"


def _random(ran: Sequence[Ran]) -> Measured:
    (drawn,) = ran
    held, spared = drawn.held("own_compiled_step", "gradients_unmixed"), drawn.metric("steps_spared")
    return Measured(
        "refined" if held and not spared else "refuted",
        f"{of(_foreign(drawn), _STEPS)} wrong, with no hook; and {spared} found again by another process, which a "
        "cache is for",
    )


def _spawn(ran: Sequence[Ran]) -> Measured:
    forked, spawned = map(_foreign, ran)
    return Measured(
        "reproduced" if forked[0] and spawned == forked else "refuted",
        f"spawned: {of(spawned, _STEPS)} wrong, forked: {of(forked, _STEPS)}: each process counts from 0",
    )


def _compile_then_fork(ran: Sequence[Ran]) -> Measured:
    counts = [_foreign(each) for each in ran]
    grows = counts[0][0] == 0 and all(one[0] < other[0] for one, other in pairwise(counts))
    told = " / ".join(f"{wrong}" for wrong, _ in counts)
    return Measured(
        "reproduced" if grows else "refuted",
        f"of 2 steps of each of 3 siblings 0 / 1 / 2 first called after the fork: {told} ran another's body",
    )


def _content(ran: Sequence[Ran]) -> Measured:
    (found,) = ran
    spared, steps = int(found.metric("steps_spared")), _foreign(found)[1]
    return Measured(
        "reproduced" if found.held("own_compiled_step", "gradients_unmixed") and spared == steps // 2 else "refuted",
        f"{of(_foreign(found), _STEPS)} wrong; {spared} of the {steps // 2} that later processes ran were found",
    )


_SIBLINGS = "workload=compile_cache train.steps=2 state.compile_ids=counter"

CLAIMS = (
    Claim(
        "S3.1",
        "a counter of the process gives forked siblings one id for different functions, and the wrong body runs",
        ("experiment=compile_cache_counter",),
        _collides,
    ),
    Claim(
        "S3.2",
        "a random 48-bit start makes collisions rare, not impossible",
        ("workload=compile_cache train.steps=4 state.compile_ids=random_offset",),
        _rare,
        ("experiment=compile_cache_random_offset",),
        _rare_in_a_small_space,
    ),
    Claim("S3.3", "a uuid for each id is fork-safe with no hook", ("experiment=compile_cache_uuid",), _random),
    Claim(
        "S3.4",
        "spawn looked immune by accident only",
        (f"{_SIBLINGS} workload.start=fork", f"{_SIBLINGS} workload.start=spawn"),
        _spawn,
    ),
    Claim(
        "S3.6",
        "compiling first and forking afterwards is safe if the first call really happens before the fork",
        tuple(
            f"{_SIBLINGS} workload.start=compile_then_fork workload.after_fork={late} num_replicas=3"
            for late in (0, 1, 2)
        ),
        _compile_then_fork,
    ),
    Claim(
        "S3.7",
        "beyond: an id made from the content is safe, and found again by other processes",
        ("experiment=compile_cache_content",),
        _content,
    ),
)
