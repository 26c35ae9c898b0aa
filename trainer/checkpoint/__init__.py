"""Checkpoints: what a run saves of itself, and how another run goes on from it.

`sealed.py` is the file, `store.py` the folder: which files there are, how one gets there whole, which one is taken.
`identity.py` is what two runs must have in common, `resume.py` holds a run to that before it starts. These are standard
library only. `files.py` puts arrays into a file and gets them out, `contents.py` says what of a record is among them,
and `checkpoints.py` is what a strategy is handed.
"""
