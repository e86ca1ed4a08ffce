"""onnxruntime: the choice of a device, and a session per graph.

The only module that imports onnxruntime. It knows nothing of batching or of requests.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import LifoQueue
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook_server.binding import Arrays, BoundSession
from openbook_server.buckets import COARSE, FINE, Buckets
from openbook_server.errors import BundleInvalid, DeviceUnavailable
from openbook_server.rows import Row, collate

DISTRIBUTIONS = {"onnxruntime": "server", "onnxruntime-gpu": "server-gpu", "onnxruntime-openvino": "server-openvino"}  # -> our extra
PROVIDERS = {"cpu": "CPUExecutionProvider", "openvino": "OpenVINOExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What each device runs, its default first. int8 stays on the CPU: on CUDA it is slower than fp32.
PRECISIONS = {"cuda": ("fp16", "fp32"), "openvino": ("bf16", "fp32"), "cpu": ("fp32", "fp16", "int8")}
MOST_SESSIONS = 8  # that a processor gets unless told: so many batches at once keep any number of cores busy
GPU_SESSIONS = 2  # one computes while the other copies
# Kernels that OpenVINO keeps, a graph and stream. It makes some for each new shape of a batch, and keeps 5,000 unless told: gigabytes, of
# shapes that may never come again. With as many as this, nothing that repeats is slower.
OPENVINO_KERNELS = 512

# Output of an embedder's graph, (batch, length, dim): large, and only passages and questions that look closely need it.
HIDDEN_STATES = "last_hidden_state"
LONGEST_KEY = "openbook.longest"  # in a graph's metadata where buckets would pad rows to more tokens, which it may have no positions for
PADDING_FREE_KEY = "openbook.padding_free"  # in a graph's metadata where its layers run on tokens, not on padded rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where and how graphs run."""

    name: str  # cpu, openvino or cuda
    precision: str  # fp32, bf16, fp16 or int8
    providers: list[tuple[str, dict[str, str]]]  # as onnxruntime takes them, the one that must run first
    threads: int = 0  # processor threads of a graph, shared by all that runs in it; 0 = all cores
    sessions: int = 1  # batches that run at once
    memory: str = ""  # onnxruntime's name of the memory that inputs and outputs are preallocated in; "" = none are
    prepares_lengths: bool = False  # the first batch of a padded length takes longer than the next: kernels are made or chosen for it

    @property
    def computes_here(self) -> bool:
        """On the processor that everything else needs as well."""
        return self.name != "cuda"


def require_onnxruntime() -> ModuleType:
    """The onnxruntime module, of whichever distribution provides it.

    Raises:
        DeviceUnavailable: none is installed, or more than one: they overwrite each other's files.
    """
    installed = [name for name in DISTRIBUTIONS if _is_installed(name)]
    if not installed:
        raise DeviceUnavailable(
            "onnxruntime is not installed; in a clone of openbook: pip install '.[server]' (or '.[server-openvino]', '.[server-gpu]')"
        )
    if len(installed) > 1:
        raise DeviceUnavailable(
            f"{' and '.join(installed)} are installed together and overwrite each other; "
            f"pip uninstall -y {' '.join(installed)}, then, in a clone of openbook, pip install '.[{DISTRIBUTIONS[installed[-1]]}]'"
        )
    try:
        return importlib.import_module("onnxruntime")
    except (ImportError, MemoryError) as error:
        lacks_memory = isinstance(error, MemoryError) or "bad_alloc" in str(error)
        way_out = "give this process more memory (ulimit -v, or its container's limit)" if lacks_memory else "reinstall it"
        raise DeviceUnavailable(f"{installed[0]} does not load ({error}); {way_out}") from error


