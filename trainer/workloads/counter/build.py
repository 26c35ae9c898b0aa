"""What a run of threads is built of: the variable, the increments on it, what its update mode holds, the replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.config import Config
from trainer.workloads.counter import on_tensorflow, on_torch
from trainer.workloads.counter.isolation import MODES, Isolation
from trainer.workloads.counter.roles import Roles
from trainer.workloads.counter.shared import Operation, Shared, Variable
from trainer.workloads.counter.ways import TORCH, num_writers, way_of

OPERATIONS: dict[str, Operation] = {**on_torch.OPERATIONS, **on_tensorflow.OPERATIONS}


def variable_for(config: Config) -> Variable:
    """The kind of variable that is counted in; its framework is imported here."""
    if way_of(config).variable == TORCH:
        from trainer.workloads.counter.torch_variable import TorchVariable

        return TorchVariable(config)
    from trainer.workloads.counter.tensorflow_variable import TensorflowVariable

    return TensorflowVariable(config)


def roles_of(
    config: Config, variable: Variable, shared: Shared, wrap: Callable[[Any], Any] = lambda kind: kind
) -> Roles:
    """All replicas of a run over one variable.

    Args:
        wrap: makes of the update mode's class what is to be used in its place.
    """
    mode, way, writers = config.update_mode.name, way_of(config), num_writers(config)
    operation = OPERATIONS.get(way.name)
    isolation: Isolation
    if operation is not None:
        isolation = wrap(MODES[mode])(operation, shared, writers)
    else:
        # Here, for it imports TensorFlow.
        from trainer.workloads.counter.gradients import TAKEN, steps_of

        isolation = wrap(steps_of(mode))(mode, TAKEN[way.name], shared, writers)
    return Roles(config, variable, shared, operation, isolation)
