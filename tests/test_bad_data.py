"""Data that cannot be trained on are refused in one line, most before anything is started, and nothing is unpickled."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import Command, verdict

import data
from trainer.config import Cnn, Config, ConfigError, Mnist, Npz, Train, Transformer
from trainer.rules import validate

ROOT = Path(__file__).resolve().parent.parent
WANTED = "Name the arrays x and y, or train_x and train_y with or without test_x and test_y."
X = np.zeros((200, 8, 8, 1), np.float32)
Y = np.arange(200) % 10
OBJECTS = np.empty(200, object)


class Marks:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def arrays(**named: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **named)


def content(some: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(some) and None


def saved(**named: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **named)
    return stream.getvalue()


def damaged(old: bytes, new: bytes) -> Callable[[Path], None]:
    """A file of x and y with some of its bytes changed."""
    whole = saved(x=X, y=Y)
    assert old in whole
    assert len(old) == len(new)
    return content(whole.replace(old, new))


def member(name: str, some: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, some)

    return write


def changed(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


def huge(path: Path) -> None:
    """A header that promises 40 terabytes, and nothing behind it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**13, 1)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", stream.getvalue())
        archive.writestr("y.npy", stream.getvalue())


# How the file is made, and what is said of it after `data.path=FILE`: known from its headers, before a run is started.
HEADERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, f" is no file. Give its path, absolute or from {Path.cwd()}."),
    "a folder": (Path.mkdir, f" is no file. Give its path, absolute or from {Path.cwd()}."),
    "a pipe": (os.mkfifo, f" is no file. Give its path, absolute or from {Path.cwd()}."),
    "empty file": (
        Path.touch,
        " is no .npz file, or is cut short. numpy.savez(FILE, x=x, y=y) writes one.",
    ),
    "text": (
        content(b"x,y\n1,2\n"),
        " is no .npz file, or is cut short. numpy.savez(FILE, x=x, y=y) writes one.",
    ),
    "cut short": (
        content(saved(x=X, y=Y)[:-100]),
        " is no .npz file, or is cut short. numpy.savez(FILE, x=x, y=y) writes one.",
    ),
    "a pickled array": (
        content(X.dumps()),
        " is no .npz file, or is cut short. numpy.savez(FILE, x=x, y=y) writes one.",
    ),
    "no arrays": (arrays(), f" has no arrays. {WANTED}"),
    "no known names": (arrays(images=X, labels=Y), f" has images, labels. {WANTED}"),
    "many names": (
        arrays(**{f"arr_{index}": Y for index in range(8)}),
        f" has arr_0, arr_1, arr_2, arr_3, arr_4 and 3 more. {WANTED}",
    ),
    "a name over two lines": (member("a\n\x1b[2Jb.npy", b""), f" has a ?[2Jb. {WANTED}"),
    "no name": (member(".npy", b""), f" has no arrays. {WANTED}"),
    "no y": (arrays(x=X), f" has x but no y. {WANTED}"),
    "no train_x": (arrays(train_y=Y), f" has train_y but no train_x. {WANTED}"),
    "no test_y": (
        arrays(train_x=X, train_y=Y, test_x=X),
        f" has test_x, train_x, train_y but no test_y. {WANTED}",
    ),
    "two namings": (
        arrays(x=X, y=Y, train_x=X, train_y=Y),
        f" has train_x and x: which to train on? {WANTED}",
    ),
    "lengths": (arrays(x=X, y=Y[:-1]), ": x has 200 samples, y has 199. They must agree."),
    "one-hot labels": (
        arrays(x=X, y=np.eye(10)[Y].astype(int)),
        ": y must be [samples], one class a sample; got shape [200, 10].",
    ),
    "one label": (arrays(x=X, y=np.int64(1)), ": y must be [samples], one class a sample; got shape []."),
    "float labels": (
        arrays(x=X, y=Y.astype(float)),
        ": y must hold classes as whole numbers; got dtype float64.",
    ),
    "names as labels": (arrays(x=X, y=Y.astype("U2")), ": y must hold classes as whole numbers; got dtype <U2."),
    "truths as labels": (arrays(x=X, y=Y > 4), ": y must hold classes as whole numbers; got dtype bool."),
    "a number a sample": (
        arrays(x=Y, y=Y),
        ": x must be [samples, ...], a vector or an image a sample; got shape [200].",
    ),
    "complex x": (arrays(x=X + 1j, y=Y), ": x must hold real numbers; got dtype complex64."),
    "text x": (arrays(x=X.astype("S3"), y=Y), ": x must hold real numbers; got dtype |S3."),
    "dates": (
        arrays(x=X.astype("M8[s]"), y=Y),
        ": x must hold real numbers; got dtype datetime64[s].",
    ),
    "records": (
        arrays(x=np.zeros((200, 2), "f4,i4"), y=Y),
        ": x must hold real numbers; got dtype [('f0', '<f4'), ('f1', '<i4')].",
    ),
    "objects": (
        arrays(x=X, y=OBJECTS),
        ": y holds Python objects, and nothing is ever unpickled. Save it with a numeric dtype.",
    ),
    "records with objects": (
        arrays(x=np.zeros((200, 2), "f4,O"), y=Y),
        ": x holds Python objects, and nothing is ever unpickled. Save it with a numeric dtype.",
    ),
    "no samples": (arrays(x=X[:0], y=Y[:0]), ": x is empty; got shape [0, 8, 8, 1]."),
    "no features": (arrays(x=X[:, :0], y=Y), ": x is empty; got shape [200, 0, 8, 1]."),
    "no test samples": (
        arrays(train_x=X, train_y=Y, test_x=X[:0], test_y=Y[:0]),
        ": test_x is empty; got shape [0, 8, 8, 1].",
    ),
    "one sample": (arrays(x=X[:1], y=Y[:1]), "data.held_out=0.2 leaves none of 1 samples to train on."),
    "other test shape": (
        arrays(x_train=X, y_train=Y, x_test=X[:, :7], y_test=Y),
        ": samples of x_train have shape [8, 8, 1], those of x_test [7, 8, 1].",
    ),
    "test images scaled, those to train on not": (
        arrays(train_x=X, train_y=Y, test_x=X.astype(np.uint8), test_y=Y),
        ": train_x is float32, test_x uint8. Save both as one dtype.",
    ),
    "test lengths": (
        arrays(train_x=X, train_y=Y, test_x=X, test_y=Y[1:]),
        ": test_x has 200 samples, test_y has 199. They must agree.",
    ),
    "array cut short": (
        member("x.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr'"),
        ": x is damaged: EOF: reading array header, expected 118 bytes got 8. Save the file again.",
    ),
    "unknown version": (
        damaged(b"\x93NUMPY\x01", b"\x93NUMPY\x07"),
        ": x is damaged: it is of .npy version 7.0, which numbers do not need. Save the file again.",
    ),
    "more promised than there is": (huge, ": x is damaged: its size is not what its header says. Save the file again."),
    "sizes below zero": (
        damaged(b"'shape': (200, 8, 8, 1)", b"'shape': (200,-8,-8, 1)"),
        ": x is damaged: its size is not what its header says. Save the file again.",
    ),
}