def choose_device(name: str = "auto", precision: str | None = None, threads: int = 0, sessions: int = 1) -> Device:
    """Find the device to run on.

    Args:
        name: cpu, openvino, cuda, or auto: the first of cuda, openvino, cpu that works here and runs `precision`.
        precision: of the graphs; None = the device's default (cuda fp16; openvino bf16 where the processor has bf16
            instructions, else fp32; cpu fp32).
        threads: see `Device`.
        sessions: the same; 0 = as many as keep the device busy. More than `threads` count as that many.

    Raises:
        DeviceUnavailable: the device is not here or does not run that precision; the message says what would help.
    """
    available = require_onnxruntime().get_available_providers()
    if name != "auto" and name not in PRECISIONS:
        raise DeviceUnavailable(f"unknown device {name!r}; choose auto, {', '.join(PRECISIONS)}")
    problems = []
    for candidate in PRECISIONS if name == "auto" else (name,):
        chosen = precision or _default_precision(candidate)
        problem = _obstacle(candidate, chosen, available)
        if problem is None:
            return build_device(candidate, chosen, threads, sessions)
        problems.append(problem)
    raise DeviceUnavailable("; ".join(problems))


def build_device(name: str, precision: str, threads: int = 0, sessions: int = 1) -> Device:
    """The device with its provider's options, whether or not it is here; `choose_device` asks that, and takes the same numbers."""
    cpu: tuple[str, dict[str, str]] = (PROVIDERS["cpu"], {})
    if name == "cuda":
        # Growing by what is asked for, not by doubling, leaves memory to others; TF32 would make fp32 a third precision.
        options = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
        providers = [(PROVIDERS[name], options), cpu]
        sessions = sessions or GPU_SESSIONS
        device = Device(name=name, precision=precision, providers=providers, threads=threads, sessions=sessions)
        return replace(device, memory="cuda", prepares_lengths=True)
    if sessions != 1:
        threads = threads or cores()
        sessions = min(sessions or MOST_SESSIONS, threads)
    device = Device(name=name, precision=precision, providers=[cpu], threads=threads, sessions=sessions)
    if name == "openvino":
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "NUM_STREAMS": str(sessions),
            "CPU_RUNTIME_CACHE_CAPACITY": str(OPENVINO_KERNELS),
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        options = {"device_type": "CPU", "load_config": json.dumps({"CPU": settings})}  # it wants its JSON as a string
        return replace(device, providers=[(PROVIDERS[name], options), cpu], prepares_lengths=True)
    return device


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Graph:
    """One graph, loaded; safe to call from several threads, and as many calls as the device has `sessions` run at once."""

    def __init__(self, path: Path, device: Device) -> None:
        """Load the graph in `path`.

        Raises:
            BundleInvalid: onnxruntime does not take the file.
            DeviceUnavailable: the device's provider did not start.
        """
        ort = require_onnxruntime()
        wanted = device.providers[0][0]
        if wanted not in ort.get_available_providers():  # it would only warn, and go on without
            raise DeviceUnavailable(f"onnxruntime here has no {wanted}, only {', '.join(ort.get_available_providers())}")
        if device.name == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds the CUDA and cuDNN libraries that pip installed
        self._session = _load(ort, path, device)
        self.input_names: list[str] = [value.name for value in self._session.get_inputs()]
        outputs = [value.name for value in self._session.get_outputs()]
        self.gives_states: bool = HIDDEN_STATES in outputs
        self.output_names: list[str] = [name for name in outputs if name != HIDDEN_STATES]
        self._shapes = {value.name: value.shape for value in self._session.get_inputs()}
        stated = self._session.get_modelmeta().custom_metadata_map
        # What rows are padded to. In bf16 a batch of one row costs a third more a token than larger ones do.
        buckets = COARSE if PADDING_FREE_KEY in stated or device.precision == "bf16" else FINE
        self.buckets: Buckets = replace(buckets, longest=int(stated[LONGEST_KEY])) if LONGEST_KEY in stated else buckets
        # A session's calls run side by side on a processor, in turn on a GPU: there each has a session, and buffers, of its own.
        self._bound: LifoQueue[BoundSession] = LifoQueue()  # those that are free; the last one used is warm
        for number in range(device.sessions if device.memory else 0):
            session = _load(ort, path, device) if number else self._session
            self._bound.put(BoundSession(ort, session, device.memory, self.output_names))
        self._binds = bool(device.memory)

    def run(self, inputs: Mapping[str, NDArray[np.generic]], *, states: bool = False) -> Arrays:
        """Run one batch.

        Args:
            inputs: (batch, length) int64 arrays by name, all of one shape; names that the graph does not take are ignored.
            states: HIDDEN_STATES as well, of a graph that `gives_states`.

        Returns:
            The outputs by name, the first axis being the batch.
        """
        feed = {name: inputs[name] for name in self.input_names}
        names = [*self.output_names, HIDDEN_STATES] if states else self.output_names
        if not self._binds:
            return dict(zip(names, self._session.run(names, feed), strict=True))
        session = self._bound.get()
        try:
            return session.run_unbound(names, feed) if states else session.run(feed)
        finally:
            self._bound.put(session)

    def heads_and_dim(self, name: str) -> tuple[int, int]:
        """Of an input of keys or values, (batch, heads, tokens, dim)."""
        _, heads, _, dim = self._shapes[name]
        return int(heads), int(dim)

    def run_rows(self, rows: Sequence[Row], length: int) -> Arrays:
        """As `run`, of rows padded to `length`."""
        return self.run(collate(rows, length))

    def warm(self, rows: Sequence[Row], length: int) -> None:
        """As `run_rows`, once in each session, before anybody else runs anything."""
        sessions = [self._bound.get() for _ in range(self._bound.qsize())]
        for session in sessions:
            self._bound.put(session)
            self.run_rows(rows, length)
            self._bound.get()
        for session in sessions:
            self._bound.put(session)
        if not sessions:
            self.run_rows(rows, length)


