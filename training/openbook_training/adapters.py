"""Low-rank updates of a backbone (LoRA, Hu et al. 2021): which layers get them, and the folder they are kept in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from openbook_training.checkpoint import Checkpoint

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def add_adapter(model: nn.Module, backbone: nn.Module, *, rank: int, alpha: int, heads: Sequence[str] = ()) -> PeftModel:
    """`model` with trainable low-rank updates on every linear layer of its `backbone`; all else is frozen.

    The adapter names no task type: peft's task wrappers drop token_type_ids, and a model would be trained without the
    segments it is served with.

    Args:
        heads: names of modules of `model` that are trained in full and kept with the adapter.
    """
    # Every linear layer of the backbone, by its last two names; "all-linear" would wrap the heads too.
    targets = sorted({".".join(name.split(".")[-2:]) for name, module in backbone.named_modules() if isinstance(module, nn.Linear)})
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=list(heads) or None)
    return get_peft_model(model, settings)


def save_adapter(model: PeftModel, folder: Path, checkpoint: Checkpoint) -> None:
    """Write the adapter as peft reads it, in half precision: half the size, no measurable loss."""
    model.save_pretrained(str(folder))
    save_file({name: value.half() for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    settings = json.loads((folder / SETTINGS).read_text())
    settings["base_model_name_or_path"] = checkpoint.name  # never a path of this machine
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the real one is written by hand
