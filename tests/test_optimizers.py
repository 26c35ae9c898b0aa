"""Our rules against Keras' own optimizers, on the same gradients."""

import keras
import numpy as np
import pytest
import torch

from trainer.updates import optimizers

RATE = 0.05
PAIRS = {
    "sgd": (optimizers.Sgd(RATE), lambda: keras.optimizers.SGD(RATE)),
    "momentum": (optimizers.Momentum(RATE, 0.9), lambda: keras.optimizers.SGD(RATE, momentum=0.9)),
    "adam": (
        optimizers.Adam(RATE, 0.9, 0.999, 1e-7),
        lambda: keras.optimizers.Adam(RATE, beta_1=0.9, beta_2=0.999, epsilon=1e-7),
    ),
}


def ours(rule: optimizers.Optimizer, gradients: np.ndarray, convert) -> np.ndarray:
    size = gradients.shape[1]
    weights = convert(np.ones(size, np.float32))
    slots = [convert(np.zeros(size, np.float32)) for _ in rule.slots]
    for step, gradient in enumerate(gradients):
        delta, *slot_deltas = rule.delta(convert(gradient), slots, convert(np.full(1, step, np.float32)))
        weights = weights + delta
        slots = [slot + change for slot, change in zip(slots, slot_deltas, strict=True)]
    return np.asarray(weights)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_rule_follows_keras(name: str, convert) -> None:
    rule, build = PAIRS[name]
    gradients = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    variable = keras.Variable(np.ones(50, np.float32))
    theirs = build()
    for gradient in gradients:
        theirs.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    # Deltas are added where Keras multiplies and assigns, so roundings differ: a few units in the last place.
    np.testing.assert_allclose(ours(rule, gradients, convert), variable.value.detach().numpy(), atol=2e-6)
