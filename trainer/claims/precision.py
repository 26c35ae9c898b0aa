"""S0: a mixed-precision mode that threads share, and the cure that was proposed for it."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.claims.claim import Claim, Measured, Ran, of

_ORDERS = "schedule=search num_replicas=2 train.steps=1"
_SCOPE = f"experiment=precision_scope_wipes_setting {_ORDERS}"
_ENABLE = f"experiment=precision_enable_loses {_ORDERS}"
_FIRST = f"experiment=precision_first_call {_ORDERS}"
_INHERIT = f"experiment=precision_thread_local {_ORDERS}"


def _mode(ran: Ran) -> tuple[int, int]:
    return ran.broken("precision_as_asked")


def _wiped(ran: Sequence[Ran]) -> Measured:
    plain, locked, inherited = map(_mode, ran)
    return Measured(
        "reproduced" if plain[0] and not inherited[0] else "refuted",
        f"{of(plain)} wipe out or change another's mode; with get and set each under a lock {of(locked)}; with "
        f"`inherited` {of(inherited)}",
    )


def _lost(ran: Sequence[Ran]) -> Measured:
    plain, local, inherited = map(_mode, ran)
    return Measured(
        "reproduced" if plain[0] and not local[0] + inherited[0] else "refuted",
        f"two threads: in {of(plain)} one reads the other's mode; with `thread_local` or `inherited` in none",
    )


def _first_calls(ran: Sequence[Ran]) -> Measured:
    flag, checked = (each.broken("initialized_once") for each in ran)
    return Measured(
        "reproduced" if flag[0] and not checked[0] else "refuted",
        f"two threads: in {of(flag)} both make the first call; with the double-checked lock in {of(checked)}",
    )


def _cure(ran: Sequence[Ran]) -> Measured:
    scope, enable, absent, inherited, explicit = map(_mode, ran)
    cures, breaks = not scope[0] + enable[0], absent[0] > 0
    return Measured(
        "refined" if cures and breaks and not inherited[0] + explicit[0] else "refuted",
        f"it cures both ({of(scope)} and {of(enable)} go wrong) and breaks the commonest use: a mode that main has "
        f"enabled is absent in its threads, {of(absent)}; `inherited` and `explicit` hold, {of(inherited)}",
    )


def _mirrored(ran: Sequence[Ran]) -> Measured:
    plain, step, inherited = ran
    wiped, off = plain.anomaly("mode_wiped"), step.anomaly("precision_off")
    return Measured(
        "reproduced" if wiped[0] == wiped[1] > 0 and off[0] and inherited.held("precision_as_asked") else "refuted",
        f"there it needs no luck: {of(wiped, 'settings')} wiped out; in a training step {of(off, 'micro-steps')} in "
        "another's precision, with `inherited` none",
    )


def _guards(ran: Sequence[Ran]) -> Measured:
    instances, hangs = ran[0].broken("initialized_once"), ran[1].broken("no_deadlock")
    return Measured(
        "reproduced" if instances[0] and hangs[0] == hangs[1] else "refuted",
        f"a set of instances: in {of(instances)} both make the first call; the double-checked lock across a merge "
        f"call: deadlock in {of(hangs)}",
    )


def _reads(ran: Sequence[Ran]) -> str:
    return str(ran[0].guarantee("precision_as_asked")["evidence"]).partition(";")[0]


def _calls(ran: Sequence[Ran]) -> str:
    return f"80 threads: {ran[0].guarantee('initialized_once')['evidence'].partition(';')[0]}"


CLAIMS = (
    Claim(
        "S0.1",
        "a scope that ends wipes out what others have enabled meanwhile",
        (_SCOPE, f"{_SCOPE} state.precision=locked_global", f"{_SCOPE} state.precision=inherited"),
        _wiped,
        ("experiment=precision_scope_wipes_setting",),
        _reads,
    ),
    Claim(
        "S0.2",
        "80 threads enable a mode, yield once and read it back: 25 read another's",
        (_ENABLE, f"{_ENABLE} state.precision=thread_local", f"{_ENABLE} state.precision=inherited"),
        _lost,
        ("experiment=precision_enable_loses",),
        _reads,
    ),
    Claim(
        "S0.3",
        "several threads pass the guard of the first call together; a double-checked lock cures it",
        (_FIRST, f"{_FIRST} state.first_call=double_checked"),
        _first_calls,
        ("experiment=precision_first_call",),
        _calls,
    ),
    Claim(
        "S0.4",
        "`threading.local` is the cure for S0.1 and S0.2",
        (
            f"{_SCOPE} state.precision=thread_local",
            f"{_ENABLE} state.precision=thread_local",
            _INHERIT,
            f"{_INHERIT} state.precision=inherited",
            f"{_INHERIT} state.precision=explicit",
        ),
        _cure,
        ("experiment=precision_step_thread_local",),
        lambda ran: f"in a training step: {_reads(ran)}",
    ),
    Claim(
        "S0.5",
        "it matters most under MirroredStrategy",
        (
            "experiment=precision_mirrored_scope",
            "experiment=precision_mirrored_step_scope train.steps=50",
            "experiment=precision_mirrored_step_scope train.steps=50 state.precision=inherited",
        ),
        _mirrored,
        ("experiment=precision_step_scope",),
        lambda ran: f"the same step on threads: {_reads(ran)}",
    ),
    Claim(
        "S0.6",
        "modules keep a set of instances with the same unguarded check, and a lock held across a cross-replica call "
        "hangs MirroredStrategy",
        (
            f"{_FIRST} state.first_call=instance_set",
            "experiment=precision_lock_across_merge_call schedule=search",
        ),
        _guards,
        ("experiment=precision_lock_across_merge_call",),
        lambda ran: f"exit status {ran[0].status}: {ran[0].verdict['error']['kind']}",
    ),
)
