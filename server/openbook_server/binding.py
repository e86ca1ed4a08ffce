"""Device memory that stays: inputs and outputs of a session in buffers allocated once a batch shape.

No allocation, and no copy that onnxruntime decides on: in, run, out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND_SHAPES = 32  # (batch, length) pairs that a session keeps buffers for, a few hundred kB each

Arrays = dict[str, NDArray[np.generic]]


class BoundSession:
    """A session with its buffers; for one caller at a time."""

    def __init__(self, ort: ModuleType, session: Any, memory: str, outputs: Sequence[str]) -> None:
        """Bind nothing yet.

        Args:
            memory: onnxruntime's name of that which buffers are in.
            outputs: that are wanted of each batch; their shapes must depend on nothing but its rows.
        """
        self._ort, self._session, self._memory, self._outputs = ort, session, memory, outputs
        self._buffers: OrderedDict[tuple[int, ...], _Buffers] = OrderedDict()  # the shape used last stands last

    def run(self, feed: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """One batch: arrays of one shape in, outputs by name out."""
        shape = next(iter(feed.values())).shape
        buffers = self._buffers.pop(shape, None) or _Buffers(self._ort, self._session, self._memory, self._outputs, shape)
        self._buffers[shape] = buffers
        if len(self._buffers) > BOUND_SHAPES:
            self._buffers.popitem(last=False)
        return buffers.run(self._session, feed)

    def run_unbound(self, outputs: Sequence[str], feed: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """One batch, with these outputs, in memory that is allocated for it."""
        return dict(zip(outputs, self._session.run(outputs, feed), strict=True))


class _Buffers:
    """Memory for the inputs and outputs of one batch shape, bound to a session."""

    def __init__(self, ort: ModuleType, session: Any, memory: str, outputs: Sequence[str], shape: tuple[int, ...]) -> None:
        self._binding = session.io_binding()
        allocate = ort.OrtValue.ortvalue_from_shape_and_type
        self._inputs = {value.name: allocate(list(shape), np.int64, memory, 0) for value in session.get_inputs()}
        self._outputs = {}
        for value in session.get_outputs():
            if value.name not in outputs:
                continue
            kind = np.int64 if value.type == "tensor(int64)" else np.float32
            self._outputs[value.name] = allocate([shape[0], *value.shape[1:]], kind, memory, 0)  # only the batch is open
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, session: Any, feed: Mapping[str, NDArray[np.generic]]) -> Arrays:
        for name, value in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(feed[name]))
        session.run_with_iobinding(self._binding)
        return {name: value.numpy().copy() for name, value in self._outputs.items()}  # in host memory numpy() is a view
