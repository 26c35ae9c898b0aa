"""`train.engine=inductor`: steps are compiled once, found by other runs, and held to what they were looked up for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, Command, verdict

LIMIT_SECONDS = 240  # several times what a library takes to compile
compiles = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="libraries need a C++ compiler, and there is none"
)


def run(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "trainer", f"hydra.run.dir={folder}", "train.engine=inductor", "model=linear"),
            *("train.steps=6", "train.batch_size=4", "audit.reference_every=2", "fail_on=never", *arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=folder.parent,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return verdict(folder)


def told(found: dict[str, Any], guarantee: str) -> tuple[str, str]:
    (each,) = [each for each in found["guarantees"] if each["name"] == guarantee]
    return str(each["status"]), str(each["evidence"])


@compiles
@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS * 4)
def test_a_step_is_compiled_once_and_found_by_its_content_but_by_a_number_also_when_it_is_another(
    tmp_path: Path,
) -> None:
    other = "precision=mixed_bfloat16"
    runs: dict[str, list[dict[str, Any]]] = {}
    for ids in ("content", "counter"):
        folder = f"train.compile_cache={tmp_path / ids}"
        asked = [(), ()] if ids == "content" else [(), (other,)]
        runs[ids] = [
            run(tmp_path / f"{ids}_{number}", folder, f"state.compile_ids={ids}", *more)
            for number, more in enumerate(asked)
        ]
    first, second = runs["content"]
    assert (first["verdict"], second["verdict"]) == ("upheld", "upheld")
    assert first["run"]["engine"] == second["run"]["engine"] == "inductor"
    assert first["final_parameters_sha256"] == second["final_parameters_sha256"]
    assert told(first, "own_compiled_step")[1].startswith("0 of 1 compiled steps were found, 0 s of compiling saved")
    assert told(second, "own_compiled_step")[1].startswith("1 of 1 compiled steps were found, ")
    # The first step of a process has the number of the first step of any other.
    _, foreign = runs["counter"]
    assert told(foreign, "own_compiled_step")[0] == "anomaly"
    assert [(each["count"], each["of"]) for each in foreign["anomalies"] if each["kind"] == "foreign_step"] == [(1, 1)]
    # It computes in float32, and was asked for another precision: the audit of values sees what the digest says.
    assert told(foreign, "precision_as_asked")[0] == "violated"


@pytest.mark.slow
def test_without_a_compiler_steps_run_as_torchscript_and_the_log_says_so(tmp_path: Path) -> None:
    found = run(tmp_path / "run", f"train.compile_cache={tmp_path / 'cache'}", CXX="no_such_compiler")
    assert (found["verdict"], found["run"]["engine"]) == ("upheld", "torchscript")
    status, evidence = told(found, "own_compiled_step")
    assert (status, evidence) == ("not_applicable", "steps run by torchscript are not kept, so none is found")
    log = (tmp_path / "run" / "console.log").read_text()
    assert "runs as TorchScript, not as a compiled library: There is no C++ compiler: no_such_compiler is not" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train.engine=inductor", "strategy=mirrored"],
            "train.engine=inductor needs strategy=threads and workload=train: it runs PyTorch's captured steps.",
        ),
        (
            ["train.engine=inductor", "train.capture=never"],
            "train.engine=inductor needs captured steps, and this run takes them operator by operator. Try "
            "train.capture=always.",
        ),
        (
            ["state.compile_ids=counter"],
            "state.compile_ids=counter needs train.engine=inductor or native: train.engine=torchscript keeps no step "
            "that it has captured.",
        ),
        (
            ["train.engine=native", "schedule=search"],
            "train.engine=native needs schedule=free: a schedule comes between accesses that the compiled loop makes "
            "by itself. Try train.engine=inductor.",
        ),
        (["train.engine=gcc"], "train.engine must be one of torchscript, inductor, native; got 'gcc'."),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused_in_one_line(
    command: Command, arguments: list[str], message: str
) -> None:
    ended = command(*arguments)
    assert (ended.returncode, ended.stderr) == (2, f"trainer: {message}\n")
    assert command.left() == []
