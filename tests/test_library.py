"""A compiled library gives what its graph gives, in any number of threads at once, and refuses what does not fit it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from trainer.config import Cnn, Config, Mlp, Precision, Train
from trainer.engines import capture, compiler
from trainer.engines.library import CannotCompile, compile_library, identity
from trainer.engines.library_calls import FORMAT, SYMBOL, CannotLoad, Description, Library, load
from trainer.strategies import steps

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="libraries need a C++ compiler, and there is none"
)
SIZE = 512
LONG = 30  # products of SIZE x SIZE, of 5 ms each where nothing else runs
SMALL_STEPS = {
    "mlp_bfloat16": Config(model=Mlp(hidden=[16]), precision=Precision("mixed_bfloat16"), train=Train(batch_size=8)),
    "cnn": Config(model=Cnn(filters=[4], normalization="batch", dropout=0.0), train=Train(batch_size=8)),
}


@dataclass
class Compiled:
    graph: GraphModule
    example: tuple[Tensor, ...]
    path: Path
    library: Library


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One intra-op thread, as replicas on few cores have, and no gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A few operators of each kind: gathered, multiplied, fused, reduced, hashed; a constant; one output twice."""
    scale = torch.linspace(0.5, 1.5, SIZE)

    def function(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        found = torch.tanh(x[index] @ x) * scale
        mixed = (index ^ (index >> 3)) * 0x9E3779B97F4A7C1  # wraps around
        return found, found.sum(), found, (mixed ^ (mixed >> 29)) & 0xFFFFFFFF

    return _compiled(function, (torch.ones(SIZE, SIZE), torch.arange(8)), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A call that takes long."""

    def function(x: Tensor) -> tuple[Tensor]:
        found = x
        for _ in range(LONG):
            found = found @ x
        return (found,)

    return _compiled(function, (torch.eye(SIZE),), tmp_path_factory.mktemp("long"))


def _compiled(function: Callable[..., Any], example: tuple[Tensor, ...], folder: Path) -> Compiled:
    graph = make_fx(lambda *inputs: function(*inputs))(*example)
    path = folder / "library.so"
    compile_library(graph, example, path)
    return Compiled(graph, example, path, load(path))


def _random(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, SIZE, generator=generator), torch.randint(SIZE, (8,), generator=generator)


def _captured(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """The graph of the training step that a run of this configuration captures, and its inputs."""
    from trainer.workloads.train import Training

    found = []

    def keep(function: Callable[..., Any], *example: Tensor, **how: Any) -> capture.Captured:
        found.append((make_fx(lambda *inputs: function(*inputs))(*example), example))
        return capture.Captured(function, "fx")

    monkeypatch.setattr(steps, "capture", keep)
    steps.Steps(config, Training(config))
    return found[0]


# What it computes.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' own
@pytest.mark.parametrize("name", SMALL_STEPS)
def test_a_library_computes_the_training_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, example = _captured(SMALL_STEPS[name], monkeypatch)
    compile_library(graph, example, tmp_path / "library.so")
    library = load(tmp_path / "library.so")
    prefix, template, x, y, samples, number, positions = example
    for inputs in (example, (prefix * 1.5, template, x, y, samples + 100, number + 7, positions + 8)):
        for ours, eager in zip(library(*inputs), graph(*inputs), strict=True):
            assert ours.dtype == eager.dtype
            # Sums in another order; seen: 1.8e-6 of 3.3 in float32, and none in bfloat16, where both round the same.
            torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5)
            if "bfloat16" in name:
                assert torch.equal(_fits_bfloat16(ours), _fits_bfloat16(eager))


def _fits_bfloat16(values: Tensor) -> Tensor:
    """What the audit reads a compute dtype off."""
    return (values.view(torch.int32) & 0xFFFF) == 0


@pytest.mark.slow
def test_a_library_has_the_graphs_outputs(small: Compiled) -> None:
    for seed in range(3):
        inputs = _random(seed)
        for ours, eager in zip(small.library(*inputs), small.graph(*inputs), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=0 if ours.dtype == torch.int64 else 1e-5)


@pytest.mark.slow
def test_a_library_that_draws_is_compared_with_the_same_draws_and_takes_nothing_from_the_generator(
    tmp_path: Path,
) -> None:
    def drawn(x: Tensor) -> tuple[Tensor]:
        return (x + torch.randint(0, 1000, x.shape),)

    own = _compiled(drawn, (torch.zeros(64),), tmp_path)
    before = torch.get_rng_state()
    assert compiler._distance(own.library, own.graph, own.example) == 0
    assert torch.equal(torch.get_rng_state(), before)
    twice = make_fx(lambda x: (drawn(x)[0] + drawn(x)[0],))(*own.example)
    assert compiler._distance(own.library, twice, own.example) > 0.1


def test_inputs_may_lie_anywhere_in_their_storage(small: Compiled) -> None:
    x, index = _random(0)
    expected = [output.clone() for output in small.library(x, index)]
    shifted = torch.cat([torch.full((3, SIZE), torch.nan), x])[3:]
    assert shifted.storage_offset() > 0
    assert all(map(torch.equal, small.library(shifted, torch.cat([index, index])[8:]), expected))


@pytest.mark.slow
def test_libraries_call_their_own_functions(small: Compiled, long: Compiled) -> None:
    """Both have functions of the same names."""
    x, index = _random(0)
    first = [output.clone() for output in small.library(x, index)]
    assert torch.equal(long.library(torch.eye(SIZE))[0], torch.eye(SIZE))
    assert all(map(torch.equal, small.library(x, index), first))


# Threads.


@pytest.mark.slow
def test_every_call_in_every_thread_has_the_same_bits(small: Compiled) -> None:
    expected = [[output.clone() for output in small.library(*_random(seed))] for seed in range(4)]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def call(own: int) -> None:
        inputs = _random(own)
        start.wait(10)
        for _ in range(300):
            if not all(map(torch.equal, small.library(*inputs), expected[own])):
                wrong.append(own)

    threads = [threading.Thread(target=call, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong


@pytest.mark.slow
def test_a_threads_next_call_writes_over_its_last_outputs_and_another_threads_does_not(small: Compiled) -> None:
    mine = small.library(*_random(0))
    before = [output.clone() for output in mine]
    other = threading.Thread(target=lambda: small.library(*_random(1)))
    other.start()
    other.join(10)
    assert all(map(torch.equal, mine, before))
    small.library(*_random(1))
    assert not any(map(torch.equal, mine, before))


def _times_both_ran(call: Callable[[Tensor], object], x: Tensor) -> int:
    """How often both of two threads, each in a call of its own, were seen to have had processor time since last time.

    More than twice only if they take their time together: if they take turns, that changes when the second one begins
    and when it is seen for the first time. While a call holds the GIL, nothing is seen.
    """
    ready, started = threading.Barrier(3), threading.Barrier(3)

    def work() -> None:
        call(x)
        ready.wait(30)
        started.wait(30)
        call(x)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread.ident]
    ready.wait(30)
    last, times = [time.clock_gettime(clock) for clock in clocks], 0
    started.wait(30)
    with contextlib.suppress(OSError):  # a thread has ended, and its clock with it
        while all(thread.is_alive() for thread in threads):
            now = [time.clock_gettime(clock) for clock in clocks]
            if all(new - old > 0.002 for new, old in zip(now, last, strict=True)):
                last, times = now, times + 1
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return times


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="threads' processor time is looked at")
def test_two_threads_run_at_the_same_time(long: Compiled) -> None:
    assert _times_both_ran(long.library, torch.eye(SIZE)) > 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="threads' processor time is looked at")
@pytest.mark.parametrize("held", ["the GIL", "a lock"])
def test_two_threads_take_turns_where_a_call_holds(held: str, long: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()

    def locked(x: Tensor) -> None:
        with lock:
            long.library(x)

    if held == "the GIL":
        call = ctypes.PyDLL(str(long.path))[SYMBOL]
        call.restype = ctypes.c_int64
        monkeypatch.setattr(long.library, "_call", call)
    assert _times_both_ran(long.library if held == "the GIL" else locked, torch.eye(SIZE)) <= 2


def _threads_started(call: Callable[[Tensor], object]) -> set[int]:
    """The system's threads that a call in a new thread has started besides."""
    found: set[int] = set()
    x = torch.eye(SIZE)  # making it asks for the number of threads

    def work() -> None:
        before = {thread.id for thread in psutil.Process().threads()}
        call(x)
        found.update({thread.id for thread in psutil.Process().threads()} - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return found


@pytest.mark.slow
def test_a_library_takes_no_more_threads_than_were_set(long: Compiled) -> None:
    assert not _threads_started(long.library)


@pytest.mark.slow
@pytest.mark.skipif(
    os.cpu_count() == 1 or bool(os.environ.get("OMP_NUM_THREADS")), reason="there are no more threads to be taken"
)
def test_the_graph_itself_does_in_a_thread_that_has_not_asked(long: Compiled) -> None:
    assert _threads_started(long.graph)


def _grown(work: Callable[[], object], times: int) -> int:
    """Bytes of memory that the process has more of after some calls than before them."""
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(times):
        work()
    return process.memory_info().rss - before


@pytest.mark.slow
@pytest.mark.parametrize("leaks", [False, True])
def test_calls_do_not_leak(small: Compiled, leaks: bool) -> None:
    """A leaked output is 16 KB a call, a leaked input a megabyte."""
    kept = []

    def call() -> None:
        found, *_ = small.library(torch.ones(SIZE, SIZE), torch.arange(8))
        if leaks:
            kept.append(found.clone())

    _grown(call, 200)
    assert (_grown(call, 2000) > 8 * 2**20) is leaks


@pytest.mark.slow
@pytest.mark.parametrize("leaks", [False, True])
def test_threads_that_end_leave_nothing(small: Compiled, leaks: bool) -> None:
    """What a thread has of its own is 32 KB of buffers and a model with its constants."""
    kept = []

    def work() -> None:
        small.library(*small.example)
        if leaks:
            kept.append(small.library._own.caller)

    def call() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    _grown(call, 50)
    # Enough of them that memory which was free before does not hide a leak.
    assert (_grown(call, 2000) > 8 * 2**20) is leaks


# What it refuses.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(SIZE, SIZE, dtype=torch.float64), torch.arange(8)), "float32[512, 512] with strides [512, 1], on"),
        ((torch.ones(SIZE, SIZE - 1), torch.arange(8)), "got float32[512, 511] with strides [511, 1], on cpu."),
        ((torch.ones(SIZE, SIZE).t(), torch.arange(8)), "got float32[512, 512] with strides [1, 512], on cpu."),
        ((torch.ones(SIZE * SIZE), torch.arange(8)), "got float32[262144] with strides [1], on cpu."),
        ((torch.ones(SIZE, SIZE, device="meta"), torch.arange(8)), "with strides [512, 1], on meta."),
        ((torch.ones(SIZE, SIZE), torch.arange(9)), "input 1 must be int64[8] with strides [1], on the CPU; got int"),
    ],
)
def test_an_input_that_was_not_compiled_for_is_refused(
    small: Compiled, inputs: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        small.library(*inputs)
    assert message in str(caught.value)
    small.library(*small.example)


@pytest.mark.slow
def test_an_input_that_changes_its_shape_in_place_is_refused(small: Compiled) -> None:
    x, index = _random(0)
    small.library(x, index)
    x.resize_(1)
    with pytest.raises(ValueError, match="input 0 must be"):
        small.library(x, index)


@pytest.mark.slow
def test_what_is_no_tensor_is_refused(small: Compiled) -> None:
    x, index = _random(0)
    for inputs in ((x,), (x, index, index)):
        with pytest.raises(TypeError, match=f"The library takes 2 tensors; got {len(inputs)}."):
            small.library(*inputs)
    # Its `_cdata` is an address too, of something else.
    with pytest.raises(TypeError, match=r"The library's input 0 must be a tensor; got UntypedStorage\."):
        small.library(x.untyped_storage(), index)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0"}, "The library was compiled for torch 1.0; this is "),
        ({"threads": 64}, "The library was compiled for 64 intra-op threads; this process has 1."),
        ({"cpu": ["quantum"]}, "The library was compiled for a CPU with quantum, which this one lacks."),
        ({"format": 0}, f"The library has format 0; this version reads {FORMAT}."),
        ({"inputs": None}, "The file is no compiled library, or a part of one."),
    ],
)
def test_a_library_for_another_process_is_refused(
    small: Compiled, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    code, _, line = small.path.read_bytes().rpartition(b"\n")
    path = tmp_path / "other.so"
    path.write_bytes(code + b"\n" + json.dumps({**json.loads(line), **changes}).encode())
    with pytest.raises(CannotLoad) as caught:
        load(path)
    assert str(caught.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_part_of_a_library_is_refused(small: Compiled, tmp_path: Path, share: float) -> None:
    code = small.path.read_bytes()
    (tmp_path / "part.so").write_bytes(code[: int(len(code) * share)])
    with pytest.raises(CannotLoad, match=r"The file is no compiled library, or a part of one\."):
        load(tmp_path / "part.so")
    with pytest.raises(CannotLoad, match=r"The library cannot be loaded: .*No such file"):
        load(tmp_path / "none.so")


@pytest.mark.slow
def test_a_library_can_be_loaded_from_a_descriptor(small: Compiled, tmp_path: Path) -> None:
    code = small.path.read_bytes()
    with small.path.open("rb") as file:
        library = Library(ctypes.CDLL(f"/proc/self/fd/{file.fileno()}"), Description.of(code))
        assert all(map(torch.equal, library(*_random(0)), small.library(*_random(0))))


@pytest.mark.slow
def test_an_operator_that_fails_is_told_and_the_library_goes_on(small: Compiled) -> None:
    x, index = _random(0)
    expected = [output.clone() for output in small.library(x, index)]
    with pytest.raises(RuntimeError, match=r"The library's run failed: .*out of bounds"):
        small.library(x, torch.full((8,), SIZE))
    assert all(map(torch.equal, small.library(x, index), expected))


def _graph(function: Callable[[Tensor], Any]) -> GraphModule:
    return make_fx(lambda x: function(x))(torch.ones(2, 3))


def test_no_compiler_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CannotCompile) as caught:
        compile_library(_graph(lambda x: (x.exp(),)), [torch.ones(2, 3)], tmp_path / "library.so")
    assert str(caught.value) == "There is no C++ compiler: g++ is not on PATH. Install it, or set CXX to another."
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiler_that_fails_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "x.cpp:1: error: no" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CannotCompile) as caught:
        compile_library(_graph(lambda x: (x.exp(),)), [torch.ones(2, 3)], tmp_path / "library.so")
    assert str(caught.value) == "AOTInductor does not take the captured step: x.cpp:1: error: no"
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("function", [lambda x: (x.exp(), None), lambda x: (x, x.t())])
def test_an_output_that_is_no_contiguous_tensor_is_refused(function: Callable[[Tensor], Any], tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=r"The captured step's output 1 is not a contiguous tensor"):
        compile_library(_graph(function), [torch.ones(2, 3)], tmp_path / "library.so")


