"""The shared vector under a schedule: what is announced of every kind of access, and that nothing else is different."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.schedule.operations import READ, UPDATE, WRITE
from trainer.schedule.order import Order
from trainer.schedule.pieces import Pieces
from trainer.schedule.point import Hidden, hosted
from trainer.schedule.turnstile import Failed, Turnstile
from trainer.schedule.visible import Visible, watched
from trainer.state.layout import plan

WAIT = 30.0
LAYOUT = plan([("kernel", (4, 3)), ("bias", (2,))], [("mean", (2,))], (), counter=False, num_replicas=2)
KERNEL, BIAS, MEAN = (segment.span for segment in LAYOUT.segments)
SIZE = LAYOUT.size
# From the middle of the first variable to the middle of the second.
ACROSS = slice(KERNEL.start + 5, BIAS.start + 1)

Use = Callable[[Tensor], Any]


def values() -> Tensor:
    return torch.sin(torch.arange(SIZE, dtype=torch.float32)) * 3


def told(use: Use, *, splits: bool = False, chunks: int = 1, cuts: tuple[int, ...] = ()) -> list[str]:
    """What a replica announces that uses the vector so; what comes of it is what comes of a plain one, to the bit."""
    memory, plain = values(), values()
    vector = watched(memory, Pieces(LAYOUT, chunks=chunks, cuts=cuts), splits_updates=splits)
    results: list[Any] = []

    def body() -> None:
        torch.set_grad_enabled(False)
        torch.manual_seed(7)
        results.append(use(vector))

    order = Order(1, lambda order: order.able()[0])
    Turnstile(order, WAIT).run([body])
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        expected = use(plain)
    assert_same(results[0], expected, plain)
    assert_bits(memory, plain)
    return order.told


def assert_same(found: Any, expected: Any, plain: Tensor) -> None:
    """Equal, and visible exactly where it is the shared vector's memory."""
    if isinstance(expected, (list, tuple)) and any(isinstance(each, Tensor) for each in expected):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, plain)
    elif isinstance(expected, Tensor):
        is_view = expected.untyped_storage().data_ptr() == plain.untyped_storage().data_ptr()
        assert isinstance(found, Visible) == is_view
        assert_bits(found.plain if isinstance(found, Visible) else found, expected)
    else:
        assert found == expected


def assert_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.contiguous().numpy().tobytes() == expected.contiguous().numpy().tobytes()


def kinds(kind: str, *names: str) -> list[str]:
    return [f"{kind} {name}" for name in names]


# Reading.