# As above, but known from the values only.
VALUES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "NaN": (
        arrays(x=changed(X, ([7, 9, 9], 3), np.nan), y=Y),
        ": x holds NaN or infinity as float32 in 2 of 200 samples, first in sample 7. Replace it, or leave those "
        "samples out.",
    ),
    "infinity": (
        arrays(train_x=X, train_y=Y, test_x=changed(X, -1, -np.inf), test_y=Y),
        ": test_x holds NaN or infinity as float32 in 1 of 200 samples, first in sample 199. Replace it, or leave "
        "those samples out.",
    ),
    "too large for float32": (
        arrays(x=changed(X.astype(float), 0, 1e39), y=Y),
        ": x holds NaN or infinity as float32 in 1 of 200 samples, first in sample 0. Replace it, or leave those "
        "samples out.",
    ),
    "negative label": (arrays(x=X, y=changed(Y, 5, -1)), ": y must hold classes from 0 up; got -1 in sample 5."),
    "negative test label": (
        arrays(train_x=X, train_y=Y, test_x=X, test_y=changed(Y, 3, -2)),
        ": test_y must hold classes from 0 up; got -2 in sample 3.",
    ),
    "one class": (
        arrays(x=X, y=0 * Y),
        ": all labels are 0, and 2 classes are the least. data.classes=2 says there are two.",
    ),
    "identifiers": (
        arrays(x=X, y=Y.astype(np.uint64) + np.uint64(2**63)),
        ": a label is 9223372036854775817, but there are only 200 samples. Number the classes from 0, or add "
        "data.classes=9223372036854775818.",
    ),
    "damaged values": (
        damaged(bytes(8000), bytes(7999) + b"?"),
        ": x is damaged: Bad CRC-32 for file 'x.npy'. Save the file again.",
    ),
}


