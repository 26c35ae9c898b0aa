"""Rewrite a captured step for the C++ compiler: the same values out of operators that it has fast loops for.

Each pass is a function of a graph of ATen operators, which it changes in place; `rewritten` runs them all on a copy. A
pass leaves alone what is not exactly what it knows, and says below what stays the same: every bit, or values up to
rounding. TorchScript runs the graph as it was captured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

WORD = 0xFFFFFFFF
END = 2**63 - 1  # of a slice that goes to the end
MOST_TAPS = 25  # of a kernel that is gathered into a matrix: each tap is one copy of the image


def rewritten(graph: GraphModule) -> GraphModule:
    """A rewritten copy of what `make_fx` has captured; the graph is left as it is."""
    copy = Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    for each in passes():
        each(copy)
    copy.eliminate_dead_code()
    copy.lint()
    return GraphModule(graph, copy)


def passes() -> list[Callable[[Graph], None]]:
    """Those that pay on this CPU, in the order in which they have to run."""
    return [
        drop_copies_for_layout,
        pool_by_comparing,
        multiply_taps,
        hash_in_32_bits,
        *([] if multiplies_bfloat16() else [multiply_in_float32]),
        sum_by_sample,
    ]


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: with AMX, or AVX512_BF16 that is not Intel's.

    Intel's vdpbf16ps starts in every second cycle at most and does 64 operations; an FMA does 32, twice a cycle, which
    is twice as many in a second. What oneDNN's kernels reach in bfloat16 is half of what MKL's do in float32. By what
    the CPU is, not by timing: bits must not change between runs.
    """
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16")) or (
        bool(has.get("avx512_bf16")) and not str(has.get("cpu_name", "")).startswith("Intel")
    )


def keeps_channels_last(graph: GraphModule) -> bool:
    """Whether all convolutions have their channels last already, so that nobody need choose a layout for them."""
    found = _calls(graph.graph, aten.convolution.default)
    return all(_value(node.args[0]).is_contiguous(memory_format=torch.channels_last) for node in found)


_OF_ANY_LAYOUT = (
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)


def drop_copies_for_layout(graph: Graph) -> None:
    """Convolve and pool values where they lie. Same bits.

    Keras copies its channels_last values to channels first before each pooling, and what follows keeps that layout.
    """
    for clone in _calls(graph, aten.clone.default):
        source: Any = clone.args[0]
        copies = clone.kwargs.get("memory_format") is torch.contiguous_format
        if copies and all(user.target in _OF_ANY_LAYOUT for user in clone.users) and not _is_written(graph, source):
            clone.replace_all_uses_with(source)


def _is_written(graph: Graph, value: Node) -> bool:
    """Whether an operator changes the memory of a value once that is there."""
    later, memory = False, _memory(value)
    for node in graph.nodes:
        writes = later and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        if writes and any(_memory(each) is memory for each in node.all_input_nodes):
            return True
        later = later or node is value
    return False


def _memory(node: Node) -> Node:
    """The node that made the memory that a view, or what was changed in place, has."""
    schema = getattr(node.target, "_schema", None)
    while schema is not None and schema.returns and schema.returns[0].alias_info is not None:
        node = node.all_input_nodes[0]
        schema = getattr(node.target, "_schema", None)
    return node


def pool_by_comparing(graph: Graph) -> None:
    """Max-pooling over windows side by side, and its gradient, as maxima and comparisons of slices. Same bits.

    The gradient goes to the first of equal values, as in PyTorch's kernel. What the compiler writes for that one finds
    the first again in 64-bit numbers and gathers the gradients one at a time.
    """
    for pool in _calls(graph, aten.max_pool2d_with_indices.default):
        kernel = _pair(pool.args[1])
        results = {user.args[1]: user for user in pool.users}
        backward = list(results[1].users) if 1 in results else []
        known = all(user.target is aten.max_pool2d_with_indices_backward.default for user in backward)
        if not known or 0 not in results or not _side_by_side(pool, kernel):
            continue
        with graph.inserting_before(pool):
            parts = [_every(graph, pool.args[0], kernel, at) for at in itertools.product(*map(range, kernel))]
            largest = parts[0]
            for part in parts[1:]:
                largest = _call(graph, aten.maximum.default, largest, part)
            first = _first_equal(graph, parts, largest)
        results[0].replace_all_uses_with(largest)
        for node in backward:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_spread(graph, node.args[0], first, kernel))


