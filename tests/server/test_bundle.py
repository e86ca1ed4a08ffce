"""A bundle is checked before any of it is used: what is refused, and what the message says."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openbook import cli
from openbook_server.bundle import GOLDEN, bundle_id, embedder_fingerprint, file_digest, load_bundle
from openbook_server.errors import BundleInvalid
from openbook_server.manifest import MANIFEST


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it the id that fits, as somebody who tampers would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"id": bundle_id(manifest)}))


def head(**changes: object) -> dict[str, object]:
    """What a manifest states of a head."""
    facts = {"objective": "classifier", "pair": False, "max_tokens": 9, "labels": ["a"], "graphs": {"fp32": "topics.onnx"}}
    return facts | changes


def test_a_bundle_says_what_its_models_take_and_are_called(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    assert (bundle.name, bundle.license, bundle.tasks) == ("tiny", "Apache-2.0", ("embed", "answer"))
    assert (bundle.embedder.dim, bundle.embedder.max_tokens) == (32, 128)
    assert bundle.reader is not None
    assert (bundle.reader.max_tokens, bundle.reader.spans) == (64, 16)
    assert bundle.id == bundle_id(bundle.manifest)
    assert bundle.embedder.fingerprint == embedder_fingerprint(bundle.manifest)


def test_what_is_kept_of_tokens_is_part_of_the_fingerprint(copy: Path) -> None:
    now = load_bundle(copy).embedder

    def as_an_earlier_export(manifest: dict[str, Any]) -> None:
        del manifest["embedder"]["token_dims"]
        manifest["embedder"]["fingerprint"] = embedder_fingerprint(manifest)

    rewrite(copy, as_an_earlier_export)
    before = load_bundle(copy).embedder
    assert (now.token_dims, before.token_dims) == (32, 0)
    assert now.fingerprint != before.fingerprint


def test_a_bundle_can_be_moved(copy: Path, tiny_bundle: Path) -> None:
    assert load_bundle(copy).id == load_bundle(tiny_bundle).id


def test_bf16_runs_the_fp32_file_and_a_missing_precision_is_named(copy: Path) -> None:
    rewrite(copy, lambda manifest: [manifest[model]["graphs"].pop("int8") for model in ("embedder", "reader")])
    bundle = load_bundle(copy)
    assert bundle.graph_path("embedder", "bf16") == bundle.graph_path("embedder", "fp32") == copy / "embedder.fp32.onnx"
    with pytest.raises(BundleInvalid, match=r"no int8 graph of the reader, only fp16, fp32; `openbook export --int8`"):
        bundle.graph_path("reader", "int8")


def test_files_that_the_manifest_does_not_list_are_ignored(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert load_bundle(copy).name == "tiny"


def test_a_listed_file_may_be_a_link_to_its_bytes(copy: Path, tmp_path: Path) -> None:
    (copy / GOLDEN).rename(tmp_path / "stored")
    (copy / GOLDEN).symlink_to(tmp_path / "stored")
    assert load_bundle(copy)


def test_a_file_is_not_said_to_be_absent(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("text")
    with pytest.raises(BundleInvalid, match=rf"^{file} is no bundle, it is no folder; name the folder that `openbook export` wrote$"):
        load_bundle(file)
    with pytest.raises(BundleInvalid, match=rf"^bundle {tmp_path / 'none'} does not exist; `openbook export CHECKPOINT"):
        load_bundle(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "method"),
    [(MANIFEST, "is_file"), (MANIFEST, "read_text"), ("tokenizer.json", "is_file"), ("tokenizer.json", "open")],
)
def test_a_file_that_may_not_be_read_is_named_with_the_way_out(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, method: str
) -> None:
    granted = getattr(Path, method)

    def refuse(file: Path, *arguments: Any, **options: Any) -> Any:  # as permissions do, which do not bind root
        if file.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return granted(file, *arguments, **options)

    monkeypatch.setattr(Path, method, refuse)
    way_out = "cannot be read: Permission denied; give this user the right to read it"
    with pytest.raises(BundleInvalid, match=rf"^bundle .*/copy: {name} {way_out}$"):
        load_bundle(copy)
    assert cli.main(["info", str(copy)]) == 1
    assert capsys.readouterr().err.endswith(f"{name} {way_out}\n")


@pytest.mark.parametrize("name", ["embedder.fp32.onnx", "reader.fp16.onnx", "tokenizer.json", "golden.npz"])
def test_a_missing_truncated_or_changed_file_is_named_with_what_was_expected(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleInvalid, match=rf"{name} has sha256 {file_digest(file)}, expected [0-9a-f]{{64}}; copy the bundle again"):
        load_bundle(copy)
    file.write_bytes(content[:-1])
    with pytest.raises(BundleInvalid, match=rf"{name} has {len(content) - 1} bytes, expected {len(content)}"):
        load_bundle(copy)
    file.unlink()
    with pytest.raises(BundleInvalid, match=f"lacks {name}"):
        load_bundle(copy)


def test_a_manifest_edited_by_hand_is_refused(copy: Path) -> None:
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"tiny"', '"tidy"'))
    with pytest.raises(BundleInvalid, match="was changed after the export"):
        load_bundle(copy)


def test_a_newer_format_asks_for_an_upgrade(copy: Path) -> None:
    rewrite(copy, lambda manifest: manifest.update(format=2))
    with pytest.raises(BundleInvalid, match=r"has format version 2, this server reads 1; update openbook"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["../embedder.fp32.onnx", "/etc/passwd", "a/b", "a\\b", "..", "", ".hidden", "C:secret"])
def test_a_file_name_that_leaves_the_folder_is_refused(copy: Path, name: str) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("embedder.fp16.onnx")
        manifest["embedder"]["graphs"]["fp16"] = name

    rewrite(copy, rename)
    with pytest.raises(BundleInvalid, match="no plain file name"):
        load_bundle(copy)


def test_a_graph_without_a_digest_is_never_loaded(copy: Path) -> None:
    rewrite(copy, lambda manifest: manifest["files"].pop("reader.fp32.onnx"))
    with pytest.raises(BundleInvalid, match=r"lists no digest for reader.fp32.onnx"):
        load_bundle(copy)


def test_a_false_fingerprint_is_refused(copy: Path) -> None:
    rewrite(copy, lambda manifest: manifest["embedder"].update(max_tokens=64))
    with pytest.raises(BundleInvalid, match="fingerprint"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("name"), r'key "name" is missing, expected str'),
        (lambda manifest: manifest.update(embedder=[]), r'key "embedder" is list, expected dict'),
        (lambda manifest: manifest["embedder"].update(dim="384"), r'key "dim" is str, expected int'),
        (lambda manifest: manifest["embedder"].update(dim=True), r'key "dim" is bool, expected int'),
        (lambda manifest: manifest["embedder"].update(token_dims=0), r'key "token_dims" is 0, expected 1 or more'),
        (lambda manifest: manifest["embedder"].update(token_dims=33), r'key "token_dims" is 33, expected at most 32'),
        (lambda manifest: manifest["reader"].update(spans=0), r'key "spans" is 0, expected 1 or more'),
        (lambda manifest: manifest["embedder"].update(dim=10**18), r'key "dim" is 1e\+18, expected at most 1048576'),
        (lambda manifest: manifest["reader"].update(max_tokens=10**30), r'key "max_tokens" is 1e\+30, expected at most 1048576'),
        (lambda manifest: manifest["reader"].update(prior_weight=1e308), r'key "prior_weight" is 1e\+308, expected less than 1000000'),
        (lambda manifest: manifest["reader"].update(null_bias=None), r'key "null_bias" is NoneType, expected float'),
        (lambda manifest: manifest["reader"].update(settling=0.9), r'key "settling" is float, expected dict'),
        (lambda manifest: manifest["reader"].update(settling={"unread_weight": 1}), r'key "unread_weight" is int, expected float'),
        (lambda manifest: manifest["reader"]["graphs"].pop("fp32"), "has no fp32 graph"),
        (lambda manifest: manifest.update(heads={"topics": {}}), r'key "labels" is missing, expected list'),
        (lambda manifest: manifest.update(heads={"topics": head(labels=[1])}), r'"labels" of \'topics\' holds something other than texts'),
        (lambda manifest: manifest.update(heads={"topics": head(max_tokens=0)}), r'key "max_tokens" is 0, expected 1 or more'),
        (lambda manifest: manifest.update(heads={"reader": head()}), r"names one 'reader', which is a model of its own"),
        (lambda manifest: manifest.update(heads={"topics": head()}), r"lists no digest for topics.onnx"),
        (lambda manifest: manifest["files"].update({"golden.npz": {"bytes": 3}}), r"no sha256 and bytes for golden.npz"),
    ],
)
def test_an_incomplete_manifest_names_the_key(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(BundleInvalid, match=message):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "unreadable"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", "unreadable"),
        (b"{}", "format version None"),
        (b'{"format": true}', "format version True"),
        (b'{"format": 1, "x": NaN}', "a number that is none"),
        (b'{"format": 1, "x": "\\ud800"}', "holds half a character"),
        (b"[" * 100_000, "unreadable"),
    ],
)
def test_a_manifest_that_is_none_is_refused(copy: Path, content: bytes, message: str) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(BundleInvalid, match=message):
        load_bundle(copy)


def test_a_folder_that_is_missing_or_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(BundleInvalid, match="openbook export"):
            load_bundle(folder)


def test_golden_arrays_are_never_unpickled(copy: Path) -> None:
    with (copy / GOLDEN).open("wb") as file:
        np.savez(file, **{"embedder/input_ids": np.array([object()])})
    listed = {"sha256": file_digest(copy / GOLDEN), "bytes": (copy / GOLDEN).stat().st_size}
    rewrite(copy, lambda manifest: manifest["files"].update({GOLDEN: listed}))
    with pytest.raises(BundleInvalid, match=r"golden.npz is unreadable"):
        load_bundle(copy).golden()
