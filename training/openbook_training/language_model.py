"""A causal language model that reads retrieved passages before its text.

    <|endoftext|> passage k \\n … passage 1 \\n before x -> p(x), every `stride_tokens` tokens with new passages

The best passage stands next to the text (Ram et al. 2023, In-Context Retrieval-Augmented Language Models, section 3). A
folder is a transformers checkpoint with one file more, language_model.json, that says how its text is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from openbook_training.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, resolve_checkpoint
from openbook_training.chunks import length_chunks
from openbook_training.errors import CheckpointNotFound, InvalidConfig
from openbook_training.negatives import ranked
from openbook_training.pretrained import fast_tokenizer, load_model, save_whole, stated_config
from openbook_training.progress import progress
from openbook_training.streams import RUN, Stretch, holds

SETTINGS, END_OF_TEXT = "language_model.json", "<|endoftext|>"
DEPTH = 16  # passages that are ranked beyond those wanted: a stretch is in two or three, and may be in copies


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingConfig:
    """How a text is read: in stretches, each after its own past and the passages retrieved for that past."""

    stride_tokens: int = 64  # of a stretch; passages are retrieved anew for each
    context_tokens: int = 64  # of the text itself, before the stretch
    passages: int = 1  # put before them; 0 = a plain language model
    passage_tokens: int = 64  # of a passage
    query_tokens: int = 48  # of the text just before the stretch that passages are looked up by
    embedder: str = DEFAULT_CHECKPOINT  # that finds them, untouched

    def longest(self, newline: int) -> int:
        """Tokens of the longest input; `newline` is how many a newline takes."""
        return 1 + self.passages * (self.passage_tokens + newline) + self.context_tokens + self.stride_tokens


class LanguageModel(nn.Module):
    """GPT-2, or another causal model of transformers, with its vocabulary head on the targets only."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """What is known before each target.

        Args:
            ids: (B, L) tokens, padded on the right.
            mask: (B, L) 1 where a token is, 0 where padding.
            at: (B, s) positions of the tokens just before the targets.

        Returns:
            states: (B, s, d) float32, the last layer's; logits: (B, s, vocabulary) float32.
        """
        states = self.network.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        states = states[torch.arange(len(ids), device=ids.device)[:, None], at]
        with torch.autocast(states.device.type, enabled=False):  # bf16 keeps 8 bits of a logit
            return states, self.network.get_output_embeddings()(states)


class Prompts:
    """Stretches and their passages as model inputs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.newline: list[int] = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise CheckpointNotFound("the tokenizer of the language model has neither a bos nor an eos token to begin a text with")
        self.start = int(start)

    def row(self, stretch: Stretch, passages: Sequence[Sequence[int]]) -> list[int]:
        """Token ids whose last ones are the stretch; `passages` come best first and are put best last."""
        read = [token for passage in reversed(passages) for token in (*passage, *self.newline)]
        return [self.start, *read, *stretch.before, *stretch.tokens]

    def queries(self, stretches: Sequence[Stretch], query_tokens: int) -> list[str]:
        """The text just before each stretch; "" at the beginning of a stream."""
        return [self.tokenizer.decode(stretch.before[-query_tokens:]).strip() for stretch in stretches]


