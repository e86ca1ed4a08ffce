"""Low-rank updates of a backbone (LoRA, Hu et al. 2021): which layers get them, and the folder they are kept in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from openbook_training.checkpoint import Checkpoint
from openbook_training.errors import CheckpointNotFound

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


def require_trained(key: str, folder: str, *files: str) -> None:
    """Refuse a recipe whose `key` names a folder in which no training has left its model.

    Args:
        folder: "" where the key is left out.
        files: one of these is in it; by default what every adapter has.

    Raises:
        CheckpointNotFound: none is.
    """
    files = files or (SETTINGS,)
    if folder and not any((Path(folder) / file).is_file() for file in files):
        raise CheckpointNotFound(
            f"{key}: {folder!r} holds no {' or '.join(files)}; train it first, as the recipe says, or leave the key out"
        )


def load_adapter(model: nn.Module, folder: str) -> PeftModel:
    """`model` with the low-rank updates in `folder`, to be trained further.

    Raises:
        CheckpointNotFound: there are none, or not of such a model.
    """
    if not (Path(folder) / SETTINGS).is_file():
        raise CheckpointNotFound(f"adapter {folder!r}: no {SETTINGS} in it")
    settings = PeftConfig.from_pretrained(folder)
    settings.task_type = None  # as in add_adapter; adapters of older runs name one
    try:
        return read_adapter(model, folder, config=settings, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointNotFound(f"adapter {folder!r} does not load ({reason}); copy the whole folder that was written") from error


def read_adapter(model: nn.Module, folder: str, **settings: Any) -> PeftModel:
    """As PeftModel.from_pretrained, where a file that lacks weights is refused: peft warns, and leaves them at random.

    Raises:
        OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError: it is damaged, or not one of such a model.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*Found missing adapter keys", UserWarning)
        try:
            return PeftModel.from_pretrained(model, folder, **settings)
        except UserWarning as warning:
            lacking = str(warning).partition("[")[2].rstrip("].").split(", ")
            raise ValueError(f"{WEIGHTS} lacks {len(lacking)} weights, the first {lacking[0]}") from warning


def stated_settings(folder: Path, file: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the JSON `file` beside an adapter states, among it the digest of the checkpoint that it belongs to.

    Raises:
        CheckpointNotFound: the file is missing or damaged, or the adapter was trained on another checkpoint.
    """
    try:
        settings = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"{folder} holds no {file}; `openbook train` leaves one in <output>/best") from error
    except (OSError, ValueError) as error:
        raise CheckpointNotFound(f"{folder}: {file} cannot be read ({error}); `openbook train` leaves one in <output>/best") from error
    if not isinstance(settings, dict):
        raise CheckpointNotFound(f"{folder}: {file} holds no JSON object")
    wanted, actual = settings.get("base_digest"), checkpoint.digest()
    if wanted != actual:
        raise CheckpointNotFound(
            f"{folder} was trained on {settings.get('base_checkpoint')!r} with digest {wanted}, but the checkpoint {checkpoint.name!r} has "
            f"{actual}; use the checkpoint it was trained on, or train again"
        )
    return settings


def save_adapter(model: PeftModel, folder: Path, checkpoint: Checkpoint) -> None:
    """Write the adapter as peft reads it, in half precision: half the size, no measurable loss."""
    model.save_pretrained(str(folder))
    save_file({name: value.half() for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    settings = json.loads((folder / SETTINGS).read_text())
    settings["base_model_name_or_path"] = checkpoint.name  # never a path of this machine
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the real one is written by hand
