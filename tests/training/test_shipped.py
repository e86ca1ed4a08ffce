"""The adapters that ship: complete, small, made for the default checkpoint, with a card that states licence and command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from safetensors import safe_open

ADAPTERS = Path(__file__).parents[2] / "training" / "adapters"


@pytest.mark.parametrize("folder", sorted(ADAPTERS.iterdir()), ids=lambda folder: folder.name)
def test_a_shipped_adapter_can_be_exported_and_says_what_it_is(folder: Path) -> None:
    [stated] = {file.name for file in folder.glob("*.json")} - {"adapter_config.json"}
    settings = json.loads((folder / stated).read_text())
    assert settings["base_checkpoint"] == DEFAULT_CHECKPOINT
    assert settings["base_digest"] == resolve_checkpoint(DEFAULT_CHECKPOINT).digest()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        assert all(weights.get_tensor(name).isfinite().all() for name in weights.keys())  # noqa: SIM118
    card = (folder / "README.md").read_text()
    assert "\nlicense: " in card
    assert "openbook train" in card
    assert "/" not in json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
