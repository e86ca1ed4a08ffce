"""Fusion-in-decoder (Izacard & Grave 2021): the encoder reads the question beside each passage alone, the decoder attends to all at once.

    (question, passage k) -> encoder -> H_k (L, d);  decoder: p(y_t | y_<t, [H_1 .. H_K])

One wrapper serves BERT2BERT (Rothe et al. 2020: two copies of an encoder checkpoint, the second with cross-attention, a vocabulary head
tied to its embeddings, and a pointer into what was read) and every encoder-decoder of transformers, such as T5 and BART. A folder is a
transformers checkpoint with one file more, generator.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from openbook_training.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, resolve_checkpoint
from openbook_training.config import too_low
from openbook_training.errors import CheckpointNotFound
from openbook_training.heads import RowEncoder
from openbook_training.pointer import PointerGenerator, Source
from openbook_training.pretrained import fast_tokenizer, load_backbone, load_model, save_whole, stated_config
from openbook_training.reader import trained_reader

SETTINGS = "generator.json"
BATCH_QUESTIONS = 16  # answered at once


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSettings:
    """How questions are read and answers written."""

    passages: int = 5  # retrieved for a question
    max_tokens: int = 192  # question, passage and special tokens; the rest of a longer passage is cut
    max_answer_tokens: int = 24  # the end included
    beams: int = 1  # 1 = greedy
    embedder: str = DEFAULT_CHECKPOINT  # that finds passages, untouched

    def problems(self) -> list[str]:
        """What cannot work."""
        return too_low(self, passages=1, beams=1, max_tokens=5, max_answer_tokens=2)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch of questions, each read beside its own passages; one without any is read alone."""

    ids: Tensor  # (pairs, L), padded on the right
    mask: Tensor  # (pairs, L)
    owner: Tensor  # (pairs,) which question
    slot: Tensor  # (pairs,) which of its passages, from 0

    def together(self, values: Tensor) -> Any:
        """(pairs, L, ...) of pairs to (questions, K * L, ...) of questions, zero where one has fewer passages."""
        laid = values.new_zeros((int(self.owner.max()) + 1, int(self.slot.max()) + 1, *values.shape[1:]))
        return laid.index_put((self.owner, self.slot), values).flatten(1, 2)


