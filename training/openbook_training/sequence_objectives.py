"""Objectives over sequences of tokens, and kNN-LM's distribution, as pure functions; each is tested against a slow formula.

"Targets" are the tokens whose probability counts, of all sequences of a batch one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openbook_training.objectives import NEGATIVE

LEAST = 1e-30  # that stands for a probability of 0, whose logarithm is no number


def target_log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """(targets,) log p of each target token; (targets, vocabulary) logits, (targets,) token ids."""
    return torch.log_softmax(logits, dim=1).gather(1, tokens[:, None])[:, 0]


def sequence_loss(log_probabilities: Tensor, owner: Tensor, sequences: int) -> Tensor:
    """Mean over sequences y of -sum over t of log p(y_t | y_<t, ...).

    Args:
        log_probabilities: (targets,) from `target_log_probabilities`.
        owner: (targets,) which sequence each target belongs to, in [0, sequences).
        sequences: how many the batch holds.
    """
    sums = log_probabilities.new_zeros(sequences).index_add(0, owner, -log_probabilities)
    return sums.mean()


def pointer_log_probabilities(logits: Tensor, scores: Tensor, gate: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, V) log of (1 - g) softmax(logits) + g · the softmax over places, summed over the places of each token.

    See et al. 2017, equation 9; with g the probability of copying.

    Args:
        logits: (B, T, V) of the vocabulary.
        scores: (B, T, S) of the places that may be copied from; NEGATIVE where none is.
        gate: (B, T, 1) logit of g.
        tokens: (B, S) which token stands in each place.
    """
    places = tokens[:, None].expand(-1, scores.shape[1], -1)
    copied = torch.zeros_like(logits).scatter_add(2, places, torch.softmax(scores, dim=2))
    share = torch.sigmoid(gate)
    mixed = (1 - share) * torch.softmax(logits, dim=2) + share * copied
    return torch.log(mixed.clamp(min=LEAST))


def neighbour_log_probabilities(distances: Tensor, tokens: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(targets,) log p_kNN(y) = log of the sum over neighbours that y followed of softmax(-distance / temperature).

    Khandelwal et al. 2020, equation 2; NEGATIVE where none of its neighbours was followed by the target.

    Args:
        distances: (targets, k) squared L2 between the context's state and its neighbours'; infinite where there are fewer.
        tokens: (targets, k) the token that followed each neighbour.
        targets: (targets,) token ids.
        temperature: above 0; the larger, the more the far neighbours count.
    """
    weights = torch.log_softmax(-distances / temperature, dim=1)
    right = weights.masked_fill(tokens != targets[:, None], NEGATIVE)
    return torch.logsumexp(right, dim=1).clamp(min=NEGATIVE)


def interpolated(model: Tensor, neighbours: Tensor, share: float) -> Tensor:
    """log(share * p_kNN + (1 - share) * p_LM), Khandelwal et al. 2020, equation 3, of log-probabilities of the same shape.

    Args:
        share: the lambda of the paper, from 0, the model alone, to below 1.
    """
    if not share:
        return model
    lam = torch.tensor(share, dtype=model.dtype, device=model.device)
    return torch.logaddexp(torch.log(lam) + neighbours, torch.log1p(-lam) + model)
