"""The native loop's machine code: compiled from loop.cpp when first needed, and kept with compiled steps."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from trainer.cache.entry import LIBRARY, Entry
from trainer.cache.library import load_library
from trainer.cache.store import Store, Wanted
from trainer.doing import doing
from trainer.engines.library import CannotCompile, find_compiler

log = logging.getLogger(__name__)

NAME = "native_loop"
HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("loop.cpp", "locks.h", "sweep.h"))
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread"),
    # A product and a sum are rounded one by one, as PyTorch's operators do.
    "-ffp-contract=off",
    # So that loops over roots are vectorized; the roots are the same.
    "-fno-math-errno",
)
# The widest vectors that PyTorch itself uses on this machine.
VECTORS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2",),
}


def load_loop(store: Store) -> ctypes.CDLL:
    """The loop's functions (loop.cpp), found in the store or compiled, which takes some seconds.

    Raises:
        CannotCompile: no C++ compiler, or one that does not take the source.
    """
    flags = (*FLAGS, *VECTORS.get(_vectors(), ()))
    content = _digest(flags)
    entry = store.load(f"{NAME}-{content}", Wanted(NAME, content, {}, LIBRARY))
    # Unlike a step's id, which may be of an unsafe kind, this one is the content's own.
    if entry is None or entry.content != content:
        entry = _compiled(content, flags)
        store.save(entry)
    try:
        return load_library(entry)
    except OSError as error:
        raise CannotCompile(f"The native loop cannot be loaded: {error}.") from error


def _compiled(content: str, flags: tuple[str, ...]) -> Entry:
    compiler = find_compiler()
    began = time.perf_counter()
    log.info("native loop: not found; compiling takes some seconds")
    with doing("compiling the replicas' loop"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "loop.so")
        command = [compiler, *flags, str(SOURCES[0]), "-o", str(path)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            code = path.read_bytes()
        except (OSError, subprocess.CalledProcessError) as error:
            lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
            raise CannotCompile(f"{compiler} does not compile the native loop: {first[:300]}") from error
    return Entry(f"{NAME}-{content}", NAME, "loop_run", LIBRARY, content, {}, time.perf_counter() - began, code)


def _digest(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _vectors() -> str:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return "avx512" if capability.startswith("avx512") else capability
