"""The dataset and the network that a config asks for: ours, or what a user brings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

import data.arrays
import models
from trainer.bring import bring
from trainer.config import Config, ConfigError, Custom
from trainer.holders import asked_dtypes, mechanism
from trainer.state.precision import PRECISION_HOLDERS
from trainer.workloads.networks import KerasNetwork, Network
from trainer.workloads.policy import AskingPolicy


def dataset(config: Config) -> data.Dataset:
    """The data that the config asks for; a user's own are held to the rules that those in a file are."""
    if not isinstance(config.data, Custom):
        return data.load(config.data, config.train.seed)
    found = bring("data", config.data)(seed=config.train.seed, **config.data.arguments)
    if isinstance(found, data.Dataset):
        return found
    where = f"data._target_={config.data._target_}"
    if not isinstance(found, Mapping):
        raise data.DataError(f"{where} must return arrays by name, {data.arrays.WANTED}; got {type(found).__name__}.")
    arrays = {str(name): np.asarray(array) for name, array in found.items()}
    roles = data.arrays.roles(arrays, where)
    return data.arrays.dataset(arrays, roles, where=where, classes=0, held_out=0.2, seed=config.train.seed)


def network(config: Config, samples: data.Dataset) -> Network:
    """The model that the config asks for: ours, or a user's, which under `threads` may be a `torch.nn.Module`.

    Where the compute dtype is passed with each call there is a Keras model for each dtype; else one that asks.
    """
    arguments: dict[str, Any] = {
        "input_shape": samples.train_x.shape[1:],
        "num_classes": samples.num_classes,
        "seed": config.train.seed,
    }
    holder = PRECISION_HOLDERS[mechanism(config, "precision")]()
    policies: dict[str | None, Any] = {None: AskingPolicy(holder.current)}
    if mechanism(config, "precision") == "explicit":
        policies = {dtype: _policy(dtype) for dtype in _passed_dtypes(config)}
    if not isinstance(config.model, Custom):
        built = {
            dtype: models.build(config.model, **arguments, dtype_policy=policy) for dtype, policy in policies.items()
        }
        return KerasNetwork(built, holder)
    target = f"model._target_={config.model._target_}"
    brought = {
        dtype: bring("model", config.model)(**arguments, dtype_policy=policy, **config.model.arguments)
        for dtype, policy in policies.items()
    }
    model = next(iter(brought.values()))
    try:
        if isinstance(model, keras.Model):
            for each in brought.values():
                each(ops.zeros((1, *arguments["input_shape"])))  # a model that was not built has no variables before
            return KerasNetwork(brought, holder)
        if config.strategy.name in ("threads", "ddp"):
            from trainer.workloads.torch_module import TorchNetwork

            return TorchNetwork(model, holder)
    except TypeError as error:
        raise ConfigError(f"{target}: {error}") from error
    raise ConfigError(
        f"{target} must return a keras.Model under strategy={config.strategy.name}; got {type(model).__name__}."
    )


def _passed_dtypes(config: Config) -> Iterable[str]:
    """Every compute dtype that a call may be passed."""
    # A first call computes in float32, and so does the audit where it asks how much of a difference is rounding.
    more = ["float32"] if config.audit.name != "none" or mechanism(config, "first_call") != "before_start" else []
    return dict.fromkeys([*asked_dtypes(config), *more])


def _policy(dtype: str) -> keras.DTypePolicy:
    return keras.DTypePolicy(dtype if dtype == "float32" else f"mixed_{dtype}")
