"""TorchScript source of captured graphs: the same bits as the graph itself, and a digest of all that decides them."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from trainer.cache.entry import pack, unpack
from trainer.cache.store import Store, Wanted
from trainer.config import Cnn, Config, Linear, Mlp, Precision, Train, Transformer
from trainer.engines import capture
from trainer.engines.capture import Captured
from trainer.engines.script_entry import to_entry, to_script
from trainer.engines.script_source import Script, ScriptError, digest, load, write
from trainer.strategies.steps import Steps
from trainer.workloads.train import Training

ROOT = Path(__file__).parents[1]
WAIT = 30.0
VERSIONS = {"torch": torch.__version__}
BATCH = 8
MODELS: dict[str, Any] = {
    "linear": Linear(),
    "mlp": Mlp(),
    "mlp_dropout": Mlp(dropout=0.2),
    "cnn_none": Cnn(normalization="none"),
    "cnn_batch": Cnn(normalization="batch"),
    "cnn_group": Cnn(normalization="group"),
    "transformer": Transformer(),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Kernels that share their work out may add in another order each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Step:
    """A training step's graph, as `Steps` captures it, and inputs of it: those of each of some steps."""

    graph: GraphModule
    inputs: list[tuple[Tensor, ...]]


def step_of(model: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> Step:
    graphs: list[GraphModule] = []

    def kept(graph: GraphModule) -> Captured:
        graphs.append(copy.deepcopy(graph))
        return Captured(graph, "fx")

    monkeypatch.setattr(capture, "_scripted", kept)
    monkeypatch.setattr(capture, "WARM_UP_CALLS", 0)
    config = Config(model=model, precision=Precision(precision), train=Train(batch_size=BATCH))
    training = Training(config)
    steps = Steps(config, training)
    prefix = torch.from_numpy(training.initial[: training.layout.read_size].copy())
    data = torch.from_numpy(training.dataset.train_x), torch.from_numpy(training.dataset.train_y)
    inputs = [
        (
            prefix + number * 0.001 * torch.sin(torch.arange(len(prefix))),
            steps.templates[0],
            *data,
            torch.arange(BATCH) + number * BATCH,
            torch.tensor(number),
            steps.positions(0),
        )
        for number in range(4)
    ]
    return Step(graphs[0], inputs)


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)


def bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def graph_of(function: Callable[..., Any], *example: Tensor) -> GraphModule:
    graph: GraphModule = make_fx(function)(*example)
    return graph


# The same bits.


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' own
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("model", list(MODELS))
def test_a_training_step_has_the_bits_of_its_graph_also_out_of_a_file(
    model: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(MODELS[model], precision, monkeypatch)
    script = write(step.graph)
    content = digest(script, VERSIONS)
    entry = to_entry(script, id="1", name="step", content=content, versions=VERSIONS, compile_seconds=1.0)
    functions = [load(script), load(to_script(unpack(pack(entry))))]
    with torch.no_grad():
        expected = [step.graph(*inputs) for inputs in step.inputs]
        assert not same_bits(expected[0], expected[1])
        # The first calls are profiled, the others run what came of that.
        for function in functions:
            for inputs, result in zip(step.inputs, expected, strict=True):
                assert same_bits(function(*inputs), result)


@pytest.mark.parametrize(("way", "same"), [("written", True), ("addmm", False)])
def test_a_product_with_a_bias_is_rounded_once(way: str, same: bool) -> None:
    torch.manual_seed(0)
    bias, left, right = torch.randn(512), torch.randn(64, 784), torch.randn(784, 512)
    graph = graph_of(torch.addmm, bias, left, right)
    script = write(graph)
    assert "aten.linear(x1, aten.t(x2), x0)" in script.source
    if way == "addmm":  # as the graph has it
        source = script.source.replace("aten.linear(x1, aten.t(x2), x0)", "aten.addmm(x0, x1, x2)")
        script = dataclasses.replace(script, source=source)
    function = load(script)
    assert same_bits([function(bias, left, right) for _ in range(3)], [graph(bias, left, right)] * 3) == same


def _shapes(x: Tensor) -> Any:
    largest, where = torch.max(x, 1)
    parts = x.split(2, 1)
    picked = x[:, torch.tensor([2, 0])]
    return largest, (where, parts[1]), [picked.sum([]), x.new_ones([])]


def _values(x: Tensor) -> Any:
    filled = torch.full_like(x, -math.inf).masked_fill(x > 0, 1e-45)
    return filled.pow(-0.0), x.div(3.0, rounding_mode="trunc"), torch.nn.functional.gelu(x, approximate="tanh")


def _dtypes(x: Tensor) -> Any:
    half, wide = x.bfloat16(), torch.arange(3, dtype=torch.float64)
    return (x > 0).to(torch.int32), half * half, wide, torch.view_as_real(x.to(torch.complex64)), x.contiguous()


def _constants(x: Tensor) -> Any:
    return (
        x + torch.tensor([[1.0], [2.0], [3.0]]) * torch.tensor(2**40),
        torch.tensor([True, False]) & torch.tensor(True),
        torch.tensor([], dtype=torch.float16) * 2,
        torch.tensor([1.5, -0.0], dtype=torch.bfloat16).neg_(),
    )


@pytest.mark.parametrize("function", [_shapes, _values, _dtypes, _constants])
def test_whatever_a_graph_is_made_of_has_its_bits_also_out_of_a_file(function: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    graph = graph_of(function, x)
    script = write(graph)
    entry = to_entry(script, id="1", name="step", content="", versions=VERSIONS, compile_seconds=0.0)
    expected = graph(x)
    for found in (load(script), load(to_script(unpack(pack(entry))))):
        for _ in range(3):
            assert same_bits(found(x), expected)


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1))
def test_every_number_is_written_exactly(number: float, whole: int) -> None:
    graph = graph_of(
        lambda x: (
            torch.full((1,), number, dtype=torch.float64),
            torch.full((1,), whole, dtype=torch.int64),
        ),
        torch.zeros(1),
    )
    found, found_whole = load(write(graph))(torch.zeros(1))
    assert struct.pack("d", found.item()) == struct.pack("d", number)
    assert found_whole.item() == whole