def _load(ort: ModuleType, path: Path, device: Device) -> Any:
    wanted = device.providers[0][0]
    options = ort.SessionOptions()
    # Calls at once share a session's threads, and each brings the one that it comes from.
    options.intra_op_num_threads = device.threads and max(1, device.threads - device.sessions + 1)
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not burn a shared machine's cores
    if device.name == "openvino":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it optimises by itself, and better
    try:
        # Without its fallback onnxruntime would print to stdout and go on with another provider.
        session = ort.InferenceSession(str(path), options, providers=device.providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen kinds, none of them public
        raise BundleInvalid(f"{path} does not load on {device.name}: {_first_line(error)}") from error
    running = session.get_providers()
    if wanted not in running:
        raise DeviceUnavailable(f"{wanted} did not start, only {', '.join(running)}; are its libraries installed? or use --device cpu")
    return session


def cuda_devices() -> int:
    """How many GPUs the NVIDIA driver answers for; 0 without a driver. The provider's own presence says nothing of that."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def has_bf16_instructions(processor: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bf16 natively; without that, bf16 is slower than fp32. Unknown counts as no."""
    try:
        flags = processor.read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags  # the last is Arm's name


def _default_precision(device: str) -> str:
    return "fp32" if device == "openvino" and not has_bf16_instructions() else PRECISIONS[device][0]


def _obstacle(device: str, precision: str, available: list[str]) -> str | None:
    """Why the device cannot run that precision here, and what would help; None if it can."""
    if PROVIDERS[device] not in available:
        wanted = "onnxruntime-gpu" if device == "cuda" else f"onnxruntime-{device}"
        others = " ".join(name for name in DISTRIBUTIONS if _is_installed(name))
        way_out = f"pip uninstall -y {others}, then, in a clone of openbook, pip install '.[{DISTRIBUTIONS[wanted]}]'"
        return f"{device}: no {PROVIDERS[device]} here; {way_out}"
    if precision not in PRECISIONS[device]:
        return f"{device}: runs {', '.join(PRECISIONS[device])}, not {precision}"
    if device == "cuda" and not cuda_devices():
        return "cuda: the driver shows no GPU (`nvidia-smi` should list one); use --device cpu"
    if device == "openvino" and precision == "bf16" and not has_bf16_instructions():
        return "openvino: this processor has no bf16 instructions; use --precision fp32"
    return None


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
