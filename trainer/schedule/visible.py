"""The shared vector as replicas under a schedule have it: every access to it is announced first.

It is a tensor without memory of its own. Whatever operators it is given to, also by TorchScript, come here before they
run; by PyTorch's own declarations of them it is known what they write to and what is only another name for what they
were given. Everything else they read. What has no operator, as `.numpy()`, is refused.

A kernel over several variables is announced, and run, variable by variable; at `schedule.granularity=memory` chunk by
chunk, and an in-place one as reading a chunk and writing it: the same arithmetic in visible pieces. An in-place
operator that is not known to work element by element, or whose operands are not laid out alike, stays whole: one
operation on everything that it may touch.

Assumption: operators are called with the Python GIL, one replica at a time, as under `turnstile.py`.

Free runs never come here: there the shared vector is a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.schedule.operations import APART, READ, UPDATE, VARIABLE, WRITE, Operation
from trainer.schedule.operators import (
    ACCUMULATING,
    ADDING,
    ELEMENTWISE,
    HIDDEN,
    LOOKING,
    PUTTING,
    REPLACING,
    SELECTING,
    TELLING,
    Declared,
    declared,
)
from trainer.schedule.pieces import Piece, Pieces
from trainer.schedule.point import Hidden, Host, listener


class Visible(Tensor):
    """A view of the shared vector, or all of it. Made by `watched`.

    Attributes:
        plain: the same elements as an ordinary tensor.
    """

    plain: Tensor
    watch: Watch

    @staticmethod
    def __new__(cls, plain: Tensor, watch: Watch) -> Visible:
        made: Visible = Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=plain.device,
        )
        made.plain, made.watch = plain, watch
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for what is asked of it in Python; operators then go on to `__torch_dispatch__`."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name in HIDDEN:
                if listener() is not None:
                    raise Hidden(
                        f"a schedule cannot see what is done through .{name}() of the shared vector. Use torch's "
                        "operators on it, or a clone()."
                    )
                args = [_plain(each) for each in args]
            elif name in TELLING:
                args = [each.clone() if isinstance(each, Visible) else each for each in args]
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every operator that it is given to."""
        call = _Call(func, declared(func), args, kwargs or {})
        if call.declared.reshapes:
            raise Hidden(f".{call.declared.name}() would make a view of the shared vector a view of something else.")
        return next(each.watch for value in (args, call.kwargs.values()) for each in _visible(value)).run(call)


def watched(vector: Tensor, pieces: Pieces, *, splits_updates: bool) -> Tensor:
    """The vector, as replicas under a schedule are to have it.

    Args:
        splits_updates: announce an in-place kernel as reading and writing, so that something can come in between.
    """
    return Visible(vector, Watch(vector, pieces, splits_updates))


class _Call(NamedTuple):
    """An operator and what it is called with."""

    func: Any
    declared: Declared
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def replaced(self, by: Callable[[Any], Any]) -> _Call:
        """The same with every argument, also those in lists, replaced."""
        kwargs = {key: _mapped(by, each) for key, each in self.kwargs.items()} if self.kwargs else self.kwargs
        return _Call(self.func, self.declared, [_mapped(by, each) for each in self.args], kwargs)

    def on(self, by: Callable[[Any], Any]) -> Any:
        """Run it with every argument replaced."""
        call = self.replaced(by)
        return call.func(*call.args, **call.kwargs)

    def written(self) -> list[Visible]:
        """What of the shared vector it writes to."""
        found: list[Visible] = []
        for place in self.declared.written:
            if isinstance(place, str):
                value = self.kwargs.get(place)
            else:
                value = self.args[place] if place < len(self.args) else None
            found.extend(_visible(value))
        return found


