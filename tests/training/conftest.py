"""Data that several objectives are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
