"""PyTorch models from a checkpoint, checked to be of a shape that a bundle holds: an encoder like BERT and its fast tokenizer.

MiniLM, BGE, E5, GTE and the other encoders with the architecture ("model_type") of one of `KINDS` qualify.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openbook_training.adapters import read_adapter
from openbook_training.checkpoint import Checkpoint, folder_digest, positions, stored_tokenizer
from openbook_training.pair_template import own_separators, set_pair_template
from openbook_training.pretrained import knows_segments, load_weights, read_in_one_segment, without_pooler
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForQuestionAnswering

from openbook_export.errors import CheckpointUnsupported

KINDS = ("bert", "camembert", "distilbert", "mpnet", "roberta", "xlm-roberta")  # whose graphs are fused and verified
TRACED_TOKENS = 16  # of the texts that optimum makes up to trace a graph with
_READER_DEFAULTS = {"max_tokens": 384, "max_answer_tokens": 30, "prior_weight": 0.0, "null_bias": 0.0}


@dataclass(frozen=True, slots=True)
class _Adapter:
    """A kind of adapter: what is written beside its weights, and by which command."""

    settings: str
    command: str


_READER = _Adapter("reader.json", "openbook train reader")
_RETRIEVER = _Adapter("retriever.json", "openbook train retriever")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedderModel:
    """The transformer without a head in PyTorch fp32, the retriever's adapter merged where there is one."""

    model: nn.Module
    max_tokens: int  # longest text, special tokens included
    digest: str = ""  # of the adapter's weights; "" = the untouched checkpoint
    dims: tuple[int, ...] = ()  # lengths that the training made its vectors good for when cut


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderModel:
    """A question-answering model in PyTorch fp32, its adapter merged, and the limits it was trained with."""

    model: nn.Module
    digest: str  # of the adapter's or checkpoint's weights
    max_tokens: int  # question + passage, special tokens included
    max_question_tokens: int
    max_answer_tokens: int
    separators: int  # that it was trained to see between question and passage; see openbook_training.pair_template
    prior_weight: float  # calibrated constants, 0.0 where the training stated none
    null_bias: float
    settling: Mapping[str, float] | None  # when the server may stop reading, calibrated; None = never


def load_tokenizer(checkpoint: Checkpoint, separators: int = 1) -> tuple[Tokenizer, int]:
    """The checkpoint's tokenizer without padding and truncation, its pairs in the one form, and the id of [SEP].

    Raises:
        CheckpointNotFound: it does not load, or a text is not [CLS] A [SEP] to it.
    """
    tokenizer = stored_tokenizer(checkpoint.folder, checkpoint.name)
    set_pair_template(tokenizer, checkpoint.name, separators=separators)
    return tokenizer, tokenizer.encode("a").ids[-1]


