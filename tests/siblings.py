"""Processes that name their compiled steps: prints as JSON the ids that each sibling gave, in the order it asked.

    python tests/siblings.py fork|compile_then_fork|spawn MECHANISM BITS NUM_SIBLINGS

Steps are told apart by their content; "shared" is a step that all siblings have. `hookless` is `random_offset` without
what it does after a fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from trainer.state import compile_ids
from trainer.state.compile_ids import COMPILE_IDS, CompileIds

NAME = "train.<locals>.step"
SECONDS = 20


def contents(sibling: int) -> list[str]:
    """The first sibling asks last for what is shared, the others first."""
    own = [f"{sibling}.0", f"{sibling}.1"]
    return [*own, "shared"] if sibling == 0 else ["shared", *own]


def ids_of(ids: CompileIds, sibling: int) -> dict[str, str]:
    return {content: ids.id_of(NAME, content) for content in contents(sibling)}


def holder(mechanism: str, bits: int) -> CompileIds:
    found = COMPILE_IDS["random_offset" if mechanism == "hookless" else mechanism](bits)
    if mechanism == "hookless":
        compile_ids._offsets.clear()
    return found


def forked(ids: CompileIds, sibling: int) -> dict[str, str]:
    """What a child of this process says that its ids are."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(into, json.dumps(ids_of(ids, sibling)).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as stream:
        said = stream.read()
    assert os.waitpid(child, 0)[1] == 0
    found: dict[str, str] = json.loads(said)
    return found


def main(start: str, mechanism: str, bits: int, num_siblings: int) -> None:
    siblings = range(num_siblings)
    if start == "one":
        found = [ids_of(holder(mechanism, bits), num_siblings)]
    elif start == "spawn":
        command = [sys.executable, __file__, "one", mechanism, str(bits)]
        processes = [subprocess.Popen([*command, str(own)], stdout=subprocess.PIPE) for own in siblings]
        found = [json.loads(process.communicate(timeout=SECONDS)[0])[0] for process in processes]
    else:
        ids = holder(mechanism, bits)
        if start == "compile_then_fork":
            for own in siblings:
                ids_of(ids, own)
        found = [forked(ids, own) for own in siblings]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
