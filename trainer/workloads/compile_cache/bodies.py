"""The steps that siblings compile: all of one qualified name and one signature, each with a body of its own."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from trainer.engines import script_source
from trainer.engines.script_source import Script, load, write

FEATURES, CLASSES = 16, 4
VERSIONS = {"torch": torch.__version__, "source": str(script_source.FORMAT)}

# f(weights, x, y) -> (loss, gradient of the loss by the weights): float32 [features, classes], [batch, features], int64
# [batch] -> float32 [], [features, classes].
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": torch.nn.functional.cross_entropy,
    "squares": lambda logits, y: (logits - _one_hot(y)).square().mean(),
    "distances": lambda logits, y: (logits - _one_hot(y)).abs().mean(),
}
DTYPES = ("float32", "bfloat16")


def _one_hot(y: Tensor) -> Tensor:
    return (y[:, None] == torch.arange(CLASSES)).float()


@dataclass(frozen=True)
class Body:
    """What one step computes.

    Attributes:
        decay: of the weights' squares in the loss. Each body has another, in steps of 2**-12, so that no two have the
            same gradient.
    """

    loss: str
    compute_dtype: str
    decay: float

    def __str__(self) -> str:
        return f"{self.loss} in {self.compute_dtype} with decay {self.decay:g}"


def body(serial: int) -> Body:
    """The body of that number, of all that there are in a run."""
    loss = list(LOSSES)[serial % len(LOSSES)]
    return Body(loss, DTYPES[serial // len(LOSSES) % len(DTYPES)], 1 + serial * 2**-12)


def step_of(own: Body) -> Step:
    """A body as a function. Whatever the body, the function's qualified name is the same."""
    dtype = getattr(torch, own.compute_dtype)

    def step(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = weights.detach().requires_grad_()
            logits = (x.to(dtype) @ leaf.to(dtype)).float()
            loss = LOSSES[own.loss](logits, y) + (leaf.square() * torch.tensor([own.decay] * CLASSES)).mean()
            (gradient,) = torch.autograd.grad(loss, [leaf])
        return loss.detach(), gradient

    return step


def content_of(own: Body, batch_size: int, versions: Mapping[str, str] = VERSIONS) -> str:
    """A digest of all that decides what a step computes, known without compiling it.

    That is its code (this file, and the versions of the libraries that it calls), its constants, dtypes and shapes.
    """
    about = {
        "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "body": asdict(own),
        "shapes": [FEATURES, CLASSES, batch_size],
        "versions": dict(versions),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def inputs(batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What steps are run on: the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(FEATURES, CLASSES, generator=generator)
    x = torch.randn(batch_size, FEATURES, generator=generator)
    return weights, x, torch.randint(CLASSES, (batch_size,), generator=generator)


def compiled(own: Body, example: tuple[Tensor, Tensor, Tensor], symbol: str) -> tuple[Script, Step, float]:
    """The step's source, the step as it is run from it, and the seconds that this took."""
    began = time.perf_counter()
    script = write(make_fx(step_of(own))(*example), symbol)
    step = load(script)
    return script, step, time.perf_counter() - began
