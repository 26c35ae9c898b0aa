"""Replicas that all make what is to be the first call.

    with first_call.call() as first:
        call                        # the first in full precision, all others in the mode

Each looks at a flag, or at a set of the instances that were called before, and sets it once the first call is done.
Whoever looks meanwhile takes itself for the first one, too. A lock round a second look cures that, unless the call
waits for another replica inside: that one waits for the lock.

Source: S0.3 and, for instances and for the lock across a cross-replica call, S0.6.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.state.first_call import FIRST_CALLS
from trainer.workloads.precision.calls import Call, Caller, Layer
from trainer.workloads.precision.program import Stops

FULL = "float32"


class FirstCall:
    """Every replica makes a call, of which the first of each round is made in full precision.

    Args:
        mechanism: who notes the first call, of `FIRST_CALLS`.
        rounds: each has a first call of its own.
    """

    def __init__(self, layer: Layer, mechanism: str, dtypes: Sequence[str | None], rounds: int) -> None:
        self.caller = Caller(layer, None)
        self.by_main = rounds if mechanism == "before_start" else 0
        self._mode = str(dtypes[0])
        self._first_calls = [FIRST_CALLS[mechanism](layer) for _ in range(rounds)]

    def begin(self) -> None:
        for _ in range(self.by_main):
            self.caller.passed(FULL, first=True)

    def replica(self, own: int, step: int, stops: Stops) -> Call:
        with self._first_calls[step].call() as first:
            stops.pause()
            return self.caller.passed(FULL if first else self._mode, first=first)

    def amiss(self, own: int) -> str:
        return ""
