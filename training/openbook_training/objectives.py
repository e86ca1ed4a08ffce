"""Training objectives as pure functions of logits; each is tested against a slow formula written out in its test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NEGATIVE = -1e9  # stands for log 0; finite, so that a fully masked row gives no NaN gradient


def span_scores(start: Tensor, end: Tensor, context: Tensor, max_answer_tokens: int) -> Tensor:
    """Score of every span a reader may answer with: start logit of its first token plus end logit of its last.

    Args:
        start: (pairs, length) logits.
        end: (pairs, length) logits.
        context: (pairs, length) bool, True where a token belongs to the passage.
        max_answer_tokens: longest span considered.

    Returns:
        (pairs, length, max_answer_tokens): entry [p, s, n] is the span from token s to token s + n; NEGATIVE where
        either end lies outside the passage.
    """
    start = start.masked_fill(~context, NEGATIVE)
    end = end.masked_fill(~context, NEGATIVE)
    shifted = [torch.nn.functional.pad(end[:, n:], (0, min(n, end.shape[1])), value=NEGATIVE) for n in range(max_answer_tokens)]
    return torch.clamp(start[:, :, None] + torch.stack(shifted, dim=2), min=NEGATIVE)


def null_scores(start: Tensor, end: Tensor) -> Tensor:
    """(pairs,) score of "no answer in this passage": the logits of the first token, [CLS] (Devlin et al. 2019, section 4.3)."""
    return start[:, 0] + end[:, 0]


def multi_passage_span_loss(spans: Tensor, null: Tensor, gold: Tensor, owner: Tensor, questions: int) -> Tensor:
    """Mean over questions of -log p(any gold span), normalised over all spans of all passages of the question.

    Sharing the normaliser makes scores compare across passages (Clark & Gardner 2018, section 3.2); summing over every
    gold occurrence is their "sum" objective. A question none of whose passages holds a gold span is one whose gold is
    the null span of each of its passages.

    Args:
        spans: (pairs, length, max_answer_tokens) from `span_scores`.
        null: (pairs,) from `null_scores`.
        gold: (pairs, length, max_answer_tokens) bool, True at accepted spans.
        owner: (pairs,) which question each pair belongs to, in [0, questions).
        questions: how many questions the batch holds.
    """
    flat = spans.flatten(1)
    everything = torch.logsumexp(torch.cat([flat, null[:, None]], dim=1), dim=1)
    right = torch.logsumexp(flat.masked_fill(~gold.flatten(1), NEGATIVE), dim=1)
    answerable = torch.zeros(questions, dtype=torch.bool, device=null.device)
    answerable[owner[gold.flatten(1).any(dim=1)]] = True
    right = torch.where(answerable[owner], right, null)
    return (_logsumexp_by(everything, owner, questions) - _logsumexp_by(right, owner, questions)).mean()


def span_distillation_loss(
    spans: Tensor, null: Tensor, taught_spans: Tensor, taught_null: Tensor, owner: Tensor, questions: int, temperature: float
) -> Tensor:
    """Mean over questions of t² Σ_a p(a) (log p(a) - log q(a)): how far the reader q is from a teacher p (Hinton et al. 2015, section 2).

    Both are softmaxes over the same outcomes as those of `multi_passage_span_loss`, every span and the null span of each
    passage of a question, of scores divided by t, the temperature: above 1, what the teacher holds less probable weighs more.

    Args:
        spans: (pairs, length, max_answer_tokens) from `span_scores`, the reader's.
        null: (pairs,) from `null_scores`, the reader's.
        taught_spans: as `spans`, the teacher's of the same pairs.
        taught_null: as `null`, the teacher's.
        owner: (pairs,) which question each pair belongs to, in [0, questions).
        questions: how many questions the batch holds.
        temperature: above 0.
    """

    def log_probabilities(spans: Tensor, null: Tensor) -> Tensor:
        scores = torch.cat([spans.flatten(1), null[:, None]], dim=1) / temperature
        return scores - _logsumexp_by(torch.logsumexp(scores, dim=1), owner, questions)[owner][:, None]

    own, taught = log_probabilities(spans, null), log_probabilities(taught_spans, taught_null)
    return temperature**2 * (taught.exp() * (taught - own)).sum() / questions


def _logsumexp_by(values: Tensor, owner: Tensor, questions: int) -> Tensor:
    """(questions,) logsumexp of the values that share an owner."""
    table = torch.where(owner[None, :] == torch.arange(questions, device=owner.device)[:, None], values[None, :], NEGATIVE)
    return torch.logsumexp(table, dim=1)


def contrastive_loss(scores: Tensor, gold: Tensor, masked: Tensor) -> Tensor:
    """-1/B sum over i of log e^s(x_i, z_i) / sum over j of e^s(x_i, z_j): each question's passage against all of the batch.

    The passages of the other questions are the negatives, and mined ones beside them (Karpukhin et al. 2020, section 3.2).

    Args:
        scores: (B, P) s(x_i, z_j), divided by the temperature already.
        gold: (B,) column of each question's own passage.
        masked: (B, P) bool, True where a passage is no negative of a question although it is not its gold either: another
            relevant one.
    """
    return torch.nn.functional.cross_entropy(scores.masked_fill(masked, NEGATIVE), gold)


def matryoshka_loss(
    questions: Tensor, passages: Tensor, gold: Tensor, masked: Tensor, *, dims: Sequence[int], weights: Sequence[float], temperature: float
) -> Tensor:
    """Weighted mean over dims m of `contrastive_loss` on the first m dimensions, scaled to unit length again.

    The sum of Kusupati et al. 2022, equation 1, divided by its weights' sum, so that the learning rate does not depend on them.

    Args:
        questions: (B, d) vectors.
        passages: (P, d) vectors.
        gold: as for `contrastive_loss`.
        masked: as for `contrastive_loss`.
        dims: each at most d.
        weights: of each of `dims`.
        temperature: cosines are divided by it.
    """

    def contrast(scores: Tensor) -> Tensor:
        return contrastive_loss(scores, gold, masked)

    return matryoshka_mean(questions, passages, contrast, dims=dims, weights=weights, temperature=temperature)


def matryoshka_mean(
    questions: Tensor,
    passages: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
) -> Tensor:
    """Weighted mean over dims m of a loss of the (B, P) scores of the first m dimensions, scaled to unit length again.

    Arguments as for `matryoshka_loss`; `loss` is told scores that are divided by the temperature already.
    """
    total = questions.new_zeros(())
    for dim, weight in zip(dims, weights, strict=True):
        x, z = (torch.nn.functional.normalize(vectors[:, :dim], dim=1) for vectors in (questions, passages))
        total = total + weight * loss(x @ z.T / temperature)
    return total / sum(weights)


def passage_masses(spans: Tensor, owner: Tensor, passages: int) -> Tensor:
    """(passages,) log of what all spans of a passage weigh together: the logsumexp of their scores, over all its windows.

    Less the normaliser of `multi_passage_span_loss`, which the passages of a question share, it is the reader's
    log p(an answer is in the passage); a softmax over those passages does not depend on it. A span in two windows counts twice, as there.

    Args:
        spans: (pairs, length, max_answer_tokens) from `span_scores`.
        owner: (pairs,) which passage each pair is a window of, in [0, passages).
        passages: how many there are, each with one window at least.
    """
    return _logsumexp_by(torch.logsumexp(spans.flatten(1), dim=1), owner, passages)


def passage_distillation_loss(scores: Tensor, taught: Tensor, candidates: Tensor) -> Tensor:
    """Mean over questions x of KL(p || q) = Σ_z p(z|x) (log p(z|x) - log q(z|x)): how far a retriever q is from a reader p.

    p and q are softmaxes over the candidates z of a question. One that has fewer than two says nothing and is not counted;
    where none has two, the loss is 0. After Izacard & Grave 2021 and Yang & Seo 2020, who minimise the same divergence;
    p is neither the former's attention nor the latter's passage ranker here, but what an extractive reader's spans weigh.

    Args:
        scores: (B, P) the retriever's s(x, z), divided by its temperature already.
        taught: (B, P) the reader's `passage_masses`, divided by its temperature already; anything where z is no candidate.
        candidates: (B, P) bool, True at the passages that a question is compared on.
    """
    own, told = (torch.log_softmax(values.masked_fill(~candidates, NEGATIVE), dim=1) for values in (scores, taught))
    compared = (candidates.sum(dim=1) >= 2).sum()
    # Of one candidate p = q, which adds 0. The others are left out once more: where no candidate has a span to read, p falls on them.
    return (told.exp() * (told - own)).masked_fill(~candidates, 0.0).sum() / compared.clamp(min=1)


def anchor_loss(vectors: Tensor, anchors: Tensor) -> Tensor:
    """Mean of 1 - cosine between texts' vectors and those of the untouched embedder, both (N, d) of unit length.

    Holds the space in place where the training data say nothing of it, in the manner of learning without forgetting
    (Li & Hoiem 2016), on the vectors themselves in place of class probabilities.
    """
    return 1 - (vectors * anchors).sum(dim=1).mean()


def neighbour_prior(scores: Tensor, null_score: Tensor, temperature: Tensor) -> Tensor:
    """log p(z|x) of each neighbour z of a text x, and last of the null passage, "read without a neighbour".

    A softmax over what retrieval found and one null passage, after REALM (Guu et al. 2020, sections 3.1 and 3.4).

    Args:
        scores: (texts, k) s(x, z), cosines; NEGATIVE where a text has fewer neighbours.
        null_score: () the score of the null passage, on the same scale.
        temperature: () what all scores are divided by.

    Returns:
        (texts, k + 1) log-probabilities.
    """
    return torch.log_softmax(torch.cat([scores, null_score.expand(scores.shape[0], 1)], dim=1) / temperature, dim=1)


def marginal_label_log_probabilities(logits: Tensor, shift: Tensor, labels: Tensor, prior: Tensor) -> Tensor:
    """log p(y|x) = log sum over z of p(z|x) p(y|x, z), with p(y|x, z) = softmax of the text's logits plus its neighbour's shift.

    Args:
        logits: (texts, labels) of the text alone, p(y|x, null passage).
        shift: (labels, labels); row c is what a neighbour labelled c adds to the logits.
        labels: (texts, k) label numbers of the neighbours.
        prior: (texts, k + 1) from `neighbour_prior`.

    Returns:
        (texts, labels) log-probabilities.
    """
    given = torch.cat([logits[:, None, :] + shift[labels], logits[:, None, :]], dim=1)  # (texts, k + 1, labels)
    return torch.logsumexp(prior[:, :, None] + torch.log_softmax(given, dim=2), dim=1)


def label_loss(log_probabilities: Tensor, gold: Tensor) -> Tensor:
    """Mean over texts of -log p(gold label | text); (texts, labels) log-probabilities, (texts,) label numbers."""
    return -log_probabilities.gather(1, gold[:, None]).mean()


def masked_token_loss(log_probabilities: Tensor, texts: Tensor, count: int) -> Tensor:
    """Mean over texts of -1/|Y| sum over j of log p(y_j | x_masked), Y the hidden tokens of a text (Devlin et al. 2019, section 3.1).

    A mean within each text before the one over texts, so that splitting a batch changes no gradient.

    Args:
        log_probabilities: (targets,) of the hidden tokens.
        texts: (targets,) which text each target belongs to, in [0, count); every text has one at least.
        count: how many texts there are.
    """
    sizes = torch.bincount(texts, minlength=count)
    return -(log_probabilities / sizes[texts]).sum() / count


def bag_of_words_loss(log_probabilities: Tensor, texts: Tensor, tokens: Tensor) -> Tensor:
    """Mean over texts of the mean of -log p(token | text) over the text's bag of tokens.

    With one token a text it is the cross-entropy of predicting one masked token.

    Args:
        log_probabilities: (texts, vocabulary).
        texts: (targets,) which text each target belongs to, in [0, texts); every text has one at least.
        tokens: (targets,) token ids.
    """
    return masked_token_loss(log_probabilities[texts, tokens], texts, len(log_probabilities))


def marginal_token_loss(prior: Tensor, given: Tensor, texts: Tensor) -> Tensor:
    """Mean over texts x of -1/|Y| sum over j of log sum over z of p(z|x) p(y_j|x, z): each hidden token may lean on another passage.

    The latent passage is summed out token by token, as in RAG-Token (Lewis et al. 2020, section 2.1).

    Args:
        prior: (texts, k + 1) log p(z|x) from `neighbour_prior`, the null passage last.
        given: (targets, k + 1) log p(y_j|x, z) of the hidden tokens; anything where the prior is nothing.
        texts: (targets,) which text each target belongs to, in [0, texts); every text has one at least.
    """
    return masked_token_loss(torch.logsumexp(prior[texts] + given, dim=1), texts, len(prior))


def marginal_sequence_loss(prior: Tensor, given: Tensor, texts: Tensor) -> Tensor:
    """Mean over texts x of -log sum over z of p(z|x) prod over j of p(y_j|x, z): one passage explains all hidden tokens of a text.

    REALM's own objective (Guu et al. 2020, equation 1 and section 3.2). Arguments as for `marginal_token_loss`.
    """
    return -torch.logsumexp(prior + sequence_log_probabilities(given, texts, len(prior)), dim=1).mean()


def sequence_log_probabilities(given: Tensor, texts: Tensor, count: int) -> Tensor:
    """(texts, k + 1) log p(y|x, z) = sum over j of log p(y_j|x, z), of (targets, k + 1) `given` and (targets,) `texts`."""
    return given.new_zeros((count, given.shape[1])).index_add(0, texts, given)


def retrieval_utility(prior: Tensor, given: Tensor, texts: Tensor) -> Tensor:
    """(texts,) mean of log p(y|x, z) - log p(y|x, null) over the retrieved z of a text, weighted by p(z|x), in nats.

    The retrieval utility of Guu et al. 2020, averaged over what was retrieved; NaN for a text that has no passage. Arguments as for
    `marginal_token_loss`.
    """
    whole = sequence_log_probabilities(given, texts, len(prior))
    weights = torch.softmax(prior[:, :-1], dim=1)
    utility = (weights * (whole[:, :-1] - whole[:, -1:])).sum(dim=1)
    return utility.masked_fill((prior[:, :-1] < NEGATIVE / 2).all(dim=1), torch.nan)
