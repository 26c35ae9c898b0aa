"""Set every setting of one backend's process in one thread and read it in others, for `test_settings.py` to judge.

    KERAS_BACKEND=torch python tests/set_all.py OUTPUT.json

writes, for each setting of the frameworks that are loaded, the scope that it was seen to have and the names of the
differences that came with it, and what replicas of the backend's strategy found.
"""

from __future__ import annotations

import contextvars
import functools
import json
import queue
import sys
import threading
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.utils import rng_utils

from trainer.state.settings import ASKED_BY, SETTINGS, Setting, differences, snapshot

NUM_REPLICAS, TIMEOUT_SECONDS = 2, 30
# Whether a change in the main thread is seen by a thread already at work, by a fresh one, and by a fresh one in a copy
# of the main thread's context; and whether the main thread sees a change in another.
SCOPES = {
    (True, True, True, True): "process",
    (False, False, False, False): "thread",
    (False, False, True, False): "context",
    (False, True, True, False): "caller",
}
Change = Callable[[], AbstractContextManager[Any]]


class Worker:
    """A thread that runs what it is given, one call after the other."""

    def __init__(self, warm_up: Callable[[], Any] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self(warm_up)

    def __call__(self, call: Callable[[], Any]) -> Any:
        self._calls.put(call)
        result = self._results.get(timeout=TIMEOUT_SECONDS)
        if isinstance(result, BaseException):
            raise result
        return result

    def end(self) -> None:
        self._calls.put(None)
        self._thread.join(TIMEOUT_SECONDS)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put(call())
            except BaseException as error:
                self._results.put(error)


def fresh(call: Callable[[], Any]) -> Any:
    """The result of a call in a thread started for it."""
    worker = Worker()
    result = worker(call)
    worker.end()
    return result


@contextmanager
def put(setter: Callable[..., Any], value: Any, back: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(back)


def attribute(holder: Any, name: str, value: Any) -> AbstractContextManager[None]:
    return put(functools.partial(setattr, holder, name), value, getattr(holder, name))


def names(asked: dict[str, str], found: dict[str, str]) -> list[str]:
    return [difference.name for difference in differences(asked, found)]


def measure(setting: Setting, change: Change, warm_up: Callable[[], Any]) -> dict[str, Any]:
    """Set one setting in the main thread and look in others, then the other way round."""

    def read() -> str:
        return str(setting.read(sys.modules[setting.framework]))

    running = Worker(warm_up)
    usual, asked = read(), snapshot()
    assert running(read) == fresh(read) == usual, setting.name
    with change():
        assert read() != usual, f"{setting.name} is not changed: {usual}"
        copied = contextvars.copy_context()
        seen = [look(read) != usual for look in (running, fresh, lambda call: fresh(lambda: copied.run(call)))]
        not_inherited = names(snapshot(), running(snapshot))
    assert read() == usual, f"{setting.name} is not restored: {read()}, before {usual}"
    changed = change()
    running(changed.__enter__)
    assert running(read) != usual, setting.name
    seen.append(read() != usual)
    shared = names(asked, snapshot())
    running(lambda: changed.__exit__(None, None, None))
    assert running(read) == read() == usual, setting.name
    running.end()
    return {"scope": SCOPES.get(tuple(seen), str(seen)), "not_inherited": not_inherited, "shared": shared}


# Changes of settings, by name.


@contextmanager
def keras_seed() -> Iterator[None]:
    # With PyTorch as the backend it would import TensorFlow, to seed that as well.
    tensorflow = mock.patch.object(rng_utils, "tf", SimpleNamespace(available=False))
    with tensorflow, seed_as_before():
        keras.utils.set_random_seed(7)
        yield
        global_state.set_global_attribute("global_random_seed", None)


@contextmanager
def seed_as_before() -> Iterator[None]:
    torch = sys.modules.get("torch")
    before = torch.initial_seed() if torch else None
    yield
    if torch:
        torch.manual_seed(before)


@contextmanager
def no_flash_attention() -> Iterator[None]:
    keras.config.disable_flash_attention()
    yield
    keras.config.enable_flash_attention()


COMMON: dict[str, Change] = {
    "switch interval": lambda: put(sys.setswitchinterval, 0.001, 0.005),
    "NumPy errstate": lambda: np.errstate(all="raise"),
    "NumPy buffer size": lambda: put(np.setbufsize, 16384, 8192),
    "Keras dtype policy": lambda: put(keras.config.set_dtype_policy, "mixed_bfloat16", "float32"),
    "Keras seed": keras_seed,
    "Keras autocast scope": lambda: keras.src.backend.common.variables.AutocastScope("bfloat16"),
    "Keras stateless scope": lambda: keras.StatelessScope(),
    "Keras remat scope": lambda: keras.RematScope("full"),
    "Keras distribution": lambda: put(keras.distribution.set_distribution, SimpleNamespace(), None),
    "Keras flash attention": no_flash_attention,
    "Keras floatx": lambda: put(keras.config.set_floatx, "float64", "float32"),
    "Keras epsilon": lambda: put(keras.config.set_epsilon, 1e-3, 1e-7),
    "Keras image data format": lambda: put(keras.config.set_image_data_format, "channels_first", "channels_last"),
}


def of_torch() -> dict[str, Change]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode

    def autocast(device: str, value: bool) -> AbstractContextManager[None]:
        return put(functools.partial(torch.set_autocast_enabled, device), value, not value)

    def autocast_dtype(device: str, value: torch.dtype, back: torch.dtype) -> AbstractContextManager[None]:
        return put(functools.partial(torch.set_autocast_dtype, device), value, back)

    torch.set_float32_matmul_precision("highest")
    return {
        "denormal numbers": lambda: put(torch.set_flush_denormal, True, False),
        "torch grad mode": torch.no_grad,
        "torch inference mode": torch.inference_mode,
        "torch autocast": lambda: autocast("cpu", True),
        "torch autocast dtype": lambda: autocast_dtype("cpu", torch.float16, torch.bfloat16),
        "torch CUDA autocast": lambda: autocast("cuda", True),
        "torch CUDA autocast dtype": lambda: autocast_dtype("cuda", torch.bfloat16, torch.float16),
        "torch autocast cache": lambda: put(torch.set_autocast_cache_enabled, False, True),
        "torch default device": lambda: put(torch.set_default_device, "meta", None),
        "torch function modes": torch.overrides.BaseTorchFunctionMode,
        "torch dispatch modes": TorchDispatchMode,
        "torch saved tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        "torch jit optimization": lambda: torch.jit.optimized_execution(False),
        "torch intra-op threads": lambda: put(torch.set_num_threads, 3, torch.get_num_threads()),
        "torch default dtype": lambda: put(torch.set_default_dtype, torch.float64, torch.float32),
        "torch float32 precision": lambda: put(torch.set_float32_matmul_precision, "medium", "highest"),
        "torch deterministic algorithms": lambda: put(torch.set_deterministic_debug_mode, "warn", "default"),
        "torch anomaly mode": lambda: put(torch.autograd.set_detect_anomaly, True, False),
        "torch oneDNN": lambda: attribute(torch.backends.mkldnn, "enabled", False),
        "torch cuDNN": lambda: attribute(torch.backends.cudnn, "benchmark", True),
        "torch attention kernels": lambda: sdpa_kernel(SDPBackend.MATH),
        "torch jit fusers": lambda: torch.jit.fuser("fuser0"),
        "torch seed": lambda: put(torch.manual_seed, 7, torch.initial_seed()),
        "Keras device": lambda: keras.device("meta"),
    }


def of_tensorflow() -> dict[str, Change]:
    import tensorflow as tf
    from tensorflow.python.framework import config, ops

    @contextmanager
    def optimized(setter: Callable[[Any], None], value: Any, back: Any) -> Iterator[None]:
        with put(setter, value, back):
            yield
        # Ask again, as a thread does that goes on training.
        tf.function(lambda: tf.constant(0))()

    @contextmanager
    def checked_numerics() -> Iterator[None]:
        tf.debugging.enable_check_numerics()
        yield
        tf.debugging.disable_check_numerics()

    @contextmanager
    def deterministic() -> Iterator[None]:
        config.enable_op_determinism()
        yield
        config.disable_op_determinism()

    rewrites = tf.config.optimizer.set_experimental_options
    tf32 = tf.config.experimental.enable_tensor_float_32_execution
    return {
        "TensorFlow eager execution": lambda: tf.Graph().as_default(),
        "TensorFlow device": lambda: tf.device("cpu:1"),
        "TensorFlow device policy": lambda: put(tf.config.experimental.set_device_policy, "explicit", "silent"),
        "TensorFlow strategy": lambda: tf.distribute.OneDeviceStrategy("cpu:0").scope(),
        "TensorFlow gradient tape": tf.GradientTape,
        "TensorFlow op callbacks": checked_numerics,
        "TensorFlow jit": lambda: optimized(tf.config.optimizer.set_jit, True, False),
        "TensorFlow graph rewrites": lambda: optimized(rewrites, {"remapping": False}, {"remapping": True}),
        "TensorFlow functions run eagerly": lambda: put(tf.config.run_functions_eagerly, True, False),
        "TensorFlow op determinism": deterministic,
        "TensorFlow TensorFloat-32": lambda: put(tf32, False, True),
        "TensorFlow soft placement": lambda: put(tf.config.set_soft_device_placement, False, True),
        "TensorFlow dtype promotion": lambda: put(ops.set_dtype_conversion_mode, "all", "off"),
        "TensorFlow seed": lambda: put(tf.random.set_seed, 7, None),
    }


def measure_all(changes: dict[str, Change], warm_up: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    found = {}
    for setting in SETTINGS:
        if setting.name in changes:
            print(setting.name, flush=True)  # whose experiment failed, if one does
            found[setting.name] = measure(setting, changes[setting.name], warm_up)
    return found


def threads() -> dict[str, Any]:
    """What is measured with PyTorch, and what replicas of `strategy=threads` find."""
    import torch

    torch.set_num_threads(1)
    before = snapshot()
    asked = before | ASKED_BY["threads"]

    def replica() -> dict[str, str]:
        torch.set_grad_enabled(False)
        return snapshot()

    found = {
        "changed_by_reading": names(before, snapshot()),
        "replicas": {"thread": [names(asked, fresh(replica)) for _ in range(NUM_REPLICAS)]},
        "replica_that_forgot": names(asked, fresh(snapshot)),
    }
    return {"settings": measure_all(COMMON | of_torch()), **found}


def mirrored() -> dict[str, Any]:
    """What is measured with TensorFlow, and what replicas of `strategy=mirrored` find."""
    import tensorflow as tf
    from tensorflow.python.eager import context

    def set_intra(number: int) -> None:
        tf.config.threading.set_intra_op_parallelism_threads(number)

    before = snapshot()
    found: dict[str, Any] = {"changed_by_reading": names(before, snapshot())}
    if context.context()._context_handle is not None or context.context()._physical_devices is not None:
        found["changed_by_reading"].append("TensorFlow is initialized")
    # Before TensorFlow is: it can only be set until then.
    set_intra(2)
    settings = measure_all({"TensorFlow intra-op threads": lambda: put(set_intra, 1, 2)})
    set_intra(1)
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * NUM_REPLICAS)
    found |= mirrored_replicas(snapshot())
    # So that there is something to go back to.
    tf.config.set_soft_device_placement(True)
    tf.config.optimizer.set_experimental_options({"remapping": True})
    call = tf.function(lambda: tf.constant(0))
    call()
    return {"settings": settings | measure_all(COMMON | of_tensorflow(), call), **found}


def mirrored_replicas(asked: dict[str, str]) -> dict[str, Any]:
    """Names of what replicas find other than asked, first of each replica at its first step, then at its last."""
    import tensorflow as tf

    devices = [f"/cpu:{replica_id}" for replica_id in range(NUM_REPLICAS)]
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())
    seen: list[dict[str, str]] = []

    def replica(first: Callable[[int], Any] = lambda replica_id: None) -> Any:
        replica_context = tf.distribute.get_replica_context()
        seen.append(snapshot())
        first(replica_context.replica_id_in_sync_group)
        total = replica_context.all_reduce(tf.distribute.ReduceOp.SUM, tf.constant(1.0))
        seen.append(snapshot())
        return total

    def loop(num_steps: Any) -> Any:
        def body(done: Any) -> Any:
            strategy.run(replica)
            return done + 1

        return tf.while_loop(lambda done: done < num_steps, body, (tf.constant(0),), parallel_iterations=1)

    def differing(
        run: Callable[..., Any], *args: Any, asked: dict[str, str] = asked, by: Mapping[str, str] = ASKED_BY["mirrored"]
    ) -> list[list[str]]:
        seen.clear()
        run(*args)
        assert len(seen) == 2 * NUM_REPLICAS
        return [names(asked | by, each) for each in seen]

    def traced() -> Any:
        return tf.function(lambda: strategy.run(replica), autograph=False)

    found: dict[str, Any] = {
        "replicas": {
            "eager": differing(strategy.run, replica),
            "tf.function": differing(traced()),
            "tf.while_loop": differing(tf.function(loop, autograph=False), tf.constant(2)),
        },
        "by_strategy": {
            "eager": differing(strategy.run, replica, by={}),
            "tf.function": differing(traced(), by={}),
        },
    }
    with put(keras.config.set_dtype_policy, "mixed_bfloat16", "float32"):
        found["not_inherited"] = differing(strategy.run, replica, asked=snapshot())
    with tf.GradientTape():
        found["under_a_tape"] = differing(strategy.run, replica, asked=snapshot())

    tf.debugging.enable_check_numerics()
    found["handed_on"] = differing(strategy.run, replica, asked=snapshot())
    tf.debugging.disable_check_numerics()
    policy = tf.config.experimental.set_device_policy
    with put(policy, "warn", "silent"):
        asked_then = snapshot() | ASKED_BY["mirrored"]
        seen.clear()
        strategy.run(lambda: seen.append(snapshot()))
        found["handed_on_in_part"] = [names(asked_then, each) for each in seen]
        found["handed_on_with_a_merge"] = differing(strategy.run, replica, asked=snapshot())
    # Once replicas have had a policy, setting the old one again does nothing: it is thought to be in force.
    policy("explicit")
    policy("silent")

    def seeds(replica_id: int) -> None:
        if replica_id == 0:
            tf.random.set_seed(7)

    found["shared"] = differing(strategy.run, functools.partial(replica, seeds))
    tf.random.set_seed(None)
    return found


def main(output: str) -> None:
    untouched = fresh(lambda: (snapshot(), global_state.get_global_attribute("dtype_policy"))[1])
    found = threads() if keras.backend.backend() == "torch" else mirrored()
    if untouched is not None:
        found["changed_by_reading"].append("Keras' dtype policy")
    found["microseconds"] = min(timeit.repeat(snapshot, number=100, repeat=5)) / 100 * 1e6
    found["loaded"] = sorted({"torch", "tensorflow"} & set(sys.modules))
    Path(output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
