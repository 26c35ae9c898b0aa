"""Compile a captured step ahead of time to a shared library that runs without the interpreter.

AOTInductor writes C++ for a graph of ATen operators: small operators are fused into loops, large ones call PyTorch's
own. It is given the graph as `graph_passes.py` rewrites it for that, and asked for the sources only. They are compiled
here, together with library_calls.cpp, to one file that holds the graph's constants and, as its last line, what it was
compiled for. `trainer/engines/library_calls.py` loads it.

Not the same bits as the step run eagerly: fused loops add in another order and have their own exp and log. The same
bits in every call and every thread. Compiling a graph again with the same PyTorch and compiler gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from trainer.engines import graph_passes
from trainer.engines.library_calls import Description, Place

CALLS = Path(__file__).with_name("library_calls.cpp")
# What a library is made by and with.
SOURCES = [
    Path(__file__),
    CALLS,
    *(Path(__file__).with_name(f"{name}.py") for name in ("graph_passes", "concatenation")),
]
NAME = "step"  # of generated files


class CannotCompile(RuntimeError):
    """There is no library of this graph to be had here; the message is one line."""


def compile_library(graph: GraphModule, example: Sequence[Tensor], into: Path) -> None:
    """Compile a graph for inputs of the example's dtypes, shapes and strides, and for this process' intra-op threads.

    It takes ten seconds to a minute of one core. The graph is left as it is. Nothing is left behind but the file, which
    appears whole.

    Args:
        graph: as `make_fx` makes it, before its operators are renamed for TorchScript.

    Raises:
        CannotCompile: no C++ compiler, or a graph that AOTInductor does not take.
        OSError: the file cannot be written.

    Thread-safety: one thread at a time, before replicas start: caches and an environment variable are the process'.
    """
    compiler = find_compiler()
    description = Description.here(_places("input", example), _places("output", _outputs(graph)))
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{into.name}.", dir=into.parent.absolute()) as folder:
        built = Path(folder, "built")
        _build(*_generate(graph, example, compiler, Path(folder)), Path(folder), built)
        with built.open("ab") as file:
            file.write(description.line())
        os.replace(built, into)


def identity(graph: GraphModule, example: Sequence[Tensor]) -> str:
    """What a library of this graph, compiled by this process, is known by: 32 hexadecimal digits.

    A digest of all that its code is made from, the graph's constants included, but for the compiler's version.

    Raises:
        CannotCompile: an input that no library takes.
    """
    digest = hashlib.sha256(graph.code.encode())
    digest.update(repr(Description.here(_places("input", example), ())).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    digest.update(repr(graph_passes.multiplies_bfloat16()).encode())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constant = attrgetter(node.target)(graph)
            digest.update(repr((node.target, Place.of(constant))).encode())
            digest.update(constant.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _generate(
    graph: GraphModule, example: Sequence[Tensor], compiler: str, folder: Path
) -> tuple[list[str], dict[str, Any]]:
    """What AOTInductor writes: sources and constants, and what they are to be compiled and linked with."""
    try:
        rewritten = graph_passes.rewritten(graph)
        found = _written(rewritten, example, _options(rewritten, compiler, folder), folder)
        (flags,) = (path for path in found if path.endswith("_linker_flags.json"))
        files, read = [path for path in found if path.endswith((".cpp", ".o"))], json.loads(Path(flags).read_text())
    except Exception as error:  # of any class
        raise CannotCompile(f"AOTInductor does not take the captured step: {_line(error)}") from error
    if (folder / f"{NAME}.wrapper.json").exists():
        # Operators without a C function are called through an executor of that file, which is not at hand.
        raise CannotCompile("AOTInductor has no C functions for all operators of the captured step.")
    return files, read


def _written(graph: GraphModule, example: Sequence[Tensor], options: dict[str, Any], folder: Path) -> list[str]:
    failure: Exception | None = None
    with warnings.catch_warnings(), torch.no_grad():
        for about_itself in (DeprecationWarning, FutureWarning):  # PyTorch uses what it has deprecated
            warnings.simplefilter("ignore", about_itself)
        # Here, as they take two seconds.
        from torch._inductor import aot_compile
        from torch._inductor.utils import fresh_cache

        from trainer.engines.concatenation import products_in_place

        with fresh_cache(dir=str(folder)), products_in_place():
            try:
                found = aot_compile(_bare_copy(graph), tuple(example), options=options)
            except Exception as error:
                failure = error  # not let through: `fresh_cache` would keep its folder for it, and say so
    if failure is not None:
        raise failure
    assert isinstance(found, list)
    return [str(path) for path in found]


def _options(graph: GraphModule, compiler: str, folder: Path) -> dict[str, Any]:
    return {
        "aot_inductor.package": True,
        "aot_inductor.package_cpp_only": True,
        "aot_inductor.output_path": str(folder),
        "aot_inductor.model_name_for_generated_files": NAME,
        "aot_inductor.metadata": {},  # else it writes to the default, which is everybody's
        "aot_inductor.enable_line_tables": False,  # 1.6 MB instead of 0.4
        "aot_inductor.precompile_headers": False,  # for a compilation that is not done here
        # Chosen, it is channels last for every value on the way to a convolution: of Keras' values, whose channels are
        # the last dimension, it would put another dimension last, and transpose them.
        "layout_optimization": not graph_passes.keeps_channels_last(graph),
        "compile_threads": 1,  # else it starts processes that stay
        "cpp.cxx": (None, compiler),
        "cpp.threads": torch.get_num_threads(),
        # Code for any CPU with this one's vector instructions, and as fast: loops are written for their width.
        "cpp.march": "",
        "cpp.vec_isa_ok": True,  # what the CPU says it has; trying it out takes ten seconds
        # Lower precisions are rounded where the layers round, though fused loops compute in float32: the audit reads
        # the compute dtype off the bits of gradients.
        "emulate_precision_casts": True,
        # Random operators draw from PyTorch's generators, as in the step run eagerly.
        "fallback_random": True,
    }


def _build(files: list[str], flags: dict[str, Any], folder: Path, into: Path) -> None:
    """Compile and link, in a folder."""
    command = [flags["compiler"], *(f"-{flag}" for flag in flags["cflags"] + flags["ldflags"])]
    for option, key in (("-D", "definitions"), ("-I", "include_dirs"), ("-L", "libraries_dirs")):
        command += [option + each.strip() for each in flags[key]]
    command += [word for argument in flags["passthrough_args"] for word in argument.split()]
    command += [
        "-fwrapv",  # 32-bit words of a hash are multiplied as signed integers
        f"-ffile-prefix-map={folder}=.",  # another one each time, which would get into the file
        "-Wl,-Bsymbolic",  # every library has functions of these names: it is to call its own
        # The constants' assembler source does not say that it needs no executable stack, so the linker would ask for
        # one, and loading the library would make the stack of every thread executable.
        "-Wl,-z,noexecstack",
    ]
    command += [str(CALLS), *files, *(f"-l{name}" for name in flags["libraries"]), "-o", str(into)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except (OSError, subprocess.CalledProcessError) as error:
        message = getattr(error, "stderr", "") or error
        raise CannotCompile(f"{command[0]} does not compile the captured step: {_line(message)}") from error


def find_compiler() -> str:
    """The C++ compiler: $CXX, or g++.

    Raises:
        CannotCompile: there is none.
    """
    asked = os.environ.get("CXX") or "g++"
    found = shutil.which(asked)
    if found is None:
        raise CannotCompile(f"There is no C++ compiler: {asked} is not on PATH. Install it, or set CXX to another.")
    return found


def _bare_copy(graph: GraphModule) -> GraphModule:
    """A copy without what `make_fx` noted of each value: each note has a tracing mode of its own, and they clash."""
    copy = Graph()
    copy.output(copy.graph_copy(graph.graph, {}))
    for node in copy.nodes:
        node.meta.clear()
    return GraphModule(graph, copy)


def _outputs(graph: GraphModule) -> Sequence[Any]:
    """What `make_fx` noted of the outputs: tensors without memory."""
    (found,) = next(node for node in graph.graph.nodes if node.op == "output").args
    nodes = found if isinstance(found, (tuple, list)) else (found,)
    return [getattr(node, "meta", {}).get("val") for node in nodes]


def _places(kind: str, tensors: Sequence[Any]) -> tuple[Place, ...]:
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise CannotCompile(f"The captured step's {kind} {index} is not a contiguous tensor on the CPU.")
    return tuple(Place.of(tensor) for tensor in tensors)


def _line(message: object) -> str:
    """What went wrong, in a line: the compiler's first error, or how the message begins."""
    lines = str(message).strip().splitlines() or [type(message).__name__]
    return next((line for line in lines if "error:" in line), lines[0])[:300]
