"""The parts of `scripts/bench.py`: who is measured, how, and what the figures come to."""
