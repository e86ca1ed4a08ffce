"""The inverse cloze task: what asks for what, what is no negative, and a retriever trained, stopped, resumed and used."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData
from openbook_training.inverse_cloze import also_right, block, folded, query_spans
from openbook_training.retriever import build_retriever
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.inverse_cloze import Example, InverseClozeConfig, InverseClozeTask
from rich.console import Console

WORDS = "red blue green one two three city river king book".split()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> InverseClozeConfig:
    """Passages of three sentences about a pair of words, with a question on each."""
    rows = []
    for n in range(24):
        about = f"{WORDS[n % 10]} {WORDS[(n * 7 + n // 10) % 10]}"
        context = f"The {about} was in case {n}. A {about} is to be read. Who was in the {about} case?"
        rows.append({"id": f"q{n}", "question": f"what is the {about} {n} ?", "context": context, "answers": [about]})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return InverseClozeConfig(
        output=str(tmp_path / "run"),
        checkpoint=str(tiny_checkpoint),
        train=str(tmp_path / "train.jsonl"),
        held_out=6,
        train_max_tokens=48,
        matryoshka_dims=(32, 8),
        matryoshka_weights=(1.0, 0.5),
        lora_rank=2,
        lora_alpha=2,
        evaluated_questions=8,
        loop=LoopConfig(epochs=2, batch_examples=6, micro_batch_examples=6, precision="fp32", learning_rate=1e-2, threads=1),
    )


def test_a_sentence_asks_for_the_rest_of_its_passage() -> None:
    passage = "The king read a book. He left. It rained in the city!"
    spans = query_spans(passage)
    assert [passage[slice(*span)].strip() for span in spans] == [
        "The king read a book.",
        "It rained in the city!",
    ]  # the short one asks nothing
    assert [block(passage, span) for span in spans] == ["He left. It rained in the city!", "The king read a book. He left."]
    assert query_spans("There is only one sentence in this passage.") == []
    assert query_spans("") == []


def test_a_block_that_equals_ones_own_or_whose_passage_holds_the_sentence_is_no_negative() -> None:
    texts = ["A b c d. R s t u.", "E f g h. R s t u.", "A b c d. X y z w.", "K l m n. O p q r."]
    spans = [0, 0, 1, 0]  # the sentence of each that asks
    queries = [folded(text[slice(*query_spans(text)[at])]) for text, at in zip(texts, spans, strict=True)]
    blocks = [folded(block(text, query_spans(text)[at])) for text, at in zip(texts, spans, strict=True)]
    expected = []
    for i in range(4):
        for j in range(4):
            same_block = blocks[i] == blocks[j]  # 0 and 1: "R s t u."
            holds = queries[i] in " ".join(texts[j].lower().split())  # 2 holds the sentence that asks for 0
            if i != j and (same_block or holds):
                expected.append((i, j))
    assert expected == [(0, 1), (0, 2), (1, 0)]
    assert also_right(queries, blocks, [folded(text) for text in texts]) == expected


def test_the_loss_is_minus_log_of_the_own_blocks_share_over_the_batch(config: InverseClozeConfig) -> None:
    task = InverseClozeTask(dataclasses.replace(config, matryoshka_dims=(32,), matryoshka_weights=(1.0,)), quiet())
    texts = task._texts
    texts[1] = texts[0].replace("case 0", "case 1")  # shares its other sentences with the first passage
    task._folded[1] = folded(texts[1])
    batch = [
        Example(0, query_spans(texts[0])[1], False),
        Example(1, query_spans(texts[1])[0], True),
        Example(2, query_spans(texts[2])[2], False),
    ]
    assert task._block(batch[1]) == texts[1]  # kept
    assert texts[0][slice(*batch[0].span)].strip() not in task._block(batch[0])
    rows = task.encoder.rows([*task._query_texts(batch), *map(task._block, batch)], 48)
    with torch.no_grad():
        vectors = task.vectors(task.model, rows).astype(np.float64)
        actual = float(task.loss(task.model, batch, random.Random(0)))
    scores = np.exp(vectors[:3] @ vectors[3:].T / config.temperature)
    masked = np.zeros((3, 3), bool)
    masked[0, 1] = True  # passage 1 holds the sentence that asks for passage 0; the one that asks for 1 is only its own
    expected = -np.mean([np.log(scores[i, i] / scores[i, ~masked[i]].sum()) for i in range(3)])
    assert actual == pytest.approx(expected, rel=1e-4)


def test_cached_gradients_equal_those_of_one_pass(config: InverseClozeConfig) -> None:
    gradients = []
    for micro in (6, 1):
        task = InverseClozeTask(dataclasses.replace(config, loop=dataclasses.replace(config.loop, micro_batch_examples=micro)), quiet())
        torch.manual_seed(5)
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        task.loss(task.model, task.batches(0)[0], random.Random(0)).backward()
        gradients.append([parameter.grad for parameter in task.model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_each_epoch_asks_once_for_every_passage_anew_and_keeps_a_share_of_the_sentences(config: InverseClozeConfig) -> None:
    task = InverseClozeTask(dataclasses.replace(config, kept_share=0.5), quiet())
    epochs = [[example for batch in task.batches(epoch) for example in batch] for epoch in range(20)]
    assert all(sorted(example.passage for example in epoch) == sorted(task.train) for epoch in epochs)
    assert not {example.passage for example in task.held_out} & set(task.train)
    assert task.batches(3) == task.batches(3) != task.batches(4)
    assert 0.4 < np.mean([example.kept for epoch in epochs for example in epoch]) < 0.6
    assert not any(example.kept for example in task.held_out)


def test_passages_that_stand_twice_are_learned_from_once_and_both_are_right(config: InverseClozeConfig) -> None:
    lines = Path(config.train).read_text().splitlines()
    copies = [json.dumps({**json.loads(line), "context": json.loads(line)["context"].upper()}) for line in lines]
    Path(config.train).write_text("\n".join([*lines, *copies]))
    task = InverseClozeTask(config, quiet())
    assert len(task._texts) == 48
    assert len(task.train) + len(task.held_out) == 24
    for example, grades in zip(task.held_out, task._grades, strict=True):
        assert set(grades) == {example.passage, example.passage + 24}


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_killed_run_resumes_to_the_same_losses_and_its_adapter_is_a_retrievers_beginning(
    config: InverseClozeConfig, tmp_path: Path, killed_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    loop = dataclasses.replace(config.loop, checkpoint_minutes=0.0)
    whole, halves = (dataclasses.replace(config, output=str(tmp_path / name), loop=loop) for name in ("whole", "halves"))
    metrics = train(OBJECTIVES["inverse_cloze"], whole, resume=False, console=quiet())

    with killed_after(2):
        train(OBJECTIVES["inverse_cloze"], halves, resume=False, console=quiet())
    assert train(OBJECTIVES["inverse_cloze"], halves, resume=True, console=quiet()) == pytest.approx(metrics, rel=1e-5)
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "whole")) == 6
    ranked = {"recall@1", "recall@5", "recall@20", "mrr", "ndcg@10"}
    expected = {f"{group}{name}" for group in ("held_out_", "dim8/held_out_", "questions/") for name in ranked}
    untouched = {"untouched_ndcg@10", "questions/untouched_ndcg@10"}
    assert set(metrics) == expected | untouched | {"drift/one_minus_cosine", "score"}
    best = tmp_path / "whole" / "best"
    assert {file.name for file in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "retriever.json"}
    task = InverseClozeTask(dataclasses.replace(config, initial_adapter=str(best)), quiet())
    with torch.inference_mode():
        assert task.evaluate(task.model.eval()) == pytest.approx(metrics, abs=0.5)  # the adapter is kept in half precision
    assert any("lora_B" in name and value.requires_grad and bool(value.any()) for name, value in task.model.named_parameters())


def test_training_finds_held_out_passages_better(config: InverseClozeConfig) -> None:
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=10, evaluate_every_epochs=10))
    task = InverseClozeTask(config, quiet())
    with torch.inference_mode():
        before = task.evaluate(task.model.eval())
    assert before["drift/one_minus_cosine"] == pytest.approx(0.0, abs=1e-3)
    assert before["held_out_ndcg@10"] == pytest.approx(before["untouched_ndcg@10"])
    assert before["questions/ndcg@10"] == pytest.approx(before["questions/untouched_ndcg@10"])
    metrics = train(OBJECTIVES["inverse_cloze"], config, resume=False, console=quiet())
    history = list(losses(Path(config.output)).values())
    assert sum(history[-4:]) < 0.8 * sum(history[:4])
    assert metrics["held_out_mrr"] > before["held_out_mrr"]


def test_an_adapter_of_another_checkpoint_is_refused(config: InverseClozeConfig, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "retriever.json").write_text('{"base_checkpoint": "other", "base_digest": "00"}')
    with pytest.raises(CheckpointNotFound, match="was trained on 'other'"):
        build_retriever(resolve_checkpoint(config.checkpoint), lora_rank=2, lora_alpha=2, folder=str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"held_out": 0}, InvalidConfig, "held_out: 0"),
        ({"kept_share": 1.5}, InvalidConfig, "kept_share: 1.5"),
        ({"temperature": 0.0}, InvalidConfig, "temperature: 0.0"),
        ({"loop": LoopConfig(batch_examples=1)}, InvalidConfig, "loop.batch_examples: 1"),
        ({"held_out": 23}, InvalidData, "24 of 24 passages have two sentences, and held_out takes 23"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(
    config: InverseClozeConfig, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(OBJECTIVES["inverse_cloze"], dataclasses.replace(config, **changes), resume=False, console=quiet())