def _side_by_side(pool: Node, kernel: tuple[int, int]) -> bool:
    """Whether windows cover every value exactly once."""
    left_out: Sequence[Any] = ([], [0, 0], [1, 1], False)[len(pool.args) - 2 :]
    how: list[Any] = [*pool.args[2:], *left_out]
    stride, padding, dilation, ceil = how
    shape = _value(pool.args[0]).shape
    whole = len(shape) == 4 and shape[2] % kernel[0] == shape[3] % kernel[1] == 0
    plain = (_pair(padding), _pair(dilation), ceil) == ((0, 0), (1, 1), False) and not pool.kwargs
    return whole and plain and (not stride or _pair(stride) == kernel)


def _every(graph: Graph, x: Any, kernel: tuple[int, int], at: tuple[int, ...]) -> Node:
    """One pixel of each window."""
    row = _call(graph, aten.slice.Tensor, x, 2, at[0], END, kernel[0])
    return _call(graph, aten.slice.Tensor, row, 3, at[1], END, kernel[1])


def _first_equal(graph: Graph, parts: Sequence[Node], largest: Node) -> Node:
    """Number of the first part that is as large: int32, like a part."""
    found = _call(graph, aten.full_like.default, largest, len(parts) - 1, dtype=torch.int32)
    for number in reversed(range(len(parts) - 1)):
        equal = _call(graph, aten.eq.Tensor, parts[number], largest)
        own = _call(graph, aten.full_like.default, largest, number, dtype=torch.int32)
        found = _call(graph, aten.where.self, equal, own, found)
    return found


def _spread(graph: Graph, gradient: Any, first: Node, kernel: tuple[int, int]) -> Node:
    """Each window's gradient at its first largest value, and zero elsewhere: channels last, [batch, channels, ...]."""
    batch, channels, rows, columns = _value(gradient).shape

    def windows(x: Any) -> Node:
        """[batch, rows, 1, columns, 1, channels]"""
        x = _call(graph, aten.permute.default, x, [0, 2, 3, 1])
        return _call(graph, aten.unsqueeze.default, _call(graph, aten.unsqueeze.default, x, 3), 2)

    number = _call(graph, aten.arange.default, kernel[0] * kernel[1], dtype=torch.int32)
    number = _call(graph, aten.view.default, number, [1, 1, kernel[0], 1, kernel[1], 1])
    here = _call(graph, aten.eq.Tensor, windows(first), number)
    own = windows(gradient)
    spread = _call(graph, aten.where.self, here, own, _call(graph, aten.zeros_like.default, own))
    spread = _call(graph, aten.reshape.default, spread, [batch, rows * kernel[0], columns * kernel[1], channels])
    spread = _call(graph, aten.clone.default, spread, memory_format=torch.contiguous_format)
    return _call(graph, aten.permute.default, spread, [0, 3, 1, 2])


def multiply_taps(graph: Graph) -> None:
    """Convolve a single channel as a matrix product, in both directions. Same values up to rounding.

    With one channel the layouts cannot be told apart by strides, and the compiler takes the one that has all values of
    the first convolution transposed, forwards and backwards. A kernel's gradient needs no transposing, either.
    """
    gathered: dict[object, Node] = {}
    for node in list(graph.nodes):
        if node.target is aten.convolution.default:
            _multiply(graph, node, gathered)
        elif node.target is aten.convolution_backward.default:
            _multiply_backward(graph, node, gathered)


def _multiply(graph: Graph, node: Node, gathered: dict[object, Node]) -> None:
    x, kernel, bias = node.args[:3]
    padding: Any = node.args[4]
    if not _has_one_channel(kernel) or not _is_plain(node.args[3:]):
        return
    with graph.inserting_before(node):
        key = _key(x, kernel, padding)
        taps = gathered[key] = gathered.get(key) or _taps(graph, x, kernel, padding)
        by_tap = _call(graph, aten.permute.default, kernel, [2, 3, 1, 0])
        by_tap = _call(graph, aten.reshape.default, by_tap, [_value(taps).shape[0], -1])
        found = _call(graph, aten.mm.default, _call(graph, aten.t.default, taps), by_tap)
        if bias is not None:
            found = _call(graph, aten.add.Tensor, found, bias)
        batch, channels, rows, columns = _value(node).shape
        found = _call(graph, aten.view.default, found, [batch, rows, columns, channels])
        node.replace_all_uses_with(_call(graph, aten.permute.default, found, [0, 3, 1, 2]))


