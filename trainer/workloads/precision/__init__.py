"""`workload=precision`: a mixed-precision mode as Sonnet keeps it, in programs of a few lines, under every holder.

`enable(dtype)` turns a mode on, `scope(dtype)` does so for the time of a `with` block, layers ask for it when they are
called, and the first call of all is made in full precision, which somebody has to note. Each program has a file; what
hosts their replicas (`plain.py`, `mirrored.py`) and what is counted (`calls.py`, `findings.py`) is the same for all.

Source: Sonnet's `mixed_precision` and the proposal to make it thread-safe, google-deepmind/sonnet, pull request 308.
"""
