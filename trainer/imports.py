"""What a run's process does while frameworks are imported, which is most of the time until its first step."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.config import Config, Custom

# Keras imports these where they are installed, for wrappers and plots that no part of ours has a use for.
TAKEN_ALONG = ("sklearn", "matplotlib", "pandas")


@contextmanager
def frameworks(config: Config) -> Iterator[None]:
    """Round the import of the frameworks: nothing is imported that nobody needs, and no garbage is looked for.

    Keras then is as it is where those packages are not installed. A user's own code may need them in Keras, so where
    there is some Keras gets them; afterwards everybody can import them.

    Thread-safety: none; called by the main thread before there are others that import.
    """
    left_out = [] if _brings_own(config) else [name for name in TAKEN_ALONG if name not in sys.modules]
    collects = gc.isenabled()
    # What is imported stays: to look through it again and again finds nothing.
    gc.disable()
    # An import of a name that stands for None fails as that of a package that is not there.
    sys.modules.update(dict.fromkeys(left_out))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in left_out:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
        gc.freeze()
        if collects:
            gc.enable()


def _brings_own(config: Config) -> bool:
    """Whether code of the user's is run."""
    parts = (config.model, config.data, config.optimizer, config.workload, config.update_mode)
    return any(isinstance(part, Custom) for part in parts)
