"""Every setting is set in one thread and read in others, a process for each backend: its scope is as the list says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trainer.state.settings import ANY, ASKED_BY, SETTINGS, Difference, Setting, differences, snapshot

BACKENDS = ("torch", "tensorflow")
MICROSECONDS = 1000  # what a snapshot may take; it takes about 30
Measured = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What `set_all.py` measures on each backend, both at once."""
    folder = tmp_path_factory.mktemp("settings")
    processes = {
        backend: subprocess.Popen(
            [sys.executable, "-W", "error", Path(__file__).with_name("set_all.py"), folder / f"{backend}.json"],
            env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for backend in BACKENDS
    }
    try:
        for backend, process in processes.items():
            output, _ = process.communicate(timeout=55)
            assert process.returncode == 0, f"{backend}:\n{output}"
    finally:
        for process in processes.values():
            process.kill()
    return {backend: json.loads((folder / f"{backend}.json").read_text()) for backend in BACKENDS}


def of(measured: Measured, setting: Setting) -> list[dict[str, Any]]:
    found = [measured[backend]["settings"].get(setting.name) for backend in BACKENDS]
    return [each for each in found if each is not None]


def test_settings_have_names_of_their_own() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_has_the_scope_that_the_list_says(measured: Measured, setting: Setting) -> None:
    found = of(measured, setting)
    assert found, f"{setting.name} has no experiment in set_all.py"
    assert {each["scope"] for each in found} == {setting.scope}


@pytest.mark.parametrize("framework", ["numpy", "keras"])
def test_what_both_backends_share_is_measured_on_both(measured: Measured, framework: str) -> None:
    for setting in SETTINGS:
        if setting.framework == framework:
            assert len(of(measured, setting)) == len(BACKENDS), setting.name


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_difference_names_the_setting(measured: Measured, setting: Setting) -> None:
    """What is shared, once another thread has set it; anything else, where it was not inherited."""
    which, other = ("shared", "not_inherited") if setting.scope == "process" else ("not_inherited", "shared")
    for each in of(measured, setting):
        assert setting.name in each[which]
        assert setting.name not in each[other]


def test_threads_that_nobody_touched_have_no_difference(measured: Measured) -> None:
    assert measured["torch"]["replicas"] == {"thread": [[], []]}


@pytest.mark.parametrize("how", ["eager", "tf.function", "tf.while_loop"])
def test_mirrored_replicas_that_nobody_touched_have_no_difference(measured: Measured, how: str) -> None:
    """Two replicas, at their first step and at their last."""
    assert measured["tensorflow"]["replicas"][how] == [[], [], [], []]


def test_a_replica_that_leaves_out_what_its_strategy_asks_has_a_difference(measured: Measured) -> None:
    assert measured["torch"]["replica_that_forgot"] == ["torch grad mode"]


def test_mirrored_replicas_differ_in_what_their_strategy_changes(measured: Measured) -> None:
    found = measured["tensorflow"]["by_strategy"]
    assert found["eager"] == [["TensorFlow device", "TensorFlow strategy"]] * 4
    assert found["tf.function"] == [["TensorFlow eager execution", "TensorFlow device", "TensorFlow strategy"]] * 4


def test_mirrored_replicas_do_not_inherit_a_dtype_policy_or_a_tape(measured: Measured) -> None:
    assert measured["tensorflow"]["not_inherited"] == [["Keras dtype policy"]] * 4
    assert measured["tensorflow"]["under_a_tape"] == [["TensorFlow gradient tape"]] * 4


def test_mirrored_replicas_are_handed_on_op_callbacks_but_not_all_of_them_the_device_policy(measured: Measured) -> None:
    found = measured["tensorflow"]
    assert found["handed_on"] == [[], [], [], []]
    assert found["handed_on_in_part"] == [["TensorFlow device policy"], []]
    # Replica 1 sets it while replica 0 has it: that is skipped.
    assert found["handed_on_with_a_merge"] == [[], ["TensorFlow device policy"], [], ["TensorFlow device policy"]]


def test_a_seed_set_by_one_mirrored_replica_is_found_by_all(measured: Measured) -> None:
    # Replica 0 sets it after its first snapshot, and replica 1 runs after that.
    assert measured["tensorflow"]["shared"] == [[], *[["TensorFlow seed"]] * 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_reading_changes_nothing_and_is_cheap(measured: Measured, backend: str) -> None:
    assert measured[backend]["changed_by_reading"] == []
    assert measured[backend]["microseconds"] < MICROSECONDS
    assert measured[backend]["loaded"] == [backend]


def test_a_snapshot_imports_no_framework() -> None:
    code = (
        "import sys; from trainer.state.settings import snapshot; print(list(snapshot()));"
        "print({'numpy', 'torch', 'keras', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == ["['denormal numbers', 'switch interval']", "set()"]


def test_a_framework_that_is_being_imported_is_not_loaded_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch")
    module.__spec__ = SimpleNamespace(_initializing=True)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torch", module)
    assert not [name for name in snapshot() if name.startswith("torch ")]


def test_a_difference_tells_what_was_asked_and_what_was_found() -> None:
    asked = {"torch grad mode": "False", "torch default dtype": "torch.float32", "Keras floatx": "float32"}
    found = asked | {"torch grad mode": "True", "Keras floatx": "float64"}
    assert differences(asked, found) == [
        Difference("torch grad mode", "thread", "False", "True"),
        Difference("Keras floatx", "process", "float32", "float64"),
    ]
    assert differences(asked, asked) == []


def test_any_value_is_as_asked_where_any_is_asked() -> None:
    assert differences({"TensorFlow device": ANY}, {"TensorFlow device": "/cpu:1"}) == []


def test_nothing_is_asked_of_a_framework_that_is_loaded_later() -> None:
    assert differences({"switch interval": "0.005"}, {"switch interval": "0.005", "torch grad mode": "True"}) == []


def test_what_is_asked_but_not_read_is_no_setting() -> None:
    with pytest.raises(ValueError, match=r"^settings asked for but not read: torch grade\.$"):
        differences({"torch grade": "True"}, {"torch grad mode": "True"})


def test_strategies_ask_for_settings_of_the_list() -> None:
    names = {setting.name for setting in SETTINGS}
    assert all(set(asked) <= names for asked in ASKED_BY.values())