class Watch:
    """Announces what operators do to one shared vector."""

    def __init__(self, vector: Tensor, pieces: Pieces, splits_updates: bool) -> None:
        self._origin = int(vector.storage_offset())
        self._storage = vector.untyped_storage().data_ptr()
        self._pieces = pieces
        self._splits_updates = splits_updates

    def run(self, call: _Call) -> Any:
        """Announce what an operator is about to do to the shared vector, and do it."""
        heard = listener()
        written = call.written()
        if heard is None:
            return self._named(call.on(_plain), written)
        turn = _Turn(*heard)
        if written:
            return self._write(turn, call, written)
        name = call.declared.name
        if call.declared.views:
            result = call.on(_plain)
            if all(self._is_shared(each) for each in (result if isinstance(result, (list, tuple)) else [result])):
                return self._named(result, written)
            # It had to copy, so it reads; what it has read by now without saying so is thrown away.
        if name in LOOKING:
            return call.on(_plain)
        if name in SELECTING and isinstance(call.args[0], Visible) and call.args[0].numel():
            call = self._selected(turn, call)
        return call.on(_Copies(self, turn).of)

    # Writing.

    def _write(self, turn: _Turn, call: _Call, written: list[Visible]) -> Any:
        name, target = call.declared.name, written[0]
        if name == "copy_" and _is_same(target, call.args[1]):
            return target  # the end of `vector[span] += ...`, which has written already
        if call.declared.outs:
            return self._write_out(turn, call)
        # What else it reads of the shared vector comes first.
        call = call.replaced(_Copies(self, turn, leaving=written).of)
        if name in REPLACING:
            result = torch.empty_like(target.plain)
            call.on(lambda value: result if value is target else value)
            self._replace(turn, target.plain, result)
            return target
        operands = (*call.args, *call.kwargs.values())
        if name in ELEMENTWISE and all(_follows(each, target) for each in operands if isinstance(each, Tensor)):
            self._change(turn, target, call)
            return target
        if name in PUTTING and target.numel():
            touched = PUTTING[name](self._positions(target.plain), *call.args[1:])
            turn.announce(UPDATE if _adds(call) else WRITE, self._pieces.at(touched))
        else:
            pieces = [piece for each in written for piece in self._within(each.plain)]
            turn.announce(UPDATE, list(dict.fromkeys(pieces)))
        return self._named(call.on(_plain), written)

    def _write_out(self, turn: _Turn, call: _Call) -> Any:
        """Run an operator into private tensors, and put those where `out=` says."""
        outs = {name: call.kwargs[name] for name in call.declared.outs}
        own = {name: torch.empty(0, dtype=each.dtype) for name, each in outs.items() if isinstance(each, Visible)}
        others = {name: each for name, each in call.kwargs.items() if name not in outs}
        call = call._replace(kwargs=others).replaced(_Copies(self, turn).of)
        call.func(*call.args, **call.kwargs, **{**outs, **own})
        for name, result in own.items():
            target = outs[name]
            if result.shape != target.shape:
                raise Hidden(
                    f"out= of {call.declared.name} has shape {list(target.shape)}, and the result "
                    f"{list(result.shape)}: the shared vector cannot be resized."
                )
            self._replace(turn, target.plain, result)
        return next(iter(outs.values())) if len(outs) == 1 else tuple(outs.values())

    def _replace(self, turn: _Turn, target: Tensor, result: Tensor) -> None:
        """Put a result where the target is."""
        if not target.is_contiguous():
            turn.announce(WRITE, self._within(target))
            target.copy_(result)
            return
        flat, new = target.view(-1), result.reshape(-1)
        for piece in self._within(target):
            span = self._span(piece, target)
            turn.announce(WRITE, [piece])
            flat[span] = new[span]

    def _change(self, turn: _Turn, target: Visible, call: _Call) -> None:
        """Run an in-place operator piece by piece."""
        pieces = self._within(target.plain)
        for piece in pieces:
            span = self._span(piece, target.plain) if len(pieces) > 1 else None
            own = _cut(target.plain, span)

            def on(changed: Tensor, span: slice | None = span) -> None:
                call.on(lambda value: changed if value is target else _cut(value, span))

            if self._splits_updates:
                turn.announce(READ, [piece])
                changed = own.clone()
                on(changed)
                turn.announce(WRITE, [piece])
                own.copy_(changed)
            else:
                turn.announce(UPDATE, [piece])
                on(own)

    # Reading.

    def copy(self, turn: _Turn, plain: Tensor, pieces: list[Piece] | None = None) -> Tensor:
        """A private copy, read piece by piece; of the given pieces only, if given, and zero elsewhere."""
        if not plain.is_contiguous():
            turn.announce(READ, self._within(plain) if pieces is None else pieces)
            return plain.clone()
        copied = torch.zeros_like(plain)
        flat, new = plain.view(-1), copied.view(-1)
        wanted = None if pieces is None else {piece.name for piece in pieces}
        for piece in self._within(plain):
            if wanted is None or piece.name in wanted:
                span = self._span(piece, plain)
                turn.announce(READ, [piece])
                new[span] = flat[span]
        return copied

    def _selected(self, turn: _Turn, call: _Call) -> _Call:
        """The same with a copy that has what the operator selects."""
        target: Visible = call.args[0]
        call = call.replaced(_Copies(self, turn, leaving=[target]).of)
        at = self._positions(target.plain)
        touched = self._pieces.at(call.on(lambda value: at if value is target else value))
        copied = self.copy(turn, target.plain, touched)
        return call.replaced(lambda value: copied if value is target else value)

    # Where it is.

    def _start(self, tensor: Tensor) -> int:
        return int(tensor.storage_offset()) - self._origin

    def _span(self, piece: Piece, tensor: Tensor) -> slice:
        return slice(piece.start - self._start(tensor), piece.stop - self._start(tensor))

    def _positions(self, tensor: Tensor) -> Tensor:
        """Each element's place in the flat vector."""
        start, reach = self._start(tensor), 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            reach += (size - 1) * stride
        return torch.arange(start, start + reach).as_strided(tensor.shape, tensor.stride(), 0)

    def _within(self, tensor: Tensor) -> list[Piece]:
        """The pieces that a tensor's elements lie in."""
        if not tensor.numel():
            return []
        if not tensor.is_contiguous():
            return self._pieces.at(self._positions(tensor))
        start = self._start(tensor)
        return self._pieces.within(start, start + tensor.numel())

    # What comes out.

    def _is_shared(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Visible) or tensor.untyped_storage().data_ptr() == self._storage

    def _named(self, result: Any, written: Sequence[Visible]) -> Any:
        """A result as the caller is to have it: views of the shared vector as visible as it is, what was written to as
        it was given, and everything else plainly.
        """
        given = {id(each.plain): each for each in written}

        def name(each: Any) -> Any:
            if not isinstance(each, Tensor) or not self._is_shared(each):
                return each
            return given[id(each)] if id(each) in given else Visible(each, self)

        return _mapped(name, result)


