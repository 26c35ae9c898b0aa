"""A mode that the main thread enables, for replicas that it starts afterwards.

    enable(float16)                 # main, as at the top of a script
    call                            # every replica

It is how a mode is commonly used, and what `threading.local` breaks: a thread that was not the one to enable the mode
has none, and computes in float32 without a word.

Source: S0.4, of which this is the other side.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.state.precision import PrecisionHolder
from trainer.workloads.precision.calls import Call, Caller
from trainer.workloads.precision.program import Stops


class Inherit:
    """Every replica is to compute in the mode that main has enabled."""

    def __init__(self, caller: Caller, holder: PrecisionHolder, dtypes: Sequence[str | None]) -> None:
        self.caller, self._holder = caller, holder
        self._enabled = dtypes[0]

    def begin(self) -> None:
        self._holder.enable(self._enabled)

    def replica(self, own: int, step: int, stops: Stops) -> Call:
        stops.pause()
        return self.caller.call(self._enabled)

    def amiss(self, own: int) -> str:
        return ""  # that no mode was on shows in what was computed
