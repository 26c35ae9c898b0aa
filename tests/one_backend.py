"""Everything that `test_models.py` compares between backends, computed on one: the one that KERAS_BACKEND names.

    KERAS_BACKEND=torch python tests/one_backend.py FOLDER

writes FOLDER/arrays.npz and FOLDER/facts.json. A process has one Keras backend, so each has its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

import models
from models.attention import SelfAttention
from models.dropout import Dropout
from models.initializers import GlorotUniform
from models.random import Key, drawing

BACKEND = keras.backend.backend()
SHAPE, CLASSES, BATCH, SEED = (8, 8, 1), 10, 8, 11
STEPS = 4
MODELS = {
    "linear": SimpleNamespace(name="linear"),
    "mlp": SimpleNamespace(name="mlp", hidden=[32, 16], dropout=0.0),
    "mlp_dropout": SimpleNamespace(name="mlp", hidden=[32, 16], dropout=0.25),
    "cnn_none": SimpleNamespace(name="cnn", filters=[8, 12], normalization="none", dropout=0.0),
    "cnn_batch": SimpleNamespace(name="cnn", filters=[8, 12], normalization="batch", dropout=0.0),
    "cnn_group": SimpleNamespace(name="cnn", filters=[8, 12], normalization="group", dropout=0.25),
    "cnn_sync_batch": SimpleNamespace(name="cnn", filters=[8, 12], normalization="sync_batch", dropout=0.0),
    "transformer": SimpleNamespace(name="transformer", patch=2, width=16, heads=4, depth=2, dropout=0.25),
}
ELEMENTS = 24

arrays: dict[str, Any] = {}
facts: dict[str, Any] = {}


def tensor(value: Any) -> Any:
    """A tensor of the backend's own, as a strategy would hand it to a step."""
    if BACKEND == "torch":
        import torch

        return torch.from_numpy(np.array(value))
    import tensorflow as tf

    return tf.constant(value)


def array(value: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(value))


def captured(function: Callable[..., Any], *like: Any) -> Any:
    """The function as each strategy captures a step: a TorchScript of its flat graph, or a tf.function."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    # A lambda has no annotations: make_fx copies them into the graph's source, where TorchScript knows no `Any`.
    graph = make_fx(lambda *inputs: function(*inputs), tracing_mode="real")(*like)
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    graph.recompile()
    return torch.jit.script(graph)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def build(options: Any, **kwargs: Any) -> keras.Model:
    return models.build(options, input_shape=SHAPE, num_classes=CLASSES, seed=SEED, **kwargs)


def values(variables: list[Any]) -> list[Any]:
    return [tensor(array(variable.value)) for variable in variables]


def model_arrays(name: str, options: Any) -> None:
    if name == "cnn_sync_batch" and BACKEND == "torch":
        facts["sync_batch"] = error_of(lambda: build(options))
        return
    model = build(options)
    x = tensor(np.random.default_rng(0).random((BATCH, *SHAPE), dtype=np.float32))
    weights, statistics = values(model.trainable_variables), values(model.non_trainable_variables)
    facts[f"{name}.trainable"] = [variable.path for variable in model.trainable_variables]
    facts[f"{name}.non_trainable"] = [variable.path for variable in model.non_trainable_variables]
    facts[f"{name}.dtypes"] = sorted({str(variable.dtype) for variable in model.variables})
    for index, value in enumerate(weights + statistics):
        arrays[f"{name}.initial.{index}"] = array(value)
    logits, _ = model.stateless_call(weights, statistics, x, training=False)
    arrays[f"{name}.logits"] = array(logits)
    with drawing(Key(SEED, tensor(np.int32(1)), tensor(np.arange(BATCH, dtype=np.int32)))):
        logits, new_statistics = model.stateless_call(weights, statistics, x, training=True)
    arrays[f"{name}.training_logits"] = array(logits)
    for index, value in enumerate(new_statistics):
        arrays[f"{name}.statistics.{index}"] = array(value)
    mixed = build(options, dtype_policy="mixed_bfloat16")
    facts[f"{name}.mixed_dtypes"] = sorted({str(variable.dtype) for variable in mixed.variables})
    logits, _ = mixed.stateless_call(values(mixed.trainable_variables), values(mixed.non_trainable_variables), x)
    facts[f"{name}.mixed_logits"] = keras.backend.standardize_dtype(logits.dtype)


def random_bits() -> None:
    def draw(step: Any, samples: Any) -> Any:
        return Key(SEED, step, samples).bits(layer_index=1, num_elements=ELEMENTS, batch=None)

    samples = [np.arange(BATCH), np.arange(1000, 1000 + BATCH), np.arange(2**32 - BATCH, 2**32)]
    steps = [np.int64(0), np.int64(1), np.int64(2**32 - 1)]
    replay = captured(draw, tensor(steps[0]), tensor(samples[0]))
    for name, function in (("eager", draw), ("captured", replay)):
        arrays[f"bits.{name}"] = np.stack(
            [[array(function(tensor(step), tensor(index))) for index in samples] for step in steps]
        )


def masks_by_replicas() -> None:
    """Masks of a joint batch of 8 at each step: of ours, and of Keras' own Dropout for contrast."""

    def masks(layer: Any, num_replicas: int) -> np.ndarray:
        size = BATCH // num_replicas
        ones = tensor(np.ones((size, 4, 6), np.float32))
        found = np.zeros((STEPS, BATCH, 4, 6), bool)
        for step in range(STEPS):
            # Last replica first: what a replica draws must not depend on who drew before.
            for replica in reversed(range(num_replicas)):
                samples = np.arange(replica * size, (replica + 1) * size, dtype=np.int32)
                with drawing(Key(SEED, tensor(np.int32(step)), tensor(samples))):
                    found[step, samples] = array(layer(ones, training=True)) != 0
        return found

    for num_replicas in (1, 2, 4):
        arrays[f"masks.ours.{num_replicas}"] = masks(Dropout(0.5, layer_index=0), num_replicas)
        arrays[f"masks.stock.{num_replicas}"] = masks(keras.layers.Dropout(0.5, seed=SEED), num_replicas)