def test_threads_that_call_one_function_at_once_get_what_each_gets_alone() -> None:
    torch.manual_seed(0)
    graph = graph_of(lambda x, w: torch.tanh(x @ w) @ torch.ones(64, 3), torch.randn(64, 64), torch.randn(64, 64))
    function = load(write(graph))
    inputs = [(torch.randn(64, 64), torch.randn(64, 64)) for _ in range(8)]
    expected = [graph(*each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(function, *inputs[number % 8]) for number in range(200)]
        found = [future.result(WAIT) for future in futures]
    assert all(same_bits(each, expected[number % 8]) for number, each in enumerate(found))


# What cannot be written.


def _branch(x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def _not_contiguous(x: Tensor) -> Any:
    return x @ torch.arange(12.0).reshape(3, 4).t()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda x: make_fx(_branch)(x), "cond is no operator that can be written"),
        (
            lambda x: make_fx(lambda x: x * x.shape[0], tracing_mode="symbolic")(x),
            "input x_1 is no tensor of a fixed shape",
        ),
        (lambda x: make_fx(lambda x: {"a": x + 1})(x), "argument .* cannot be written"),
        (lambda x: torch.fx.symbolic_trace(torch.nn.Linear(3, 2)), "is no operator that can be written"),
        (lambda x: torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 2))), "call_module"),
        (lambda x: with_constant(torch.arange(6.0).reshape(2, 3).t()), "constant c cannot be written"),
        (lambda x: with_constant(torch.eye(3).to_sparse()), "constant c cannot be written"),
        (lambda x: with_constant("text"), "constant c cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused(make: Callable[[Tensor], GraphModule], problem: str) -> None:
    with pytest.raises(ScriptError, match=problem):
        write(make(torch.randn(4, 4)))


def with_constant(value: Any) -> GraphModule:
    root = torch.nn.Module()
    root.c = value
    graph = torch.fx.Graph()
    graph.output(graph.get_attr("c"))
    return GraphModule(root, graph)


def test_source_that_is_none_is_refused() -> None:
    for source in ("", "def step(x0)\n", "\x00\xff", "def other(x0):\n    return x0\n", "class step:\n    pass\n"):
        with pytest.raises(ScriptError):
            load(Script("step", source, ()))


# Source from a file is data.


HOSTILE = {
    "makes a file": "    return aten.from_file('{path}', True, 8)\n",
    "writes a file": "    aten.save(x0, '{path}')\n    return x0\n",
    "prints": "    print(x0)\n    return x0\n",
    "loops": "    while True:\n        x0 = aten.add(x0, 1)\n    return x0\n",
    "branches": "    if bool(aten.sum(x0) > 0):\n        x0 = aten.add(x0, 1)\n    return x0\n",
    "raises": "    raise RuntimeError('no')\n    return x0\n",
    "calls": "    return other(x0)\ndef other(x0):\n    return x0\n",
    "imports": "    import os\n    return x0\n",
    "opens": "    open('{path}', 'w')\n    return x0\n",
    "reaches into torch": "    return torch.ops.aten.add(x0, x0)\n",
    "calls Python": "    return torch.hub.load('{path}', 'model')\n",
    "other namespace": "    return prims.add(x0, x0)\n",
}


@pytest.mark.parametrize("way", list(HOSTILE))
def test_source_that_does_anything_but_compute_is_refused(tmp_path: Path, way: str) -> None:
    path = tmp_path / "made"
    source = "def step(x0):\n" + HOSTILE[way].format(path=path)
    with pytest.raises(ScriptError):
        load(Script("step", source, ()))(torch.ones(2))
    assert not path.exists()


@pytest.mark.parametrize("way", ["makes a file", "writes a file"])
def test_torchscript_itself_takes_source_that_writes_files(tmp_path: Path, way: str) -> None:
    """The unsafe twin: the same source, taken as it is."""
    path = tmp_path / "made"
    unit = torch.jit.CompilationUnit()
    unit.define("def step(x0):\n" + HOSTILE[way].format(path=path), {"aten": torch.ops.aten}.get)
    assert not path.exists()
    unit.step(torch.ones(2))
    assert path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"dtype": "float64"},
        {"dtype": "Tensor"},
        {"dtype": "nothing"},
        {"shape": (3, 2)},
        {"shape": ()},
        {"shape": (2**62, 4)},
        {"data": b""},
    ],
)
def test_an_array_that_is_none_is_refused(damage: dict[str, Any]) -> None:
    graph = graph_of(lambda x: x + torch.tensor([1.0, 2.0]), torch.zeros(2))
    entry = to_entry(write(graph), id="1", name="step", content="", versions=VERSIONS, compile_seconds=0.0)
    arrays = (dataclasses.replace(entry.arrays[0], **damage),)
    with pytest.raises(ScriptError, match="bytes are no"):
        to_script(dataclasses.replace(entry, arrays=arrays))


