"""Anomalies of a mode that replicas set: one that leaks, that stays on, that is gone. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainer.audit.found import Found, found, told, who
from trainer.audit.lineage import Transaction
from trainer.audit.touch import Touch, writes
from trainer.schedule.operations import ENABLED, READ, WRITE, History

# What is written to a mode that is put back to what it was before anybody set it.
UNSET = ("", "none")


def mode_leaks(history: History, place: str, touches: list[Touch]) -> Iterator[Found]:
    """A mode that is not at the end what it was to be, or that another replica set inside one's own scope.

    At the end it is to be what it was at first, or else what somebody enabled last. Version 0 is that nobody set it,
    and whoever restores that says so (`UNSET`). A mode that another replica set to the same value is no leak: it is the
    one asked for.
    """
    written = {version: touch._replace(value=_dtype(touch)) for version, touch in writes(touches).items()}
    if not written:
        return
    enabled = [touch.version for touch in touches if _stays(touch)]
    if enabled:
        yield from _wiped(history, place, touches, written, max(enabled))
    else:
        yield from _left_on(history, place, touches, written)
    yield from _read_in_scopes(history, place, touches, written)


def _stays(touch: Touch) -> bool:
    return touch.kind != READ and touch.value.endswith(f", {ENABLED}")


def _dtype(touch: Touch) -> str:
    return touch.value.removesuffix(f", {ENABLED}")


def _read_in_scopes(
    history: History, place: str, touches: list[Touch], written: Mapping[int, Touch]
) -> Iterator[Found]:
    """Reads of what another replica set, after one's own setting; one finding a step.

    A write that brings back the value which a scope found when it began ends the scope. What is enabled inside of a
    scope takes the place of what that set, and outside of every scope holds for good.
    """
    values = {0: UNSET, **{version: (touch.value,) for version, touch in written.items()}}
    # The scopes that each step is inside, each with its set and with what it found and will put back.
    scopes: dict[Transaction, list[tuple[Touch, tuple[str, ...] | None]]] = {}
    told_of: set[Transaction] = set()
    for touch in touches:
        open_scopes = scopes.setdefault(touch.by, [])
        if _stays(touch):
            put_back = open_scopes.pop()[1] if open_scopes else ()
            open_scopes.append((written[touch.version], put_back))
        elif touch.kind != READ:
            before = open_scopes[-1][1] if open_scopes else ()
            if before is None or touch.value in before:
                open_scopes.pop()
            else:
                open_scopes.append((touch, values.get(touch.base)))
        elif open_scopes and touch.by not in told_of:
            own, setter = open_scopes[-1][0], written.get(touch.version)
            if setter is not None and setter.by != touch.by and setter.value != own.value:
                told_of.add(touch.by)
                because = (
                    f"{told(*touch.by)} set {place} to {own.value!r} and then read version {touch.version}, "
                    f"{setter.value!r}, which {told(*setter.by)} wrote"
                )
                events = (own.event, setter.event, touch.event)
                yield found(history, "mode_leak", "precision_as_asked", place, events, because)


def _wiped(
    history: History, place: str, touches: list[Touch], written: Mapping[int, Touch], enabled: int
) -> Iterator[Found]:
    """A scope's end that put back, over what another replica had enabled meanwhile, what it had found before.

    Args:
        enabled: the version that was enabled last.
    """
    setting, last = written[enabled], written[max(written)]
    if last.value == setting.value or last.by[0] == setting.by[0]:
        return
    because = (
        f"{told(*setting.by)} enabled {setting.value!r} in {place} as version {setting.version}; {told(*last.by)} put "
        f"back {last.value!r} at the end of its scope, which it had found before: what was enabled is gone"
    )
    found_before = [touch.event for touch in touches if touch.by == last.by and touch.kind != WRITE][:1]
    events = (*found_before, setting.event, last.event)
    yield found(history, "mode_wiped", "precision_as_asked", place, events, because)


def _left_on(history: History, place: str, touches: list[Touch], written: Mapping[int, Touch]) -> Iterator[Found]:
    last = written[max(written)]
    if last.value in UNSET:
        return
    events = [last.event]
    because = f"{who(history, last.event)} wrote {place} version {last.version}, the last: it ends as {last.value!r}"
    # Where a scope put back what it had found, that it found another's is why.
    for touch in touches:
        setter = written.get(touch.version) if touch.kind == READ else None
        if touch.by == last.by and setter is not None and setter.by != last.by and setter.value == last.value:
            events += [setter.event, touch.event]
            because += f", which is what it had found: version {setter.version}, set by {told(*setter.by)}"
            break
    yield found(history, "mode_leak", "precision_as_asked", place, events, f"{because}, not as it was at first")