def said_of(path: Path, message: str) -> str:
    return message if message.startswith("data.") else f"data.path={path}{message}"


def refusal(call: Callable[[], Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize("case", HEADERS)
def test_a_file_that_cannot_be_trained_on_is_refused_from_its_headers(tmp_path: Path, case: str) -> None:
    make, message = HEADERS[case]
    path = tmp_path / "some.npz"
    make(path)
    options = Npz(path=str(path))
    assert refusal(lambda: validate(Config(data=options)), ConfigError) == said_of(path, message)
    # The run's own process does not rely on that.
    assert refusal(lambda: data.load(options, seed=0), data.DataError) == said_of(path, message)


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_trained_on_are_refused_when_they_are_loaded(tmp_path: Path, case: str) -> None:
    make, message = VALUES[case]
    path = tmp_path / "some.npz"
    make(path)
    options = Npz(path=str(path))
    validate(Config(data=options))
    assert refusal(lambda: data.load(options, seed=0), data.DataError) == said_of(path, message)


def test_a_label_that_is_none_of_the_classes_asked_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, x=X, y=Y)
    assert data.load(Npz(path=str(path), classes=10), seed=0).num_classes == 10
    said = refusal(lambda: data.load(Npz(path=str(path), classes=9), seed=0), data.DataError)
    assert said == f"data.path={path}: y must hold classes from 0 to 8; got 9 in sample 9."


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, x=X, y=Y)
    path.chmod(0)
    assert (
        refusal(lambda: data.load(Npz(path=str(path)), seed=0), data.DataError)
        == f"data.path={path} cannot be read: Permission denied."
    )


def test_npz_without_a_path_is_refused() -> None:
    said = "data=npz needs a file. Add data.path=FILE, one that numpy.savez wrote."
    assert refusal(lambda: validate(Config(data=Npz())), ConfigError) == said
    assert refusal(lambda: data.load(Npz(), seed=0), data.DataError) == said


def test_one_class_or_a_share_that_is_none_is_refused() -> None:
    assert (
        refusal(lambda: validate(Config(data=Npz(path="x", classes=1))), ConfigError)
        == "data.classes must be at least 2; got 1. 0 takes one more than the largest label."
    )
    assert (
        refusal(lambda: validate(Config(data=Npz(path="x", held_out=1))), ConfigError)
        == "data.held_out must be above 0 and below 1; got 1."
    )


