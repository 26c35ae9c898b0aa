"""The same model, truly: both strategies follow the same losses, and N replicas follow one on the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(300)  # whichever test comes first trains everything

BATCH = 16
# The two frameworks add up matrix products in different orders, so losses of order 1 differ by a few units in the last
# place (6e-8 each), which every update carries on. The largest difference seen over these 20 steps is 5e-7; a real one
# (another batch, mask or rate) is larger than 1e-3.
TOLERANCE = 5e-6
MODELS = ["linear", "mlp", "mlp_dropout", "cnn_none", "cnn_group", "cnn_batch", "transformer"]
Losses = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Losses]:
    """Losses of every model by strategy and number of replicas, the joint batch the same in all."""
    folder = tmp_path_factory.mktemp("parity")
    processes = {}
    for strategy, backend in (("threads", "torch"), ("mirrored", "tensorflow")):
        for num_replicas in (1, 2):
            output = folder / f"{strategy}_{num_replicas}.npz"
            command = [sys.executable, Path(__file__).with_name("train_all.py"), strategy]
            command += [str(num_replicas), str(2 * BATCH // num_replicas), output]
            environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            subprocess.run(command, env=environment, check=True, timeout=240)
            processes[strategy, num_replicas] = output
    return {key: dict(np.load(output)) for key, output in processes.items()}


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_both_strategies_follow_the_same_losses(
    losses: dict[tuple[str, int], Losses], model: str, num_replicas: int
) -> None:
    threads, mirrored = losses["threads", num_replicas][model], losses["mirrored", num_replicas][model]
    assert np.isfinite(threads).all()
    np.testing.assert_allclose(threads, mirrored, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
@pytest.mark.parametrize("model", [*MODELS, "cnn_sync_batch"])
def test_two_replicas_follow_one_on_the_joint_batch(
    losses: dict[tuple[str, int], Losses], strategy: str, model: str
) -> None:
    if (strategy, model) == ("threads", "cnn_sync_batch"):
        pytest.skip("Keras has no synchronized BatchNormalization on PyTorch")
    one, two = losses[strategy, 1][model].mean(axis=0), losses[strategy, 2][model].mean(axis=0)
    if model == "cnn_batch":
        # Its unsafe twin: each replica normalizes its own half by itself, which is another function.
        assert np.abs(one - two).max() > 100 * TOLERANCE
    else:
        np.testing.assert_allclose(one, two, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
@pytest.mark.parametrize("model", [*MODELS, "cnn_sync_batch"])
def test_all_reduce_ends_in_the_same_bits_every_time(
    losses: dict[tuple[str, int], Losses], strategy: str, model: str
) -> None:
    if (strategy, model) == ("threads", "cnn_sync_batch"):
        pytest.skip("Keras has no synchronized BatchNormalization on PyTorch")
    first, second = losses[strategy, 2][f"{model}.digests"]
    assert first == second != "None"


@pytest.mark.parametrize("model", MODELS)
def test_every_model_runs_captured(losses: dict[tuple[str, int], Losses], model: str) -> None:
    assert losses["threads", 2][f"{model}.engine"] == "torchscript"
    assert losses["mirrored", 2][f"{model}.engine"] == "tf.function"
