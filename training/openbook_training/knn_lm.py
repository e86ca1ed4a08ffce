"""kNN-LM (Khandelwal et al. 2020): tokens that followed similar contexts in a text, mixed into a language model's prediction.

    datastore: (state before a token -> token) of every token of a text
    p(y) = lambda * p_kNN(y) + (1 - lambda) * p_LM(y)

The state is the last layer's output, which the vocabulary head reads; in the paper it is the input of the last
feed-forward layer. Neighbours are searched for exactly, in blocks: memory for a million states, minutes for a few hundred thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openbook_training.language_model import Prompts, read
from openbook_training.sequence_objectives import interpolated, neighbour_log_probabilities
from openbook_training.streams import Stretch

SHARES = tuple(step / 20 for step in range(20))  # lambdas tried; 0 = the model alone
SCALES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # temperatures tried, times the mean distance of the nearest neighbour
BLOCK_KEYS = 65_536


@dataclass(frozen=True, slots=True)
class Datastore:
    """What followed each context of a text."""

    states: Tensor  # (tokens, d) float32
    tokens: Tensor  # (tokens,) ids


@dataclass(frozen=True, slots=True)
class Mixture:
    """How much the neighbours say."""

    share: float  # lambda, in [0, 1)
    temperature: float  # of squared distances


def build_datastore(
    model: nn.Module, prompts: Prompts, stretches: Sequence[Stretch], device: torch.device, precision: str = "fp32"
) -> Datastore:
    """Every token of the stretches, read without passages."""
    rows = [prompts.row(stretch, []) for stretch in stretches]
    states, tokens = [], []
    for _, found, _, followed in read(model, rows, len(stretches[0].tokens), device, precision):
        states.append(found.flatten(0, 1))
        tokens.append(followed.flatten())
    return Datastore(torch.cat(states), torch.cat(tokens))


def neighbours(states: Tensor, datastore: Datastore, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest contexts of each state, nearest first: squared L2 distances, and what followed, (n, k); fewer where there are."""
    k = min(k, len(datastore.tokens))
    best = torch.empty((len(states), 0), device=states.device)
    where = torch.empty((len(states), 0), dtype=torch.long, device=states.device)
    own = states.square().sum(dim=1, keepdim=True)
    for at in range(0, len(datastore.tokens), BLOCK_KEYS):
        keys = datastore.states[at : at + BLOCK_KEYS]
        distances = (own - 2 * states @ keys.T + keys.square().sum(dim=1)).clamp(min=0)
        found = torch.topk(distances, min(k, len(keys)), dim=1, largest=False, sorted=False)
        both, places = torch.cat([best, found.values], dim=1), torch.cat([where, found.indices + at], dim=1)
        best, order = torch.topk(both, min(k, both.shape[1]), dim=1, largest=False)
        where = places.gather(1, order)
    return best, datastore.tokens[where]


def tune(model: Tensor, distances: Tensor, followed: Tensor, targets: Tensor) -> Mixture:
    """The share and temperature, of a grid, under which held-out tokens are the least surprising; share 0 where neighbours do not help.

    Args:
        model: (targets,) log p_LM of each.
        distances: (targets, k), with `followed`, from `neighbours`.
        followed: (targets, k) token ids.
        targets: (targets,) token ids.
    """
    near = float(distances[:, 0].mean()) or 1.0
    best, chosen = -float(model.double().mean()), Mixture(0.0, near)
    for scale in SCALES:
        votes = neighbour_log_probabilities(distances, followed, targets, near * scale)
        for share in SHARES[1:]:
            surprise = -float(interpolated(model.double(), votes.double(), share).mean())
            if surprise < best:
                best, chosen = surprise, Mixture(share, near * scale)
    return chosen


def mixed(model: Tensor, distances: Tensor, followed: Tensor, targets: Tensor, mixture: Mixture) -> Tensor:
    """(targets,) log p of each under the mixture; arguments as for `tune`."""
    return interpolated(model, neighbour_log_probabilities(distances, followed, targets, mixture.temperature), mixture.share)
