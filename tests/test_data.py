from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import data
from data.plan import BatchPlan
from trainer.samples import Samples, samples

ROOT = Path(__file__).parents[1]


def digits(held_out: float = 0.2) -> SimpleNamespace:
    return SimpleNamespace(name="digits", held_out=held_out)


def synthetic(**options: object) -> SimpleNamespace:
    defaults = {"samples": 103, "shape": [3, 5], "classes": 4, "noise": 1.0, "held_out": 0.2}
    return SimpleNamespace(name="synthetic", **{**defaults, **options})


def test_digits_are_1797_images_of_8_by_8_pixels_from_0_to_1() -> None:
    loaded = data.load(digits(), seed=0)
    x = np.concatenate([loaded.train_x, loaded.test_x])
    y = np.concatenate([loaded.train_y, loaded.test_y])
    assert x.shape == (1797, 8, 8, 1)
    assert x.dtype == np.float32
    assert y.shape == (1797,)
    assert y.dtype == np.int32
    assert (x.min(), x.max()) == (0, 1)
    assert loaded.num_classes == 10
    assert set(y) == set(range(10))


@pytest.mark.parametrize("options", [digits(), digits(0.5), synthetic(), synthetic(samples=2, held_out=0.01)])
def test_the_number_held_out_is_the_rounded_share_and_at_least_one(options: SimpleNamespace) -> None:
    loaded = data.load(options, seed=0)
    samples = 1797 if options.name == "digits" else options.samples
    num_test = max(1, round(samples * options.held_out))
    assert len(loaded.test_x) == len(loaded.test_y) == num_test
    assert len(loaded.train_x) == len(loaded.train_y) == samples - num_test


def test_held_out_samples_are_not_trained_on_and_none_is_lost() -> None:
    loaded = data.load(synthetic(), seed=3)
    train, test = ({row.tobytes() for row in part} for part in (loaded.train_x, loaded.test_x))
    assert not train & test
    assert len(train | test) == 103


def test_synthetic_has_the_shape_and_the_classes_asked_for() -> None:
    loaded = data.load(synthetic(samples=1000, shape=[6, 7, 2], classes=3), seed=0)
    assert loaded.train_x.shape == (800, 6, 7, 2)
    assert loaded.train_x.dtype == np.float32
    assert loaded.train_y.dtype == np.int32
    counts = np.bincount(np.concatenate([loaded.train_y, loaded.test_y]))
    assert loaded.num_classes == 3
    assert counts.max() - counts.min() <= 1


def test_synthetic_without_noise_is_its_class_centres() -> None:
    loaded = data.load(synthetic(noise=0.0), seed=0)
    assert len(np.unique(loaded.train_x.reshape(len(loaded.train_x), -1), axis=0)) == 4


@pytest.mark.parametrize("options", [digits(), synthetic()])
def test_a_seed_fixes_samples_and_split_and_another_seed_changes_them(options: SimpleNamespace) -> None:
    first, again, other = (data.load(options, seed) for seed in (7, 7, 8))
    for name in ("train_x", "train_y", "test_x", "test_y"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.test_x, other.test_x)


def test_unknown_data_and_a_share_that_leaves_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^data must be one of digits, synthetic, npz, mnist; got 'cifar'\.$"):
        data.load(SimpleNamespace(name="cifar"), seed=0)
    with pytest.raises(data.DataError, match=r"^data\.held_out=0\.99 leaves none of 2 samples to train on\.$"):
        data.load(synthetic(samples=2, held_out=0.99), seed=0)


RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (50, 6, 4), np.uint8)
IMAGES[0, 0, :2] = 0, 255
LABELS = (np.arange(50) % 3).astype(np.int64)


def npz(path: Path, **options: object) -> SimpleNamespace:
    return SimpleNamespace(name="npz", **{"path": str(path), "held_out": 0.2, "classes": 0, **options})


@pytest.mark.parametrize(
    "names", [("train_x", "train_y", "test_x", "test_y"), ("x_train", "y_train", "x_test", "y_test")]
)
def test_a_file_with_a_test_set_is_taken_as_it_is(tmp_path: Path, names: tuple[str, ...]) -> None:
    arrays = (IMAGES[:40], LABELS[:40], IMAGES[40:], LABELS[40:])
    np.savez(tmp_path / "some.npz", **dict(zip(names, arrays, strict=True)))
    loaded = data.load(npz(tmp_path / "some.npz", held_out=0.5), seed=3)
    pixels = (IMAGES / 255).astype(np.float32)[..., np.newaxis]
    np.testing.assert_array_equal(loaded.train_x, pixels[:40])
    np.testing.assert_array_equal(loaded.test_x, pixels[40:])
    np.testing.assert_array_equal(loaded.train_y, LABELS[:40])
    np.testing.assert_array_equal(loaded.test_y, LABELS[40:])
    assert loaded.num_classes == 3
    assert loaded.train_x.dtype == loaded.test_x.dtype == np.float32
    assert loaded.train_y.dtype == loaded.test_y.dtype == np.int32


