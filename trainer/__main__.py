"""`python -m trainer`, and the entry point `trainer`. Imports no framework."""

from __future__ import annotations

import os
import sys

# What is run where nothing is asked for: both strategies, safe and unsafe modes, one table.
TOUR = ["--multirun", "experiment=glob(tour_*)"]


def main() -> int:
    # Hydra then raises what goes wrong, which is told here on one line, and prints nothing itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["show"]:
            from trainer.show import show

            return show(arguments[1:])
        if arguments[:1] == ["report"]:
            from trainer.report.command import report

            return report(arguments[1:])
        if {"--help", "-h"} & set(arguments):
            from trainer.usage import usage

            print(usage(), end="")
            return 0
        from trainer import cli

        return cli.main(arguments or TOUR)
    except BrokenPipeError:
        # Whoever read the output has seen enough, as in `trainer show modes | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
