"""The rounds of one program, whoever hosts its replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.config import Config, PrecisionMode
from trainer.holders import holder, mechanism
from trainer.schedule.operations import BEGIN
from trainer.schedule.point import mark
from trainer.state.precision import PRECISION_HOLDERS, PrecisionHolder, Runner
from trainer.workloads.precision.calls import Caller, Layer, Tally
from trainer.workloads.precision.enable import Enable
from trainer.workloads.precision.first_call import FirstCall
from trainer.workloads.precision.inherit import Inherit
from trainer.workloads.precision.program import Program, Stops
from trainer.workloads.precision.scope import Scope

# Made with what makes the calls, what holds the mode, and the modes.
ABOUT_A_MODE: dict[str, Callable[[Caller, PrecisionHolder, Sequence[str | None]], Program]] = {
    "scope": Scope,
    "enable": Enable,
    "inherit": Inherit,
}


class Rounds:
    """What replicas share, made anew, and what each of them has seen.

    Attributes:
        num_rounds: steps of each replica.
        by_main: first calls that the main thread makes.
        runners: run a function in a replica's thread with what main has handed over to it; there once they are started.
        tallies: one for each replica, written by its own thread.
    """

    def __init__(self, config: Config, layer: Layer) -> None:
        assert isinstance(config.workload, PrecisionMode)
        self.num_rounds = config.train.steps
        self.by_main = 0
        self.holder: PrecisionHolder = PRECISION_HOLDERS[mechanism(config, "precision")]()
        self.program = self._program(config, layer)
        self.tallies = [Tally() for _ in range(config.num_replicas)]
        self.runners: list[Runner] = []
        # A mode that main has enabled is there for all rounds.
        self._clears = config.workload.enabled_in == "replica"
        self._process_wide = holder(config, "precision").safe == "never"

    def _program(self, config: Config, layer: Layer) -> Program:
        dtypes: Sequence[str | None] = [None if dtype == "none" else dtype for dtype in config.workload.dtypes]
        if config.workload.program == "first_call":
            first_call = FirstCall(layer, mechanism(config, "first_call"), dtypes, self.num_rounds)
            self.by_main = first_call.by_main
            return first_call
        passes = mechanism(config, "precision") == "explicit"
        caller = Caller(layer, None if passes else self.holder)
        return ABOUT_A_MODE[config.workload.program](caller, self.holder, dtypes)

    def start(self) -> None:
        """What the main thread does before it starts replicas."""
        self.program.begin()
        self.runners = [self.holder.hand_over() for _ in self.tallies]

    def take(self, own: int, step: int, stops: Stops) -> None:
        """One replica's round, in its own thread."""

        def take() -> None:
            mark(BEGIN)
            self.tallies[own].add(step, self.program.replica(own, step, stops))

        self.runners[own](take)

    def clear(self, own: int | None = None) -> None:
        """Between two rounds: have no mode on, as at first.

        Args:
            own: the replica in whose thread this is, which turns off what it alone sees, and the first of them what all
                see; None for the thread that starts replicas anew for each round.
        """
        if not self._clears:
            return
        if own is None:
            self.holder.clear()
        elif own == 0 or not self._process_wide:
            self.runners[own](self.holder.clear)
