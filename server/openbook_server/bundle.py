"""The bundle on disk: what `openbook export` wrote, checked before anything of it is used.

A bundle is an immutable, relocatable folder: manifest.json, tokenizer.json, one graph a model and precision, golden.npz.
`load_bundle` promises that the format is known, that the manifest is complete, and that every file it lists has the size
and sha256 it lists. Files it does not list are never opened here, and none of the graphs that `openbook export` writes has onnxruntime
open one. Nothing is unpickled, and no name leads out of the folder; a file may be a symbolic link, as stores of content by digest make
them: what counts is that its bytes are those that were listed.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openbook_server.errors import BundleInvalid
from openbook_server.heads import HeadInfo, neighbours_graph, parse_heads
from openbook_server.manifest import AGAIN, MANIFEST, get, graphs_of, invalid, natural, positive, unreadable, weight
from openbook_server.ranking import Settling
from openbook_server.writers import WRITERS, WriterInfo

FORMAT = 1  # raised whenever an older server would misread a bundle
TOKENIZER, GOLDEN = "tokenizer.json", "golden.npz"

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a plain name: no folder, no "..", nothing hidden
_COPY = f"copy the bundle again, or {AGAIN}"
_DIGESTS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedderInfo:
    """What a caller of the embedder's graph must know."""

    fingerprint: str  # names the embedder; a knowledge base records the one it was built with
    dim: int  # of the unit vectors it returns
    max_tokens: int  # longest text, special tokens included
    token_dims: int  # of a token's state, the first whose signs a knowledge base keeps; 0 = tokens are not compared one by one
    graphs: Mapping[str, str]  # precision -> file name


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderInfo:
    """What a caller of the reader's graph must know."""

    max_tokens: int  # longest question + passage, special tokens included
    max_question_tokens: int  # longest question, special tokens not included
    max_answer_tokens: int  # longest span considered
    spans: int  # spans returned a pair
    prior_weight: float  # weight of the retrieval score beside the span score, a calibrated constant
    null_bias: float  # added to every null score, a calibrated constant
    settling: Settling | None  # when to stop reading, calibrated; None = read every passage found
    graphs: Mapping[str, str]  # precision -> file name


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A checked bundle; its files may be opened."""

    folder: Path
    id: str  # sha256 of the manifest without this key
    name: str
    license: str
    tasks: tuple[str, ...]
    embedder: EmbedderInfo
    reader: ReaderInfo | None
    heads: Mapping[str, HeadInfo]  # of other tasks, by name
    writers: Mapping[str, WriterInfo]  # models that write text: "generator", "language_model", or none
    manifest: Mapping[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def tokenizer_digest(self) -> str:
        """sha256 of the tokenizer's file, in hexadecimal."""
        return str(self.manifest["files"][TOKENIZER]["sha256"])

    @property
    def graphs(self) -> dict[str, Mapping[str, str]]:
        """By model name: precision -> file name."""
        reader = {"reader": self.reader.graphs} if self.reader else {}
        heads = {name: head.graphs for name, head in self.heads.items()}
        heads |= {neighbours_graph(name): head.neighbours.graphs for name, head in self.heads.items() if head.neighbours}
        written = {model: graphs for writer in self.writers.values() for model, graphs in writer.graphs.items()}
        return {"embedder": self.embedder.graphs} | reader | heads | written

    def graph_path(self, model: str, precision: str) -> Path:
        """The file of a model's graph for a precision of the runtime; bf16 runs the fp32 file.

        Raises:
            BundleInvalid: the bundle has no such graph.
        """
        graphs = self.graphs.get(model)
        if graphs is None:
            option = next((f"--{kind.replace('_', '-')}" for kind in ("reader", *WRITERS) if model.startswith(kind)), "--task")
            raise invalid(self.folder, f"it has no {model}, only {', '.join(self.graphs)}", f"`openbook export {option}` adds one")
        stored = "fp32" if precision == "bf16" else precision
        if stored not in graphs:
            way_out = "`openbook export --int8` writes it" if stored == "int8" else AGAIN
            raise BundleInvalid(f"bundle {self.folder} has no {stored} graph of the {model}, only {', '.join(sorted(graphs))}; {way_out}")
        return self.folder / graphs[stored]

    def golden(self) -> dict[str, NDArray[np.generic]]:
        """Inputs with the outputs PyTorch fp32 gave for them, each under "<model>/<input or output>".

        Raises:
            BundleInvalid: the file is no archive of plain arrays.
        """
        try:
            with np.load(self.folder / GOLDEN, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise invalid(self.folder, f"{GOLDEN} is unreadable ({error})") from error


def load_bundle(folder: Path) -> Bundle:
    """Open the bundle in `folder` and check all of it.

    Raises:
        BundleInvalid: something is missing, malformed, of a newer format, not to be read, or differs from its digest; the message names
            the file, what was expected and found, and the way out.
    """
    manifest = read_manifest(folder)
    bundle = _parse(folder, manifest)
    files = get(manifest, "files", dict, folder)
    tokenizers = [writer.tokenizer for writer in bundle.writers.values()]
    for name in (TOKENIZER, GOLDEN, *tokenizers, *(file for graphs in bundle.graphs.values() for file in graphs.values())):
        if name not in files:
            raise invalid(folder, f"{MANIFEST} lists no digest for {name}")
    with ThreadPoolExecutor(_DIGESTS_AT_ONCE) as threads:  # reading and hashing let the interpreter go
        list(threads.map(lambda item: _check_file(folder, *item), files.items()))
    stated, actual = bundle.embedder.fingerprint, embedder_fingerprint(manifest)
    if stated != actual:
        raise invalid(folder, f"{MANIFEST} gives the embedder's fingerprint as {stated}, its files say {actual}")
    return bundle


def bundle_id(manifest: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON (sorted keys, no spaces, UTF-8) of the manifest without its "id"."""
    body = {key: value for key, value in manifest.items() if key != "id"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def embedder_fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 over what decides a text's vectors: the fp32 embedder graph, the tokenizer, the length limit, and what is kept of tokens.

    The other precisions share it: they return the same vectors within their tolerance, so one knowledge base serves all.
    """
    files, embedder = manifest["files"], manifest["embedder"]
    parts = [files[embedder["graphs"]["fp32"]]["sha256"], files[TOKENIZER]["sha256"], str(embedder["max_tokens"])]
    parts += [str(embedder["token_dims"])] if "token_dims" in embedder else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the bundle in `folder`, of a known format and unchanged since the export; no other file is looked at.

    Raises:
        BundleInvalid: as `load_bundle`.
    """
    file = folder / MANIFEST
    try:
        if folder.exists() and not folder.is_dir():
            raise BundleInvalid(f"{folder} is no bundle, it is no folder; name the folder that `openbook export` wrote")
        if not folder.is_dir():
            raise BundleInvalid(f"bundle {folder} does not exist; `openbook export CHECKPOINT {folder}` writes it")
        if not file.is_file():
            raise BundleInvalid(f"{folder} is no bundle, it has no {MANIFEST}; `openbook export CHECKPOINT BUNDLE` writes one")
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise invalid(folder, f"{MANIFEST} is unreadable ({error})") from error
    if not isinstance(manifest, dict):
        raise invalid(folder, f"{MANIFEST} holds no JSON object")
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise invalid(folder, f"{MANIFEST} has the format version {version!r}, expected {FORMAT}")
    if version != FORMAT:
        way_out = "update openbook" if version > FORMAT else AGAIN
        raise invalid(folder, f"it has format version {version}, this server reads {FORMAT}", way_out)
    try:
        actual = bundle_id(manifest)
    except UnicodeEncodeError as error:
        raise invalid(folder, f"{MANIFEST} holds half a character, which no UTF-8 has ({error.reason})") from error
    except ValueError as error:  # NaN or infinity, which canonical JSON has not
        raise invalid(folder, f"{MANIFEST} holds a number that is none ({error})") from error
    if manifest.get("id") != actual:
        problem = f"{MANIFEST} was changed after the export: its id is {manifest.get('id')!r}, its content says {actual}"
        raise invalid(folder, problem, _COPY)
    return manifest


def _parse(folder: Path, manifest: dict[str, Any]) -> Bundle:
    embedder, reader = get(manifest, "embedder", dict, folder), None
    if manifest.get("reader") is not None:
        table = get(manifest, "reader", dict, folder)
        reader = ReaderInfo(
            max_tokens=positive(table, "max_tokens", folder),
            max_question_tokens=positive(table, "max_question_tokens", folder),
            max_answer_tokens=positive(table, "max_answer_tokens", folder),
            spans=positive(table, "spans", folder),
            prior_weight=weight(table, "prior_weight", folder),
            null_bias=weight(table, "null_bias", folder),
            settling=_settling(table, folder),
            graphs=graphs_of(table, folder),
        )
    return Bundle(
        folder=folder,
        id=get(manifest, "id", str, folder),
        name=get(manifest, "name", str, folder),
        license=get(manifest, "license", str, folder),
        tasks=tuple(str(task) for task in get(manifest, "tasks", list, folder)),
        embedder=EmbedderInfo(
            fingerprint=get(embedder, "fingerprint", str, folder),
            dim=positive(embedder, "dim", folder),
            max_tokens=positive(embedder, "max_tokens", folder),
            token_dims=_token_dims(embedder, folder),
            graphs=graphs_of(embedder, folder),
        ),
        reader=reader,
        heads=parse_heads(manifest, folder),
        writers={name: _writer(get(manifest, name, dict, folder), models, folder) for name, models in WRITERS.items() if name in manifest},
        manifest=manifest,
    )


def _token_dims(embedder: dict[str, Any], folder: Path) -> int:
    dims = positive(embedder, "token_dims", folder) if "token_dims" in embedder else 0
    if dims > embedder["dim"]:
        raise invalid(folder, f'key "token_dims" is {dims}, expected at most {embedder["dim"]}, the embedder\'s dimensions')
    return dims


def _writer(table: dict[str, Any], models: tuple[str, ...], folder: Path) -> WriterInfo:
    parts = {model: get(table, model, dict, folder) for model in models}
    return WriterInfo(
        architecture=get(table, "architecture", str, folder),
        max_tokens=positive(table, "max_tokens", folder),
        passages=natural(table, "passages", folder),
        passage_tokens=natural(table, "passage_tokens", folder) if "passage_tokens" in table else 0,
        query_tokens=natural(table, "query_tokens", folder) if "query_tokens" in table else 0,
        max_answer_tokens=natural(table, "max_answer_tokens", folder) if "max_answer_tokens" in table else 0,
        start_token=natural(table, "start_token", folder),
        end_token=natural(table, "end_token", folder),
        tokenizer=get(table, "tokenizer", str, folder),
        graphs={model: graphs_of(part, folder) for model, part in parts.items()},
    )


def _settling(table: Mapping[str, Any], folder: Path) -> Settling | None:
    if "settling" not in table:
        return None
    return Settling(unread_weight=weight(get(table, "settling", dict, folder), "unread_weight", folder))


def _check_file(folder: Path, name: str, listed: object) -> None:
    if not _FILE_NAME.fullmatch(name):
        raise invalid(folder, f"{MANIFEST} names the file {name!r}, which is no plain file name", "do not trust this bundle")
    sha256, size = (listed.get("sha256"), listed.get("bytes")) if isinstance(listed, dict) else (None, None)
    if not isinstance(sha256, str) or type(size) is not int:
        raise invalid(folder, f"{MANIFEST} has no sha256 and bytes for {name}")
    file = folder / name
    try:
        if not file.is_file():
            raise invalid(folder, f"it lacks {name}", _COPY)
        if file.stat().st_size != size:
            raise invalid(folder, f"{name} has {file.stat().st_size} bytes, expected {size}", _COPY)
        actual = file_digest(file)
    except OSError as error:
        raise unreadable(file, error) from error
    if actual != sha256:
        raise invalid(folder, f"{name} has sha256 {actual}, expected {sha256}", _COPY)