@pytest.mark.parametrize("names", [("x", "y"), ("train_x", "train_y"), ("x_train", "y_train")])
def test_a_share_of_a_file_without_a_test_set_is_held_out(tmp_path: Path, names: tuple[str, str]) -> None:
    np.savez(tmp_path / "some.npz", **dict(zip(names, (IMAGES, LABELS), strict=True)))
    loaded = data.load(npz(tmp_path / "some.npz"), seed=3)
    assert (len(loaded.train_x), len(loaded.test_x)) == (40, 10)
    rows = {image.tobytes(): label for image, label in zip(IMAGES, LABELS, strict=True)}
    for part_x, part_y in ((loaded.train_x, loaded.train_y), (loaded.test_x, loaded.test_y)):
        for image, label in zip(part_x, part_y, strict=True):
            assert rows.pop(np.round(image * 255).astype(np.uint8).tobytes()) == label
    assert not rows


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "<i4", ">i8", "f2", "<f4", ">f4", "f8"])
def test_only_bytes_are_scaled_and_other_numbers_keep_their_values(tmp_path: Path, dtype: str) -> None:
    x = RANDOM.integers(0, 100, (20, 5)).astype(dtype)
    np.savez(tmp_path / "some.npz", x=np.asfortranarray(x), y=LABELS[:20].astype("u1"))
    loaded = data.load(npz(tmp_path / "some.npz"), seed=0)
    assert loaded.train_x.dtype == np.dtype("=f4")
    found = np.concatenate([loaded.train_x, loaded.test_x])
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(x.astype(np.float32), axis=0))


@pytest.mark.parametrize(
    ("shape", "trained"), [((4,), (4,)), ((6, 4), (6, 4, 1)), ((6, 4, 3), (6, 4, 3)), ((2, 3, 4, 5), (2, 3, 4, 5))]
)
def test_images_without_channels_get_one_and_other_shapes_stay(
    tmp_path: Path, shape: tuple[int, ...], trained: tuple[int, ...]
) -> None:
    np.savez_compressed(tmp_path / "some.npz", x=np.zeros((20, *shape)), y=LABELS[:20])
    options = npz(tmp_path / "some.npz")
    assert data.load(options, seed=0).train_x.shape == (16, *trained)
    assert samples(options) == Samples(16, trained)


def test_classes_asked_for_may_be_more_than_there_are_labels_of(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", x=IMAGES, y=LABELS)
    assert data.load(npz(tmp_path / "some.npz", classes=7), seed=0).num_classes == 7


def test_a_path_may_start_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "some.npz", x=IMAGES, y=LABELS)
    assert len(data.load(npz(Path("~/some.npz")), seed=0).train_x) == 40


def mnist_arrays(num_train: int, num_test: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        "x_train": random.integers(0, 256, (num_train, 28, 28), np.uint8),
        "y_train": (np.arange(num_train) % 10).astype(np.uint8),
        "x_test": random.integers(0, 256, (num_test, 28, 28), np.uint8),
        "y_test": (np.arange(num_test) % 10).astype(np.uint8),
    }


def assert_is_mnist(loaded: data.Dataset, arrays: dict[str, np.ndarray]) -> None:
    for part in ("train", "test"):
        x, y = getattr(loaded, f"{part}_x"), getattr(loaded, f"{part}_y")
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, (arrays[f"x_{part}"] / 255).astype(np.float32)[..., np.newaxis])
        np.testing.assert_array_equal(y, arrays[f"y_{part}"])
    assert loaded.num_classes == 10


def test_mnist_in_a_file_is_taken_with_its_own_test_set(tmp_path: Path) -> None:
    arrays = mnist_arrays(30, 4)
    # Not all ten: the classes are MNIST's, not the file's.
    arrays["y_train"] %= 4
    arrays["y_test"] %= 4
    np.savez(tmp_path / "mnist.npz", **arrays)
    options = SimpleNamespace(name="mnist", path=str(tmp_path / "mnist.npz"))
    assert_is_mnist(data.load(options, seed=0), arrays)
    assert samples(options) == Samples(30, (28, 28, 1))


def test_mnist_without_a_path_is_what_keras_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = mnist_arrays(30, 4)

    def load_data() -> tuple[tuple[np.ndarray, ...], ...]:
        assert socket.getdefaulttimeout() is not None, "a network that swallows everything would hang the run"
        return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])

    # Ahead of Keras itself, which nothing here needs.
    monkeypatch.setitem(sys.modules, "keras", ModuleType("keras"))
    monkeypatch.setitem(sys.modules, "keras.datasets", SimpleNamespace(mnist=SimpleNamespace(load_data=load_data)))
    options = SimpleNamespace(name="mnist", path="")
    assert_is_mnist(data.load(options, seed=0), arrays)
    assert socket.getdefaulttimeout() is None
    assert samples(options) == Samples(60_000, (28, 28, 1))