def _multiply_backward(graph: Graph, node: Node, gathered: dict[object, Node]) -> None:
    gradient, x, kernel = node.args[:3]
    taps = gathered.get(_key(x, kernel, node.args[5]))
    result = next((user for user in node.users if user.args[1] == 1), None)
    if taps is None or result is None or not _is_plain(node.args[4:-1]) or node.args[-1] != [False, True, False]:
        return
    with graph.inserting_before(result):
        channels, _, rows, columns = _value(kernel).shape
        flat = _call(graph, aten.permute.default, gradient, [0, 2, 3, 1])
        flat = _call(graph, aten.reshape.default, flat, [-1, channels])
        by_tap = _call(graph, aten.mm.default, taps, flat)
        by_tap = _call(graph, aten.view.default, by_tap, [rows, columns, 1, channels])
        result.replace_all_uses_with(_call(graph, aten.permute.default, by_tap, [3, 2, 0, 1]))


def _key(x: Any, kernel: Any, padding: Any) -> object:
    return x, tuple(_value(kernel).shape), tuple(padding)


def _has_one_channel(kernel: Any) -> bool:
    shape = _value(kernel).shape
    return len(shape) == 4 and shape[1] == 1 and shape[2] * shape[3] <= MOST_TAPS


def _is_plain(how: Sequence[Any]) -> bool:
    stride, padding, dilation, transposed, _, groups = how
    return (stride, dilation, transposed, groups) == ([1, 1], [1, 1], False, 1) and len(padding) == 2


def _taps(graph: Graph, x: Any, kernel: Any, padding: Sequence[int]) -> Node:
    """For each tap of the kernel what it sees at each place: [taps, batch * rows * columns]."""
    batch, _, height, width = _value(x).shape
    taps = _value(kernel).shape[2:]
    padded = _call(graph, aten.reshape.default, x, [batch, height, width])
    # Concatenated, as that is written out once; a padding would be worked out again for each tap.
    for dim, size in enumerate(padding, 1):
        if size:
            shape = [*_value(padded).shape]
            shape[dim] = size
            zeros = _call(graph, aten.new_zeros.default, padded, shape)
            padded = _call(graph, aten.cat.default, [zeros, padded, zeros], dim)
    rows, columns = height + 2 * padding[0] - taps[0] + 1, width + 2 * padding[1] - taps[1] + 1
    seen = []
    for row, column in itertools.product(*map(range, taps)):
        part = _call(graph, aten.slice.Tensor, padded, 1, row, row + rows)
        part = _call(graph, aten.slice.Tensor, part, 2, column, column + columns)
        seen.append(_call(graph, aten.unsqueeze.default, part, 0))
    return _call(graph, aten.view.default, _call(graph, aten.cat.default, seen), [len(seen), -1])


def hash_in_32_bits(graph: Graph) -> None:
    """Work on 32-bit words that int64 hold (`models/random.py`) as int32, which fit twice into a vector. Same bits.

    Only where the graph itself shows that a value is from 0 below 2**32. The sign bit is one of the word, and products
    wrap, for which the library is compiled with -fwrapv.
    """
    narrow: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if _is_word(node) and _value(node).dtype == torch.int64:
            with graph.inserting_after(node):
                narrow[node] = _narrowed(graph, node, narrow)
    for node, bits in narrow.items():
        for user in list(node.users):
            if user is bits or user in narrow or bits.target is aten._to_copy.default:
                continue
            with graph.inserting_before(user):
                if user.target is aten.ge.Scalar and 0 <= user.args[1] <= WORD:  # type: ignore[operator]
                    # As unsigned ones are compared: both sides less 2**31.
                    turned = _call(graph, aten.bitwise_xor.Scalar, bits, -(2**31))
                    user.replace_all_uses_with(_call(graph, aten.ge.Scalar, turned, user.args[1] - 2**31))  # type: ignore[operator]
                else:
                    wide = _call(graph, aten._to_copy.default, bits, dtype=torch.int64)
                    user.replace_input_with(node, _call(graph, aten.bitwise_and.Scalar, wide, WORD))


