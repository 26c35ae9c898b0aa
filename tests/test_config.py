"""The rules across keys, a config's way through dictionaries, and the keys that messages and --help speak of."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from trainer.audit.guarantees import GUARANTEES, checkable
from trainer.config import (
    ONE_PROCESS,
    OPTIONS,
    Adam,
    Audit,
    Cnn,
    Config,
    ConfigError,
    Digits,
    Linear,
    MixedFloat16,
    Mlp,
    Momentum,
    Precision,
    Sgd,
    State,
    Strategy,
    Synthetic,
    Train,
    UpdateMode,
    Watchdog,
)
from trainer.from_dict import from_dict
from trainer.holders import at_risk, claims, mechanism, refusal, state
from trainer.keys import keys, unknown
from trainer.rules import validate
from trainer.state.mechanisms import HOLDERS
from trainer.updates.mechanisms import MODES

MIRRORED = Strategy("mirrored")


def one_of(group: str) -> str:
    return f"{group} must be one of {', '.join(OPTIONS[group])}"


def first_hosted(strategy: str) -> str:
    """How the list of a strategy's modes begins."""
    return ", ".join([mode.name for mode in MODES.values() if strategy in mode.strategies][:2])


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"num_replicas": 0}, "num_replicas must be between 1 and 64; got 0."),
    ({"num_replicas": 65}, "num_replicas must be between 1 and 64; got 65."),
    ({"train": Train(steps=0)}, "train.steps must be at least 1; got 0."),
    (
        {"train": Train(steps=2**24)},
        "train.steps must be below 16777216, where canaries stop counting; got 16777216.",
    ),
    ({"train": Train(batch_size=0)}, "train.batch_size must be at least 1; got 0."),
    ({"train": Train(log_every=0)}, "train.log_every must be at least 1; got 0."),
    ({"train": Train(evaluate_every=-1)}, "train.evaluate_every must be at least 0; got -1."),
    ({"train": Train(threads_per_replica=-1)}, "train.threads_per_replica must be at least 0; got -1."),
    ({"train": Train(timeout_seconds=float("nan"))}, "train.timeout_seconds must be between 0 and 1e+08; got nan."),
    ({"watchdog": Watchdog(seconds=0)}, "watchdog.seconds must be above 0 and at most 1e+08; got 0."),
    ({"watchdog": Watchdog(float("inf"))}, "watchdog.seconds must be above 0 and at most 1e+08; got inf."),
    ({"train": Train(seed=2**31)}, "train.seed must be between 0 and 2147483647; got 2147483648."),
    ({"audit": Audit(reference_every=0)}, "audit.reference_every must be at least 1; got 0."),
    ({"audit": Audit(reference_mebibytes=0)}, "audit.reference_mebibytes must be at least 1; got 0."),
    ({"audit": Audit("counter")}, f"{one_of('audit')}; got 'counter'. Did you mean 'counters'?"),
    ({"optimizer": Sgd(learning_rate=0)}, "optimizer.learning_rate must be above 0 and finite; got 0."),
    (
        {"optimizer": Sgd(learning_rate=float("inf"))},
        "optimizer.learning_rate must be above 0 and finite; got inf.",
    ),
    ({"optimizer": Momentum(momentum=1)}, "optimizer.momentum must be from 0 up to but without 1; got 1."),
    ({"optimizer": Adam(beta_2=1)}, "optimizer.beta_2 must be from 0 up to but without 1; got 1."),
    ({"optimizer": Adam(epsilon=0)}, "optimizer.epsilon must be above 0; got 0."),
    (
        {"fail_on": "anomalies"},
        "fail_on must be one of violated, anomaly, inconclusive, never; got 'anomalies'. Did you mean 'anomaly'?",
    ),
    (
        {"state": State(gradients="unheard_of")},
        "state.gradients must be one of safe, naive, " + ", ".join(HOLDERS["gradients"]) + "; got 'unheard_of'.",
    ),
    (
        {"strategy": MIRRORED, "state": State(gradients="shared")},
        "state.gradients=shared needs strategy=threads: TensorFlow's tape returns gradients, so there is no .grad to "
        "share. Try per_replica.",
    ),
    (
        {"strategy": MIRRORED, "state": State(first_call="double_checked")},
        "state.first_call=double_checked needs strategy=threads: a lock held across a cross-replica call hangs "
        "MirroredStrategy, which runs replicas one at a time. Try before_start, instance_set, flag.",
    ),
    (
        {"state": State(loss_scale="shared")},
        "state.loss_scale=shared needs precision=mixed_float16: precision=float32 has no loss scale.",
    ),
    (
        {"update_mode": UpdateMode("locked"), "state": State(batch_statistics="reduced")},
        "state.batch_statistics=reduced needs update_mode=all_reduce or unscaled_sum: update_mode=locked never brings "
        "the replicas together.",
    ),
    (
        {"strategy": MIRRORED, "update_mode": UpdateMode("first_replica"), "state": State(batch_statistics="shared")},
        "state.batch_statistics=shared does not go with update_mode=first_replica, which gives every copy the same "
        "value.",
    ),
    (
        {"precision": Precision(enabled_in="both")},
        "precision.enabled_in must be one of main, replica; got 'both'.",
    ),
    (
        {"precision": MixedFloat16(initial_scale=1000.0)},
        "precision.initial_scale must be a power of two from 1 to 2**126; got 1000. Keras and PyTorch start from 32768 "
        "and 65536.",
    ),
    ({"precision": MixedFloat16(growth_steps=0)}, "precision.growth_steps must be at least 1; got 0."),
    ({"train": Train(capture="maybe")}, "train.capture must be one of auto, always, never; got 'maybe'."),
    ({"train": Train(evaluators=2)}, "train.evaluators must be from 0 to num_replicas - 1; got 2."),
    (
        {"train": Train(evaluators=1), "update_mode": UpdateMode("locked")},
        "train.evaluators=1 needs update_mode=all_reduce, which leaves evaluating replicas out of the mean; "
        "update_mode=locked would step the optimizer for them.",
    ),
    (
        {"strategy": MIRRORED, "update_mode": UpdateMode("locked")},
        "update_mode=locked needs strategy=threads: under mirrored every replica writes its own copy, so there is no "
        f"shared one to race on. strategy=mirrored takes {first_hosted('mirrored')}",
    ),
    (
        {"update_mode": UpdateMode("unreduced")},
        "update_mode=unreduced needs strategy=mirrored or multi_worker: under threads all replicas share one copy, so "
        f"none can drift away. strategy=threads takes {first_hosted('threads')}",
    ),
    ({"model": Mlp(hidden=[64, 0])}, "model.hidden must be at least 1; got 0."),
    ({"model": Mlp(dropout=1)}, "model.dropout must be from 0 up to but without 1; got 1."),
    (
        {"model": Cnn(filters=[])},
        "model.filters must name at least one convolution; got []. Try model.filters=[16,32].",
    ),
    (
        {"model": Cnn(normalization="layer")},
        "model.normalization must be one of none, batch, sync_batch, group; got 'layer'.",
    ),
    (
        {"model": Cnn(normalization="sync_batch")},
        "model.normalization=sync_batch needs strategy=mirrored or multi_worker: Keras has no synchronized "
        "BatchNormalization on PyTorch. Try model.normalization=group.",
    ),
    (
        {"model": Cnn(filters=[1, 1, 1, 1])},
        "model=cnn with 4 poolings needs images of at least 16x16 as [height, width, channels]; data=digits gives "
        "[8, 8, 1].",
    ),
    (
        {"model": Cnn(), "data": Synthetic(shape=[64])},
        "model=cnn with 2 poolings needs images of at least 4x4 as [height, width, channels]; data=synthetic gives "
        "[64].",
    ),
    ({"data": Digits(held_out=0)}, "data.held_out must be above 0 and below 1; got 0."),
    ({"data": Synthetic(shape=[])}, "data.shape must list sizes of at least 1; got []."),
    ({"data": Synthetic(classes=1)}, "data.classes must be at least 2; got 1."),
    (
        {"train": Train(batch_size=720)},
        "train.batch_size=720 x num_replicas=2 is a joint batch of 1440 samples, but data=digits has 1438 to train on. "
        "Try train.batch_size=719 or less.",
    ),
    (
        {"num_replicas": 64, "data": Synthetic(samples=50)},
        "train.batch_size=32 x num_replicas=64 is a joint batch of 2048 samples, but data=synthetic has 40 to train "
        "on. Try fewer replicas.",
    ),
    ({"require": ["no_lost_update"]}, "got 'no_lost_update'. Did you mean 'no_lost_updates'?"),
    (
        {"require": ["replicas_identical"]},
        "require=replicas_identical cannot be checked by this run, which checks no_lost_updates, no_torn_reads,",
    ),
    (
        {"require": ["no_lost_updates"], "audit": Audit("none")},
        "require=no_lost_updates cannot be checked by this run, which checks nothing. It needs audit=counters.",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_broken_rule_is_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        validate(Config(**changes))
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_the_defaults_keep_every_rule() -> None:
    validate(Config())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", OPTIONS["strategy"])
def test_a_mode_is_refused_exactly_where_it_cannot_be_hosted(strategy: str, mode: str) -> None:
    config = Config(strategy=OPTIONS["strategy"][strategy], update_mode=UpdateMode(mode))
    if strategy in MODES[mode].strategies:
        validate(config)
    else:
        with pytest.raises(ConfigError, match=f"^update_mode={mode} needs strategy="):
            validate(config)


@pytest.mark.parametrize("name", GUARANTEES)
def test_a_required_guarantee_is_taken_exactly_where_it_can_be_checked(name: str) -> None:
    for strategy in ("threads", "mirrored"):
        config = Config(strategy=Strategy(strategy), require=[name])
        if name in checkable(config):
            validate(config)
        else:
            with pytest.raises(ConfigError, match=f"^require={name} cannot be checked"):
                validate(config)


@pytest.mark.parametrize("strategy", ["threads", "mirrored", "ddp", "multi_worker"])
def test_every_holder_is_taken_by_its_name_or_refused_with_a_reason(strategy: str) -> None:
    for key, mechanisms in HOLDERS.items():
        for name in mechanisms:
            options = {"strategy": OPTIONS["strategy"][strategy], "precision": MixedFloat16()}
            config = Config(state=State(**{key: name}), **options)
            if why := refusal(config, key, name):
                with pytest.raises(ConfigError, match=f"^state.{key}={name} {re.escape(why)}$"):
                    validate(config)
            else:
                validate(config)


@pytest.mark.parametrize("precision", OPTIONS["precision"].values(), ids=lambda option: option.name)
@pytest.mark.parametrize("enabled_in", ["main", "replica"])
def test_safe_and_naive_are_never_refused(precision: Any, enabled_in: str) -> None:
    for mode in (row for row in MODES.values() if row.name != "custom"):
        for strategy in {*mode.strategies} & {*ONE_PROCESS}:
            for preset in ("safe", "naive"):
                config = Config(
                    strategy=Strategy(strategy),
                    update_mode=UpdateMode(mode.name),
                    precision=dataclasses.replace(precision, enabled_in=enabled_in),
                    state=OPTIONS["state"][preset],
                )
                validate(config)
                unsafe = {key: name for key, name in state(config).items() if HOLDERS[key][name].safe != "always"}
                assert bool(unsafe) == (preset == "naive")
                assert not at_risk(config) or preset == "naive"


def test_naive_precision_is_what_goes_wrong_where_the_mode_is_turned_on() -> None:
    """A thread-local mode that each replica turns on itself is in order; one that main turns on is not there."""
    for enabled_in, name in (("main", "thread_local"), ("replica", "process_global")):
        config = Config(precision=Precision(enabled_in=enabled_in), state=State(precision="naive"))
        assert mechanism(config, "precision") == name
        assert "precision_as_asked" in at_risk(config)
    own = Config(precision=Precision(enabled_in="replica"), state=State(precision="thread_local"))
    assert "precision_as_asked" in claims(own)


def test_what_is_written_with_the_weights_is_claimed_only_as_they_are() -> None:
    for mode, claimed in (("locked", True), ("overwrite", False)):
        config = Config(update_mode=UpdateMode(mode), precision=MixedFloat16())
        assert ({"batch_statistics_kept", "loss_scale_kept"} <= claims(config)) == claimed


@pytest.mark.parametrize("model", [Linear(), Mlp(hidden=[8, 4]), Cnn(normalization="group")])
@pytest.mark.parametrize("data", [Digits(held_out=0.5), Synthetic()])
def test_a_config_comes_back_from_a_dictionary_as_it_was(model: Any, data: Any) -> None:
    config = Config(model=model, data=data, optimizer=Adam(), num_replicas=3, require=["no_torn_reads"])
    assert from_dict(dataclasses.asdict(config)) == config


def test_a_dictionary_with_a_strange_key_is_refused() -> None:
    fields = dataclasses.asdict(Config())
    with pytest.raises(ConfigError, match=r"^trian is not a key of the configuration\. Did you mean 'train"):
        from_dict({**fields, "trian": {}})
    with pytest.raises(
        ConfigError, match=r"^train\.step is not a key of the configuration\. Did you mean 'train.steps'"
    ):
        from_dict({**fields, "train": {"step": 1}})
    with pytest.raises(ConfigError, match=f"^{one_of('model')}; got 'cnnn'. Did you mean 'cnn'"):
        from_dict({**fields, "model": {"name": "cnnn"}})
    with pytest.raises(ConfigError, match=r"^train must be a group of keys; got '3'\."):
        from_dict({**fields, "train": 3})


def test_keys_have_their_defaults_texts_and_owners_from_the_schema() -> None:
    known = keys()
    assert known["num_replicas"].text == (
        "Replicas of each process, 1 to 64; with workload=precision under threads up to 1024."
    )
    assert known["num_replicas"].default == str(Config().num_replicas)
    assert known["model.hidden"].owners == ("model=mlp",)
    assert known["optimizer.learning_rate"].owners == ()
    assert known["optimizer.learning_rate"].default == "0.1 (sgd), 0.03 (momentum), 0.003 (adam)"
    # A comment of several lines, and one of the class below that has the same field.
    assert known["audit.reference_mebibytes"].text.endswith("in MiB.")
    assert "held_out" not in known["data.samples"].text


def test_every_field_of_the_schema_is_a_key() -> None:
    known = keys()
    for group, options in OPTIONS.items():
        for option in options.values():
            names = {field.name for field in dataclasses.fields(option)} - {"name"}
            assert {f"{group}.{name}" for name in names} <= set(known)
    assert {f"train.{field.name}" for field in dataclasses.fields(Train)} <= set(known)


def test_a_key_of_another_option_is_told_with_that_option() -> None:
    assert unknown("model.filters") == "model.filters is a key of model=cnn only. Add model=cnn, or leave the key out."


def test_a_key_like_no_other_is_told_without_a_guess() -> None:
    assert unknown("xyzzy") == "xyzzy is not a key of the configuration. --help lists the keys."