@pytest.mark.parametrize(
    ("named", "config", "message"),
    [
        (
            {"x": X[:20], "y": Y[:20]},
            {"train": Train(batch_size=16)},
            "train.batch_size=16 x num_replicas=2 is a joint batch of 32 samples, but data=npz has 16 to train on. "
            "Try train.batch_size=8 or less.",
        ),
        (
            {"train_x": X[:20], "train_y": Y[:20], "test_x": X, "test_y": Y},
            {"train": Train(batch_size=16)},
            "train.batch_size=16 x num_replicas=2 is a joint batch of 32 samples, but data=npz has 20 to train on. "
            "Try train.batch_size=10 or less.",
        ),
        (
            {"x": X.reshape(200, 64), "y": Y},
            {"model": Cnn()},
            "model=cnn with 2 poolings needs images of at least 4x4 as [height, width, channels]; data=npz gives [64].",
        ),
        (
            {"x": X.reshape(200, 64), "y": Y},
            {"model": Transformer()},
            "model=transformer needs images as [height, width, channels]; data=npz gives [64].",
        ),
        (
            {"x": X[:, :6, :, 0], "y": Y},
            {"model": Transformer(patch=4)},
            "model.patch must divide the images' height and width; got 4, and data=npz gives [6, 8, 1]. "
            "It can be 1, 2.",
        ),
    ],
)
def test_data_that_do_not_fit_the_run_are_refused(
    tmp_path: Path, named: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, **named)
    assert refusal(lambda: validate(Config(data=Npz(path=str(path)), **config)), ConfigError) == message


MNIST = {"x_train": np.zeros((80, 28, 28), np.uint8), "y_train": Y[:80], "x_test": X[:5], "y_test": Y[:5]}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"x": X, "y": Y},
            " has no test set, and data=mnist has x_test and y_test. Other data: data=npz data.path={}.",
        ),
        (
            {"train_x": X, "train_y": Y, "test_x": X, "test_y": Y},
            ": data=mnist has images of 28x28; got [8, 8, 1]. Other data: data=npz data.path={}.",
        ),
    ],
)
def test_a_file_that_is_not_like_mnists_is_refused(tmp_path: Path, named: dict[str, Any], message: str) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, **named)
    options = Mnist(path=str(path))
    said = f"data.path={path}{message.format(path)}"
    assert refusal(lambda: validate(Config(data=options)), ConfigError) == said
    assert refusal(lambda: data.load(options, seed=0), data.DataError) == said


def test_an_eleventh_digit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    x = np.zeros((80, 28, 28), np.uint8)
    np.savez(path, x_train=x, y_train=changed(Y[:80], 1, 10), x_test=x, y_test=Y[:80])
    said = refusal(lambda: data.load(Mnist(path=str(path)), seed=0), data.DataError)
    assert said == f"data.path={path}: y_train must hold classes from 0 to 9; got 10 in sample 1."


@pytest.mark.slow
def test_mnist_without_a_network_or_a_file_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import data\n"
        "from types import SimpleNamespace\n"
        "try: data.load(SimpleNamespace(name='mnist', path=''), seed=0)\n"
        "except data.DataError as error: print(error)"
    )
    # Keras' own loader, in a home where nothing is cached, with a proxy that nobody listens at.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **nowhere, "no_proxy": "", "NO_PROXY": "", "KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert re.fullmatch(
        r"data=mnist could not be downloaded \(URL fetch failure on https://\S+/mnist\.npz: .*Connection refused.*\)\. "
        r"Fetch mnist\.npz where there is a network and add data\.path=FILE, or try data=digits\.",
        found.stdout.splitlines()[-1],
    )


def marking(marker: Path) -> np.ndarray:
    return np.array([Marks(marker) for _ in range(3)], object)


# Every way in for a pickle: as the file, as an array of objects in any role, as a member without an array's header.
PICKLES: dict[str, Callable[[Path, Path], Any]] = {
    "the file": lambda path, marker: path.write_bytes(pickle.dumps(Marks(marker))),
    "x": lambda path, marker: np.savez(path, x=marking(marker), y=Y[:3]),
    "y": lambda path, marker: np.savez(path, x=X[:3], y=marking(marker)),
    "test_y": lambda path, marker: np.savez(path, train_x=X, train_y=Y, test_x=X[:3], test_y=marking(marker)),
    "a member": lambda path, marker: member("x.npy", pickle.dumps(Marks(marker)))(path),
}