def targets(model: nn.Module, rows: Sequence[Sequence[int]], stride: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`LanguageModel` on rows whose last `stride` tokens are the targets: states, logits and (B, stride) target ids."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    places = torch.tensor([len(row) - stride for row in rows], device=device)[:, None] + torch.arange(stride, device=device)
    states, logits = model(ids, mask, places - 1)
    return states, logits, ids.gather(1, places)


def read(
    model: nn.Module, rows: Sequence[Sequence[int]], stride: int, device: torch.device, precision: str
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """In chunks of similar length: which rows, their states (B, s, d), log p of their targets (B, s), and the targets (B, s)."""
    for chunk in length_chunks([len(row) for row in rows]):
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            states, logits, tokens = targets(model, [rows[i] for i in chunk], stride, device)
            log_probabilities = torch.log_softmax(logits, dim=2).gather(2, tokens[:, :, None])[:, :, 0]
        yield chunk, states, log_probabilities, tokens


def retrieve(
    prompts: Prompts,
    stretches: Sequence[Stretch],
    memory: Sequence[list[int]],
    settings: ReadingConfig,
    embed: Callable[[Sequence[str]], np.ndarray],
) -> list[list[list[int]]]:
    """The best passages of each stretch for the text just before it, best first; never one that holds the stretch.

    Args:
        memory: passages as token ids.
        embed: texts to (texts, dim) unit vectors; asked once, for passages and queries together.
    """
    if not settings.passages or not memory:
        return [[] for _ in stretches]
    queries = prompts.queries(stretches, settings.query_tokens)
    vectors = embed([*(prompts.tokenizer.decode(passage).strip() for passage in memory), *queries])
    found = []
    rankings = ranked(vectors[len(memory) :], vectors[: len(memory)], settings.passages + DEPTH)
    for stretch, query, ranking in zip(stretches, queries, rankings, strict=True):
        usable = (memory[z] for z in ranking if query and not holds(memory[z], stretch))
        found.append([passage for passage, _ in zip(usable, range(settings.passages), strict=False)])
    return found


def new_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (Radford et al. 2019, section 2.2) that learned its merges from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def new_model(tokenizer: Any, *, layers: int, dim: int, heads: int, positions: int, dropout: float) -> LanguageModel:
    """GPT-2 of random weights."""
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=layers,
        n_embd=dim,
        n_head=heads,
        n_positions=positions,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    return LanguageModel(GPT2LMHeadModel(config))


def pretrained_model(checkpoint: Checkpoint, *, dropout: float) -> LanguageModel:
    """A checkpoint's own weights, to go on from.

    Raises:
        CheckpointNotFound: it is no causal language model.
    """
    try:
        return LanguageModel(load_model(AutoModelForCausalLM, checkpoint, dropout=dropout))
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointNotFound(f"checkpoint {checkpoint.name!r} does not load as a causal language model: {reason}") from error


def check_reading(settings: ReadingConfig, model: LanguageModel, prompts: Prompts) -> None:
    """Raises:
    InvalidConfig: the settings leave nothing to predict, or do not fit into the model; all reasons at once.
    """
    problems = []
    if not settings.stride_tokens:
        problems.append("stride_tokens 0: nothing would be predicted")
    if settings.passages and settings.passage_tokens < RUN:
        problems.append(f"passage_tokens {settings.passage_tokens}: a passage has at least {RUN}, by which copies of the text are told")
    if settings.passages and not 0 < settings.query_tokens <= settings.context_tokens:
        problems.append(f"query_tokens {settings.query_tokens}: at least 1 and at most context_tokens, {settings.context_tokens}")
    positions, longest = model.network.config.max_position_embeddings, settings.longest(len(prompts.newline))
    if longest > positions:
        problems.append(f"passages, context and stretch take {longest} tokens, and the model has {positions} positions")
    if problems:
        raise InvalidConfig("; ".join(problems))


def save_language_model(model: LanguageModel, prompts: Prompts, settings: ReadingConfig, folder: Path) -> None:
    """Write the folder that `load_language_model` reads."""
    save_whole(model.network, prompts.tokenizer, settings, ReadingConfig, folder / SETTINGS)


def load_language_model(name: str) -> tuple[LanguageModel, Prompts, ReadingConfig]:
    """A folder that `openbook train causal_lm` wrote, or any GPT-2 checkpoint, which is read by the default settings.

    Raises:
        CheckpointNotFound: it is none, or damaged.
        InvalidConfig: language_model.json holds a value that cannot work.
    """
    checkpoint = resolve_checkpoint(name)
    file = checkpoint.folder / SETTINGS
    settings = stated_config(ReadingConfig, file, "openbook train causal_lm") if file.is_file() else ReadingConfig()
    prompts = Prompts(fast_tokenizer(checkpoint))
    model = pretrained_model(checkpoint, dropout=0.0).eval()
    check_reading(settings, model, prompts)
    return model, prompts, settings


def embed_with(embedder: str, console: Console, purpose: str) -> Callable[[Sequence[str]], np.ndarray]:
    """An `embed` for `retrieve` that keeps nothing."""
    from openbook_training.negatives import embed

    def vectors(texts: Sequence[str]) -> np.ndarray:
        with progress(console, f"embedding texts to {purpose}", len(texts)) as update:
            return embed(resolve_checkpoint(embedder), texts, report=update)

    return vectors