@pytest.mark.parametrize("options", [digits(), digits(0.5), synthetic(), synthetic(samples=2, held_out=0.01)])
def test_what_is_told_beforehand_is_what_is_loaded(options: SimpleNamespace) -> None:
    told, loaded = samples(options), data.load(options, seed=0)
    assert told == Samples(len(loaded.train_x), loaded.train_x.shape[1:])


def test_digits_are_those_of_scikit_learn_which_is_not_imported_for_them() -> None:
    code = (
        "import sys, data, types\n"
        "found = data.load(types.SimpleNamespace(name='digits', held_out=0.2), seed=0)\n"
        "assert 'sklearn' not in sys.modules\n"
        "import numpy as np\n"
        "from sklearn.datasets import load_digits\n"
        "images, labels = load_digits(return_X_y=True)\n"
        "x = np.concatenate([found.train_x, found.test_x]).reshape(-1, 64) * 16\n"
        "y = np.concatenate([found.train_y, found.test_y])\n"
        "rows = lambda x, y: sorted(map(tuple, np.column_stack([x, y])))\n"
        "print(rows(x, y) == rows(images, labels))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True\n"


def test_digits_that_are_not_installed_are_a_mistake_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(data.DataError, match=r"^data=digits needs scikit-learn, which brings them, installed\. "):
        data.load(digits(), seed=0)


def test_importing_the_packages_loads_no_framework() -> None:
    code = (
        "import sys, data, data.plan, models\n"
        "print(sorted({'keras', 'sklearn', 'torch', 'tensorflow', 'trainer'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_replicas_share_the_joint_batches_of_one_replica() -> None:
    joint = BatchPlan(100, num_replicas=1, batch_size=12, seed=5).indices(0, 30)
    for num_replicas in (2, 3, 4):
        plan = BatchPlan(100, num_replicas, 12 // num_replicas, seed=5)
        np.testing.assert_array_equal(plan.indices(0, 30).reshape(30, 1, 12), joint)


def test_an_epoch_sees_each_sample_once_but_for_the_short_last_batch() -> None:
    plan = BatchPlan(50, num_replicas=2, batch_size=4, seed=0)
    assert plan.steps_per_epoch == 6
    epochs = plan.indices(0, 24).reshape(4, 48)
    for epoch in epochs:
        assert len(set(epoch)) == 48
        assert set(epoch) <= set(range(50))
    assert len(set(epochs.reshape(-1))) == 50, "every sample has its turn in some epoch"
    assert len({epoch.tobytes() for epoch in epochs}) == 4, "every epoch has its own order"


def test_any_range_of_steps_is_the_same_part_of_the_plan() -> None:
    plan = BatchPlan(20, num_replicas=2, batch_size=3, seed=1)
    whole = plan.indices(0, 40)
    assert whole.shape == (40, 2, 3)
    assert whole.dtype == np.int32
    for first in range(0, 40, 7):
        for last in range(first, 40, 3):
            np.testing.assert_array_equal(plan.indices(first, last), whole[first:last])


def test_a_seed_fixes_the_plan_and_another_seed_changes_it() -> None:
    first, again, other = (BatchPlan(64, 2, 4, seed).indices(0, 8) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_writing_to_what_a_plan_gave_does_not_change_the_plan() -> None:
    plan = BatchPlan(64, 2, 4, seed=0)
    given = plan.indices(0, 8)
    kept = given.copy()
    given[:] = -1
    np.testing.assert_array_equal(plan.indices(0, 8), kept)


def test_threads_that_share_a_plan_in_different_epochs_get_what_one_would() -> None:
    plan = BatchPlan(1437, num_replicas=8, batch_size=16, seed=0)
    steps = [(37 * turn) % 900 for turn in range(400)]
    expected = {step: plan.indices(step, step + 1) for step in set(steps)}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda step: plan.indices(step, step + 1), steps, timeout=60))
    for step, indices in zip(steps, found, strict=True):
        np.testing.assert_array_equal(indices, expected[step])


def test_a_plan_that_cannot_fill_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch_size=6 x num_replicas=2 is more than 11 samples\.$"):
        BatchPlan(11, num_replicas=2, batch_size=6, seed=0)
    with pytest.raises(ValueError, match=r"^num_replicas must be at least 1; got 0\.$"):
        BatchPlan(11, num_replicas=0, batch_size=6, seed=0)
    with pytest.raises(ValueError, match=r"^Steps must run upwards from 0; got 3 to 2\.$"):
        BatchPlan(12, num_replicas=2, batch_size=6, seed=0).indices(3, 2)
