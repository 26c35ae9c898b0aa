"""Where a replica's gradients are put before they are used, on PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.schedule.operations import BUFFER, READ, UPDATE, WRITE
from trainer.schedule.point import point
from trainer.state.layout import Layout

LossOf = Callable[[list[Tensor]], tuple[Tensor, Any]]
Differentiated = tuple[Tensor, Any, Sequence[Tensor | None]]


class GradientHolder(Protocol):
    def differentiate(self, loss_of: LossOf, weights: list[Tensor]) -> Differentiated:
        """A loss, what comes with it, and its gradients by the weights; called inside a step."""

    def put(self, contribution: Tensor) -> Tensor:
        """What a captured step computed, as it is read back from where gradients are held: float32 [read_size]."""

    def mixed(self) -> bool | None:
        """Whether what the calling thread last read back was not what it had put.

        None where that cannot happen, and of a thread that has put nothing: an evaluating replica's.
        """


class PerReplica:
    """Safe: gradients are new tensors of the replica's own."""

    def differentiate(self, loss_of: LossOf, weights: list[Tensor]) -> Differentiated:
        with torch.enable_grad():
            leaves = [weight.detach().requires_grad_() for weight in weights]
            loss, rest = loss_of(leaves)
            return loss, rest, torch.autograd.grad(loss, leaves, allow_unused=True)

    def put(self, contribution: Tensor) -> Tensor:
        return contribution

    def mixed(self) -> bool | None:
        return None


class _Own(threading.local):
    """What each thread has by itself."""

    mixed: bool | None = None


class SharedGrad:
    """Unsafe: every replica's parameters have the same `.grad`, as those of one module that all threads use.

    Each replica clears it, lets autograd add its gradient and reads the sum. What others added meanwhile is in it, and
    what others cleared is not. Every gradient is also caught on its way in, so that a mixed one is known as such.
    """

    def __init__(self, layout: Layout) -> None:
        self._buffer = torch.zeros(layout.read_size)
        self._spans = [segment.span for segment in layout.of_kind("weight")]
        self._grads = [self._buffer[segment.span].view(segment.shape) for segment in layout.of_kind("weight")]
        self._own = _Own()

    def differentiate(self, loss_of: LossOf, weights: list[Tensor]) -> Differentiated:
        with torch.enable_grad():
            leaves = [weight.detach().requires_grad_() for weight in weights]
            caught: dict[int, Tensor] = {}
            for index, (leaf, grad) in enumerate(zip(leaves, self._grads, strict=True)):
                # Called with the leaf's own gradient, before autograd adds it to .grad.
                leaf.register_hook(lambda own, index=index: caught.update({index: own.clone()}))  # type: ignore[no-untyped-call]
                leaf.grad = grad
            point(WRITE, ".grad", of=BUFFER)
            self._buffer.zero_()  # optimizer.zero_grad(set_to_none=False)
            loss, rest = loss_of(leaves)
            point(UPDATE, ".grad", of=BUFFER)
            loss.backward()  # type: ignore[no-untyped-call]
        point(READ, ".grad", of=BUFFER)
        read = [grad.clone() for grad in self._grads]
        zeros = (torch.zeros_like(grad) for grad in read)
        self._own.mixed = not all(
            torch.equal(found, caught.get(index, zero))
            for index, (found, zero) in enumerate(zip(read, zeros, strict=True))
        )
        return loss, rest, read

    def put(self, contribution: Tensor) -> Tensor:
        own = contribution.clone()
        point(WRITE, ".grad", of=BUFFER)
        self._buffer.zero_()
        point(UPDATE, ".grad", of=BUFFER)
        for span in self._spans:  # values only: canaries are no gradients
            self._buffer[span].add_(own[span])
        point(READ, ".grad", of=BUFFER)
        for span in self._spans:
            contribution[span] = self._buffer[span]
        self._own.mixed = not torch.equal(contribution, own)
        return contribution

    def mixed(self) -> bool | None:
        return self._own.mixed
