"""What the tests of several objectives share: data that they are trained on, and a way to kill a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from openbook_training.loop import Loop

KilledAfter = Callable[[int], AbstractContextManager[None]]
WORDS = "red blue green one two three city river king book".split()


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 SQuAD-shaped questions, each on a passage of its own; to be copied before it is changed."""
    rows = []
    for number in range(24):
        answer = WORDS[number % 10]
        context = f"the {WORDS[(number + 3) % 10]} of {answer} was {WORDS[(number + 5) % 10]} in case {number}"
        rows.append({"id": f"q{number}", "question": f"what was {answer} ?", "context": context, "answers": {"text": [answer]}})
    path = tmp_path_factory.mktemp("questions") / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


class _Killed(BaseException):
    """What no code that is tested catches."""


@pytest.fixture
def killed_after() -> KilledAfter:
    """Within what it gives, a run is killed when it has taken so many steps; it must come that far."""

    @contextmanager
    def within(steps: int) -> Iterator[None]:
        original = Loop._take_step

        def take_step(self: Loop[Any], batch: list[Any], total: int) -> float:
            if self._step == steps:
                raise _Killed
            return original(self, batch, total)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_take_step", take_step)
            with pytest.raises(_Killed):
                yield

    return within
