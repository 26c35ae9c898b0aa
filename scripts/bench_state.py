"""What safe state holders cost: micro-steps per second of state=safe beside state=naive, steps captured in both.

    python scripts/bench_state.py --rounds 5 model=mlp update_mode=locked

Runs are made in turn, safe and naive, so that both meet the same machine. Further arguments are overrides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STATES = ("safe", "naive")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--steps", type=int, default=5000, help="train.steps of a run (default: 5000)")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for both, as for python -m trainer")
    given = parser.parse_args()
    speeds: dict[str, list[float]] = {state: [] for state in STATES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for state in STATES:
                speeds[state].append(run(Path(folder) / f"{number}_{state}", state, given.steps, given.overrides))
    safe, naive = (statistics.median(speeds[state]) for state in STATES)
    for state in STATES:
        own = speeds[state]
        print(f"state={state:<6} {statistics.median(own):>10,.0f} micro-steps/s   {min(own):,.0f} to {max(own):,.0f}")
    print(f"safe / naive   {safe / naive:.3f}   (medians of {given.rounds} runs each, made in turn)")


def run(folder: Path, state: str, steps: int, overrides: list[str]) -> float:
    """One run's micro-steps per second."""
    command = [sys.executable, "-m", "trainer", f"state={state}", "train.capture=always", f"train.steps={steps}"]
    command += [*overrides, "fail_on=never", f"hydra.run.dir={folder}"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "verdict.json").read_text())["metrics"]
    return float(metrics["micro_steps_per_second"])


if __name__ == "__main__":
    main()
