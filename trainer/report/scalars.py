"""The scalars of an event file, read back with TensorBoard's own reader of records, which needs no TensorFlow."""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

PATTERN = "events.out.tfevents.*"


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, up to the last whole record; nothing where there is no event file.

    Where a tag has several points at a step, the last one counts.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob(PATTERN)):
        reader = PyRecordReader_New(str(path))
        while True:
            try:
                reader.GetNext()
            except (DataLossError, OutOfRangeError):
                # The end, or what a run that was killed has left of a record.
                break
            event = event_pb2.Event.FromString(reader.record())
            for value in event.summary.value:
                if value.tensor.float_val:
                    found.setdefault(value.tag, {})[event.step] = value.tensor.float_val[0]
    return found