class FusionInDecoder(nn.Module):
    """An encoder-decoder whose encoder reads pairs and whose decoder reads all pairs of a question."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def fused(self, inputs: Inputs) -> tuple[BaseModelOutput, Tensor]:
        """(questions, K * L, d) states of all pairs of each question, and their (questions, K * L) mask."""
        states = self.network.get_encoder()(input_ids=inputs.ids, attention_mask=inputs.mask).last_hidden_state
        source = BaseModelOutput(inputs.together(states))
        if isinstance(self.network, PointerGenerator):
            keys = inputs.together(self.network.pointer.keys(states))
            source = Source(source.last_hidden_state, pointer_keys=keys, pointer_ids=inputs.together(inputs.ids))
        return source, inputs.together(inputs.mask)

    def forward(self, inputs: Inputs, answers: Tensor) -> Tensor:
        """(questions, T) tokens, the first of which begins the answer, to (questions, T, vocabulary) float32 logits of the next."""
        source, mask = self.fused(inputs)
        output = self.network(encoder_outputs=source, attention_mask=mask, decoder_input_ids=answers, use_cache=False)
        logits: Tensor = output.logits.float()
        return logits

    def write(self, inputs: Inputs, *, beams: int, max_answer_tokens: int) -> list[list[int]]:
        """The most probable answers by beam search, one beam being greedy; token ids."""
        source, mask = self.fused(inputs)
        found = self.network.generate(
            encoder_outputs=source,
            attention_mask=mask,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_answer_tokens,
        )
        return [[int(token) for token in row] for row in found]


class AnswerEncoder:
    """Questions, passages and answers as token ids, by the tokenizer's own templates."""

    def __init__(self, checkpoint: Checkpoint, *, max_tokens: int, max_answer_tokens: int) -> None:
        self.tokenizer = fast_tokenizer(checkpoint)
        self._pairs = RowEncoder(checkpoint, max_tokens=max_tokens, own_template=True)
        self.pad: int = self._pairs.pad
        self.start = self._first_of("cls_token", "bos_token", "pad_token")
        self.end = self._first_of("eos_token", "sep_token")
        self._max_answer_tokens = max_answer_tokens

    def _first_of(self, *names: str) -> int:
        found = [number for name in names if (number := getattr(self.tokenizer, f"{name}_id")) is not None]
        if not found:
            raise CheckpointNotFound(f"the tokenizer of the generator has no {' and no '.join(names)} to begin or end an answer with")
        return int(found[0])

    def inputs(self, questions: Sequence[tuple[str, Sequence[str]]], device: torch.device) -> Inputs:
        """Of (question, passages)."""
        pairs = [(row, slot, text, passage) for row, (text, beside) in enumerate(questions) for slot, passage in enumerate(beside or [""])]
        batch = self._pairs.batch(self._pairs.rows([(text, passage) for _, _, text, passage in pairs]), device)
        owner, slot = (torch.tensor([pair[at] for pair in pairs], device=device) for at in (0, 1))
        return Inputs(batch["input_ids"], batch["attention_mask"], owner, slot)

    def answer(self, text: str) -> list[int]:
        """An answer's tokens, the last of which ends it; what is over the limit is cut."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return [*ids[: self._max_answer_tokens - 1], self.end]

    def text(self, ids: Sequence[int], passages: Sequence[str]) -> str:
        """An answer's characters: a passage's where its tokens stand in one, for WordPiece cannot tell "3.5" from "3. 5"."""
        special = set(self.tokenizer.all_special_ids)
        wanted = [token for token in ids if token not in special]
        for passage in passages if wanted else []:
            encoding = self.tokenizer.backend_tokenizer.encode(passage, add_special_tokens=False)
            for at in range(len(encoding.ids) - len(wanted) + 1):
                if encoding.ids[at : at + len(wanted)] == wanted:
                    return passage[encoding.offsets[at][0] : encoding.offsets[at + len(wanted) - 1][1]].strip()
        return str(self.tokenizer.decode(wanted)).strip()


def build_generator(checkpoint: Checkpoint, encoder: AnswerEncoder, *, dropout: float, adapter: str = "") -> FusionInDecoder:
    """T5 or BART as it is; of an encoder checkpoint two copies, the head's transform of random weights.

    The decoder's cross-attention begins as a copy of each layer's self-attention (Ma et al. 2020, XLM-T), which finds what is alike.

    Args:
        adapter: of a reader; the encoder begins with it, for where an answer stands is what the decoder has to learn from it.

    Raises:
        CheckpointNotFound: it is neither, or the adapter is not one of a reader of this checkpoint.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        if config.is_encoder_decoder:
            if adapter:
                raise CheckpointNotFound(f"initial_adapter {adapter!r}: {checkpoint.name!r} has a decoder of its own; leave it out")
            points = PointerGenerator.__name__ in (config.architectures or [])
            whole = load_model(PointerGenerator if points else AutoModelForSeq2SeqLM, checkpoint, dropout=dropout, new=["pooler"])
            encoder.start = int(whole.config.decoder_start_token_id)  # BART begins with the token that ends a text
            whole.generation_config.forced_bos_token_id = None  # what follows is learned from answers alone
            return FusionInDecoder(whole)
        reader = _reading_backbone(checkpoint, adapter, dropout) if adapter else load_backbone(checkpoint, dropout=dropout)
        new = ["crossattention", "cls", "lm_head"]
        writer = load_model(AutoModelForCausalLM, checkpoint, dropout=dropout, new=new, is_decoder=True, add_cross_attention=True)
        for layer in writer.base_model.encoder.layer:
            layer.crossattention.load_state_dict(layer.attention.state_dict())
        network: Any = PointerGenerator(encoder=reader, decoder=writer)
    except (ValueError, TypeError, OSError, AttributeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointNotFound(f"checkpoint {checkpoint.name!r} becomes no encoder with a decoder: {reason}") from error
    for config in (network.config, network.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = encoder.start, encoder.end, encoder.pad
    return FusionInDecoder(network)


def _reading_backbone(checkpoint: Checkpoint, adapter: str, dropout: float) -> Any:
    reader: Any = trained_reader(checkpoint, adapter, dropout=dropout).merge_and_unload()
    return reader.base_model.requires_grad_(True)


def save_generator(model: FusionInDecoder, encoder: AnswerEncoder, settings: GeneratorSettings, folder: Path) -> None:
    """Write the folder that `load_generator` reads."""
    save_whole(model.network, encoder.tokenizer, settings, GeneratorSettings, folder / SETTINGS)


def load_generator(name: str) -> tuple[FusionInDecoder, AnswerEncoder, GeneratorSettings]:
    """The folder that `openbook train generator` wrote.

    Raises:
        CheckpointNotFound: it is none, or damaged.
        InvalidConfig: generator.json holds a value that cannot work.
    """
    checkpoint = resolve_checkpoint(name)
    settings = stated_config(GeneratorSettings, checkpoint.folder / SETTINGS, "openbook train generator")
    encoder = AnswerEncoder(checkpoint, max_tokens=settings.max_tokens, max_answer_tokens=settings.max_answer_tokens)
    return build_generator(checkpoint, encoder, dropout=0.0).eval(), encoder, settings


@torch.inference_mode()
def answer_all(
    model: FusionInDecoder,
    encoder: AnswerEncoder,
    questions: Sequence[tuple[str, Sequence[str]]],
    settings: GeneratorSettings,
    device: torch.device,
) -> list[str]:
    """The answer written for each (question, passages)."""
    texts: list[str] = []
    for at in range(0, len(questions), BATCH_QUESTIONS):
        part = questions[at : at + BATCH_QUESTIONS]
        written = model.write(encoder.inputs(part, device), beams=settings.beams, max_answer_tokens=settings.max_answer_tokens)
        texts += [encoder.text(ids, beside) for ids, (_, beside) in zip(written, part, strict=True)]
    return texts