READS: dict[str, tuple[Use, list[str]]] = {
    "operator": (lambda v: v + 1.0, kinds(READ, "kernel", "bias", "mean")),
    "of one variable": (lambda v: v[KERNEL] * 2.0, kinds(READ, "kernel")),
    "across two": (lambda v: v[ACROSS].sum(), kinds(READ, "kernel", "bias")),
    "clone": (lambda v: v.clone(), kinds(READ, "kernel", "bias", "mean")),
    "into a copy": (lambda v: torch.zeros(SIZE).copy_(v), kinds(READ, "kernel", "bias", "mean")),
    "added to something else": (lambda v: torch.ones(12).add_(v[KERNEL]), kinds(READ, "kernel")),
    "into a slice": (lambda v: torch.zeros(20).__setitem__(slice(0, 12), v[KERNEL]), kinds(READ, "kernel")),
    "twice in one operator": (lambda v: v[BIAS] * v[BIAS], kinds(READ, "bias")),
    "two variables in one operator": (lambda v: v[BIAS] + v[MEAN], kinds(READ, "bias", "mean")),
    "in a list": (lambda v: torch.cat([v[MEAN], torch.ones(1), v[BIAS]]), kinds(READ, "mean", "bias")),
    "by name": (lambda v: torch.add(input=v[BIAS], other=v[MEAN], alpha=2), kinds(READ, "bias", "mean")),
    "several results": (lambda v: torch.aminmax(v[KERNEL]), kinds(READ, "kernel")),
    "several results by name": (lambda v: torch.max(v[KERNEL].view(4, 3), dim=0), kinds(READ, "kernel")),
    "a number": (lambda v: v[BIAS.start].item(), kinds(READ, "bias")),
    "a float": (lambda v: float(v[MEAN.start]), kinds(READ, "mean")),
    "a condition": (lambda v: bool(v[BIAS.start] > 100), kinds(READ, "bias")),
    "a list": (lambda v: v[BIAS].tolist(), kinds(READ, "bias")),
    "printed": (lambda v: repr(v[BIAS]), kinds(READ, "bias")),
    "formatted": (lambda v: f"{v[BIAS.start]:.3f}", kinds(READ, "bias")),
    "compared": (lambda v: torch.equal(v[BIAS], v[MEAN]), kinds(READ, "bias", "mean")),
    "deep copy": (lambda v: copy.deepcopy(v[BIAS]), kinds(READ, "bias")),
    "pickled": (lambda v: pickle.loads(pickle.dumps(v[BIAS])), kinds(READ, "bias")),
    "torch.tensor": (lambda v: torch.tensor(v[BIAS].tolist()), kinds(READ, "bias")),
    "another dtype": (lambda v: v[BIAS].double(), kinds(READ, "bias")),
    "a layer": (lambda v: torch.nn.functional.linear(torch.ones(2, 3), v[KERNEL].view(4, 3)), kinds(READ, "kernel")),
    "with gaps": (lambda v: v[KERNEL].view(4, 3)[:, 1] + 0.0, kinds(READ, "kernel")),
    "with gaps, across variables": (lambda v: v[:: SIZE // 2] * 1.0, kinds(READ, "kernel to bias")),
    "with gaps that hold a variable": (lambda v: v[KERNEL.start :: MEAN.start] * 1.0, kinds(READ, "kernel to mean")),
    "laid out anew": (lambda v: v[KERNEL].view(4, 3).T.reshape(-1), kinds(READ, "kernel")),
    "by index": (lambda v: v[torch.tensor([MEAN.start, KERNEL.start])], kinds(READ, "kernel", "mean")),
    "by mask": (lambda v: v[torch.arange(SIZE) >= MEAN.start], kinds(READ, "mean")),
    "by a mask of its own": (lambda v: v[v > 100], kinds(READ, "kernel", "bias", "mean")),
    "index_select": (lambda v: v.index_select(0, torch.tensor([BIAS.start])), kinds(READ, "bias")),
    "gather": (lambda v: v.gather(0, torch.tensor([BIAS.start])), kinds(READ, "bias")),
    "masked_select": (lambda v: v.masked_select(torch.arange(SIZE) < 3), kinds(READ, "kernel")),
    "nothing": (lambda v: v[3:3] + 1.0, []),
    "nothing by index": (lambda v: v[3:3][torch.tensor([], dtype=torch.int64)], []),
}


@pytest.mark.parametrize(("use", "expected"), READS.values(), ids=list(READS))
@pytest.mark.parametrize("splits", [False, True])
def test_what_is_read_is_announced_and_nothing_else(use: Use, expected: list[str], splits: bool) -> None:
    assert told(use, splits=splits) == expected


LOOKS: dict[str, Use] = {
    "shape": lambda v: (
        v.shape,
        v.size(),
        v.dim(),
        v.numel(),
        len(v),
        v.stride(),
        v.storage_offset(),
        v.is_contiguous(),
    ),
    "kind": lambda v: (v.dtype, str(v.device), v.is_floating_point(), v.requires_grad, v.element_size(), v.is_leaf),
    "zeros_like": lambda v: torch.zeros_like(v),
    "new_ones": lambda v: v.new_ones(3),
    "slice": lambda v: v[ACROSS],
    "element": lambda v: v[3],
    "view": lambda v: v[KERNEL].view(4, 3),
    "reshape": lambda v: v[KERNEL].reshape(3, 4),
    "transposed": lambda v: v[KERNEL].view(4, 3).T,
    "detached": lambda v: v.detach(),
    "detached in place": lambda v: v.detach_(),
    "data": lambda v: v.data,
    "split": lambda v: v.split(48),
    "unbound": lambda v: v[KERNEL].view(4, 3).unbind(0),
    "looped over": lambda v: list(v[KERNEL].view(4, 3)),
    "as it is": lambda v: v.to("cpu"),
    "contiguous": lambda v: v.contiguous(),
    "flattened": lambda v: v[KERNEL].view(4, 3).flatten(),
    "as_tensor": lambda v: torch.as_tensor(v),
    "as_subclass": lambda v: v.as_subclass(Tensor),
    "as_strided": lambda v: v.as_strided((2, 2), (3, 1), 5),
    "itself": lambda v: v[KERNEL] is None,
}


@pytest.mark.parametrize("use", LOOKS.values(), ids=list(LOOKS))
def test_another_name_for_it_or_its_shape_is_no_access(use: Use) -> None:
    assert told(use) == []


# Writing.


def set_to(where: Any, value: Any) -> Use:
    return lambda v: v.__setitem__(where, value)


def add_to(where: Any, value: Any) -> Use:
    def use(v: Tensor) -> None:
        v[where] += value

    return use


def each_row(v: Tensor) -> None:
    for row in v[KERNEL].view(4, 3)[:2]:
        row.add_(1.0)


ONES = torch.ones(SIZE)
AT_MEAN = torch.tensor([MEAN.start])

UPDATES: dict[str, tuple[Use, list[str]]] = {
    "add_": (lambda v: v.add_(ONES), ["kernel", "bias", "mean"]),
    "add_ a number": (lambda v: v[ACROSS].add_(0.1), ["kernel", "bias"]),
    "add_ alpha": (lambda v: v[KERNEL].add_(ONES[KERNEL], alpha=-0.3), ["kernel"]),
    "add_ one element to all": (lambda v: v[ACROSS].add_(torch.tensor([0.1])), ["kernel", "bias"]),
    "add_ a double to all": (lambda v: v[ACROSS].add_(torch.tensor(0.1, dtype=torch.float64)), ["kernel", "bias"]),
    "an element": (lambda v: v[BIAS.start].add_(torch.tensor(0.1, dtype=torch.float64)), ["bias"]),
    "sub_": (lambda v: v.sub_(ONES / 3), ["kernel", "bias", "mean"]),
    "mul_": (lambda v: v[ACROSS].mul_(0.3), ["kernel", "bias"]),
    "div_": (lambda v: v[ACROSS].div_(ONES[ACROSS] * 3), ["kernel", "bias"]),
    "div_ rounded": (lambda v: v[ACROSS].div_(0.3, rounding_mode="floor"), ["kernel", "bias"]),
    "neg_": (lambda v: v[ACROSS].neg_(), ["kernel", "bias"]),
    "lerp_": (lambda v: v.lerp_(ONES, 0.3), ["kernel", "bias", "mean"]),
    "addcmul_": (lambda v: v.addcmul_(ONES, ONES / 3, value=0.3), ["kernel", "bias", "mean"]),
    "addcdiv_": (lambda v: v.addcdiv_(ONES, ONES * 3, value=0.3), ["kernel", "bias", "mean"]),
    "+=": (lambda v: v.__iadd__(ONES), ["kernel", "bias", "mean"]),
    "+= of a slice": (add_to(KERNEL, 1.0), ["kernel"]),
    "+= of an element": (add_to(MEAN.start, 1.0), ["mean"]),
    "of data": (lambda v: v.data.add_(1.0), ["kernel", "bias", "mean"]),
    "of what is no copy": (lambda v: v.to("cpu").contiguous().float().add_(1.0), ["kernel", "bias", "mean"]),
    "torch.ops": (lambda v: torch.ops.aten.add_.Tensor(v[KERNEL], ONES[KERNEL]), ["kernel"]),
    "in a loop": (each_row, ["kernel", "kernel"]),
}


@pytest.mark.parametrize(("use", "names"), UPDATES.values(), ids=list(UPDATES))
def test_an_in_place_kernel_is_an_update_of_each_variable(use: Use, names: list[str]) -> None:
    assert told(use) == kinds(UPDATE, *names)


@pytest.mark.parametrize(("use", "names"), UPDATES.values(), ids=list(UPDATES))
def test_in_visible_pieces_an_in_place_kernel_reads_and_writes(use: Use, names: list[str]) -> None:
    assert told(use, splits=True) == [f"{kind} {name}" for name in names for kind in (READ, WRITE)]


WRITES: dict[str, tuple[Use, list[str]]] = {
    "copy_": (lambda v: v.copy_(ONES), ["kernel", "bias", "mean"]),
    "copy_ of one": (lambda v: v[ACROSS].copy_(torch.tensor(3.0)), ["kernel", "bias"]),
    "copy_ of another dtype": (lambda v: v[ACROSS].copy_(ONES[ACROSS].double() / 3), ["kernel", "bias"]),
    "copy_ of a row to all": (lambda v: v[KERNEL].view(4, 3).copy_(ONES[:3]), ["kernel"]),
    "fill_": (lambda v: v[ACROSS].fill_(2.0), ["kernel", "bias"]),
    "zero_": (lambda v: v.zero_(), ["kernel", "bias", "mean"]),
    "normal_": (lambda v: v[ACROSS].normal_(), ["kernel", "bias"]),
    "a slice": (set_to(ACROSS, ONES[ACROSS]), ["kernel", "bias"]),
    "a slice to a number": (set_to(KERNEL, 3), ["kernel"]),
    "an element": (set_to(MEAN.start, 3.0), ["mean"]),
    "rows": (lambda v: v[KERNEL].view(4, 3).__setitem__(slice(1, 3), torch.ones(3)), ["kernel"]),
    "out=": (lambda v: torch.add(ONES[ACROSS], 1.0, out=v[ACROSS]), ["kernel", "bias"]),
}


@pytest.mark.parametrize(("use", "names"), WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("splits", [False, True])
def test_what_replaces_is_a_write_of_each_variable(use: Use, names: list[str], splits: bool) -> None:
    assert told(use, splits=splits) == kinds(WRITE, *names)


WHOLE: dict[str, tuple[Use, list[str]]] = {
    "unknown": (lambda v: v.cumsum_(0), kinds(UPDATE, "kernel to mean")),
    "unknown, of one variable": (lambda v: v[KERNEL].exp_(), kinds(UPDATE, "kernel")),
    "inplace=True": (lambda v: torch.nn.functional.relu(v[ACROSS], inplace=True), kinds(UPDATE, "kernel to bias")),
    "power": (lambda v: v[KERNEL].__ipow__(2), kinds(UPDATE, "kernel")),
    "with gaps": (lambda v: v[KERNEL].view(4, 3)[:, 1].add_(1.0), kinds(UPDATE, "kernel")),
    "with gaps, replaced": (lambda v: v[:: SIZE // 2].zero_(), kinds(WRITE, "kernel to bias")),
    "a row to all": (lambda v: v[KERNEL].view(4, 3).add_(torch.ones(3)), kinds(UPDATE, "kernel")),
    "a transposed operand": (lambda v: v[KERNEL].view(3, 4).add_(ONES[KERNEL].view(4, 3).T), kinds(UPDATE, "kernel")),
    "a list of tensors": (lambda v: torch._foreach_add_([v[MEAN], v[KERNEL]], 1.0), kinds(UPDATE, "mean to kernel")),
    "statistics": (
        lambda v: torch.nn.functional.batch_norm(torch.arange(6.0).view(3, 2), v[MEAN], v[BIAS], training=True),
        kinds(UPDATE, "mean to bias"),
    ),
    "by index": (set_to(AT_MEAN, 3.0), kinds(WRITE, "mean")),
    "by mask": (set_to(torch.arange(SIZE) < 60, 0.0), kinds(WRITE, "kernel to bias")),
    "added by index": (add_to(AT_MEAN, 1.0), [*kinds(READ, "mean"), *kinds(WRITE, "mean")]),
    "accumulated by index": (
        lambda v: v.index_put_((AT_MEAN,), torch.tensor(1.0), accumulate=True),
        kinds(UPDATE, "mean"),
    ),
    "index_add_": (lambda v: v.index_add_(0, AT_MEAN, ONES[:1]), kinds(UPDATE, "mean")),
    "index_copy_": (lambda v: v.index_copy_(0, AT_MEAN, ONES[:1]), kinds(WRITE, "mean")),
    "index_fill_": (lambda v: v.index_fill_(0, AT_MEAN, 2.0), kinds(WRITE, "mean")),
    "masked_fill_": (lambda v: v.masked_fill_(torch.arange(SIZE) < 3, 2.0), kinds(WRITE, "kernel")),
    "scatter_": (lambda v: v.scatter_(0, AT_MEAN, 2.0), kinds(WRITE, "mean")),
    "scatter_ that adds": (lambda v: v.scatter_(0, AT_MEAN, 2.0, reduce="add"), kinds(UPDATE, "mean")),
    "scatter_add_": (lambda v: v.scatter_add_(0, AT_MEAN, ONES[:1]), kinds(UPDATE, "mean")),
    "put_": (lambda v: v.put_(AT_MEAN, ONES[:1]), kinds(WRITE, "mean")),
}


@pytest.mark.parametrize(("use", "expected"), WHOLE.values(), ids=list(WHOLE))
@pytest.mark.parametrize("splits", [False, True])
def test_what_cannot_be_cut_up_is_one_operation(use: Use, expected: list[str], splits: bool) -> None:
    assert told(use, splits=splits) == expected


BOTH: dict[str, tuple[Use, list[str]]] = {
    "copied from itself": (lambda v: v[BIAS].copy_(v[MEAN]), [*kinds(READ, "mean"), *kinds(WRITE, "bias")]),
    "set from itself": (lambda v: v.__setitem__(BIAS, v[MEAN] * 2), [*kinds(READ, "mean"), *kinds(WRITE, "bias")]),
    "set from itself in another dtype": (
        lambda v: v.__setitem__(BIAS, v[MEAN].double()),
        [*kinds(READ, "mean"), *kinds(WRITE, "bias")],
    ),
    "added to itself": (lambda v: v[BIAS].add_(v[MEAN]), [*kinds(READ, "mean"), *kinds(UPDATE, "bias")]),
    "out= of itself": (lambda v: torch.mul(v[BIAS], 2.0, out=v[BIAS]), [*kinds(READ, "bias"), *kinds(WRITE, "bias")]),
    "one of two outs": (
        lambda v: torch.max(v[KERNEL].view(4, 3)[:, :2], 0, out=(v[BIAS], torch.empty(2, dtype=torch.int64))),
        [*kinds(READ, "kernel"), *kinds(WRITE, "bias")],
    ),
}


@pytest.mark.parametrize(("use", "expected"), BOTH.values(), ids=list(BOTH))
def test_what_else_an_operator_reads_comes_before_what_it_writes(use: Use, expected: list[str]) -> None:
    assert told(use) == expected


def test_what_is_written_to_is_given_back_as_it_was() -> None:
    def use(v: Tensor) -> bool:
        part = v[KERNEL]
        return part.add_(1.0) is part and torch.add(ONES[KERNEL], 1.0, out=part) is part and part.zero_() is part

    assert told(use) == [*kinds(UPDATE, "kernel"), *kinds(WRITE, "kernel", "kernel")]


# Pieces.


def test_variables_are_cut_into_chunks() -> None:
    pieces = Pieces(LAYOUT, chunks=3).pieces
    assert [piece.name for piece in pieces] == [
        f"{name}[{at}]" for name in ("kernel", "bias", "mean") for at in range(3)
    ]
    assert [pieces[0].start, *(piece.stop for piece in pieces)] == [*(piece.start for piece in pieces), SIZE]
    names = [piece.name for piece in pieces]
    assert told(lambda v: v.add_(ONES), chunks=3) == kinds(UPDATE, *names)
    assert told(lambda v: v.add_(ONES), chunks=3, splits=True) == [
        f"{k} {name}" for name in names for k in (READ, WRITE)
    ]
    assert told(lambda v: v[KERNEL.start] + 1.0, chunks=3) == kinds(READ, "kernel[1]")


def test_variables_are_cut_where_shares_meet() -> None:
    use = add_to(slice(KERNEL.start, KERNEL.start + 4), 1.0)
    assert told(use, cuts=(0, KERNEL.start + 2, BIAS.start + 1000)) == kinds(UPDATE, "kernel[0]", "kernel[1]")


def test_more_chunks_than_elements_are_one_a_element() -> None:
    pieces = Pieces(LAYOUT, chunks=1000).pieces
    assert [(piece.start, piece.stop) for piece in pieces] == [(at, at + 1) for at in range(SIZE)]


OPERATORS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda part, other: part.add_(other),
    lambda part, other: part.sub_(other, alpha=0.3),
    lambda part, other: part.mul_(0.7),
    lambda part, other: part.div_(other.abs() + 1),
    lambda part, other: part.lerp_(other, 0.3),
    lambda part, other: part.addcmul_(other, other, value=0.3),
    lambda part, other: part.addcdiv_(other, other.abs() + 1, value=-0.3),
    lambda part, other: part.copy_(other),
    lambda part, other: part.zero_(),
    lambda part, other: part.sqrt_(),
    lambda part, other: part.tanh_(),
    lambda part, other: part.__setitem__(slice(1, 5), 2.0),
    lambda part, other: part.__setitem__(slice(None), part * 0.5),
    lambda part, other: part[::2].add_(1.0),
    lambda part, other: (part * other).sum(),
    lambda part, other: torch.addcmul(part, part, other, out=part),
    lambda part, other: part.norm(),
]
SPANS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda pair: slice(pair[0], pair[0] + pair[1]))


@given(
    uses=st.lists(st.tuples(st.sampled_from(OPERATORS), SPANS, st.integers(0, 99)), max_size=6),
    splits=st.booleans(),
    chunks=st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_any_sequence_of_operators_comes_to_the_same_bits(uses: list[Any], splits: bool, chunks: int) -> None:
    def use(v: Tensor) -> list[Tensor]:
        results = []
        for operator, span, seed in uses:
            part = v[span]
            other = torch.randn(len(part), generator=torch.Generator().manual_seed(seed))
            result = operator(part, other)
            results.append(torch.zeros(()) if result is None else result)
        return results

    told(use, splits=splits, chunks=chunks)


@given(uses=st.lists(st.tuples(st.sampled_from(OPERATORS), SPANS, st.integers(0, 99)), max_size=4))
@settings(deadline=None, max_examples=40)
def test_nothing_is_changed_that_was_not_announced(uses: list[Any]) -> None:
    memory, pieces = values(), Pieces(LAYOUT, chunks=4)
    vector = watched(memory, pieces, splits_updates=False)
    before = memory.clone()

    def body() -> None:
        torch.set_grad_enabled(False)
        for operator, span, seed in uses:
            part = vector[span]
            operator(part, torch.randn(len(part), generator=torch.Generator().manual_seed(seed)))

    order = Order(1, lambda order: order.able()[0])
    Turnstile(order, WAIT).run([body])
    changed = {piece.name for piece in pieces.at((memory != before).nonzero())}
    assert changed <= {
        place for event in order.history.events if event.operation.kind != READ for place in event.operation.places
    }


def test_an_update_in_pieces_loses_what_another_wrote_between() -> None:
    def kept(splits: bool) -> float:
        memory = torch.zeros(SIZE)
        vector = watched(memory, Pieces(LAYOUT), splits_updates=splits)
        # In turn, as long as both can go.
        order = Order(2, lambda order: len(order.granted) % 2)
        Turnstile(order, WAIT).run([partial(add_to(KERNEL, 1.0), vector)] * 2)
        return float(memory[KERNEL.start])

    assert kept(splits=False) == 2.0
    assert kept(splits=True) == 1.0


# What does not come by way of torch's operators in Python.


SCRIPTED = torch.jit.CompilationUnit(  # not torch.jit.script, which warns
    "def pure(a, b):\n    return a * 2 + b\ndef in_place(a, b):\n    a[0:20].add_(b[0:20])\n    return a\n"
)


def test_a_torchscript_function_is_seen_inside() -> None:
    assert told(lambda v: SCRIPTED.pure(v, ONES)) == kinds(READ, "kernel", "bias", "mean")
    assert told(lambda v: SCRIPTED.in_place(v, ONES)) == kinds(UPDATE, "kernel")


def test_a_gradient_by_the_shared_vector_reads_it() -> None:
    def use(v: Tensor) -> Tensor:
        with torch.enable_grad():
            weight = v[KERNEL].view(4, 3).detach().requires_grad_()
            (torch.ones(2, 4) @ weight).square().sum().backward()
            assert weight.grad is not None
            return weight.grad

    assert told(use) == kinds(READ, "kernel")


HIDDEN: dict[str, Use] = {
    "numpy": lambda v: v.numpy(),
    "np.asarray": lambda v: np.asarray(v),
    "dlpack": lambda v: torch.from_dlpack(v),
    "data_ptr": lambda v: v.data_ptr(),
    "storage": lambda v: v.untyped_storage(),
    "of a view": lambda v: v[KERNEL].view(4, 3).numpy(),
    "other data": lambda v: setattr(v, "data", torch.zeros(3)),
    "set_": lambda v: v.set_(torch.zeros(3)),
    "resize_": lambda v: v.resize_(3),
    "transpose_": lambda v: v[KERNEL].view(4, 3).transpose_(0, 1),
    "out= of another size": lambda v: torch.add(ONES, 1.0, out=v[KERNEL]),
}


@pytest.mark.filterwarnings("ignore")  # what torch says of some of them before they come here
@pytest.mark.parametrize("use", HIDDEN.values(), ids=list(HIDDEN))
def test_ways_round_the_announcements_are_refused(use: Use) -> None:
    memory = values()
    vector = watched(memory, Pieces(LAYOUT), splits_updates=False)
    with pytest.raises(Failed) as raised:
        Turnstile(Order(1, lambda order: 0), WAIT).run([lambda: use(vector)])
    assert isinstance(raised.value.__cause__, Hidden)
    assert "\n" not in str(raised.value.__cause__)
    assert_bits(memory, values())


def test_there_is_no_memory_behind_it() -> None:
    vector = watched(values(), Pieces(LAYOUT), splits_updates=False)
    capsule = torch.utils.dlpack.to_dlpack(vector)
    assert torch.utils.dlpack.from_dlpack(capsule).data_ptr() == 0


# Who is no replica.


class Deaf:
    """A host that has no replicas, and fails when it hears of anything."""

    order = Order(1, lambda order: 0)

    def own(self) -> None:
        return None

    def announce(self, own: int, operation: Any) -> None:
        raise AssertionError("nobody to hear of")


@pytest.mark.parametrize("is_hosted", [False, True])
def test_who_is_no_replica_uses_it_as_an_ordinary_tensor(is_hosted: bool) -> None:
    def check() -> None:
        for use, _ in (*READS.values(), *UPDATES.values(), *WRITES.values(), *WHOLE.values(), *BOTH.values()):
            memory, plain = values(), values()
            vector = watched(memory, Pieces(LAYOUT, chunks=2), splits_updates=True)
            with torch.no_grad():
                torch.manual_seed(7)
                found = use(vector)
                torch.manual_seed(7)
                assert_same(found, use(plain), plain)
            assert_bits(memory, plain)
        vector = watched(memory, Pieces(LAYOUT), splits_updates=True)
        assert vector.numpy().tobytes() == np.asarray(vector).tobytes() == memory.numpy().tobytes()
        assert vector.data_ptr() == memory.data_ptr()

    with torch.random.fork_rng():
        if is_hosted:
            with hosted(Deaf()):
                check()
        else:
            check()


def test_another_thread_reads_while_it_is_no_turn_of_its_own() -> None:
    memory = torch.zeros(SIZE)
    vector = watched(memory, Pieces(LAYOUT), splits_updates=False)
    seen: list[float] = []

    def body() -> None:
        vector[KERNEL].add_(1.0)
        reader = threading.Thread(target=lambda: seen.append(float(vector[KERNEL].sum())))
        reader.start()
        reader.join(WAIT)
        assert not reader.is_alive()
        vector[KERNEL].add_(1.0)

    Turnstile(Order(1, lambda order: 0), WAIT).run([body])
    assert seen == [12.0]
