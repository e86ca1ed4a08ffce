"""Devices are chosen with a reason, graphs run the same through every path, and a wrong graph is found out at start."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from openbook_server import runtime
from openbook_server.binding import BOUND_SHAPES, BoundSession
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.errors import BundleInvalid, DeviceUnavailable
from openbook_server.rows import Row, collate
from openbook_server.runtime import (
    HIDDEN_STATES,
    Device,
    Graph,
    build_device,
    choose_device,
    cores,
    has_bf16_instructions,
    require_onnxruntime,
)

BOUND = Device(name="cpu", precision="fp32", providers=[("CPUExecutionProvider", {})], memory="cpu")  # CUDA's path without CUDA


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


class Onnxruntime:
    """What `choose_device` asks of onnxruntime."""

    def __init__(self, *providers: str) -> None:
        self._providers = [f"{name}ExecutionProvider" for name in (*providers, "CPU")]

    def get_available_providers(self) -> list[str]:
        return self._providers


def machine(patch: pytest.MonkeyPatch, *providers: str, gpus: int = 0, bf16: bool = False) -> None:
    patch.setattr(runtime, "require_onnxruntime", lambda: Onnxruntime(*providers))
    patch.setattr(runtime, "cuda_devices", lambda: gpus)
    patch.setattr(runtime, "has_bf16_instructions", lambda: bf16)


@pytest.mark.parametrize(
    ("providers", "gpus", "bf16", "precision", "chosen"),
    [
        ((), 0, True, None, ("cpu", "fp32")),
        (("CUDA",), 1, False, None, ("cuda", "fp16")),
        (("CUDA",), 0, False, None, ("cpu", "fp32")),  # onnxruntime-gpu on a machine without a GPU
        (("OpenVINO",), 0, True, None, ("openvino", "bf16")),
        (("OpenVINO",), 0, False, None, ("openvino", "fp32")),
        (("OpenVINO",), 0, True, "int8", ("cpu", "int8")),
        (("CUDA",), 1, False, "fp32", ("cuda", "fp32")),
    ],
)
def test_auto_takes_the_fastest_device_that_works_here(
    monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...], gpus: int, bf16: bool, precision: str | None, chosen: tuple[str, str]
) -> None:
    machine(monkeypatch, *providers, gpus=gpus, bf16=bf16)
    device = choose_device("auto", precision)
    assert (device.name, device.precision) == chosen


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (ImportError("std::bad_alloc"), "give this process more memory"),
        (MemoryError("no room"), "give this process more memory"),
        (ImportError("libfoo.so: cannot open shared object file"), "reinstall it"),
    ],
)
def test_an_onnxruntime_that_does_not_load_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception, way_out: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(runtime.importlib, "import_module", fail)
    with pytest.raises(DeviceUnavailable) as raised:
        require_onnxruntime()
    assert str(error) in str(raised.value)
    assert str(raised.value).partition("; ")[2].startswith(way_out)


@pytest.mark.parametrize(
    ("providers", "name", "precision", "message"),
    [
        ((), "cuda", None, r"no CUDAExecutionProvider here; .*pip install '\.\[server-gpu\]'"),
        ((), "openvino", None, r"no OpenVINOExecutionProvider here; .*pip install '\.\[server-openvino\]'"),
        (("CUDA",), "cuda", None, "the driver shows no GPU"),
        (("CUDA",), "cuda", "int8", "runs fp16, fp32, not int8"),
        (("OpenVINO",), "openvino", "bf16", "no bf16 instructions; use --precision fp32"),
        ((), "cpu", "bf16", "runs fp32, fp16, int8, not bf16"),
        ((), "tpu", None, "unknown device 'tpu'; choose auto, cuda, openvino, cpu"),
    ],
)
def test_a_device_that_is_not_here_says_what_would_help(
    monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...], name: str, precision: str | None, message: str
) -> None:
    machine(monkeypatch, *providers)
    with pytest.raises(DeviceUnavailable, match=message):
        choose_device(name, precision)


def test_openvino_gets_its_settings_as_a_string_of_json() -> None:
    [(name, options), (fallback, _)] = build_device("openvino", "bf16", threads=3).providers
    assert (name, fallback) == ("OpenVINOExecutionProvider", "CPUExecutionProvider")
    settings = json.loads(options["load_config"])["CPU"]
    assert settings == {
        "INFERENCE_PRECISION_HINT": "bf16",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": "3",
        "CPU_RUNTIME_CACHE_CAPACITY": "512",  # bounds memory
    }
    [(_, options), _] = build_device("openvino", "fp32").providers
    settings = json.loads(options["load_config"])["CPU"]
    assert (settings["INFERENCE_PRECISION_HINT"], settings["NUM_STREAMS"]) == ("f32", "1")
    assert "INFERENCE_NUM_THREADS" not in settings


def test_cuda_binds_its_inputs_and_outputs() -> None:
    device = build_device("cuda", "fp16")
    assert device.providers[0][0] == "CUDAExecutionProvider"
    assert device.providers[0][1]["use_tf32"] == "0"
    assert device.memory == "cuda"


def test_none_or_two_distributions_of_onnxruntime_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(*names: str) -> None:
        def version(name: str) -> str:
            if name not in names:
                raise importlib.metadata.PackageNotFoundError(name)
            return "1.0"

        monkeypatch.setattr(importlib.metadata, "version", version)

    installed()
    with pytest.raises(DeviceUnavailable, match=r"not installed; in a clone of openbook: pip install '\.\[server\]'"):
        require_onnxruntime()
    installed("onnxruntime", "onnxruntime-gpu")
    with pytest.raises(DeviceUnavailable, match=r"pip uninstall -y onnxruntime onnxruntime-gpu, then, .* pip install '\.\[server-gpu\]'"):
        require_onnxruntime()


def test_bf16_instructions_are_read_from_the_processors_flags(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("flags\t: fpu avx512f avx512_bf16 amx_tile\n")
    (tmp_path / "old").write_text("flags\t: fpu avx2\n")
    assert has_bf16_instructions(tmp_path / "new")
    assert not has_bf16_instructions(tmp_path / "old")
    assert not has_bf16_instructions(tmp_path / "absent")


def test_bound_buffers_give_the_same_bytes_as_a_plain_run(bundle: Bundle) -> None:
    rng = np.random.default_rng(0)
    for model in ("embedder", "reader"):
        path = bundle.graph_path(model, "fp32")
        plain, bound = Graph(path, build_device("cpu", "fp32")), Graph(path, BOUND)
        kept = []
        for rows, length in ((1, 8), (3, 16), (1, 8), (2, 8)):
            ids = rng.integers(4, 60, (rows, length))
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids % 2}
            wanted = plain.run(inputs)
            kept.append((wanted, bound.run(inputs)))
        for wanted, got in kept:  # an earlier result must not be a view of a buffer that a later run wrote to
            assert {name: values.tobytes() for name, values in got.items()} == {name: values.tobytes() for name, values in wanted.items()}


@pytest.mark.parametrize("device", [build_device("cpu", "fp32"), BOUND, replace(BOUND, sessions=2)])
def test_the_states_come_when_they_are_asked_for_and_change_nothing_else(bundle: Bundle, device: Device) -> None:
    graph, rows = Graph(bundle.graph_path("embedder", "fp32"), device), [Row([5, 6, 7]), Row([8, 9, 10, 11])]
    assert graph.gives_states
    assert not Graph(bundle.graph_path("reader", "fp32"), device).gives_states
    for length in (4, 16):  # a length that was bound before is bound after
        plain = graph.run_rows(rows, length)
        whole = graph.run(collate(rows, length), states=True)
        assert {name: values.tobytes() for name, values in plain.items()} == {
            name: values.tobytes() for name, values in whole.items() if name != HIDDEN_STATES
        }
        assert whole[HIDDEN_STATES].shape == (2, length, bundle.embedder.dim)
        assert {name: values.tobytes() for name, values in graph.run_rows(rows, length).items()} == {
            name: values.tobytes() for name, values in plain.items()
        }


def test_buffers_of_the_least_recent_shape_are_given_up(bundle: Bundle) -> None:
    graph = Graph(bundle.graph_path("embedder", "fp32"), BOUND)
    for length in range(4, 4 + BOUND_SHAPES + 5):
        ids = np.full((1, length), 7)
        graph.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0})
    buffers = graph._bound.get()._buffers
    assert len(buffers) == BOUND_SHAPES
    assert (1, 4) not in buffers


def test_each_batch_at_once_has_a_session_of_its_own_and_each_is_warmed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    run, together = BoundSession.run, threading.Barrier(2, timeout=30)

    def noted(session: BoundSession, feed: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        ran.append(id(session))
        return run(session, feed)

    monkeypatch.setattr(BoundSession, "run", noted)
    graph = Graph(bundle.graph_path("embedder", "fp32"), replace(BOUND, sessions=2))
    rows = [Row([5, 6, 7, 8])]
    graph.warm(rows, 4)
    assert len(set(ran)) == len(ran) == 2

    def held(session: BoundSession, feed: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        together.wait()  # opens only if both are in
        return noted(session, feed)

    monkeypatch.setattr(BoundSession, "run", held)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: graph.run_rows(rows, 4)["sentence_embedding"].tobytes(), range(2))
    assert one == other
    assert len(set(ran[2:])) == 2


def test_a_processors_sessions_are_as_many_as_its_threads_up_to_a_limit_and_share_them() -> None:
    assert build_device("cpu", "fp32").sessions == 1
    assert [build_device("cpu", "fp32", threads, sessions=0).sessions for threads in (1, 2, 8, 64)] == [1, 2, 8, 8]
    assert build_device("cpu", "fp32", 2, sessions=5).sessions == 2
    assert build_device("cpu", "fp32", sessions=0).threads == cores()
    assert build_device("cuda", "fp16", sessions=0).sessions == 2
    [(_, options), _] = build_device("openvino", "bf16", threads=4, sessions=0).providers
    settings = json.loads(options["load_config"])["CPU"]
    assert (settings["NUM_STREAMS"], settings["INFERENCE_NUM_THREADS"]) == ("4", "4")


def test_a_file_that_is_no_graph_is_an_invalid_bundle(tmp_path: Path) -> None:
    (tmp_path / "embedder.fp32.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleInvalid, match=r"embedder.fp32.onnx does not load on cpu"):
        Graph(tmp_path / "embedder.fp32.onnx", build_device("cpu", "fp32"))


def test_a_provider_that_is_not_there_is_not_replaced_in_silence(bundle: Bundle) -> None:
    device = Device(name="npu", precision="fp32", providers=[("AbsentExecutionProvider", {}), ("CPUExecutionProvider", {})])
    with pytest.raises(DeviceUnavailable, match="no AbsentExecutionProvider, only .*CPUExecutionProvider"):
        Graph(bundle.graph_path("embedder", "fp32"), device)
