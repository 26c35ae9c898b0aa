"""What a replica does with its share of a joint update, in one call that does not hold the GIL.

TorchScript source rather than captured graphs: one function serves every number of replicas and every share.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _sum_into(total: Tensor, contributions: list[Tensor], start: int, stop: int) -> None:
    """Sum a span of the contributions, in the order of the replicas."""
    own = total[start:stop]
    own.copy_(contributions[0][start:stop])
    for index in range(1, len(contributions)):
        own.add_(contributions[index][start:stop])


def _add_scaled(
    values: Tensor,
    contributions: list[Tensor],
    scales: list[Tensor],
    start: int,
    stop: int,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """The same sum, multiplied by every vector of `scales` in turn, and added to the shared values of that span.

    In the memory of the first contribution unless that `keeps` what it is: nobody else reads its span any more.

    Returns:
        The sum, and what was added; both are the latter unless they are kept.
    """
    total = contributions[0][start:stop]
    if keeps:
        total = total.clone()
    for index in range(1, len(contributions)):
        total.add_(contributions[index][start:stop])
    delta = total
    if keeps:
        delta = total.clone()
    for scale in scales:
        delta.mul_(scale)
    values.add_(delta)
    return total, delta


@functools.cache
def _scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        scripted: Callable[..., Any] = torch.jit.script(function)
    return scripted


def sum_into() -> Callable[[Tensor, list[Tensor], int, int], None]:
    return _scripted(_sum_into)


def add_scaled() -> Callable[[Tensor, list[Tensor], list[Tensor], int, int, bool], tuple[Tensor, Tensor]]:
    return _scripted(_add_scaled)
