"""Objectives against slow formulas written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from openbook_training.objectives import (
    NEGATIVE,
    anchor_loss,
    bag_of_words_loss,
    label_loss,
    marginal_label_log_probabilities,
    marginal_sequence_loss,
    marginal_token_loss,
    masked_token_loss,
    matryoshka_loss,
    multi_passage_span_loss,
    neighbour_prior,
    null_scores,
    retrieval_utility,
    span_distillation_loss,
    span_scores,
)


def test_a_span_scores_its_first_start_plus_its_last_end_logit_and_only_inside_the_passage() -> None:
    rng = np.random.default_rng(0)
    start, end = rng.normal(size=(3, 9)), rng.normal(size=(3, 9))
    context = rng.random((3, 9)) < 0.6
    spans = span_scores(torch.tensor(start), torch.tensor(end), torch.tensor(context), max_answer_tokens=4).numpy()
    assert spans.shape == (3, 9, 4)
    for pair in range(3):
        for first in range(9):
            for extra in range(4):
                inside = first + extra < 9 and context[pair, first] and context[pair, first + extra]
                expected = start[pair, first] + end[pair, first + extra] if inside else NEGATIVE
                assert spans[pair, first, extra] == pytest.approx(expected)


def test_the_loss_is_minus_log_of_the_gold_share_over_all_passages_of_a_question() -> None:
    rng = np.random.default_rng(1)
    pairs, length, longest = 5, 7, 3
    owner = np.array([0, 0, 1, 1, 1])
    start, end = rng.normal(size=(pairs, length)), rng.normal(size=(pairs, length))
    context = np.ones((pairs, length), bool)
    context[:, :2] = False
    gold = np.zeros((pairs, length, longest), bool)
    gold[0, 3, 1] = gold[1, 2, 0] = gold[1, 5, 1] = True  # question 1 has none: its gold is the null of each passage
    expected = 0.0
    for question in (0, 1):
        everything, right = [], []
        for pair in np.flatnonzero(owner == question):
            null = start[pair, 0] + end[pair, 0]
            everything.append(null)
            if question == 1:
                right.append(null)
            for first in range(2, length):
                for extra in range(min(longest, length - first)):
                    everything.append(start[pair, first] + end[pair, first + extra])
                    if gold[pair, first, extra]:
                        right.append(everything[-1])
        expected -= (np.log(np.sum(np.exp(right))) - np.log(np.sum(np.exp(everything)))) / 2
    tensors = torch.tensor(start), torch.tensor(end)
    loss = multi_passage_span_loss(
        span_scores(*tensors, torch.tensor(context), longest), null_scores(*tensors), torch.tensor(gold), torch.tensor(owner), 2
    )
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_the_distance_to_a_teacher_is_the_divergence_over_all_spans_and_nulls_of_a_question() -> None:
    rng = np.random.default_rng(11)
    owner, length, longest, temperature = [0, 0, 1], 5, 3, 2.0
    context = np.array([[False, True, True, True, True], [False, True, True, False, False], [False, True, True, True, False]])
    logits = {who: (rng.normal(size=(3, length)), rng.normal(size=(3, length))) for who in ("reader", "teacher")}
    expected = 0.0
    for question in (0, 1):
        outcomes: dict[str, list[float]] = {}
        for who, (start, end) in logits.items():
            outcomes[who] = []
            for pair in (row for row in range(3) if owner[row] == question):
                outcomes[who].append((start[pair, 0] + end[pair, 0]) / temperature)
                for first in range(length):
                    for last in range(first, min(first + longest, length)):
                        if context[pair, first] and context[pair, last]:
                            outcomes[who].append((start[pair, first] + end[pair, last]) / temperature)
        own, taught = (np.array(outcomes[who]) - np.log(np.sum(np.exp(outcomes[who]))) for who in ("reader", "teacher"))
        expected += temperature**2 * float(np.sum(np.exp(taught) * (taught - own))) / 2

    def distance(reader: str, teacher: str) -> float:
        both = []
        for who in (reader, teacher):
            start, end = (torch.tensor(values) for values in logits[who])
            both += [span_scores(start, end, torch.tensor(context), longest), null_scores(start, end)]
        return float(span_distillation_loss(*both, torch.tensor(owner), 2, temperature))

    assert distance("reader", "teacher") == pytest.approx(expected, rel=1e-6)
    assert distance("teacher", "teacher") == pytest.approx(0.0, abs=1e-9)


def test_a_passage_without_any_gold_span_gets_a_finite_gradient() -> None:
    start = torch.zeros((2, 5), requires_grad=True)
    context = torch.tensor([[False, False, True, True, True], [False] * 5])
    gold = torch.zeros((2, 5, 2), dtype=torch.bool)
    gold[0, 2, 0] = True
    loss = multi_passage_span_loss(span_scores(start, start, context, 2), null_scores(start, start), gold, torch.tensor([0, 0]), 1)
    loss.backward()
    assert start.grad is not None
    assert torch.isfinite(start.grad).all()


def test_the_contrastive_loss_is_minus_log_of_the_gold_share_over_the_unmasked_passages_at_every_dimension() -> None:
    rng = np.random.default_rng(3)
    questions, passages = rng.normal(size=(4, 8)), rng.normal(size=(7, 8))
    gold, masked = np.array([2, 0, 6, 3]), np.zeros((4, 7), bool)
    masked[0, 5] = masked[2, [0, 1]] = True
    dims, weights, temperature = (8, 3), (1.0, 0.5), 0.1
    expected = 0.0
    for dim, weight in zip(dims, weights, strict=True):
        loss = 0.0
        for i in range(4):
            similarity = []
            for j in range(7):
                x, z = questions[i, :dim], passages[j, :dim]
                similarity.append(float(x @ z) / np.sqrt(x @ x) / np.sqrt(z @ z) / temperature)
            everything = sum(np.exp(similarity[j]) for j in range(7) if not masked[i, j])
            loss -= np.log(np.exp(similarity[gold[i]]) / everything) / 4
        expected += weight * loss / 1.5
    actual = matryoshka_loss(
        torch.tensor(questions),
        torch.tensor(passages),
        torch.tensor(gold),
        torch.tensor(masked),
        dims=dims,
        weights=weights,
        temperature=temperature,
    )
    assert float(actual) == pytest.approx(expected, rel=1e-9)


def test_the_anchor_loss_is_one_minus_the_mean_cosine() -> None:
    rng = np.random.default_rng(4)
    vectors, anchors = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    vectors, anchors = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors, anchors))
    expected = sum(1 - sum(a * b for a, b in zip(one, other, strict=True)) for one, other in zip(vectors, anchors, strict=True)) / 5
    assert float(anchor_loss(torch.tensor(vectors), torch.tensor(anchors))) == pytest.approx(expected, rel=1e-9)
    assert float(anchor_loss(torch.tensor(anchors), torch.tensor(anchors))) == pytest.approx(0.0, abs=1e-12)


def test_a_label_sums_over_the_neighbours_and_the_null_passage() -> None:
    rng = np.random.default_rng(2)
    texts, k, labels, null, temperature = 4, 3, 5, 0.4, 0.3
    scores, of = rng.uniform(-1, 1, (texts, k)), rng.integers(0, labels, (texts, k))
    logits, shift = rng.normal(size=(texts, labels)), rng.normal(size=(labels, labels))
    prior = neighbour_prior(torch.tensor(scores), *torch.tensor([null, temperature], dtype=torch.float64))
    actual = marginal_label_log_probabilities(torch.tensor(logits), torch.tensor(shift), torch.tensor(of), prior).numpy()
    for x in range(texts):
        z_weights = [np.exp(score / temperature) for score in [*scores[x], null]]
        for y in range(labels):
            expected = 0.0
            for z in range(k + 1):
                given = [np.exp(logits[x, other] + (shift[of[x, z], other] if z < k else 0.0)) for other in range(labels)]
                expected += z_weights[z] / sum(z_weights) * given[y] / sum(given)
            assert np.exp(actual[x, y]) == pytest.approx(expected, rel=1e-9)


def test_a_text_without_neighbours_has_the_probabilities_of_its_own_logits_and_finite_gradients() -> None:
    logits, shift = torch.randn(2, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    null, temperature = torch.tensor(0.5, requires_grad=True), torch.tensor(0.05, requires_grad=True)
    prior = neighbour_prior(torch.full((2, 4), NEGATIVE), null, temperature)
    log_probabilities = marginal_label_log_probabilities(logits, shift, torch.zeros((2, 4), dtype=torch.long), prior)
    torch.testing.assert_close(log_probabilities, torch.log_softmax(logits, dim=1))
    loss = label_loss(log_probabilities, torch.tensor([2, 0]))
    assert loss.item() == pytest.approx(-(log_probabilities[0, 2] + log_probabilities[1, 0]).item() / 2)
    loss.backward()
    for value in (logits, shift, null, temperature):
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


def test_the_bag_of_words_loss_is_a_mean_over_texts_of_a_mean_over_their_tokens() -> None:
    logits = np.random.default_rng(3).normal(size=(3, 6))
    bags = [[1, 1, 4], [5], [0, 2]]
    expected = 0.0
    for row, bag in zip(logits, bags, strict=True):
        expected += sum(-np.log(np.exp(row[token]) / np.exp(row).sum()) for token in bag) / len(bag) / 3
    texts = torch.tensor([0, 0, 0, 1, 2, 2])
    tokens = torch.tensor([token for bag in bags for token in bag])
    loss = bag_of_words_loss(torch.log_softmax(torch.tensor(logits), dim=1), texts, tokens)
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_the_masked_token_loss_is_a_mean_over_texts_of_a_mean_over_their_hidden_tokens() -> None:
    values = np.log(np.random.default_rng(4).random(6))
    texts = [0, 2, 0, 1, 2, 2]
    expected = 0.0
    for text in range(3):
        own = [value for value, owner in zip(values, texts, strict=True) if owner == text]
        expected -= sum(own) / len(own) / 3
    assert float(masked_token_loss(torch.tensor(values), torch.tensor(texts), 3)) == pytest.approx(expected, rel=1e-9)


def retrieved() -> tuple[np.ndarray, np.ndarray, list[int]]:
    """p(z|x) of three texts with two passages and the null passage (the last one has a single passage), and p(y_j|x, z)."""
    rng = np.random.default_rng(5)
    prior = rng.random((3, 3))
    prior[2, 1] = 0.0
    return prior / prior.sum(axis=1, keepdims=True), rng.random((6, 3)), [0, 2, 0, 1, 2, 2]


def logs(prior: np.ndarray, given: np.ndarray, texts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(np.log(np.maximum(prior, 1e-300))), torch.tensor(np.log(given)), torch.tensor(texts)


def test_a_token_is_summed_over_the_passages_for_itself() -> None:
    prior, given, texts = retrieved()
    expected = 0.0
    for x in range(3):
        own = [j for j in range(6) if texts[j] == x]
        for j in own:
            expected -= np.log(sum(prior[x, z] * given[j, z] for z in range(3))) / len(own) / 3
    assert float(marginal_token_loss(*logs(prior, given, texts))) == pytest.approx(expected, rel=1e-9)


def test_a_sequence_is_explained_by_one_passage_at_a_time() -> None:
    prior, given, texts = retrieved()
    expected = 0.0
    for x in range(3):
        explained = 0.0
        for z in range(3):
            product = 1.0
            for j in range(6):
                product *= given[j, z] if texts[j] == x else 1.0
            explained += prior[x, z] * product
        expected -= np.log(explained) / 3
    loss = marginal_sequence_loss(*logs(prior, given, texts))
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    assert float(loss) != pytest.approx(float(marginal_token_loss(*logs(prior, given, texts))), rel=1e-2)


def test_retrieval_utility_is_what_passages_add_to_the_log_probability_of_the_whole_sequence() -> None:
    prior, given, texts = retrieved()
    prior[1] = [0.0, 0.0, 1.0]  # read alone
    utility = retrieval_utility(
        torch.tensor(np.where(prior > 0, np.log(np.maximum(prior, 1e-300)), NEGATIVE)), *logs(prior, given, texts)[1:]
    )
    for x in (0, 2):
        whole = [sum(np.log(given[j, z]) for j in range(6) if texts[j] == x) for z in range(3)]
        expected = sum(prior[x, z] * (whole[z] - whole[2]) for z in range(2)) / prior[x, :2].sum()
        assert float(utility[x]) == pytest.approx(expected, rel=1e-9)
    assert np.isnan(float(utility[1]))


def test_a_text_without_passages_has_the_losses_of_reading_it_alone_and_finite_gradients() -> None:
    given, null = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    prior = neighbour_prior(torch.full((2, 3), NEGATIVE, dtype=torch.float64), null, torch.tensor(0.05, dtype=torch.float64))
    texts = torch.tensor([0, 0, 1])
    token, sequence = marginal_token_loss(prior, given, texts), marginal_sequence_loss(prior, given, texts)
    alone = given.detach().numpy()[:, -1]
    assert token.item() == pytest.approx(-((alone[0] + alone[1]) / 2 + alone[2]) / 2)
    assert sequence.item() == pytest.approx(-(alone[0] + alone[1] + alone[2]) / 2)
    (token + sequence).backward()
    for value in (given, null):
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


def test_a_passage_gains_by_how_much_more_probable_it_makes_the_sequence_than_all_do_on_average() -> None:
    """Guu et al. 2020, section 3.3: the gradient of log p(y|x) in s(x, z) is (p(y|x, z) / p(y|x) - 1) p(z|x)."""
    rng = np.random.default_rng(6)
    scores, given = torch.tensor(rng.uniform(-1, 1, (1, 3)), requires_grad=True), rng.random((2, 4))
    prior = neighbour_prior(scores, torch.tensor(0.2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    marginal_sequence_loss(prior, torch.tensor(np.log(given)), torch.tensor([0, 0])).backward()
    weights, whole = prior[0].detach().exp().numpy(), given.prod(axis=0)
    expected = [(whole[z] / (weights @ whole) - 1) * weights[z] for z in range(3)]
    assert scores.grad is not None
    assert -scores.grad[0].numpy() == pytest.approx(np.array(expected), rel=1e-9)
