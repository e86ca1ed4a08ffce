"""What every objective takes from a checkpoint: its tokenizer, its weights, and the device they go to."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from openbook_training.checkpoint import Checkpoint, positions, stored_tokenizer
from openbook_training.config import Config, config_of
from openbook_training.errors import CheckpointNotFound, InvalidConfig
from openbook_training.processes import process


def fast_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer; its `backend_tokenizer` neither pads nor truncates.

    Raises:
        CheckpointNotFound: it is none that keeps offsets.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    if not tokenizer.is_fast:
        raise CheckpointNotFound(f"checkpoint {checkpoint.name!r} has no fast tokenizer (tokenizer.json)")
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def load_model(kind: Any, checkpoint: Checkpoint, *, dropout: float, new: Collection[str] = (), **settings: Any) -> Any:
    """As `load_weights`, to be trained.

    Attention dropout is off: on a CPU it costs as much as the attention itself.
    """
    return load_weights(kind, checkpoint, new=new, **_dropout(checkpoint, dropout), **settings)


def load_weights(kind: Any, checkpoint: Checkpoint, *, new: Collection[str] = (), **settings: Any) -> Any:
    """The checkpoint's weights in a transformers class, in fp32, with a row of embeddings for every token of its tokenizer.

    Args:
        new: names of modules that may begin at random, since training or an adapter brings them. Of all else every weight is the
            checkpoint's: transformers would make up what is missing, with no more than a notice.

    Raises:
        CheckpointNotFound: there are no weights in safetensors, some are missing or do not fit, or the tokenizer is of another model.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = kind.from_pretrained(
            checkpoint.folder,
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:  # what a damaged file leads to
        reason = " ".join(str(error).split())[:300]  # of the several lines about sizes the first is but a heading
        raise CheckpointNotFound(f"checkpoint {checkpoint.name!r}: its weights do not load ({type(error).__name__}: {reason})") from error
    finally:
        logging.set_verbosity(verbosity)
    _require_all(model, set(found["missing_keys"]), set(new), checkpoint.name)
    rows = model.get_input_embeddings().num_embeddings
    largest = max(stored_tokenizer(checkpoint.folder, checkpoint.name).get_vocab().values(), default=0)
    if largest >= rows:
        raise CheckpointNotFound(
            f"checkpoint {checkpoint.name!r}: its tokenizer has ids up to {largest}, its model embeddings for ids below {rows}; copy the "
            "tokenizer that the model was trained with, or resize_token_embeddings, train and save both"
        )
    return model


def _require_all(model: Any, missing: set[str], new: set[str], name: str) -> None:
    """Raises:
    CheckpointNotFound: weights are missing; a tied one that is under its other name is not, nor is a buffer, which is computed.
    """
    lacks = sorted(weight for weight, _ in model.named_parameters() if weight in missing and new.isdisjoint(weight.split(".")))
    if lacks:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise CheckpointNotFound(
            f"checkpoint {name!r} lacks {', '.join(lacks[:3])}{more}, weights of a {type(model).__name__}, which would be random; copy the "
            "whole checkpoint again, or take one of this kind"
        )


def _dropout(checkpoint: Checkpoint, share: float) -> dict[str, float]:
    """The checkpoint's own names of its dropouts: of hidden states `share`, of attention none."""
    names = AutoConfig.from_pretrained(checkpoint.folder).to_dict()
    hidden = {name: share for name in ("hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "dropout", "dropout_rate") if name in names}
    attention = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
    return hidden | {name: 0.0 for name in attention if name in names}


def load_backbone(checkpoint: Checkpoint, *, dropout: float = 0.1, one_segment: bool = False) -> Any:
    """The transformer without its own pooler, see `load_model`, and with `one_segment` as `read_in_one_segment` leaves it.

    Raises:
        CheckpointNotFound: it is not of BERT's shape.
    """
    backbone = load_model(AutoModel, checkpoint, dropout=dropout, **without_pooler(checkpoint))
    if one_segment:
        read_in_one_segment(backbone)
    return backbone


def without_pooler(checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers must be told to leave a model's own pooler out; DistilBERT has none.

    Raises:
        CheckpointNotFound: it is not of BERT's shape.
    """
    config = AutoConfig.from_pretrained(checkpoint.folder)
    if config.model_type == "distilbert":
        return {}
    kind: Any = MODEL_MAPPING[type(config)]
    if "add_pooling_layer" not in inspect.signature(kind.__init__).parameters:
        raise CheckpointNotFound(
            f"checkpoint {checkpoint.name!r} is not of BERT's shape (its model_type is {config.model_type!r}); take one of a BERT, "
            "DistilBERT, RoBERTa or MPNet"
        )
    return {"add_pooling_layer": False}


def knows_segments(config: Any) -> bool:
    """Whether a transformer of this configuration tells tokens of several segments apart."""
    return bool(getattr(config, "type_vocab_size", 0) > 1)


def model_inputs(config: Any, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
    """Of a batch's (B, L) inputs those that a transformer of this configuration takes.

    `token_type_ids` tell which of two texts a token is of, as scoring must know. A model takes them where it knows segments: BERT does,
    DistilBERT, MPNet and RoBERTa do not.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return inputs | {"token_type_ids": token_type_ids} if knows_segments(config) else inputs


def read_in_one_segment(model: PreTrainedModel) -> None:
    """Let the passage carry the question's segment, as if token_type_ids were all zero.

    Embedders are trained on single texts: their second segment is a vector that no weight of theirs has learned to read. The
    tokens' kinds still stand in token_type_ids, which scoring needs; so it is the weights that no longer tell them apart. A model that
    knows no segments reads so by itself.
    """
    try:
        segments = model.base_model.get_parameter("embeddings.token_type_embeddings.weight")
    except AttributeError:
        return
    with torch.no_grad():
        segments[1:] = segments[0]


def check_length(checkpoint: Checkpoint, key: str, tokens: int) -> None:
    """Raises:
    InvalidConfig: `tokens`, the value of the setting `key`, are more than the checkpoint has positions for.
    """
    longest = positions(AutoConfig.from_pretrained(checkpoint.folder).to_dict())
    if longest is not None and tokens > longest:
        raise InvalidConfig(f"{key}: {tokens} is above {longest}, the positions of checkpoint {checkpoint.name!r}; lower it")


def best_device() -> torch.device:
    """A GPU where there is one, this process's own where there are several; the CPU under `accelerate launch --cpu`."""
    device: torch.device = process().device
    return device


def stated_config(kind: type[Config], file: Path, command: str) -> Config:
    """The settings that `save_whole` wrote.

    Raises:
        CheckpointNotFound: there is no such file, or it holds no JSON object; `command` writes one.
        InvalidConfig: a value is of another kind, or cannot work.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointNotFound(f"{file} cannot be read ({error}); `{command}` leaves one in <output>/best") from error
    return config_of(kind, table, str(file))


def save_whole(network: Any, tokenizer: Any, settings: Any, kind: type[Any], file: Path) -> None:
    """A transformers checkpoint in the file's folder, and in the file the fields of `kind`: the settings of a run have more."""
    network.save_pretrained(file.parent)
    tokenizer.save_pretrained(file.parent)
    stated = {field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)}
    file.write_text(json.dumps(stated, indent=2) + "\n")
