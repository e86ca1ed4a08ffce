"""What a user may name in place of a folder."""

from __future__ import annotations

from pathlib import Path


def is_address(target: str | Path) -> bool:
    """Whether it is meant as elasticsearch://HOST:PORT/ALIAS, well formed or not: nobody means a folder that is named so, and it may hold
    a password."""
    return "://" in str(target) or str(target).lower().startswith(("elasticsearch:", "elasticsearchs:"))
