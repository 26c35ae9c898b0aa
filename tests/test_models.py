"""Models are the same on both backends: each computes everything in its own process, and the arrays are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import Config, ConfigError, Transformer
from trainer.rules import validate

ROOT = Path(__file__).parents[1]
BACKENDS = ("torch", "tensorflow")
# cnn_sync_batch is TensorFlow's only.
ON_BOTH = ("linear", "mlp", "mlp_dropout", "cnn_none", "cnn_batch", "cnn_group", "transformer")
# Logits up to 3.3 through sums of up to 72 float32 products, which backends add in different orders: seen, 1.8e-6.
LOGITS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Computed:
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]

    def named(self, prefix: str) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.arrays.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Computed]:
    """What `one_backend.py` computes on each backend, both at once."""
    folders = {backend: tmp_path_factory.mktemp(backend) for backend in BACKENDS}
    processes = {
        backend: subprocess.Popen(
            [sys.executable, ROOT / "tests" / "one_backend.py", folder],
            env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for backend, folder in folders.items()
    }
    try:
        for backend, process in processes.items():
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, f"{backend}:\n{output}"
    finally:
        for process in processes.values():
            process.kill()
    found = {}
    for backend, folder in folders.items():
        with np.load(folder / "arrays.npz") as arrays:
            found[backend] = Computed(dict(arrays), json.loads((folder / "facts.json").read_text()))
    return found


@pytest.mark.parametrize("model", ON_BOTH)
def test_initial_weights_are_the_same_bits_on_both_backends(computed: dict[str, Computed], model: str) -> None:
    torch, tensorflow = (computed[backend].named(f"{model}.initial.") for backend in BACKENDS)
    assert torch
    assert torch.keys() == tensorflow.keys()
    for name in torch:
        assert torch[name].tobytes() == tensorflow[name].tobytes(), name


def test_keras_own_initializer_gives_other_weights_on_each_backend(computed: dict[str, Computed]) -> None:
    torch, tensorflow = (computed[backend].arrays["stock_initial"] for backend in BACKENDS)
    assert not np.array_equal(torch, tensorflow)


@pytest.mark.parametrize("model", [*ON_BOTH, "cnn_sync_batch"])
def test_weights_differ_between_variables_and_biases_are_zero(computed: dict[str, Computed], model: str) -> None:
    facts, arrays = computed["tensorflow"].facts, computed["tensorflow"].arrays
    kernels = []
    for index, path in enumerate(facts[f"{model}.trainable"]):
        value = arrays[f"{model}.initial.{index}"]
        if path.endswith(("kernel", "embedding")):
            limit = np.sqrt(6 / (np.prod(value.shape[:-2]) * sum(value.shape[-2:])))
            assert 0.9 * limit < np.abs(value).max() <= limit
            kernels.append(value.reshape(-1)[:40] / limit)
        elif path.endswith("bias"):
            assert not value.any()
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize("model", ON_BOTH)
@pytest.mark.parametrize("result", ["logits", "training_logits", "statistics."])
def test_results_in_float32_agree_between_backends(computed: dict[str, Computed], model: str, result: str) -> None:
    torch, tensorflow = (computed[backend].named(f"{model}.{result}") for backend in BACKENDS)
    assert torch.keys() == tensorflow.keys()
    num_statistics = 4 if model == "cnn_batch" else 0
    assert len(torch) == (num_statistics if result == "statistics." else 1)
    for name in torch:
        np.testing.assert_allclose(torch[name], tensorflow[name], rtol=0, atol=LOGITS_TOLERANCE, err_msg=name)


def test_synchronized_normalization_of_one_replica_is_that_of_its_batch(computed: dict[str, Computed]) -> None:
    arrays = computed["tensorflow"].arrays
    synchronized, plain = (arrays[f"{model}.training_logits"] for model in ("cnn_sync_batch", "cnn_batch"))
    # Not the same bits: a synchronized variance is E[x^2] - E[x]^2.
    np.testing.assert_allclose(synchronized, plain, rtol=0, atol=LOGITS_TOLERANCE)
    assert "only supported with the TensorFlow backend" in computed["torch"].facts["sync_batch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ON_BOTH)
def test_only_batch_statistics_are_non_trainable_and_all_variables_are_float32(
    computed: dict[str, Computed], backend: str, model: str
) -> None:
    facts = computed[backend].facts
    statistics = [f"cnn/normalization_{layer}/moving_{kind}" for layer in (0, 1) for kind in ("mean", "variance")]
    assert facts[f"{model}.non_trainable"] == (statistics if model == "cnn_batch" else [])
    assert facts[f"{model}.dtypes"] == facts[f"{model}.mixed_dtypes"] == ["float32"]
    assert facts[f"{model}.mixed_logits"] == "bfloat16"


@pytest.mark.parametrize("model", ["cnn_batch", "cnn_group", "cnn_none"])
def test_a_convolution_has_a_bias_only_without_a_normalization(computed: dict[str, Computed], model: str) -> None:
    biases = [
        path for path in computed["torch"].facts[f"{model}.trainable"] if "convolution" in path and "bias" in path
    ]
    assert len(biases) == (2 if model == "cnn_none" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ON_BOTH)
def test_a_model_built_again_from_its_config_has_the_same_weights(
    computed: dict[str, Computed], backend: str, model: str
) -> None:
    assert computed[backend].facts[f"{model}.same_from_config"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_never_imports_the_other(computed: dict[str, Computed], backend: str) -> None:
    assert computed[backend].facts["imported"] == [backend]


def hashed(words: np.ndarray) -> np.ndarray:
    """lowbias32 on uint32, which wraps by itself: written apart from `models.random`, to check it."""
    words = words.astype(np.uint32)
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x7FEB352D)
    words ^= words >> np.uint32(15)
    words *= np.uint32(0x846CA68B)
    words ^= words >> np.uint32(16)
    return words


def reference_bits(seed: int, steps: Any, samples: Any, layer_index: int, num_elements: int) -> np.ndarray:
    """uint32 [steps, samples, elements]."""
    row, column = np.random.SeedSequence([seed, layer_index]).generate_state(2)
    step = hashed(np.asarray(steps, np.uint32) ^ row)[:, None]
    rows = hashed(np.asarray(samples, np.uint32) ^ step)
    columns = hashed(np.arange(num_elements, dtype=np.uint32) ^ step ^ column)
    return hashed(rows[:, :, None] ^ columns[:, None, :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["eager", "captured"])
def test_random_bits_are_the_hash_of_what_they_are_for(computed: dict[str, Computed], backend: str, how: str) -> None:
    found = computed[backend].arrays[f"bits.{how}"]
    firsts = (0, 1000, 2**32 - 8)
    expected = np.stack(
        [reference_bits(11, [0, 1, 2**32 - 1], np.arange(first, first + 8), 1, 24) for first in firsts], axis=1
    )
    np.testing.assert_array_equal(found, expected)


def test_random_bits_are_even_and_unrelated_along_every_axis() -> None:
    def draw(seed: int, layer_index: int) -> np.ndarray:
        return reference_bits(seed, np.arange(64), np.arange(64), layer_index, 128)

    words = draw(0, 0)
    five_sigma = 5 / np.sqrt(words.size)
    for bit in range(32):
        ones = (words >> np.uint32(bit)) & 1
        assert abs(2 * ones.mean() - 1) < five_sigma, f"bit {bit}"
    signs = np.where(words >> np.uint32(31), 1, -1)
    for axis in range(3):
        # Powers of two apart, where a weak hash of counters shows first.
        for distance in (1, 2, 4, 16):
            moved = signs * np.roll(signs, distance, axis)
            assert abs(moved.mean()) < five_sigma, f"axis {axis}, distance {distance}"
    for other in (draw(1, 0), draw(0, 1)):
        assert abs((signs * np.where(other >> np.uint32(31), 1, -1)).mean()) < five_sigma
    assert len({mask.tobytes() for mask in (signs > 0).reshape(-1, 128)}) == 64 * 64, "no two masks are the same"


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_dropout_masks_are_the_same_on_both_backends(computed: dict[str, Computed], num_replicas: int) -> None:
    torch, tensorflow = (computed[backend].arrays[f"masks.ours.{num_replicas}"] for backend in BACKENDS)
    np.testing.assert_array_equal(torch, tensorflow)
    expected = reference_bits(11, range(4), range(8), 0, 24) >= 2**31
    np.testing.assert_array_equal(torch, expected.reshape(4, 8, 4, 6))


def replica_counts_change_masks(computed: Computed, layer: str) -> bool:
    joint = computed.arrays[f"masks.{layer}.1"]
    return any(not np.array_equal(joint, computed.arrays[f"masks.{layer}.{count}"]) for count in (2, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_do_not_depend_on_the_number_of_replicas(computed: dict[str, Computed], backend: str) -> None:
    assert not replica_counts_change_masks(computed[backend], "ours")


@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_own_dropout_masks_depend_on_the_number_of_replicas(computed: dict[str, Computed], backend: str) -> None:
    assert replica_counts_change_masks(computed[backend], "stock")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ["mlp_dropout", "transformer"])
def test_a_captured_step_draws_for_the_step_and_samples_of_its_replay(
    computed: dict[str, Computed], model: str, backend: str
) -> None:
    eager, captured = (computed[backend].arrays[f"{model}.dropout_step.{how}"] for how in ("eager", "captured"))
    np.testing.assert_allclose(captured, eager, rtol=0, atol=LOGITS_TOLERANCE)
    assert not np.allclose(eager[0], eager[1], rtol=0, atol=1e-2), (
        "the two replays must differ for this to mean anything"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_without_a_key_for_this_batch_is_refused(computed: dict[str, Computed], backend: str) -> None:
    facts = computed[backend].facts
    for case in ("no_key", "after_key"):
        assert facts[case].startswith("RuntimeError")
        assert "Random numbers were asked for without a source" in facts[case]
    assert "The key is for 1 samples; the batch has 8." in facts["short_key"]
    assert facts["bad_rate"] == "ValueError: rate must be from 0 up to but without 1; got 1."


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_passes_everything_on_outside_training_and_holds_no_variable(
    computed: dict[str, Computed], backend: str
) -> None:
    assert computed[backend].facts["identity"]
    assert computed[backend].facts["dropout_variables"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_models_and_normalizations_are_refused(computed: dict[str, Computed], backend: str) -> None:
    facts = computed[backend].facts
    assert facts["unknown_model"] == "ValueError: model must be one of linear, mlp, cnn, transformer; got 'lstm'."
    assert facts["unknown_normalization"].startswith("ValueError: model.normalization must be one of none, batch, ")
    assert facts["odd_patch"] == "ValueError: model.patch must divide height and width; got 3 for 8x8."
    assert facts["odd_heads"] == "ValueError: heads must divide the width 6; got 4."


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_attention_drops_the_same_weights_on_both_backends_in_any_number_of_replicas(
    computed: dict[str, Computed], num_replicas: int, backend: str
) -> None:
    arrays = computed[backend].arrays
    joint = computed["torch"].arrays["attention.1"]
    # A weight of 0.25 is dropped or doubled: another mask would show in the first digit.
    np.testing.assert_allclose(arrays[f"attention.{num_replicas}"], joint, rtol=0, atol=LOGITS_TOLERANCE)
    assert np.abs(joint - arrays["attention.inference"]).max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_holds_no_generator_and_no_variable_without_a_gradient(
    computed: dict[str, Computed], backend: str
) -> None:
    kernels = [f"{name}/kernel" for name in ("query", "key", "value", "output")]
    assert computed[backend].facts["attention_variables"] == [*kernels, "output/bias"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_own_attention_starts_queries_and_keys_alike_under_a_seeded_initializer(
    computed: dict[str, Computed], backend: str
) -> None:
    assert computed[backend].facts["stock_attention_kernels_are_equal"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Transformer(width=30), "model.heads must divide model.width=30; got 4."),
        (Transformer(patch=0), "model.patch must be at least 1; got 0."),
        (Transformer(width=0), "model.width must be at least 1; got 0."),
        (Transformer(heads=0), "model.heads must be at least 1; got 0."),
        (Transformer(depth=0), "model.depth must be at least 1; got 0."),
        (Transformer(dropout=1), "model.dropout must be from 0 up to but without 1; got 1."),
        (
            Transformer(patch=3),
            "model.patch must divide the images' height and width; got 3, and data=digits gives [8, 8, 1]. "
            "It can be 1, 2, 4, 8.",
        ),
    ],
)
def test_a_transformer_that_cannot_be_built_is_refused(model: Transformer, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Config(model=model))
    assert str(caught.value) == message