def load_embedder(checkpoint: Checkpoint, folder: Path | None = None, flag: str = "--embedder") -> EmbedderModel:
    """The transformer without a head, ready to export, with the adapter in `folder` that `openbook train retriever` wrote.

    Args:
        flag: that names the folder on the command line, for the messages.

    Raises:
        CheckpointUnsupported: it is none of `KINDS`, its weights do not load, or the adapter is damaged or another checkpoint's.
    """
    _require_known(checkpoint)
    base = load_weights(AutoModel, checkpoint, **without_pooler(checkpoint)).eval()
    if base.config.hidden_size % 2:
        raise CheckpointUnsupported(
            f"checkpoint {checkpoint.name!r} has {base.config.hidden_size} dimensions; a bundle's embedder halves them, so take one whose "
            "hidden_size is even"
        )
    longest_text(base)
    if folder is None:
        return EmbedderModel(model=base, max_tokens=checkpoint.max_tokens)
    given = f"{flag} {folder}"
    settings = _adapter_settings(checkpoint, folder, _RETRIEVER, given)
    if settings.get("queries_only"):
        raise CheckpointUnsupported(
            f"{given} was trained for questions alone, against passages of another embedder's vectors, and a bundle has one "
            'embedder for both; train with refresh = "full", "rerank" or "none"'
        )
    try:
        max_tokens, dims = int(settings["max_tokens"]), tuple(int(dim) for dim in settings["dims"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointUnsupported(f"{given}: retriever.json states no max_tokens or no dims ({error})") from error
    longest, hidden = longest_text(base), int(base.config.hidden_size)
    if not 3 <= max_tokens <= longest or not all(1 <= dim <= hidden for dim in dims):
        raise CheckpointUnsupported(
            f"{given}: retriever.json states max_tokens {max_tokens} and dims {list(dims)}; the checkpoint has "
            f"{longest} positions and {hidden} dimensions"
        )
    return EmbedderModel(model=_merged(base, folder, given), max_tokens=max_tokens, digest=folder_digest(folder), dims=dims)


def longest_text(model: Any) -> int:
    """Tokens that a transformer has positions for.

    Raises:
        CheckpointUnsupported: it counts none, and so is none of `KINDS`, or fewer than are traced.
    """
    longest = positions(model.config.to_dict())
    if longest is None:
        raise CheckpointUnsupported(
            f"a checkpoint of model_type {model.config.model_type!r} counts no positions; take one of {', '.join(KINDS)}"
        )
    if longest < TRACED_TOKENS:
        raise CheckpointUnsupported(
            f"a checkpoint has positions for {longest} tokens (see its max_position_embeddings); export traces texts of {TRACED_TOKENS}: "
            "take one with as many or more"
        )
    return longest


def load_reader(checkpoint: Checkpoint, folder: Path, flag: str = "--reader") -> ReaderModel:
    """The reader in `folder`: an adapter to `checkpoint` written by `openbook train reader`, or a whole question-answering checkpoint.

    Args:
        flag: as `load_embedder`.

    Raises:
        CheckpointUnsupported: the folder holds neither, or what it holds does not belong to `checkpoint`.
    """
    given = f"{flag} {folder}"
    if not folder.is_dir():
        raise CheckpointUnsupported(f"{given}: no such folder; `openbook train reader` leaves one in <output>/best")
    settings = _READER_DEFAULTS | read_json(folder / "reader.json")
    stored, separators = Checkpoint(name=given, folder=folder, pooling="", max_tokens=0), 1
    if (folder / "adapter_config.json").is_file():
        _adapter_settings(checkpoint, folder, _READER, given)
        base = load_weights(AutoModelForQuestionAnswering, checkpoint, new=["qa_outputs"])
        if settings.get("one_segment"):
            read_in_one_segment(base)
        model = _merged(base, folder, given)
    elif (folder / "config.json").is_file():
        _require_known(stored)
        tokenizer = stored_tokenizer(folder, stored.name)
        if other := _differing(tokenizer, stored_tokenizer(checkpoint.folder, checkpoint.name)):
            raise CheckpointUnsupported(
                f"{given}: the {other} of its tokenizer is not {checkpoint.name!r}'s; a bundle has one tokenizer, so take a "
                "reader that was trained on this checkpoint or its like"
            )
        model = load_weights(AutoModelForQuestionAnswering, stored).eval()
        separators = own_separators(tokenizer, stored.name, segments=knows_segments(model.config))
    else:
        raise CheckpointUnsupported(f"{given}: neither adapter_config.json (an adapter) nor config.json (a checkpoint) in it")
    try:
        max_tokens = min(int(settings["max_tokens"]), longest_text(model))
        reader = ReaderModel(
            model=model,
            digest=folder_digest(folder),
            max_tokens=max_tokens,
            max_question_tokens=int(settings.get("max_question_tokens", max_tokens // 3)),
            max_answer_tokens=int(settings["max_answer_tokens"]),
            separators=separators,
            prior_weight=float(settings["prior_weight"]),
            null_bias=float(settings["null_bias"]),
            settling=_settling(settings.get("settling")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointUnsupported(f"{given}: reader.json holds a value that is no number ({error})") from error
    special = 2 + separators
    if min(reader.max_question_tokens, reader.max_answer_tokens) < 1 or reader.max_tokens <= reader.max_question_tokens + special:
        raise CheckpointUnsupported(
            f"{given}: {reader.max_tokens} tokens in all leave no room for a passage beside a question of "
            f"{reader.max_question_tokens} and {special} special tokens; reader.json states these limits"
        )
    return reader


def _differing(one: Tokenizer, other: Tokenizer) -> str:
    """What makes other tokens of a text in one than in the other; "" where nothing does.

    Special tokens count by their ids alone: how white space around them is read differs from one version of transformers to the next.
    """
    if one.get_vocab() != other.get_vocab():
        return "vocabulary"
    stated, wanted = json.loads(one.to_str()), json.loads(other.to_str())
    for parts in (stated, wanted):
        parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["special"]]
    names = {"normalizer": "normalizer", "pre_tokenizer": "pre-tokenizer", "model": "model", "added_tokens": "list of added tokens"}
    return next((name for key, name in names.items() if stated[key] != wanted[key]), "")


def _settling(stated: Any) -> dict[str, float] | None:
    """What reader.json states of stopping early; ValueError or TypeError where that is no finite number."""
    if stated is None:
        return None
    weight = float(stated["unread_weight"])
    if not math.isfinite(weight):
        raise ValueError(f"settling is {stated}")
    return {"unread_weight": weight}


def _adapter_settings(checkpoint: Checkpoint, folder: Path, kind: _Adapter, given: str) -> dict[str, Any]:
    """What the training wrote beside an adapter's weights, once it is certain that the adapter is whole and is `checkpoint`'s."""
    if not folder.is_dir():
        raise CheckpointUnsupported(f"{given}: no such folder; `{kind.command}` leaves one in <output>/best")
    missing = [name for name in ("adapter_config.json", kind.settings, "adapter_model.safetensors") if not (folder / name).is_file()]
    settings = read_json(folder / kind.settings)
    actual, wanted = checkpoint.digest(), settings.get("base_digest")
    if missing or wanted is None:
        lacks = ", ".join(missing) or f"{kind.settings} with a base_digest"
        raise CheckpointUnsupported(f"{given} lacks {lacks}; copy the whole folder that `{kind.command}` wrote")
    if wanted != actual:
        raise CheckpointUnsupported(
            f"{given} was trained on {settings.get('base_checkpoint')!r} with digest {wanted}, but the checkpoint "
            f"{checkpoint.name!r} has {actual}; export the checkpoint it was trained on, or train again"
        )
    return settings


def _merged(base: Any, folder: Path, given: str) -> Any:
    try:
        return read_adapter(base, str(folder)).merge_and_unload().eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:  # what a damaged file leads to
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise CheckpointUnsupported(f"{given}: the adapter does not load ({reason})") from error


def _require_known(checkpoint: Checkpoint) -> None:
    config = read_json(checkpoint.folder / "config.json")
    kind, places = config.get("model_type"), config.get("position_embedding_type") or "absolute"
    if kind not in KINDS:
        raise CheckpointUnsupported(
            f"checkpoint {checkpoint.name!r} is of model_type {kind!r}; export fuses and verifies {', '.join(KINDS)}"
        )
    if config.get("is_decoder") or places != "absolute":
        stated = "is_decoder true" if config.get("is_decoder") else f"position_embedding_type {places!r}"
        raise CheckpointUnsupported(
            f"checkpoint {checkpoint.name!r}: config.json states {stated}; export verifies encoders that read both ways, with "
            "absolute positions"
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file.

    Raises:
        CheckpointUnsupported: it is damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointUnsupported(f"{file} is unreadable ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointUnsupported(f"{file} holds no JSON object")
    return content