def dropout_step(name: str) -> None:
    """Logits of a training step, eager and captured once and replayed at another step with other samples."""
    model = build(MODELS[name])
    weights = values(model.trainable_variables)
    x = tensor(np.random.default_rng(0).random((BATCH, *SHAPE), dtype=np.float32))

    def step_function(step: Any, samples: Any, x: Any, *weights: Any) -> Any:
        with drawing(Key(SEED, step, samples)):
            return model.stateless_call(list(weights), [], x, training=True)[0]

    first = (tensor(np.int32(0)), tensor(np.arange(BATCH, dtype=np.int32)), x, *weights)
    other = (tensor(np.int32(3)), tensor(np.arange(BATCH, 2 * BATCH, dtype=np.int32)), x, *weights)
    replay = captured(step_function, *first)
    for how, function in (("eager", step_function), ("captured", replay)):
        arrays[f"{name}.dropout_step.{how}"] = np.stack([array(function(*first)), array(function(*other))])


def attention() -> None:
    """What attention does to one joint batch, by number of replicas; and the kernels that Keras' own starts with."""
    layer = SelfAttention(2, 0.5, seed=SEED, first_index=0, layer_index=0)
    x = np.random.default_rng(0).standard_normal((BATCH, 4, 6), dtype=np.float32)
    arrays["attention.inference"] = array(layer(tensor(x)))
    for num_replicas in (1, 2, 4):
        parts = []
        for samples in np.split(np.arange(BATCH, dtype=np.int32), num_replicas):
            with drawing(Key(SEED, tensor(np.int32(1)), tensor(samples))):
                parts.append(array(layer(tensor(x[samples]), training=True)))
        arrays[f"attention.{num_replicas}"] = np.concatenate(parts)
    facts["odd_heads"] = error_of(lambda: SelfAttention(4, 0.0, seed=SEED, first_index=0, layer_index=0)(tensor(x)))
    facts["attention_variables"] = [variable.path.split("/", 1)[1] for variable in layer.variables]
    stock = keras.layers.MultiHeadAttention(2, 3, kernel_initializer=GlorotUniform(SEED, 0))
    stock.build((BATCH, 4, 6), (BATCH, 4, 6))
    query, key = (array(dense.kernel.value) for dense in (stock.query_dense, stock.key_dense))
    facts["stock_attention_kernels_are_equal"] = bool(np.array_equal(query, key))


def errors() -> None:
    layer = Dropout(0.5, layer_index=0)
    ones = tensor(np.ones((BATCH, 4), np.float32))

    def short_key() -> Any:
        with drawing(Key(SEED, 0, tensor(np.arange(1)))):
            return layer(ones, training=True)

    def after_key() -> Any:
        with drawing(Key(SEED, 0, tensor(np.arange(BATCH)))):
            layer(ones, training=True)
        return layer(ones, training=True)

    facts["no_key"] = error_of(lambda: layer(ones, training=True))
    facts["after_key"] = error_of(after_key)
    facts["short_key"] = error_of(short_key)
    facts["bad_rate"] = error_of(lambda: Dropout(1.0, layer_index=0))
    facts["unknown_model"] = error_of(lambda: build(SimpleNamespace(name="lstm")))
    facts["unknown_normalization"] = error_of(
        lambda: build(SimpleNamespace(name="cnn", filters=[8], normalization="layer"))
    )
    facts["odd_patch"] = error_of(
        lambda: build(SimpleNamespace(name="transformer", patch=3, width=8, heads=2, depth=1, dropout=0.0))
    )
    facts["identity"] = bool(np.array_equal(array(layer(ones, training=False)), array(ones)))
    facts["dropout_variables"] = len(layer.variables)


def serialization() -> None:
    for name, options in MODELS.items():
        if name != "cnn_sync_batch":
            model = build(options)
            again = type(model).from_config(model.get_config())
            facts[f"{name}.same_from_config"] = all(
                np.array_equal(array(a.value), array(b.value))
                for a, b in zip(model.variables, again.variables, strict=True)
            )


def main() -> None:
    folder = Path(sys.argv[1])
    for name, options in MODELS.items():
        model_arrays(name, options)
    arrays["stock_initial"] = array(keras.initializers.GlorotUniform(seed=SEED)((64, 10)))
    random_bits()
    masks_by_replicas()
    dropout_step("mlp_dropout")
    dropout_step("transformer")
    attention()
    errors()
    facts["imported"] = sorted({"torch", "tensorflow"} & set(sys.modules))
    # Last: Keras' own serialization imports TensorFlow wherever it is installed.
    serialization()
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
