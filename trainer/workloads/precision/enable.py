"""Replicas that each enable a mode, yield once, and look which one is on.

    enable(mode of this replica)
    # others may do the same here
    call

Source: S0.2, there 80 threads and one of float16, float32, bfloat16 and None for each.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.state.precision import PrecisionHolder
from trainer.workloads.precision.calls import Call, Caller
from trainer.workloads.precision.program import Stops


class Enable:
    """Every replica computes in the mode that it has enabled itself."""

    def __init__(self, caller: Caller, holder: PrecisionHolder, dtypes: Sequence[str | None]) -> None:
        self.caller, self._holder, self._dtypes = caller, holder, dtypes

    def begin(self) -> None:
        """No mode is on at first."""

    def replica(self, own: int, step: int, stops: Stops) -> Call:
        asked = self._dtypes[own % len(self._dtypes)]
        self._holder.enable(asked)
        stops.pause()
        return self.caller.call(asked)

    def amiss(self, own: int) -> str:
        return "mode_leak"
