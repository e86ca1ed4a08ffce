"""The folder of a run: whether a run may begin there or go on, and what it was made with.

A run is known by the settings that decide which examples each step sees and what the weights are of, and by digests of those examples.
Its checkpoint states them, and only a run that has the same goes on from it. How long it takes, how fast it learns and how often it saves
may change between two starts.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from openbook_training.errors import InvalidConfig, InvalidData, NotWritten, TrainingError

CHECKPOINT, CONFIG, LOCK = "checkpoint.pt", "config.json", "lock"
_RECORDED = ("torch", "transformers", "peft", "accelerate", "tokenizers")
_STATE = {"step", "evaluated", "best", "trained", "average", "optimizer"}  # that every checkpoint has
_MAY_CHANGE = {"output"} | {
    f"loop.{name}"
    for name in (
        "epochs",
        "max_steps",
        "micro_batch_examples",
        "gradient_checkpointing",
        "learning_rate",
        "warmup_share",
        "weight_decay",
        "max_gradient_norm",
        "threads",
        "checkpoint_minutes",
        "evaluate_every_epochs",
    )
}


def identity(config: Any) -> dict[str, Any]:
    """The settings that a run cannot change and stay the same run, by their names in the configuration file ("loop.seed")."""
    named = _flat(json.loads(json.dumps(dataclasses.asdict(config))), "")
    return {name: value for name, value in named.items() if name not in _MAY_CHANGE}


def check_folder(folder: Path, config: Any, *, resume: bool) -> None:
    """Refuse a run before anything of it is written.

    Raises:
        InvalidConfig: the folder is none, another process trains in it, or it holds a run that was not to be resumed, or one of other
            settings.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InvalidConfig(f"output: {str(existing)!r} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):  # told now, not after hours of reading data
        raise InvalidConfig(f"output: {str(existing)!r} cannot be written to; name another folder")
    if (folder / LOCK).is_file():
        with (folder / LOCK).open() as handle:  # shared: the processes of one run may all look at once
            _claim(folder, handle, fcntl.LOCK_SH)
    file = folder / CHECKPOINT
    if not file.is_file():
        return
    if not resume:
        raise InvalidConfig(f"{folder} already holds a run; go on with --resume, or choose another output")
    began, now = load_state(file, mmap=True).get("config", {}), identity(config)  # runs of older versions state nothing
    changed = [f"{name} was {began[name]!r} and is {now[name]!r}" for name in began if name in now and began[name] != now[name]]
    if changed:
        raise InvalidConfig(
            f"{folder} holds a run of other settings: {'; '.join(changed)}. Set them as they were to go on with --resume, "
            "or choose another output"
        )


def digests(parts: Mapping[str, Iterable[object]]) -> dict[str, str]:
    """Of each part of what a run trains on its name and a digest; parts are gone through once and need not fit into memory."""
    named = {}
    for name, items in parts.items():
        digest = hashlib.sha256()
        for item in items:
            digest.update(repr(item).encode() + b"\0")
        named[name] = digest.hexdigest()
    return named


def check_data(folder: Path, data: Mapping[str, str]) -> None:
    """Refuse to go on with other data than the run in a folder began with, where there is one; `data` as from `digests`.

    Raises:
        InvalidData: they differ; the message says in what.
    """
    file = folder / CHECKPOINT
    began = load_state(file, mmap=True).get("data", {}) if file.is_file() else {}  # runs of older versions state nothing
    if changed := [name for name in began if began[name] != data.get(name)]:
        raise InvalidData(
            f"{folder} holds a run on other data: {', '.join(changed)} changed since it began. Put back what was there to go on with "
            "--resume, or choose another output"
        )


def load_state(file: Path, *, mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint holds; with `mmap` its tensors are read only where they are used.

    Raises:
        InvalidConfig: the file is damaged, or no checkpoint.
    """
    try:
        if not file.stat().st_size:
            raise ValueError("it is empty")
        with zipfile.ZipFile(file) as archive:  # which is what torch writes, with checksums that it never looks at
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged!r} in it is not what was written")
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(state, dict) or not state.keys() >= _STATE:
            raise ValueError(f"it holds a {type(state).__name__}, and not {', '.join(sorted(_STATE))}")
    except Exception as error:  # of a damaged file torch raises half a dozen kinds
        reason = str(error).split("\n", 1)[0]
        raise InvalidConfig(f"{file} cannot be read ({reason}); remove it to begin again, or choose another output") from error
    return state


def make_folder(folder: Path) -> None:
    """Raises:
    InvalidConfig: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfig(f"output: {str(folder)!r} cannot be made ({error.strerror}); name another folder") from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within, no other run begins in a folder. The kernel lets go of it when the process ends, however it does.

    Raises:
        InvalidConfig: another process trains in it.
        NotWritten: the system refuses.
    """
    with writing(folder / LOCK):
        handle = (folder / LOCK).open("a+")
    with handle:
        _claim(folder, handle, fcntl.LOCK_EX)
        with writing(folder / LOCK):
            handle.truncate(0)
            handle.write(f"{os.getpid()}\n")
            handle.flush()
        yield


def _claim(folder: Path, handle: IO[str], kind: int) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        raise InvalidConfig(f"another process (pid {owner}) trains in {folder}; stop it first, or choose another output") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks keeps nobody out, and nobody's run from going
            raise


def publish(aside: Path, file: Path) -> None:
    """Give a finished file its name in one step, once its bytes are on the disk: a crash leaves the old file or the new one, whole."""
    _sync(aside)
    aside.replace(file)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def save_state(file: Path, state: dict[str, Any]) -> None:
    """Make a checkpoint of a state, or leave the one before.

    Raises:
        NotWritten: the system refuses.
    """
    aside = file.with_suffix(".new")
    with writing(aside):
        try:
            with aside.open("wb") as stream:
                torch.save(state, stream)
            publish(aside, file)
        except BaseException:
            aside.unlink(missing_ok=True)  # it would take the room that is missing
            raise


def save_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Put what `save` writes in the place of a folder, once its bytes are on the disk, or leave it as it was.

    A kill finds one of the two whole: under the folder's name, or, between two renames, beside it (`.old`, `.new`).

    Raises:
        NotWritten: the system refuses.
    """
    aside, before = (folder.with_name(f"{folder.name}.{which}") for which in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    with writing(aside):
        try:
            save(aside)
            for file in aside.rglob("*"):
                if file.is_file():
                    _sync(file)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        aside.rename(folder)
        shutil.rmtree(before, ignore_errors=True)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Within, a file or folder is written that lies in a run's folder.

    Raises:
        NotWritten: the system refuses.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _not_written(file, error) from error


def _not_written(file: Path, error: OSError | SafetensorError) -> NotWritten:
    reason, number = str(error), None
    if isinstance(error, OSError):
        reason, number = error.strerror or reason, error.errno
    full = number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in reason  # so safetensors says it
    try:
        step = load_state(file.parent / CHECKPOINT, mmap=True)["step"]
        way_on = f"go on with --resume: the last checkpoint is of step {step}"
    except TrainingError:
        way_on = "begin again: there is no checkpoint yet"
    return NotWritten(f"{file} cannot be written: {reason}; {'make room' if full else 'mend that'} and {way_on}")


def write_config(folder: Path, config: Any) -> None:
    """State settings and versions in config.json, which is there whole or not at all.

    Raises:
        NotWritten: the system refuses.
    """
    versions = {name: importlib.metadata.version(name) for name in _RECORDED}
    aside = folder / f"{CONFIG}.{os.getpid()}"
    with writing(folder / CONFIG):
        try:
            aside.write_text(json.dumps({"config": dataclasses.asdict(config), "versions": versions}, indent=2) + "\n")
            aside.replace(folder / CONFIG)
        finally:
            aside.unlink(missing_ok=True)


def _flat(table: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
