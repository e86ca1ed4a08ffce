"""Profiles: settings that `openbook tune` measured to be good on one machine, in a file that `openbook serve` reads."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openbook_server.errors import InvalidRequest

FORMAT = 1
SETTINGS: dict[str, type] = {
    "device": str,
    "precision": str,
    "threads": int,
    "sessions": int,
    "max_batch_tokens": int,
}  # fields of ServerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What `openbook tune` found, and what it was measured with where the file says so."""

    settings: Mapping[str, str | int]  # by the names of ServerConfig
    cores: int | None
    bundle_id: str | None


def check_target(file: Path) -> None:
    """Find out whether a profile can be written there, before minutes are spent on measuring one.

    Raises:
        OSError: it cannot.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    aside = _aside(file)
    aside.touch()
    aside.unlink()


def write_profile(file: Path, settings: Mapping[str, str | int], measured: Mapping[str, Any]) -> None:
    """Write a profile; `measured` says how the settings came about: `cores` and `bundle_id` to `Profile`, all of it to people.

    Raises:
        OSError: the file cannot be written.
    """
    aside = _aside(file)
    try:
        aside.write_text(json.dumps({"format": FORMAT, "settings": dict(settings), "measured": dict(measured)}, indent=2) + "\n")
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _aside(file: Path) -> Path:
    """Where it is written until it is whole."""
    return file.with_name(file.name + ".new")


def read_profile(file: Path) -> Profile:
    """The profile in a file.

    Raises:
        InvalidRequest: the file is missing, is no profile, or sets something that profiles do not.
    """

    def problem(what: str) -> InvalidRequest:
        return InvalidRequest("--profile", f"{file} {what}; `openbook tune BUNDLE --out {file}` writes one")

    try:
        profile = json.loads(file.read_text())
    except OSError as error:
        raise problem(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise problem("is no profile: it holds no JSON") from error
    settings = profile.get("settings") if isinstance(profile, dict) and profile.get("format") == FORMAT else None
    if not isinstance(settings, dict):
        raise problem(f"is no profile of format {FORMAT}")
    for name, value in settings.items():
        if name not in SETTINGS:
            raise problem(f"sets {name!r}, profiles set only {', '.join(SETTINGS)}")
        if type(value) is not SETTINGS[name]:
            raise problem(f"sets {name} to {value!r}, which is no {SETTINGS[name].__name__}")
    measured = profile.get("measured")
    if not isinstance(measured, dict):
        measured = {}
    cores, bundle_id = measured.get("cores"), measured.get("bundle_id")
    return Profile(
        settings=settings, cores=cores if type(cores) is int else None, bundle_id=bundle_id if isinstance(bundle_id, str) else None
    )
