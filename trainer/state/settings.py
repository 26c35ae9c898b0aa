"""Settings of the frameworks that a thread silently does not inherit, or silently shares.

What a replica computes depends on more than its arguments: on a dtype policy, a default device, a seed, set somewhere
in the process. Whether a setting made in one thread holds in another differs from item to item, and no framework says
so when it does not. `SETTINGS` is the list, with the scope of each as measured; `tests/test_settings.py` measures it
again by setting every item in one thread and reading it in others.

A run takes one snapshot in its main thread, when all is built and before there are replicas: what was asked. Every
replica takes one at its first step and one at its last, *in its own thread*, where alone it shows what the replica
computes with; the first tells what was not inherited, the last also what others changed meanwhile. What a strategy
changes on purpose is put into what was asked (`ASKED_BY`). Any other difference is one that nobody asked for.

A captured graph keeps what was in force when it was captured. In a `tf.function` the replica's Python runs while it is
traced and never again, so a snapshot in there tells how the graph was traced, whichever step then replays it; one of
the last step needs an eager `strategy.run`, whose replica threads start afresh.

Settings, not state: a generator changes with every number it gives, so only seeds are here. Not even that of `random`
and `numpy.random`, which do not keep theirs; both are process-wide, and threads draw from them in whatever order they
come. Left out because no result depends on them: print options, traceback filters, warning filters, name scopes; and
inter-op threads, which are fixed once a framework has computed.

Thread-safety: everything is read in the calling thread, and nothing that computes can tell that it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Scope = Literal["thread", "context", "process", "caller"]

SCOPES: Mapping[Scope, str] = {
    "thread": "each thread has its own, and a new thread starts with the default",
    "context": "each contextvars.Context has its own, and a new thread starts with an empty one",
    "process": "all threads share one",
    "caller": "set for the caller and threads that it starts later; threads already at work keep theirs",
}
ANY = "any"  # asked of a setting that may have any value


@dataclass(frozen=True)
class Setting:
    """One item of the list.

    Attributes:
        framework: the module, as in `sys.modules`, that has to be loaded already for the setting to exist.
        read: the value in the calling thread, given that module. Nothing but `str` is called on what it returns.
    """

    name: str
    framework: str
    scope: Scope
    read: Callable[[Any], object]


@dataclass(frozen=True)
class Difference:
    """A setting that was not as asked."""

    name: str
    scope: Scope
    asked: str
    found: str


def snapshot() -> dict[str, str]:
    """Every setting of the frameworks that are loaded, by name, as the calling thread has it.

    Imports nothing and sets nothing. A framework that another thread is importing at the moment is not loaded yet.
    """
    loaded = {name: module for name in _FRAMEWORKS if (module := _loaded(name)) is not None}
    return {
        setting.name: str(setting.read(loaded[setting.framework]))
        for setting in SETTINGS
        if setting.framework in loaded
    }


def differences(asked: Mapping[str, str], found: Mapping[str, str]) -> list[Difference]:
    """Settings that a replica found other than asked, in the list's order.

    Args:
        asked: the run's snapshot, over it what the strategy changes on purpose, as in
            `snapshot() | ASKED_BY["mirrored"]`. Of a framework that was loaded later nothing was asked.
        found: a replica's snapshot.

    Raises:
        ValueError: something was asked that is no setting or that the replica did not read.
    """
    if unread := sorted(set(asked) - set(found)):
        raise ValueError(f"settings asked for but not read: {', '.join(unread)}.")
    return [
        Difference(setting.name, setting.scope, asked[setting.name], found[setting.name])
        for setting in SETTINGS
        if asked.get(setting.name, ANY) not in (ANY, found.get(setting.name))
    ]


def _loaded(name: str) -> Any:
    module = sys.modules.get(name)
    importing = getattr(getattr(module, "__spec__", None), "_initializing", False)
    return None if importing else module


# The processor.

_SMALLEST = 5e-324


def _denormals(_: Any) -> str:
    # Flushing them to zero is a mode of the floating-point unit without a getter, but this product shows it. Off a
    # variable: a product of constants is computed once, when this file is compiled.
    return "flushed" if _SMALLEST * 1.0 == 0.0 else "kept"


# PyTorch.


def _names(modes: list[Any]) -> str:
    return ", ".join(type(mode).__name__ for mode in modes) or "none"


def _default_device(torch: Any) -> str:
    # `torch.get_default_device()` may make a tensor to find out.
    modes = torch.overrides._get_current_function_mode_stack()
    devices = [mode.device for mode in modes if isinstance(mode, torch.utils._device.DeviceContext)]
    return str(devices[-1]) if devices else "cpu"


def _float32_precision(torch: Any) -> str:
    # `torch.get_float32_matmul_precision()` raises once the settings by engine, which are read here, have been used.
    read = torch._C._get_fp32_precision_getter
    kinds = [
        ("generic", "all"),
        *((engine, kind) for engine in ("mkldnn", "cuda") for kind in ("matmul", "conv", "rnn")),
    ]
    found = [f"{engine}.{kind}={value}" for engine, kind in kinds if (value := read(engine, kind)) != "none"]
    return ", ".join(found) or "default"


def _flags(**flags: bool) -> str:
    return ", ".join(name for name, is_set in flags.items() if is_set) or "none"


def _onednn(torch: Any) -> str:
    return _flags(enabled=torch.backends.mkldnn.enabled, deterministic=torch.backends.mkldnn.deterministic)


def _cudnn(torch: Any) -> str:
    cudnn = torch.backends.cudnn
    return _flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic)


def _attention_kernels(torch: Any) -> str:
    cuda = torch.backends.cuda
    return _flags(
        flash=cuda.flash_sdp_enabled(),
        memory_efficient=cuda.mem_efficient_sdp_enabled(),
        math=cuda.math_sdp_enabled(),
        cudnn=cuda.cudnn_sdp_enabled(),
    )


def _fusers(torch: Any) -> str:
    native = torch._C
    return _flags(
        cpu=native._jit_can_fuse_on_cpu(), nnc=native._jit_texpr_fuser_enabled(), onednn=native._jit_llga_enabled()
    )


def _anomaly_mode(torch: Any) -> str:
    return _flags(anomaly=torch.is_anomaly_enabled(), check_nan=torch.is_anomaly_check_nan_enabled())


def _saved_tensor_hooks(torch: Any) -> str:
    return "none" if torch._C._autograd._top_saved_tensors_default_hooks(True) is None else "set"


# Keras.


def _attribute(name: str) -> Any:
    """One of the attributes that Keras calls global: they are thread-local."""
    # Looked up each time: `keras.utils.clear_session` puts another store in place.
    return sys.modules["keras.src.backend.common.global_state"].get_global_attribute(name)


def _dtype_policy(keras: Any) -> str:
    # `keras.config.dtype_policy()` would set it where it is not set yet.
    policy = _attribute("dtype_policy")
    return str(keras.config.floatx() if policy is None else policy.name)


def _kind(value: Any) -> str:
    return "none" if value is None else type(value).__name__


def _remat(_: Any) -> str:
    scopes = _attribute("remat_scope_stack")
    return str(scopes[-1].mode) if scopes else "none"


def _autocast_scope(_: Any) -> str:
    scope = _attribute("autocast_scope")
    return "none" if scope is None else str(scope.dtype)


# TensorFlow.


def _eager_context() -> Any:
    return sys.modules["tensorflow.python.eager.context"].context()


def _device(tf: Any) -> str:
    if tf.executing_eagerly():
        return _eager_context().device_name or "none"
    scopes = tf.compat.v1.get_default_graph()._device_function_stack.peek_objs()
    return " in ".join(scope.display_name for scope in scopes) or "none"


def _strategy(tf: Any) -> str:
    # `tf.distribute.get_strategy()` would make a default one where there is none.
    scopes = tf.compat.v1.get_default_graph()._distribution_strategy_stack
    if not scopes:
        return "none"
    return f"{type(scopes[-1].strategy).__name__}, {'replica' if scopes[-1].replica_context else 'cross-replica'}"


def _tapes(_: Any) -> str:
    native = sys.modules["tensorflow.python.pywrap_tfe"]
    if native.TFE_Py_TapeSetIsStopped():
        return "stopped"
    return "none" if native.TFE_Py_TapeSetIsEmpty() else "recording"


def _seed(tf: Any) -> object:
    return _eager_context()._seed if tf.executing_eagerly() else tf.compat.v1.get_default_graph().seed


def _graph_options() -> dict[str, bool | int]:
    """What a `tf.function` called now is optimized with.

    A thread keeps what was set when it first called one, whoever changes it then; only a change that it makes itself
    has it look again. TensorFlow's own getters tell what was set, not what the thread keeps.
    """
    context = _eager_context()
    called_with = context._thread_local_data.function_call_options
    if called_with is None:
        return {"jit": bool(context._optimizer_jit), **context._optimizer_experimental_options}
    config = sys.modules["tensorflow.core.protobuf.config_pb2"].ConfigProto
    options = config.FromString(called_with.config_proto_serialized).graph_options
    rewrites = {
        field.name: value if field.name == "min_graph_nodes" else value == 1
        for field, value in options.rewrite_options.ListFields()
    }
    return {"jit": options.optimizer_options.global_jit_level > 0, **rewrites}


def _rewrites(_: Any) -> str:
    # A call's options do not tell the two that disable something from unset where they are false.
    options = [
        f"{name}={value}"
        for name, value in sorted(_graph_options().items())
        if name != "jit" and (value or not name.startswith("disable_"))
    ]
    return ", ".join(options) or "default"


SETTINGS: tuple[Setting, ...] = (
    # A thread starts with the mode of the thread that starts it.
    Setting("denormal numbers", "sys", "caller", _denormals),
    Setting("switch interval", "sys", "process", lambda sys: sys.getswitchinterval()),
    Setting("NumPy errstate", "numpy", "context", lambda np: " ".join(np.geterr().values())),
    Setting("NumPy buffer size", "numpy", "context", lambda np: np.getbufsize()),
    Setting("torch grad mode", "torch", "thread", lambda torch: torch.is_grad_enabled()),
    Setting("torch inference mode", "torch", "thread", lambda torch: torch.is_inference_mode_enabled()),
    Setting("torch autocast", "torch", "thread", lambda torch: torch.is_autocast_enabled("cpu")),
    Setting("torch autocast dtype", "torch", "thread", lambda torch: torch.get_autocast_dtype("cpu")),
    Setting("torch CUDA autocast", "torch", "thread", lambda torch: torch.is_autocast_enabled("cuda")),
    Setting("torch CUDA autocast dtype", "torch", "thread", lambda torch: torch.get_autocast_dtype("cuda")),
    Setting("torch autocast cache", "torch", "thread", lambda torch: torch.is_autocast_cache_enabled()),
    Setting("torch default device", "torch", "thread", _default_device),
    Setting(
        "torch function modes",
        "torch",
        "thread",
        lambda torch: _names(torch.overrides._get_current_function_mode_stack()),
    ),
    Setting(
        "torch dispatch modes",
        "torch",
        "thread",
        lambda torch: _names(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    ),
    Setting("torch saved tensor hooks", "torch", "thread", _saved_tensor_hooks),
    Setting("torch jit optimization", "torch", "thread", lambda torch: torch._C._get_graph_executor_optimize()),
    # Set also for every thread that has not used PyTorch yet, whoever starts it.
    Setting("torch intra-op threads", "torch", "caller", lambda torch: torch.get_num_threads()),
    Setting("torch default dtype", "torch", "process", lambda torch: torch.get_default_dtype()),
    Setting("torch float32 precision", "torch", "process", _float32_precision),
    Setting(
        "torch deterministic algorithms",
        "torch",
        "process",
        lambda torch: ("default", "warn", "error")[torch.get_deterministic_debug_mode()],
    ),
    Setting("torch anomaly mode", "torch", "process", _anomaly_mode),
    Setting("torch oneDNN", "torch", "process", _onednn),
    Setting("torch cuDNN", "torch", "process", _cudnn),
    Setting("torch attention kernels", "torch", "process", _attention_kernels),
    Setting("torch jit fusers", "torch", "process", _fusers),
    Setting("torch seed", "torch", "process", lambda torch: torch.initial_seed()),
    Setting("Keras dtype policy", "keras", "thread", _dtype_policy),
    Setting("Keras seed", "keras", "thread", lambda _: _attribute("global_random_seed")),
    Setting("Keras autocast scope", "keras", "thread", _autocast_scope),
    Setting("Keras stateless scope", "keras", "thread", lambda _: _kind(_attribute("stateless_scope"))),
    Setting("Keras remat scope", "keras", "thread", _remat),
    Setting("Keras distribution", "keras", "thread", lambda _: _kind(_attribute("distribution"))),
    Setting("Keras flash attention", "keras", "thread", lambda keras: keras.config.is_flash_attention_enabled()),
    Setting("Keras device", "keras.src.backend.torch", "thread", lambda backend: backend.core.get_device()),
    Setting("Keras floatx", "keras", "process", lambda keras: keras.config.floatx()),
    Setting("Keras epsilon", "keras", "process", lambda keras: keras.config.epsilon()),
    Setting("Keras image data format", "keras", "process", lambda keras: keras.config.image_data_format()),
    Setting("TensorFlow eager execution", "tensorflow", "thread", lambda tf: tf.executing_eagerly()),
    Setting("TensorFlow device", "tensorflow", "thread", _device),
    Setting(
        "TensorFlow device policy",
        "tensorflow",
        "thread",
        lambda tf: tf.config.experimental.get_device_policy(),
    ),
    Setting("TensorFlow strategy", "tensorflow", "thread", _strategy),
    Setting("TensorFlow gradient tape", "tensorflow", "thread", _tapes),
    Setting("TensorFlow op callbacks", "tensorflow", "thread", lambda _: len(_eager_context().op_callbacks)),
    Setting("TensorFlow jit", "tensorflow", "caller", lambda _: _graph_options()["jit"]),
    Setting("TensorFlow graph rewrites", "tensorflow", "caller", _rewrites),
    Setting("TensorFlow functions run eagerly", "tensorflow", "process", lambda tf: tf.config.functions_run_eagerly()),
    Setting(
        "TensorFlow op determinism",
        "tensorflow",
        "process",
        lambda _: sys.modules["tensorflow.python.framework.config"].is_op_determinism_enabled(),
    ),
    Setting(
        "TensorFlow TensorFloat-32",
        "tensorflow",
        "process",
        lambda tf: tf.config.experimental.tensor_float_32_execution_enabled(),
    ),
    Setting("TensorFlow soft placement", "tensorflow", "process", lambda _: _eager_context()._soft_device_placement),
    Setting(
        "TensorFlow dtype promotion",
        "tensorflow",
        "process",
        lambda _: sys.modules["tensorflow.python.framework.ops"].get_dtype_conversion_mode().name,
    ),
    Setting(
        "TensorFlow intra-op threads",
        "tensorflow",
        "process",
        lambda _: _eager_context()._intra_op_parallelism_threads,
    ),
    Setting("TensorFlow seed", "tensorflow", "process", _seed),
)

_FRAMEWORKS = tuple(dict.fromkeys(setting.framework for setting in SETTINGS))

# What a strategy itself changes in its replicas' threads. The threads of a loop of one's own are as they are started.
ASKED_BY: Mapping[str, Mapping[str, str]] = {
    "threads": {
        # Each replica turns it off; gradients are computed in a scope of their own.
        "torch grad mode": "False",
    },
    "ddp": {
        "torch grad mode": "False",
    },
    # Of what is thread-local, MirroredStrategy hands on op callbacks, and the device policy to some replicas only:
    # TensorFlow notes what was set last in any thread, and skips setting the same in another.
    "mirrored": {
        # True in an eager `strategy.run`, False in a `tf.function`.
        "TensorFlow eager execution": ANY,
        # Each replica's own.
        "TensorFlow device": ANY,
        # What makes `tf.distribute.get_replica_context()` the replica's.
        "TensorFlow strategy": "MirroredStrategy, replica",
    },
    "multi_worker": {
        "TensorFlow eager execution": ANY,
        "TensorFlow device": ANY,
        "TensorFlow strategy": "MultiWorkerMirroredStrategy, replica",
    },
}
