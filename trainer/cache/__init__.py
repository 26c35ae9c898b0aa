"""Compiled steps on disk, so that sweeps and restarts need not compile them again. Standard library only.

`entry.py` is what a file holds, `folder.py` who may have written it, `store.py` finds and keeps them, and `library.py`
loads machine code. Whatever is wrong with a file or a folder, nothing is raised and nothing wrong is returned: the step
is compiled again, and one line says why.
"""
