"""The instructions of the very loops that are run, marked where another thread can come in between, and where it did.

CPython 3.11 looks whether another thread wants the GIL where a function begins, where a loop goes back, and when a call
is over, and nowhere else. So none comes between loading a name and storing it by itself: what lets others in is code
that gives up the GIL inside an instruction, as PyTorch and TensorFlow do for the time of each kernel, and a lock for as
long as it has to wait. Imports no framework.

A thread that waits for the GIL stands at the instruction in which it gave it up, which `sys._current_frames` tells
whoever has the GIL meanwhile: that is how `Waits` sees where switches really come.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from types import CodeType
from typing import NamedTuple

from trainer.frames import collector_off
from trainer.workloads.counter import on_tensorflow, on_torch
from trainer.workloads.counter.shared import TOTAL, Operation

# What calls do to the variable, by the method's name.
METHODS = {
    "add_": "reads and writes it, in one kernel",
    "assign_add": "reads and writes it, in one kernel that holds its lock",
    "clone": "reads it",
    "copy_": "writes it, over whatever has come since it was read",
    "assign": "writes it, over whatever has come since it was read",
}
SAME = "binds the name to the tensor that it is bound to: harmless"
ANEW = "binds the name anew, over whatever has come since it was read"
KERNEL = "inside: its kernel runs without the GIL"
PYTHON = "inside: it is Python code, with a kernel without the GIL"
FREES = "inside, once it is done: the tensor that was there before is freed without the GIL"


class Row(NamedTuple):
    """One instruction.

    Attributes:
        touches: what it does to the variable, in words.
        switch: why another thread can come in; "" where none can.
    """

    offset: int
    instruction: str
    touches: str
    switch: str


def of_loop(function: Callable[..., None]) -> list[Row]:
    """The instructions of a function's loop, from asking for the next round to going back.

    What would be done about an exception is left out.
    """
    found: list[Row] = []
    skipped_to = 0
    for row in rows(function.__code__):
        name, _, argument = row.instruction.partition(" ")
        if row.offset < skipped_to or not (found or name == "FOR_ITER"):
            continue
        found.append(row)
        if name == "JUMP_FORWARD":
            skipped_to = int(argument.removeprefix("to "))
        if name == "JUMP_BACKWARD":
            break
    return found


def rows(code: CodeType) -> Iterator[Row]:
    """Every instruction of a function."""
    instructions = list(dis.get_instructions(code))
    kernel = PYTHON if code.co_filename == on_tensorflow.__file__ else KERNEL
    calls: list[str] = []
    for index, each in enumerate(instructions):
        touches, switch = "", ""
        before = instructions[index - 1] if index else None
        following = instructions[min(index + 1, len(instructions) - 1)]
        match each.opname:
            case "RESUME" | "JUMP_BACKWARD":
                switch = "before the next instruction"
            case "LOAD_METHOD":
                calls.append(each.argval)
            case "LOAD_GLOBAL" if each.argrepr.startswith("NULL"):
                calls.append("")
            case "BEFORE_WITH":
                calls.append("")
                switch = "inside: waits for the lock without the GIL"
            case "BINARY_OP":
                touches, switch = _binary(each, following), kernel
            case "STORE_ATTR" if each.argval == TOTAL:
                same = instructions[index - 1 - _moves(instructions, index)].argrepr == "+="
                touches, switch = (SAME, "") if same else (ANEW, FREES)
            case "STORE_FAST" if before is not None and before.opname == "CALL":
                switch = FREES  # what the name was bound to in the last round
            case "PRECALL" | "CALL" | "CALL_FUNCTION_EX":
                touches = METHODS.get(calls[-1], "") if calls else ""
                switch = f"{kernel}; and when it is over" if touches else "when it is over"
                if each.opname != "PRECALL" and calls:
                    calls.pop()
        yield Row(each.offset, f"{each.opname} {each.argrepr}".strip(), touches, switch)


def _moves(instructions: list[dis.Instruction], index: int) -> int:
    """How many instructions right before one only put things on the stack, or move them there."""
    moves = 0
    while instructions[index - 1 - moves].opname in ("SWAP", "LOAD_FAST"):
        moves += 1
    return moves


def _binary(each: dis.Instruction, following: dis.Instruction) -> str:
    if each.argrepr != "+=":
        return "reads it, and makes a new value of it"
    # Into a Python variable of the function's own: what is added to is a copy.
    return "" if following.opname == "STORE_FAST" else "reads and writes it, in one kernel"


def operations() -> dict[str, Operation]:
    return {**on_torch.OPERATIONS, **on_tensorflow.OPERATIONS}


class Waits:
    """Where threads stood that had given up the GIL, each time that somebody looked.

    Attributes:
        seen: (name of the loop's function, offset) -> times.

    Thread-safety: one thread looks.
    """

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, int]] = Counter()
        self._functions = {
            function.__code__: function
            for operation in operations().values()
            for function in (operation.free, operation.locked, operation.read, operation.write)
            if function is not None
        }

    def look(self) -> None:
        """Note where threads are, those whose innermost code is not a loop's left out.

        One call that runs in C from its beginning to its end: after any other, threads could go on in between.
        """
        frames = chain.from_iterable(map(dict.values, map(operator.call, [sys._current_frames])))
        with collector_off():
            found = list(map(operator.attrgetter("f_code", "f_lasti"), frames))
        for code, offset in found:
            if code in self._functions:
                self.seen[code.co_name, offset] += 1

    def told(self) -> str:
        """The instructions that threads were seen waiting in, the commonest first; "" where none was seen."""
        found: Counter[str] = Counter()
        for row, times in self.rows():
            found[row.instruction.partition(" to ")[0]] += times
        return ", ".join(f"{instruction} {times:,}" for instruction, times in found.most_common())

    def rows(self) -> list[tuple[Row, int]]:
        """The instructions that threads were seen waiting in, and how often."""
        codes = {code.co_name: code for code in self._functions}
        # An instruction that has called Python code stands at the last of its own inline caches.
        return [
            (max(row for row in rows(codes[name]) if row.offset <= offset), times)
            for (name, offset), times in self.seen.items()
        ]
