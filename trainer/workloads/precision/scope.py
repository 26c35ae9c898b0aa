"""A scope that wipes out what another thread has enabled.

    replica 0                       every other
    with scope(float16):            enable(bfloat16)
        call                        ...
    # puts back what it had found   call, when all are through

Where replica 0 began before another enabled its mode and ends after it, it puts back that there was none. What the
other had enabled is gone, although it was not to end with anybody's scope.

Source: S0.1, with None for what is put back.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.state.precision import PrecisionHolder
from trainer.workloads.precision.calls import Call, Caller
from trainer.workloads.precision.program import Stops


class Scope:
    """Replica 0 computes inside a scope, and the others have enabled one mode for good."""

    def __init__(self, caller: Caller, holder: PrecisionHolder, dtypes: Sequence[str | None]) -> None:
        self.caller, self._holder = caller, holder
        self._inside = str(dtypes[0])
        self._enabled = next(dtype for dtype in dtypes if dtype != dtypes[0])

    def begin(self) -> None:
        """No mode is on at first."""

    def replica(self, own: int, step: int, stops: Stops) -> Call:
        if own == 0:
            with self._holder.scope(self._inside):
                stops.pause()
                call = self.caller.call(self._inside)
            stops.meet()
            return call
        self._holder.enable(self._enabled)
        stops.pause()
        stops.meet()
        return self.caller.call(self._enabled)

    def amiss(self, own: int) -> str:
        return "mode_wiped" if own else "mode_leak"
