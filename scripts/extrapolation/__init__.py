"""The parts of `scripts/extrapolate.py`: what a step is made of, what is simulated of it, and what that is held to."""
