"""Captured steps that were rewritten for the C++ compiler compute what they did before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from models.random import WORD
from trainer.config import Cnn, Config, Mlp, Precision, Synthetic, Train, Transformer
from trainer.engines import capture, graph_passes, library
from trainer.strategies import steps

aten = torch.ops.aten
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": Mlp(dropout=0.25)},
    "cnn": {"model": Cnn()},
    "cnn_images": {"model": Cnn(), "data": Synthetic(shape=[28, 28, 1]), "train": Train(batch_size=8)},
    "cnn_colours": {"model": Cnn(), "data": Synthetic(shape=[12, 12, 3]), "train": Train(batch_size=8)},
    "cnn_none": {"model": Cnn(normalization="none", dropout=0.0)},
    "cnn_group": {"model": Cnn(normalization="group")},
    "transformer": {"model": Transformer(depth=1)},
}
# What they may change: the order of sums, in float32 and in sums that are rounded to bfloat16.
TOLERANCE = {"float32": 1e-5, "mixed_bfloat16": 4e-3}
# Keras' own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def captured(monkeypatch: pytest.MonkeyPatch, name: str, precision: str) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """The training step that a run would capture."""
    from trainer.workloads.train import Training

    found: list[tuple[GraphModule, tuple[Tensor, ...]]] = []

    def keep(function: Callable[..., Any], *example: Tensor, **how: Any) -> capture.Captured:
        found.append((make_fx(lambda *inputs: function(*inputs))(*example), example))
        return capture.Captured(found[0][0], "fx")

    monkeypatch.setattr(steps, "capture", keep)
    config = Config(precision=Precision(precision), **MODELS[name])
    steps.Steps(config, Training(config))
    return found[0]


def graph_of(function: Callable[..., Any], *example: Tensor) -> GraphModule:
    return make_fx(function)(*example)


def only(graph: GraphModule, *passes: Callable[[torch.fx.Graph], None]) -> GraphModule:
    """A copy rewritten by these passes only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_passes, "passes", lambda: list(passes))
        return graph_passes.rewritten(graph)


def targets(graph: GraphModule) -> set[object]:
    return {node.target for node in graph.graph.nodes}