@pytest.mark.parametrize("case", PICKLES)
def test_nothing_is_unpickled(tmp_path: Path, case: str) -> None:
    path, marker = tmp_path / "some.npz", tmp_path / "marker"
    PICKLES[case](path, marker)
    refusal(lambda: validate(Config(data=Npz(path=str(path)))), ConfigError)
    refusal(lambda: data.load(Npz(path=str(path)), seed=0), data.DataError)
    refusal(lambda: data.load(Mnist(path=str(path)), seed=0), data.DataError)
    assert not marker.exists()


def test_a_pickle_in_an_array_that_nobody_asked_for_stays_closed(tmp_path: Path) -> None:
    path, marker = tmp_path / "some.npz", tmp_path / "marker"
    np.savez(path, x=X, y=Y, notes=marking(marker))
    assert len(data.load(Npz(path=str(path)), seed=0).train_x) == 160
    assert not marker.exists()


def test_unpickling_one_of_them_would_have_shown(tmp_path: Path) -> None:
    path, marker = tmp_path / "some.npz", tmp_path / "marker"
    PICKLES["x"](path, marker)
    with np.load(path, allow_pickle=True) as archive, pytest.raises(FileExistsError):
        # Its three elements make one folder.
        archive["x"]
    assert marker.exists()


def test_the_command_refuses_a_bad_file_on_one_line_with_status_2_and_leaves_nothing(command: Command) -> None:
    path, marker = command.folder / "some.npz", command.folder / "marker"
    PICKLES["y"](path, marker)
    found = command("data=npz", "data.path=some.npz")
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr == (
        "trainer: data.path=some.npz: y holds Python objects, and nothing is ever unpickled. "
        "Save it with a numeric dtype.\n"
    )
    assert command.left() == ["some.npz"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["threads", "mirrored"])
def test_a_run_that_finds_a_bad_value_ends_refused_with_status_2_and_one_line(command: Command, strategy: str) -> None:
    np.savez(command.folder / "some.npz", x=changed(X, 3, np.nan), y=Y)
    found = command("data=npz", "data.path=some.npz", f"strategy={strategy}", "hydra.run.dir=run")
    said = (
        "data.path=some.npz: x holds NaN or infinity as float32 in 1 of 200 samples, first in sample 3. "
        "Replace it, or leave those samples out."
    )
    assert found.returncode == 2
    told = [line for line in found.stderr.splitlines() if line.strip()]
    assert len(told) == 1
    assert told[0].endswith(said)
    assert "Traceback" not in found.stdout + (command.folder / "run" / "console.log").read_text(encoding="utf-8")
    left = verdict(command.folder / "run")
    assert (left["verdict"], left["error"]["kind"], left["error"]["message"]) == ("broken", "refused", said)


def test_a_users_own_package_named_data_is_not_run_to_check_a_file(command: Command) -> None:
    (command.folder / "data.py").write_text("raise SystemExit('this is not yours to run')\n", encoding="utf-8")
    code = "from trainer.config import Npz; from trainer.samples import samples; print(samples(Npz(path='nowhere')))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=command.folder,
        env=command.environment(),
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert found.stdout == "None\n"


def test_only_data_in_a_file_cost_numpy_to_check() -> None:
    code = (
        "import sys\n"
        "from trainer.config import Config, Mnist, Synthetic; from trainer.rules import validate\n"
        "for data in (None, Synthetic(), Mnist()): validate(Config(data=data) if data else Config())\n"
        "print('numpy' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=True
    )
    assert found.stdout == "False\n"


def test_options_that_data_does_not_know_tell_nothing() -> None:
    from trainer.samples import samples

    assert samples(SimpleNamespace(name="theirs")) is None