def _is_word(node: Any) -> bool:
    """Whether values are known to be from 0 below 2**32, by what computes them."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    match node.target, node.args:
        case aten.bitwise_and.Scalar, (_, int(mask)):
            return 0 <= mask <= WORD
        case aten.bitwise_xor.Tensor, (left, right):
            return _is_word(left) and _is_word(right)
        case aten.bitwise_right_shift.Tensor_Scalar, (word, int(bits)):
            return 0 <= bits < 32 and _is_word(word)
    return False


def _narrowed(graph: Graph, node: Node, narrow: dict[Any, Node]) -> Node:
    """The same word as int32, after the node."""
    first: Any = node.args[0]
    match node.target, node.args:
        case aten.bitwise_and.Scalar, (Node(target=aten.mul.Tensor, args=(factor, int(by))), mask):
            if factor in narrow and mask == WORD:
                return _call(graph, aten.mul.Tensor, narrow[factor], _signed(by))
        case aten.bitwise_xor.Tensor, (_, second):
            return _call(graph, aten.bitwise_xor.Tensor, narrow[first], narrow[second])
        case aten.bitwise_right_shift.Tensor_Scalar, (_, int(bits)):
            shifted = _call(graph, aten.bitwise_right_shift.Tensor_Scalar, narrow[first], bits)
            with graph.inserting_after(shifted):
                return _call(graph, aten.bitwise_and.Scalar, shifted, WORD >> bits)  # the sign came in from the left
    return _call(graph, aten._to_copy.default, node, dtype=torch.int32)


def _signed(word: int) -> int:
    return (word + 2**31) % 2**32 - 2**31


_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.convolution.default, aten.convolution_backward.default)


def multiply_in_float32(graph: Graph) -> None:
    """Multiply bfloat16 as float32 and round the result to bfloat16. Same values up to the order of sums.

    A product of two bfloat16 is exact in float32, and float32 is what kernels for bfloat16 add up in. For CPUs that are
    slower in bfloat16 (`multiplies_bfloat16`).
    """
    for node in [node for node in graph.nodes if node.target in _PRODUCTS]:
        operands = [index for index, each in enumerate(node.args) if isinstance(each, Node)]
        if any(_value(node.args[index]).dtype != torch.bfloat16 for index in operands):
            continue
        with graph.inserting_before(node):
            for index in operands:
                wide = _call(graph, aten._to_copy.default, node.args[index], dtype=torch.float32)
                node.update_arg(index, wide)
        results = list(node.users) if node.target is aten.convolution_backward.default else [node]
        for result in results:
            if isinstance(result.meta.get("val"), Tensor):
                _round(graph, result)


def _round(graph: Graph, result: Node) -> None:
    users = list(result.users)
    result.meta["val"] = _like(result).float()
    with graph.inserting_after(result):
        rounded = _call(graph, aten._to_copy.default, result, dtype=torch.bfloat16)
    for user in users:
        user.replace_input_with(result, rounded)


def sum_by_sample(graph: Graph) -> None:
    """Sum batch, rows and columns up in two steps, each sample's pixels first. Same values up to rounding.

    A sum of more than 4,096 values is kept in memory, where the compiler cascades it: each addition waits for the last
    one's store. Those of one image are in registers, and two steps are as exact.
    """
    for target in (aten.sum.dim_IntList, aten.mean.dim):
        for node in _calls(graph, target):
            if _value(node.args[0]).ndim == 4 and node.args[1:] == ([0, 1, 2], True) and not node.kwargs:
                with graph.inserting_before(node):
                    each = _call(graph, target, node.args[0], [1, 2], True)
                    node.replace_all_uses_with(_call(graph, target, each, [0], True))


def _calls(graph: Graph, target: Any) -> list[Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call, with a note of what it returns, as `make_fx` makes one."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*torch.fx.node.map_arg(args, _like), **torch.fx.node.map_arg(kwargs, _like))
    return node


def _value(node: Any) -> Tensor:
    """What `make_fx` noted of a node: a tensor without memory."""
    value: Tensor = node.meta["val"]
    return value


def _like(node: Node) -> Tensor:
    value = _value(node)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[-1])
