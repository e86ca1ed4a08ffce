"""`openbook train masked_lm`: words hidden in passages, each predicted from its place; the warm-up of a vocabulary head.

Sentence embedders have lost the head that they were pre-trained with. This gives them one again, tied to the token embeddings, for the
retrieval-augmented objective `realm` to go on from. With a table [scratch] it is pre-training from nothing instead: a
tokenizer trained on the passages, random weights, all of them trained.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from openbook_training.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from openbook_training.chunks import length_chunks, length_grouped
from openbook_training.config import LoopConfig, no_rank, no_share, too_low
from openbook_training.errors import InvalidConfig, InvalidData
from openbook_training.heads import RowEncoder
from openbook_training.loop import Staged
from openbook_training.masked_language_model import MaskedLanguageModel, build_masked_lm
from openbook_training.masking import Text, log_frequencies, words_of
from openbook_training.metrics import perplexity
from openbook_training.objectives import masked_token_loss
from openbook_training.pretrained import best_device
from openbook_training.retrieval import load_passages
from openbook_training.run_folder import CHECKPOINT
from openbook_training.scratch import ScratchConfig, make_checkpoint
from openbook_training.squad import held_out_rows

_LAYER = re.compile(r"\.layer\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedLmConfig:
    """Settings of `openbook train masked_lm`."""

    output: str = "runs/masked_lm"  # run folder: config, metrics, checkpoints, adapter and head
    checkpoint: str = DEFAULT_CHECKPOINT  # backbone: package:NAME, folder or hub id; not read where [scratch] has layers
    train: str  # passages: a folder in BEIR's layout, texts (.txt, .csv, .jsonl with "text"), or the contexts of SQuAD-shaped questions
    held_out: int = 200  # passages set aside to choose the best epoch by
    max_tokens: int = 128  # special tokens included; the rest of a longer passage is cut
    masked_share: float = 0.15  # of a passage's words; at least one is hidden
    frozen_layers: int = 3  # lowest layers that rest at first, while the new head finds its way; 0 = none
    frozen_share: float = 0.2  # of all steps during which they rest
    lora_rank: int = 32  # 0 = train every weight of the backbone
    lora_alpha: int = 32  # update is scaled by alpha / rank
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def problems(self) -> list[str]:
        """What cannot work."""
        found = [] if self.held_out else ["held_out: 0 leaves nothing to choose the best epoch by"]
        found += [] if 0 < self.masked_share <= 1 else [f"masked_share: {self.masked_share} is not in (0, 1]"]
        found += [*no_share(self, "frozen_share"), *too_low(self, max_tokens=3), *no_rank(self, least=0)]
        if self.scratch.layers and self.frozen_layers:
            found.append(f"frozen_layers: {self.frozen_layers} layers of random weights would rest; set 0 beside [scratch]")
        return found


class MaskedLmTask(Staged):
    """Gives the loop its batches, loss and metrics."""

    compares_examples: ClassVar[bool] = False

    def __init__(self, config: MaskedLmConfig, console: Console) -> None:
        self._config = config
        passages = load_passages(config.train, console)
        held = held_out_rows([[passage] for passage in passages], str, config.held_out)
        kept = [passage for row, passage in enumerate(passages) if row not in held]
        if not kept:
            raise InvalidData(f"{config.train}: {len(passages)} passages, and held_out takes {config.held_out} of them")
        rank = config.lora_rank
        if config.scratch.layers:
            folder, goes_on = Path(config.output) / "scratch", (Path(config.output) / CHECKPOINT).is_file()
            self.checkpoint, rank = make_checkpoint(folder, kept, config.scratch, config.loop.seed, keep=goes_on), 0
        else:
            self.checkpoint = resolve_checkpoint(config.checkpoint)
        self.encoder = RowEncoder(self.checkpoint, max_tokens=config.max_tokens)
        if self.encoder.mask is None:
            raise InvalidConfig(f"checkpoint {config.checkpoint!r}: its tokenizer has no [MASK] token")
        self._mask = self.encoder.mask
        self.train, self.held_out = self._texts(kept), self._texts([passages[row] for row in sorted(held)])
        self._wordless = len(passages) - len(self.train) - len(self.held_out)
        if not self.train or not self.held_out:
            raise InvalidData(f"{config.train}: no passage with a word to hide is left to train on, or to hold out")
        self._device = best_device()
        self.unigram = log_frequencies(self.train, self.encoder.tokenizer.get_vocab_size())
        self.model: nn.Module = build_masked_lm(self.checkpoint, lora_rank=rank, lora_alpha=config.lora_alpha, frequencies=self.unigram)
        layers = {name: int(found[1]) for name, _ in self.model.named_parameters() if (found := _LAYER.search(name))}
        if config.frozen_layers > max(layers.values(), default=-1) + 1:
            raise InvalidConfig(f"frozen_layers: {config.frozen_layers}, and the backbone has {max(layers.values(), default=-1) + 1}")
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._lower = [parameter for name, parameter in trained.items() if layers.get(name, config.frozen_layers) < config.frozen_layers]

    def _texts(self, passages: Sequence[str]) -> list[Text]:
        encoded = words_of(self.encoder, passages)
        return [Text(str(row), ids, [at for _, at in words]) for row, (ids, words) in enumerate(encoded) if words]

    def summary(self) -> str:
        without = f"; in {self._wordless} passages there is no word to hide" if self._wordless else ""
        return f"{len(self.train)} training passages, {len(self.held_out)} held out{without}"

    def batches(self, epoch: int) -> list[list[Text]]:
        rng = random.Random(f"{self._config.loop.seed}/{epoch}")
        return length_grouped(self.train, lambda text: len(text.ids), self._config.loop.batch_examples, rng)

    def trains_on(self) -> Mapping[str, Iterable[object]]:
        parts = (("training passages", self.train), ("held-out passages", self.held_out))
        return {"checkpoint": [self.checkpoint.digest()], **{name: [(text.ids, text.words) for text in texts] for name, texts in parts}}

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        """Rest the lower layers, or wake them: they cost no backward pass while the layers above learn to use the new head."""
        for parameter in self._lower:
            parameter.requires_grad_(step >= self._config.frozen_share * total)

    def loss(self, model: nn.Module, batch: list[Text], rng: random.Random) -> Tensor:
        log_probabilities, rows, targets = self._predict(model, [(text, *self._hide(text, rng)) for text in batch])
        return masked_token_loss(log_probabilities.gather(1, targets[:, None])[:, 0], rows, len(batch))

    def _hide(self, text: Text, rng: random.Random) -> tuple[list[int], list[int]]:
        return text.hide(self._config.masked_share, self._mask, rng)

    def _predict(self, model: nn.Module, masked: Sequence[tuple[Text, list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of texts with their masked ids and hidden positions: (targets, vocabulary) log-probabilities, rows, and gold tokens."""
        inputs = self.encoder.batch([(ids, [0] * len(ids)) for _, ids, _ in masked], self._device)
        rows = torch.tensor([row for row, (_, _, hidden) in enumerate(masked) for _ in hidden], device=self._device)
        columns = torch.tensor([at for _, _, hidden in masked for at in hidden], device=self._device)
        targets = torch.tensor([text.ids[at] for text, _, hidden in masked for at in hidden], device=self._device)
        return model(inputs, rows, columns), rows, targets

    def describe(self, batch: list[Text]) -> str:
        return ", ".join(f"passage {text.place}" for text in batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Perplexity of hidden pieces of held-out passages, beside that of their frequencies, and how many are guessed right, in percent.

        The same words are hidden after every epoch.
        """
        masked = [(text, *self._hide(text, random.Random(f"{self._config.loop.seed}/{row}"))) for row, text in enumerate(self.held_out)]
        surprise = unigram = 0.0
        right = total = 0
        for chunk in length_chunks([len(text.ids) for text in self.held_out]):
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._config.loop.precision == "bf16"):
                log_probabilities, _, targets = self._predict(model, [masked[row] for row in chunk])
            surprise -= float(log_probabilities.gather(1, targets[:, None]).sum())
            unigram -= float(self.unigram.to(self._device)[targets].sum())
            right, total = right + int((log_probabilities.argmax(1) == targets).sum()), total + len(targets)
        metrics = {"held_out_top1": 100 * right / total}
        metrics |= {"perplexity/held_out": perplexity(surprise / total), "perplexity/word_frequencies": perplexity(unigram / total)}
        return metrics | {"score": -metrics["perplexity/held_out"]}

    def save(self, model: nn.Module, folder: Path) -> None:
        cast(MaskedLanguageModel, model).save(folder, self.checkpoint)