def distance(given: Tensor, expected: Tensor) -> float:
    """Relative to the length of all of it."""
    return float((given.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_all_passes_together_keep_a_steps_values(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, example = captured(monkeypatch, name, precision)
    code = graph.code
    # Also those that this CPU does without.
    monkeypatch.setattr(graph_passes, "multiplies_bfloat16", lambda: False)
    for given, expected in zip(graph_passes.rewritten(graph)(*example), graph(*example), strict=True):
        assert given.dtype == expected.dtype
        assert given.is_contiguous()
        assert distance(given, expected) <= TOLERANCE[precision]
    assert graph.code == code  # as it was


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("each", ["drop_copies_for_layout", "pool_by_comparing", "hash_in_32_bits"])
def test_a_pass_that_says_so_keeps_every_bit(each: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, example = captured(monkeypatch, name, "float32")
    passes = [graph_passes.drop_copies_for_layout] if each == "pool_by_comparing" else []
    after = only(graph, *passes, getattr(graph_passes, each))(*example)
    assert all(torch.equal(given, expected) for given, expected in zip(after, graph(*example), strict=True))


def test_passes_find_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = captured(monkeypatch, "cnn_images", "float32")
    rewritten = graph_passes.rewritten(graph)
    left = targets(rewritten)
    assert aten.max_pool2d_with_indices.default in targets(graph)
    assert not {aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default} & left
    # The second convolution has 16 channels.
    assert len(rewritten.graph.find_nodes(op="call_function", target=aten.convolution.default)) == 1
    assert graph_passes.keeps_channels_last(rewritten)
    # Words of each sample's elements; those of samples or elements only are few.
    words = [
        node.meta["val"].dtype
        for node in rewritten.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        if node.meta["val"].shape == (8, 1568) and not node.meta["val"].is_floating_point()
    ]
    assert words == [torch.int32, torch.int32]


@pytest.mark.parametrize("shape", [(2, 3, 6, 9), (2, 1, 4, 6)])
@pytest.mark.parametrize("kernel", [(2, 3), (1, 3), (2, 1)])
def test_a_pools_gradient_goes_to_the_first_of_equals(shape: tuple[int, ...], kernel: tuple[int, int]) -> None:
    def pool(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        largest, where = aten.max_pool2d_with_indices(x, kernel, kernel)
        return largest, aten.max_pool2d_with_indices_backward(gradient, x, kernel, kernel, [0, 0], [1, 1], False, where)

    x = torch.randint(3, shape, generator=torch.Generator().manual_seed(0)).float()  # many are equal
    gradient = torch.randn(aten.max_pool2d_with_indices(x, kernel, kernel)[0].shape)
    graph = graph_of(pool, x, gradient)
    rewritten = only(graph, graph_passes.pool_by_comparing)
    assert aten.max_pool2d_with_indices.default not in targets(rewritten)
    assert all(map(torch.equal, rewritten(x, gradient), pool(x, gradient)))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(([3, 3], [2, 2]), id="windows overlap"),
        pytest.param(([2, 2], [3, 3]), id="values are left out"),
        pytest.param(([2, 2], [2, 2], [1, 1]), id="padding"),
        pytest.param(([5, 5], [5, 5]), id="a rest that fills no window"),
        pytest.param(([2, 2], [2, 2], [0, 0], [2, 2]), id="dilation"),
    ],
)
def test_a_pool_of_another_kind_is_left_alone(how: tuple[list[int], ...]) -> None:
    graph = graph_of(lambda x: aten.max_pool2d_with_indices(x, *how)[0], torch.randn(2, 3, 6, 6))
    assert aten.max_pool2d_with_indices.default in targets(only(graph, graph_passes.pool_by_comparing))


def test_a_copy_of_what_is_written_to_later_stays() -> None:
    changes = False

    def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
        own = x * 2
        copy = own.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        if changes:
            own.add_(1)
        return aten.max_pool2d_with_indices(copy, [2, 2])[0], own

    x = torch.randn(2, 4, 4, 3)
    for changes in (True, False):
        graph = graph_of(pooled, x)
        rewritten = only(graph, graph_passes.drop_copies_for_layout)
        assert (aten.clone.default in targets(rewritten)) == changes
        assert all(map(torch.equal, rewritten(x), pooled(x)))


@pytest.mark.parametrize("padding", [[0, 0], [1, 1], [2, 0]])
def test_one_channel_is_convolved_by_a_product(padding: list[int]) -> None:
    def convolved(x: Tensor, kernel: Tensor, bias: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        how = ([1, 1], padding, [1, 1], False, [0, 0], 1)
        found = aten.convolution(x, kernel, bias, *how)
        return found, aten.convolution_backward(gradient, x, kernel, [0], *how, [False, True, False])[1]

    x, kernel, bias = torch.randn(3, 1, 7, 6), torch.randn(5, 1, 3, 2), torch.randn(5)
    gradient = torch.randn(aten.convolution(x, kernel, bias, [1, 1], padding, [1, 1], False, [0, 0], 1).shape)
    inputs = (x, kernel, bias, gradient)
    rewritten = only(graph_of(convolved, *inputs), graph_passes.multiply_taps)
    assert not {aten.convolution.default, aten.convolution_backward.default} & targets(rewritten)
    for given, expected in zip(rewritten(*inputs), convolved(*inputs), strict=True):
        torch.testing.assert_close(given, expected)


def test_words_of_32_bits_are_the_same_at_both_ends() -> None:
    def mixed(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x & WORD
        x = (x ^ torch.bitwise_right_shift(x, 16)) * 0x7FEB352D & WORD
        x = (x ^ torch.bitwise_right_shift(x, 15)) * (0x846CA68B - (1 << 32)) & WORD
        return x, x >= 0x80000001

    x = torch.cat([torch.arange(-3, 3), torch.tensor([WORD, WORD - 1, 2**31, 2**31 - 1])])
    rewritten = only(graph_of(mixed, x), graph_passes.hash_in_32_bits)
    assert torch.int32 in {node.meta["val"].dtype for node in rewritten.graph.nodes if "val" in node.meta}
    assert all(map(torch.equal, rewritten(x), mixed(x)))


def test_numbers_that_may_have_more_bits_stay_in_64() -> None:
    graph = graph_of(lambda x: (x * 0x7FEB352D) ^ (x >> 16), torch.arange(4))
    after = only(graph, graph_passes.hash_in_32_bits)
    assert {node.meta["val"].dtype for node in after.graph.nodes if "val" in node.meta} == {torch.int64}


@pytest.mark.parametrize(
    ("cpu", "native"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC", "avx2": True}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_multiplied_as_the_cpu_is_faster(
    cpu: dict[str, object], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    inputs = torch.randn(4, 8).bfloat16(), torch.randn(8, 2).bfloat16()
    graph = graph_of(lambda x, y: x @ y, *inputs)
    rewritten = graph_passes.rewritten(graph)
    (product,) = rewritten.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert product.args[0].meta["val"].dtype == (torch.bfloat16 if native else torch.float32)
    assert rewritten(*inputs).dtype == torch.bfloat16
    # Products that are known exactly are the same either way.
    exact = [each.sign() for each in inputs]
    assert torch.equal(rewritten(*exact), graph(*exact))


def test_products_are_written_into_the_concatenation(tmp_path: Path) -> None:
    def parts(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (torch.cat([x[0], (x @ y).view(-1), y[0]]),)

    inputs = torch.randn(16, 16), torch.randn(16, 16)
    files, _ = library._generate(graph_of(parts, *inputs), inputs, library.find_compiler(), tmp_path)
    source = Path(next(path for path in files if path.endswith(".cpp"))).read_text()
    # A view of the concatenation, 16 elements from its beginning, and no loop over a product's 256 elements.
    assert re.search(r"reinterpret_tensor_wrapper\(buf\d, 2, \w+, \w+, 16L\)", source)
    assert "256L)" not in source
