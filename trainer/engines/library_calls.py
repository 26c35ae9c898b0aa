"""A captured step that was compiled to a shared library: loaded and called without the interpreter.

`trainer/engines/library.py` makes the file that is loaded here. Each thread has a model of its own, in AOTInductor's
sense of the word: the compiled code with its constants, without the pool and the locks of a model *container*. So
threads never wait for each other inside, however many there are.
"""

from __future__ import annotations

import ctypes
import json
import threading
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 2  # of the description, of `Frame` and of what a library has besides `library_call`
SYMBOL = "library_call"
OUTPUT_CHANGED = -2  # as `library_call` returns it


class CannotLoad(ValueError):
    """A file that holds no library for this process: compile it again."""


@dataclass(frozen=True)
class Place:
    """What a tensor must be like to be an input or an output; strides count elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride())

    @classmethod
    def read(cls, found: dict[str, Any]) -> Place:
        return cls(str(found["dtype"]), tuple(found["shape"]), tuple(found["strides"]))

    def empty(self, device: str) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=getattr(torch, self.dtype), device=device)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)} with strides {list(self.strides)}"


@dataclass(frozen=True)
class Description:
    """What a library was compiled for: the last line of its file, as JSON, behind what the dynamic loader reads.

    Attributes:
        torch: version of PyTorch, whose functions it calls.
        threads: intra-op threads that its loops are split for.
        cpu: names of the capabilities that the compiling machine had; it may use any of them.
    """

    torch: str
    threads: int
    cpu: tuple[str, ...]
    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    format: int = FORMAT

    @classmethod
    def here(cls, inputs: tuple[Place, ...], outputs: tuple[Place, ...]) -> Description:
        """Of a library that is compiled by this process."""
        return cls(torch.__version__, torch.get_num_threads(), _cpu(), inputs, outputs)

    @classmethod
    def of(cls, code: bytes) -> Description:
        """The description in a library's file.

        Raises:
            CannotLoad: there is none, or one of another format.
        """
        try:
            found = json.loads(code.rpartition(b"\n")[2])
            inputs, outputs = (tuple(map(Place.read, found[name])) for name in ("inputs", "outputs"))
            read = cls(found["torch"], found["threads"], tuple(found["cpu"]), inputs, outputs, found["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise CannotLoad("The file is no compiled library, or a part of one.") from error
        if read.format != FORMAT:
            raise CannotLoad(f"The library has format {read.format}; this version reads {FORMAT}.")
        return read

    def line(self) -> bytes:
        return b"\n" + json.dumps(asdict(self)).encode()

    def validate(self) -> None:
        """Raise `CannotLoad` where the library must not run in this process."""
        if self.torch != torch.__version__:
            raise CannotLoad(f"The library was compiled for torch {self.torch}; this is {torch.__version__}.")
        if self.threads != (here := torch.get_num_threads()):
            # More than it may have would take others' cores; fewer would give another run's bits.
            raise CannotLoad(f"The library was compiled for {self.threads} intra-op threads; this process has {here}.")
        if missing := sorted(set(self.cpu) - set(_cpu())):
            raise CannotLoad(f"The library was compiled for a CPU with {', '.join(missing)}, which this one lacks.")


class Library:
    """A graph that was compiled to a shared library: a function of tensors.

    Thread-safety: any number of threads may call it at once; the GIL is given up for the run. What a call returns are
    the calling thread's own buffers, which its next call writes to again: clone what is to be kept. The child of a fork
    may call it where it was compiled for one intra-op thread; with more, only if nothing had run in parallel before.

    Args:
        loaded: the file, loaded with its symbols kept to itself, after its description was found valid.
    """

    def __init__(self, loaded: ctypes.CDLL, description: Description) -> None:
        self.description = description
        self._loaded = loaded
        self._call = loaded[SYMBOL]
        self._check = loaded["library_check"]
        self._call.restype = self._check.restype = ctypes.c_int64
        self.release = loaded["library_release"]
        self.run = ctypes.cast(loaded["library_run"], ctypes.c_void_p).value or 0
        self._num_inputs = len(description.inputs)
        # Tensors without memory: all that an input must have in common with them is looked at before each run.
        self._expected = [place.empty("meta") for place in description.inputs]
        self._own = threading.local()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run it.

        Raises:
            TypeError: there are too many inputs or too few, or one is not a tensor.
            ValueError: an input's dtype, shape or strides are not those that the library was compiled for.
            RuntimeError: an operator failed. An index out of range does that with one intra-op thread only; with more,
                it is found inside a parallel loop, which no C++ exception leaves: the process ends.
        """
        own = self._own
        try:
            caller: _Caller = own.caller
        except AttributeError:
            caller = own.caller = _Caller(self._loaded, self._expected, self.description.outputs)
        if len(tensors) != self._num_inputs:
            raise TypeError(f"The library takes {self._num_inputs} tensors; got {len(tensors)}.")
        given, held = caller.given, caller.held
        for index, tensor in enumerate(tensors):
            # Most inputs are the last call's, and what Python does here the other threads wait for.
            if tensor is not held[index]:
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"The library's input {index} must be a tensor; got {type(tensor).__name__}.")
                held[index] = tensor
                given[index] = tensor._cdata
        status = self._call(caller.frame)
        if status:
            raise self.error(status, tensors)
        return caller.results

    def bind(self, *tensors: Tensor) -> Bound:
        """The library with its inputs set for good, for other compiled code to run; by the thread that will run it.

        Raises:
            TypeError, ValueError: as `__call__` does.
        """
        if len(tensors) != self._num_inputs:
            raise TypeError(f"The library takes {self._num_inputs} tensors; got {len(tensors)}.")
        caller = _Caller(self._loaded, self._expected, self.description.outputs)
        for index, tensor in enumerate(tensors):
            caller.held[index] = tensor
            caller.given[index] = tensor._cdata
        status = self._check(caller.frame)
        if status:
            raise self.error(status, tensors)
        return Bound(self, caller)

    def error(self, status: int, tensors: tuple[Tensor, ...]) -> Exception:
        if status > 0:
            index, found = status - 1, tensors[status - 1]
            return ValueError(
                f"The library's input {index} must be {self.description.inputs[index]}, on the CPU; got "
                f"{Place.of(found)}, on {found.device}."
            )
        if status == OUTPUT_CHANGED:
            return RuntimeError("The library returned an output of another dtype or shape than its graph did.")
        message = ctypes.c_char_p()
        self._loaded.AOTInductorGetLastError(ctypes.byref(message))
        first_line = (message.value or b"").decode(errors="replace").partition("\n")[0]
        return RuntimeError(f"The library's run failed: {first_line}")


