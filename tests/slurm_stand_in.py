"""Slurm's commands for a machine without Slurm: the jobs that sbatch is given run at once, in a session each.

    python slurm_stand_in.py sbatch SCRIPT          and srun, sacct, as submitit calls them

Nothing is queued or limited, and options of sbatch other than --array change nothing. `STAND_IN` is its folder, with a
file for each job that holds its process id.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

ARRAY = 1000  # its only one


def install(folder: Path) -> dict[str, str]:
    """Put the commands into a folder, and return the environment in which they are found."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    (folder / "jobs").mkdir()
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "STAND_IN": str(folder / "jobs")}


def jobs() -> Path:
    return Path(os.environ["STAND_IN"])


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    found = re.search(r"--array=0-(\d+)", text)
    for index in range(int(found[1]) + 1 if found else 1):
        number = str(ARRAY + index)
        array = {"SLURM_ARRAY_JOB_ID": str(ARRAY), "SLURM_ARRAY_TASK_ID": str(index)} if found else {}
        tasks = {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        job = subprocess.Popen(
            ["bash", script],
            env={**os.environ, "SLURM_JOB_ID": number, **array, **tasks},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        (jobs() / (f"{ARRAY}_{index}" if found else number)).write_text(str(job.pid))
    print(f"Submitted batch job {ARRAY}")


def srun(*arguments: str) -> None:
    words = list(arguments)
    places = {
        "%A": os.environ.get("SLURM_ARRAY_JOB_ID", ""),
        "%a": os.environ.get("SLURM_ARRAY_TASK_ID", ""),
        "%j": os.environ["SLURM_JOB_ID"],
        "%t": "0",
    }
    while words[0].startswith("--"):
        option = words.pop(0)
        if option in ("--output", "--error"):
            path = words.pop(0)
            for place, value in places.items():
                path = path.replace(place, value)
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, 1 if option == "--output" else 2)
    os.execvp(words[0], words)


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for path in sorted(jobs().iterdir()):
        print(f"{path.name}|{'RUNNING' if running(int(path.read_text())) else 'COMPLETED'}|here")


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct}[sys.argv[1]](*sys.argv[2:])
