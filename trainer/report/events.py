"""TensorBoard's event file: a series of checksummed protobuf records, written without TensorFlow or torch.

TensorBoard's own `EventFileWriter` opens its file through TensorFlow wherever that is installed, which costs seconds
and would bring TensorFlow into a `threads` run. Its record format and its plugins' metadata modules do not need it, and
they are all that stands here.

What is written is on its way to the disk once `flush` returns: a process that is killed after that leaves a readable
file, one that is killed in the middle of a batch leaves a file that is readable up to its last whole record.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import plugin_data_pb2 as hparams_pb2
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

# Tells apart the files that one process opens within one second.
_FILE_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Hyperparameter:
    """A column of the HParams table that tells runs apart; `leading` ones are shown before anything is clicked.

    TensorBoard shows five columns at first, those that are marked as differing before others.

    Attributes:
        values: all that it can take, where they are few: TensorBoard has a box to tick for each.
    """

    name: str
    type: type[str | int | float]
    leading: bool = False
    values: tuple[str | float, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A column of the HParams table: the last value of a scalar tag, under a title."""

    tag: str
    title: str
    description: str


@dataclass(frozen=True)
class Chart:
    """A chart of the Custom Scalars page: every scalar tag that one of the regular expressions matches."""

    title: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Category:
    """Charts of the Custom Scalars page that are folded away together."""

    title: str
    charts: tuple[Chart, ...]


class EventFile:
    """One run's event file, open for writing.

    Args:
        folder: the run's folder, which exists.
        descriptions: what a tag shows, by the tag or by the tag without its last part, as `/replica_i`; TensorBoard
            shows it with the chart.
        suffix: of its name, to be told apart by.

    Thread-safety: none; one thread writes.
    """

    def __init__(self, folder: Path, descriptions: Mapping[str, str], suffix: str = "") -> None:
        by = f"{socket.gethostname()}.{os.getpid()}.{next(_FILE_NUMBERS)}"
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{by}{suffix}"
        self._descriptions = descriptions
        self._tags: set[str] = set()
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each tag, in one record."""
        summary = summary_pb2.Summary()
        for tag, value in values.items():
            entry = summary.value.add(tag=tag, tensor=_number(value))
            self._introduce(entry, scalar_metadata)
        self._summary(step, summary)

    def histograms(self, step: int, values: Mapping[str, NDArray[np.float64]]) -> None:
        """Add one histogram to each tag, in one record: float64 [buckets, 3], left edge, right edge, count."""
        summary = summary_pb2.Summary()
        for tag, buckets in values.items():
            entry = summary.value.add(tag=tag, tensor=_matrix(buckets))
            self._introduce(entry, histogram_metadata)
        self._summary(step, summary)

    def images(self, step: int, values: Mapping[str, bytes]) -> None:
        """Add one image to each tag, in one record: the content of a PNG file."""
        summary = summary_pb2.Summary()
        for tag, png in values.items():
            entry = summary.value.add(tag=tag, tensor=_image(png))
            self._introduce(entry, image_metadata)
        self._summary(step, summary)

    def text(self, step: int, tag: str, markdown: str) -> None:
        summary = summary_pb2.Summary()
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=_SCALAR, string_val=[markdown.encode()])
        summary.value.add(tag=tag, tensor=tensor, metadata=text_metadata.create_summary_metadata("", ""))
        self._summary(step, summary)

    def charts(self, categories: Sequence[Category]) -> None:
        """Say which charts the Custom Scalars page has.

        Args:
            categories: TensorBoard puts those of all runs together, so all runs have to name the same.
        """
        layout = layout_pb2.Layout(
            category=[
                layout_pb2.Category(
                    title=category.title,
                    chart=[
                        layout_pb2.Chart(title=chart.title, multiline=layout_pb2.MultilineChartContent(tag=chart.tags))
                        for chart in category.charts
                    ],
                )
                for category in categories
            ]
        )
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, tensor_shape=_SCALAR, string_val=[layout.SerializeToString()]
        )
        summary = summary_pb2.Summary()
        summary.value.add(
            tag=layout_metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=layout_metadata.create_summary_metadata()
        )
        self._summary(0, summary)

    def session_started(
        self, hyperparameters: Mapping[str, str | float], columns: Sequence[Hyperparameter], metrics: Sequence[Metric]
    ) -> None:
        """Make this run a row of the HParams table.

        Args:
            hyperparameters: this run's values; a column that is not among them stays empty.
            columns: every hyperparameter that the table may show. TensorBoard takes the columns from whichever run it
                finds first, so all runs have to name the same.
            metrics: likewise.
        """
        experiment = api_pb2.Experiment(
            hparam_infos=[_column(each) for each in columns],
            metric_infos=[
                api_pb2.MetricInfo(
                    name=api_pb2.MetricName(tag=metric.tag), display_name=metric.title, description=metric.description
                )
                for metric in metrics
            ],
        )
        # Without a group name a session is a group of its own: two runs of the same configuration stay two rows.
        session = hparams_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in hyperparameters.items():
            if isinstance(value, str):
                session.hparams[name].string_value = value
            else:
                session.hparams[name].number_value = value
        self._hparams(hparams_metadata.EXPERIMENT_TAG, hparams_pb2.HParamsPluginData(experiment=experiment))
        self._hparams(
            hparams_metadata.SESSION_START_INFO_TAG, hparams_pb2.HParamsPluginData(session_start_info=session)
        )

    def session_ended(self, *, success: bool) -> None:
        status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
        session = hparams_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        self._hparams(hparams_metadata.SESSION_END_INFO_TAG, hparams_pb2.HParamsPluginData(session_end_info=session))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _introduce(self, entry: Any, plugin: Any) -> None:
        """Say of a tag's first point what it is: readers look there only."""
        if entry.tag not in self._tags:
            self._tags.add(entry.tag)
            description = self._descriptions.get(entry.tag) or self._descriptions.get(entry.tag.rpartition("/")[0], "")
            entry.metadata.CopyFrom(plugin.create_summary_metadata("", description))

    def _hparams(self, tag: str, content: Any) -> None:
        summary = summary_pb2.Summary()
        metadata = hparams_metadata.create_summary_metadata(content)
        summary.value.add(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)
        self._summary(0, summary)

    def _summary(self, step: int, summary: Any) -> None:
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


_SCALAR = tensor_shape_pb2.TensorShapeProto()


def _number(value: float) -> Any:
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, tensor_shape=_SCALAR, float_val=[value])


def _matrix(values: NDArray[np.float64]) -> Any:
    shape = tensor_shape_pb2.TensorShapeProto(
        dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=length) for length in values.shape]
    )
    return tensor_pb2.TensorProto(
        dtype=types_pb2.DT_DOUBLE, tensor_shape=shape, tensor_content=values.astype("<f8").tobytes()
    )


def _image(png: bytes) -> Any:
    """Width, height and the file itself; the first two are read from its head."""
    width, height = struct.unpack_from(">II", png, 16)
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=3)])
    strings = [str(width).encode(), str(height).encode(), png]
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=strings)


def _column(what: Hyperparameter) -> Any:
    kind = api_pb2.DATA_TYPE_STRING if what.type is str else api_pb2.DATA_TYPE_FLOAT64
    info = api_pb2.HParamInfo(name=what.name, type=kind, differs=what.leading)
    if what.values:
        info.domain_discrete.extend(what.values)
    return info