class Bound:
    """A library's function of no inputs: those that it has been bound to are read anew at each run.

    Attributes:
        run: address of the function: of the frame and of room for the outputs' addresses, to 0 or a status. Outputs
            last until the next run, or `release`.
        frame: what it is called with.

    Thread-safety: one thread at a time.
    """

    def __init__(self, library: Library, caller: _Caller) -> None:
        self._library, self._caller = library, caller
        self.run, self.frame = library.run, caller.frame

    def release(self) -> None:
        """Delete what the last run has left."""
        self._library.release(self.frame)

    def error(self, status: int) -> Exception:
        """What a status other than 0 means."""
        return self._library.error(status, tuple(each for each in self._caller.held if each is not None))


def load(path: Path) -> Library:
    """The library in a file.

    The dynamic loader knows files by their paths: a process that loads two that had one path gets the first one twice.

    Raises:
        CannotLoad: there is none in the file, or none for this process.
    """
    try:
        description = Description.of(path.read_bytes())
        description.validate()
        return Library(ctypes.CDLL(str(path.resolve())), description)
    except OSError as error:
        raise CannotLoad(f"The library cannot be loaded: {error}") from error


class _Frame(ctypes.Structure):
    """As `Frame` in library_calls.cpp has it."""

    _fields_ = (
        ("model", ctypes.c_void_p),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("given", ctypes.c_void_p),
        ("expected", ctypes.c_void_p),
        ("results", ctypes.c_void_p),
        ("inputs", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
    )


class _Caller:
    """What one thread calls a library with: a model, room for a run's handles, and buffers for what it returns.

    Attributes:
        given: the inputs' cells; `held` are the tensors in them, which must live for as long as they stand there.
    """

    def __init__(self, loaded: ctypes.CDLL, expected: list[Tensor], outputs: tuple[Place, ...]) -> None:
        # A thread has the number of intra-op threads that was set for all only once it has asked for it, and nothing in
        # a library does: until then its matrix products take all cores.
        torch.get_num_threads()
        self.results = tuple(place.empty("cpu") for place in outputs)
        self.held: list[Tensor | None] = [None] * len(expected)
        self.given = _cells([None] * len(expected))
        model = ctypes.c_void_p()
        if loaded.AOTInductorModelCreateV2(ctypes.byref(model), None, ctypes.c_size_t(0)):
            raise RuntimeError("The library could not be set up for this thread.")
        weakref.finalize(self, loaded.AOTInductorModelDelete, model)
        room = _cells([None] * len(expected)), _cells([None] * len(outputs))
        # Kept, as the frame has nothing but their addresses.
        self._arrays = (self.given, _cells(expected), _cells(self.results), *room)
        addresses = [ctypes.addressof(array) for array in self._arrays]
        self._frame = _Frame(model, len(expected), len(outputs), *addresses)
        self.frame = ctypes.byref(self._frame)


def _cells(tensors: Iterable[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    values = [None if tensor is None else tensor._cdata for tensor in tensors]
    return (ctypes.c_void_p * len(values))(*values)


def _cpu() -> tuple[str, ...]:
    return tuple(sorted(name for name, has in torch.cpu.get_capabilities().items() if has is True))
