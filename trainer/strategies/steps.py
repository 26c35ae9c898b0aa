"""The training step as PyTorch replicas call it: captured once for each compute dtype, or operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from trainer.audit.records import CompiledStep
from trainer.config import Config
from trainer.doing import doing
from trainer.engines.capture import Captured, capture
from trainer.engines.compiler import Compiler
from trainer.engines.library_calls import Library
from trainer.holders import captures, holder, mechanism
from trainer.schedule.operations import GENERATOR, UPDATE
from trainer.schedule.point import point
from trainer.state.gradients import GradientHolder, PerReplica
from trainer.state.layout import Floats
from trainer.workloads.train import Training

# prefix, template, samples, step, positions -> contribution, row
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def draw(shape: tuple[int, int]) -> Tensor:
    """32-bit words from PyTorch's process-wide generator: int64."""
    point(UPDATE, "generator", of=GENERATOR)
    return torch.randint(0, 2**32, shape, dtype=torch.int64)


class Steps:
    """Steps over the training data.

    Attributes:
        gradients: where a replica's gradients are put.
        engine: torchscript, inductor, fx or eager.
        compiled: the steps that run as compiled libraries.
        libraries: these, by compute dtype, whether they train, and batch size.

    Thread-safety: built by the main thread, before there are replicas; `take` may then be called by all of them.
    """

    def __init__(self, config: Config, training: Training) -> None:
        self._training = training
        if not training.derived:
            training.generator = draw
        self.gradients: GradientHolder = PerReplica()
        self.x = torch.from_numpy(training.dataset.train_x)
        self.y = torch.from_numpy(training.dataset.train_y)
        everyone = range(training.num_replicas)
        self.templates = [torch.from_numpy(training.layout.own_canaries(own)) for own in everyone]
        self._positions = [torch.from_numpy(training.positions(own)) for own in everyone]
        self._captured: dict[tuple[str, bool, int], Captured] = {}
        self.compiler = Compiler(config) if config.train.compiles else None
        self.libraries: dict[tuple[str, bool, int], Library] = {}
        self.engine = "eager"
        self.captures = captures(config)
        if self.captures:
            with doing("capturing the step"):
                for dtype in self._in_reach(config):
                    self.engine = self.captured(dtype).engine
                if config.train.evaluators:
                    self.captured("float32", trains=False)

    @property
    def compiled(self) -> list[CompiledStep]:
        return [] if self.compiler is None else self.compiler.steps

    def take(self, own: int, prefix: Tensor, number: Tensor, samples: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
        """One replica's step, in the compute dtype that it is asked for as far as the precision holder keeps to it.

        Returns:
            The contribution and the row; valid until the calling thread's next step, which may write to their memory.
        """
        trains = own < self._training.num_trainers
        if not self.captures:
            return self._step(self.gradients, prefix, own, samples, number, dtype, trains)
        step = self._captured[self.in_force(dtype), trains, self._training.batch_size].call
        contribution, row = step(prefix, self.templates[own], samples, number, self._positions[own])
        return self.gradients.put(contribution) if trains else contribution, row

    def again(self, own: int, snapshot: Floats, number: int, samples: Tensor, positions: Tensor, dtype: str) -> Floats:
        """What a step of any batch should have computed: captured in that dtype, whatever holders the run had."""
        step = self.captured(dtype, batch_size=len(samples))
        prefix = torch.from_numpy(snapshot)
        contribution, _ = step(prefix, self.templates[own], samples, torch.tensor(number), positions)
        # A copy: it may be a library's buffer (`_capture`).
        vector: Floats = contribution.numpy().copy()
        return vector

    def positions(self, own: int) -> Tensor:
        return self._positions[own]

    def captured(self, dtype: str, *, trains: bool = True, batch_size: int = 0) -> Captured:
        """A step that computes in a dtype, captured when it is first asked for, by the main thread."""
        size = batch_size or self._training.batch_size
        key = (dtype, trains, size)
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        return self._captured[key]

    def _in_reach(self, config: Config) -> list[str]:
        """The dtypes that a replica may find itself asked for, or in."""
        training = self._training
        asked = dict.fromkeys(training.asked[: training.num_trainers])
        unsure = holder(config, "precision").safe != "always"
        if unsure or mechanism(config, "first_call") != "before_start":
            asked["float32"] = None
        return list(asked)

    def in_force(self, dtype: str) -> str:
        """What a captured step is chosen by: the mode that the replica finds, or where it turns one on itself, that."""
        training = self._training
        if training.explicit or training.enabled_in == "replica" or dtype != training.asked[0]:
            return dtype
        return training.precision.current() or "float32"

    def _capture(self, dtype: str, trains: bool, size: int) -> Captured:
        training, private = self._training, PerReplica()

        def step(
            prefix: Tensor, template: Tensor, x: Tensor, y: Tensor, samples: Tensor, number: Tensor, positions: Tensor
        ) -> tuple[Tensor, Tensor]:
            with training.put_back():
                contribution, row = training.step(
                    private.differentiate,
                    prefix,
                    template,
                    x[samples],
                    y[samples],
                    samples,
                    number,
                    positions,
                    compute_dtype=dtype,
                    trains=trains,
                )
            return _own(contribution, trains), row.detach()

        # Round the whole step, where that is how a replica finds its mode; else the step turns it on where it belongs.
        with training.precision.scope(dtype) if training.enabled_in == "main" else nullcontext():
            captured = capture(
                step,
                torch.from_numpy(training.initial[: training.layout.read_size].copy()),
                self.templates[0],
                self.x,
                self.y,
                torch.arange(size),
                torch.tensor(0),
                torch.arange(size, dtype=torch.int32),
                # Of the batches that replicas take; what the audit computes of others is not worth the time.
                compiler=self.compiler if size == training.batch_size else None,
            )

        run, x, y = captured.call, self.x, self.y

        def call(
            prefix: Tensor, template: Tensor, samples: Tensor, number: Tensor, positions: Tensor
        ) -> tuple[Tensor, Tensor]:
            # A library's outputs are the calling thread's buffers, which its next call writes to.
            found: tuple[Tensor, Tensor] = run(prefix, template, x, y, samples, number, positions)
            return found

        if isinstance(captured.call, Library):
            self.libraries[dtype, trains, size] = captured.call
        return Captured(call, captured.engine)

    def _step(
        self,
        gradients: GradientHolder,
        prefix: Tensor,
        own: int,
        samples: Tensor,
        number: Tensor,
        dtype: str,
        trains: bool,
    ) -> tuple[Tensor, Tensor]:
        contribution, row = self._training.step(
            gradients.differentiate,
            prefix,
            self.templates[own],
            self.x[samples],
            self.y[samples],
            samples,
            number,
            self._positions[own],
            compute_dtype=dtype,
            trains=trains,
        )
        return _own(contribution, trains), row.detach()


def _own(contribution: Tensor, trains: bool) -> Tensor:
    """A contribution that may be written to: an evaluator's is its template itself."""
    return contribution.detach() if trains else contribution.clone()