@pytest.mark.slow
def test_an_operator_without_a_c_function_is_refused(tmp_path: Path) -> None:
    @torch.library.custom_op("library_tests::own", mutates_args=())
    def own(x: Tensor) -> Tensor:
        return x + 1

    own.register_fake(torch.empty_like)
    with pytest.raises(CannotCompile, match="AOTInductor has no C functions for all operators of the captured step"):
        compile_library(_graph(lambda x: (own(x),)), [torch.ones(2, 3)], tmp_path / "library.so")


# What it leaves.


@pytest.mark.slow
def test_compiling_again_leaves_the_same_file_and_nothing_else(
    small: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in ("HOME", "TMPDIR", "here")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(folders["here"])
    code, environment, state = small.graph.code, dict(os.environ), torch.get_rng_state()
    compile_library(small.graph, small.example, Path("../libraries/one.so"))
    found = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert found == {Path(each) for each in (*folders, "libraries", "libraries/one.so")}
    assert (tmp_path / "libraries" / "one.so").read_bytes() == small.path.read_bytes()
    assert small.graph.code == code
    assert all("val" in node.meta for node in small.graph.graph.nodes if node.op == "placeholder")
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 1
    assert not psutil.Process().children()


def test_an_identity_is_of_code_constants_shapes_and_threads() -> None:
    def named(constant: float, rows: int, function: Callable[[Tensor], Tensor] = torch.exp) -> str:
        kept = torch.full((3,), constant)
        example = [torch.ones(rows, 3)]
        return identity(make_fx(lambda x: (function(x) * kept,))(*example), example)

    first = named(1.0, 2)
    assert named(1.0, 2) == first
    others = {named(2.0, 2), named(1.0, 3), named(1.0, 2, torch.tanh)}
    torch.set_num_threads(2)
    try:
        others.add(named(1.0, 2))
    finally:
        torch.set_num_threads(1)
    assert len(others) == 4
    assert first not in others
