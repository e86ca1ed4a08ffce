"""A checkpoint from nothing but texts: a WordPiece tokenizer trained on them, and a BERT of random weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.config import MOST_LAYERS, MOST_PIECES, WIDEST, too_high, too_low
from openbook_training.errors import InvalidConfig
from openbook_training.processes import process

POSITIONS = 512  # longest text it can learn to read, special tokens included
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_MADE_OF = "scratch.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScratchConfig:
    """The table [scratch]: the model that begins with random weights."""

    layers: int = 0  # 0 = none: begin with the weights of `checkpoint`
    hidden: int = 256  # of a token's state, and of a text's vector
    heads: int = 4  # of attention; divides `hidden`
    vocabulary: int = 8192  # word pieces at most, but for the letters of the texts, which are all in it

    def problems(self) -> list[str]:
        """What describes no model."""
        found = [*too_low(self, vocabulary=len(_SPECIAL) + 1), *too_high(self, layers=MOST_LAYERS, hidden=WIDEST, vocabulary=MOST_PIECES)]
        if min(self.hidden, self.heads) < 1 or self.hidden % self.heads:
            found.append(f"hidden: {self.hidden} should be a multiple of heads, {self.heads}, both above 0")
        return found


def make_checkpoint(folder: Path, texts: Sequence[str], config: ScratchConfig, seed: int, *, keep: bool = False) -> Checkpoint:
    """The checkpoint of these texts and settings in `folder`, where it stands already or is made.

    The first of several processes makes it and the others load it: a tokenizer trained twice on the same texts is not the same.

    Args:
        keep: the one that stands is taken whatever it was made of, and none is made: a run that goes on has weights for its tokens.

    Raises:
        InvalidConfig: with `keep`, where none stands.
    """
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    made_of = json.dumps({**asdict(config), "seed": seed, "texts": digest})
    stated = folder / _MADE_OF
    if keep and not stated.is_file():
        raise InvalidConfig(
            f"{folder} holds no {_MADE_OF}, and the weights of the checkpoint beside it are of the tokenizer that was made there; "
            "copy the whole run folder, or begin again with another output"
        )
    with process().main_process_first():
        if not stated.is_file() or not (keep or stated.read_text() == made_of):
            _make(folder, texts, config, seed, made_of)
    return resolve_checkpoint(str(folder))


def _make(folder: Path, texts: Sequence[str], config: ScratchConfig, seed: int, made_of: str) -> None:
    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer = _train_tokenizer(texts, config.vocabulary)
    tokenizer.save_pretrained(aside)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.hidden,
                max_position_embeddings=POSITIONS,
            ),
            add_pooling_layer=False,
        )
    model.save_pretrained(aside)
    (aside / _MADE_OF).write_text(made_of)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 (a token of a text)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names)