class _Copies:
    """Private copies of what one operator reads, one of each thing however often it is given.

    Args:
        leaving: what is to stay as it is.
    """

    def __init__(self, watch: Watch, turn: _Turn, leaving: Sequence[Visible] = ()) -> None:
        self._watch, self._turn = watch, turn
        self._leaving = {id(each) for each in leaving}
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def of(self, value: Any) -> Any:
        if not isinstance(value, Visible) or id(value) in self._leaving:
            return value
        plain = value.plain
        key = (plain.storage_offset(), plain.shape, plain.stride(), plain.dtype)
        if key not in self._made:
            self._made[key] = self._watch.copy(self._turn, plain)
        return self._made[key]


class _Turn:
    """Announces for one replica."""

    def __init__(self, host: Host, own: int) -> None:
        self._host, self._own = host, own

    def announce(self, kind: str, pieces: Sequence[Piece]) -> None:
        if not pieces:
            return
        names = tuple(piece.name for piece in pieces)
        told = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        of = APART if all(piece.of == APART for piece in pieces) else VARIABLE
        self._host.announce(self._own, Operation(kind, told, names, of))


def _visible(value: Any) -> Iterator[Visible]:
    """What of the shared vector an argument, or what it lists, is."""
    if isinstance(value, Visible):
        yield value
    elif isinstance(value, (list, tuple, type({}.values()))):
        for each in value:
            yield from _visible(each)


def _mapped(by: Callable[[Any], Any], value: Any) -> Any:
    """An argument or a result, and what is in it where it is a list, replaced."""
    if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
        return by(value)
    found = [_mapped(by, each) for each in value]
    return found if isinstance(value, list) else tuple(found) if type(value) is tuple else type(value)(found)


def _adds(call: _Call) -> bool:
    if call.declared.name in ACCUMULATING:
        return len(call.args) > 3 and bool(call.args[3])
    return call.declared.name in ADDING or "reduce" in call.kwargs


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, Visible) else value


def _follows(value: Tensor, target: Tensor) -> bool:
    """Whether an operand goes with a contiguous target element by element, or is the same for all elements."""
    if value.numel() == 1 and target.is_contiguous():
        return True
    return value.shape == target.shape and value.is_contiguous()


def _is_same(target: Visible, value: Any) -> bool:
    if not isinstance(value, Visible):
        return False
    one, other = target.plain, value.plain
    same_place = one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
    return same_place and one.shape == other.shape and one.stride() == other.stride()


def _cut(value: Any, span: slice | None) -> Any:
    """An operand's part for a span of the target; all of it where the target is not cut up or it is one number."""
    if span is None or not isinstance(value, Tensor):
        return value
    return value.reshape(-1)[span] if value.numel() > 1 else value.reshape(-1) if value.dim() else value