# What a step is called, and what it is.


def script_of(scale: float = 2.0, *, size: int = 3, dtype: torch.dtype = torch.float32, symbol: str = "step") -> Script:
    return write(
        graph_of(lambda x: torch.tanh(x) * torch.tensor([scale, 1.0]), torch.zeros(size, 2, dtype=dtype)), symbol
    )


def test_the_digest_tells_all_that_decides_the_bits_apart_and_no_names() -> None:
    plain = digest(script_of(), VERSIONS)
    assert digest(script_of(symbol="another"), VERSIONS) == plain
    assert digest(script_of(), dict(VERSIONS)) == plain
    others = [
        digest(script_of(math.nextafter(2.0, 3.0) + 1e-6), VERSIONS),
        digest(script_of(size=4), VERSIONS),
        digest(script_of(dtype=torch.bfloat16), VERSIONS),
        digest(script_of(), {"torch": "2.12.0"}),
        digest(script_of(), {**VERSIONS, "keras": "3.15.1"}),
        digest(write(graph_of(lambda x: torch.sin(x) * torch.tensor([2.0, 1.0]), torch.zeros(3, 2))), VERSIONS),
        digest(write(graph_of(lambda x: torch.tanh(x) * torch.tensor([2, 1]), torch.zeros(3, 2))), VERSIONS),
        digest(write(graph_of(lambda x: torch.tanh(x) * torch.tensor([[2.0, 1.0]]), torch.zeros(3, 2))), VERSIONS),
    ]
    assert len({plain, *others}) == 1 + len(others)
    # The source alone does not: constants are not in it, nor are the shapes that it was captured for.
    assert len({script_of(scale, size=size).source for scale in (2.0, 3.0) for size in (3, 4)}) == 1


IN_ANOTHER_PROCESS = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from trainer.engines.script_source import digest, write
graph = make_fx(lambda x: torch.tanh(x) * torch.tensor([2.0, 1.0]))(torch.zeros(3, 2))
print(digest(write(graph), {"torch": torch.__version__}))
"""


@pytest.mark.slow
def test_another_process_comes_to_the_same_digest() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert ended.stdout.strip() == digest(script_of(), VERSIONS)


@pytest.mark.parametrize("symbol", ["stored", "own"])
def test_a_step_is_called_by_the_name_in_its_file(tmp_path: Path, symbol: str) -> None:
    """A process that draws names, as uuids are, draws others than the one that wrote the file."""
    drawn, drawn_here = "step_3f2a", "step_91bc"
    script = script_of(symbol=drawn)
    entry = to_entry(script, id="1", name="step", content="c", versions=VERSIONS, compile_seconds=0.1)
    Store(tmp_path / "cache").save(entry)
    found = Store(tmp_path / "cache").load("1", Wanted("step", "c", VERSIONS))
    assert found is not None
    x = torch.randn(3, 2)
    if symbol == "stored":
        assert same_bits(load(to_script(found))(x), torch.tanh(x) * torch.tensor([2.0, 1.0]))
    else:
        with pytest.raises(ScriptError):
            load(dataclasses.replace(to_script(found), symbol=drawn_here))


def test_a_captured_step_has_its_own_casts_and_not_those_of_a_mode_that_is_on() -> None:
    def product(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x @ y

    x, y = torch.rand(4, 4), torch.rand(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        captured = capture.capture(product, x, y)
        assert captured(x, y).dtype == torch.float32
        # Without that, TorchScript casts.
        assert captured.call(x, y).dtype == torch.bfloat16
