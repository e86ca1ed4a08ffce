"""The retriever on a tiny checkpoint: cached gradients, batches, negatives, and a whole run that is stopped and resumed."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.embedding import TextEncoder, encode
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData
from openbook_training.negatives import embed, embed_once
from openbook_training.retriever import build_retriever
from openbook_training.run import train
from openbook_training.squad import occurrences
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.retriever import Example, RetrieverConfig, RetrieverTask
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

WORDS = "red blue green one two three city river king book".split()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder: 20 titled passages, 30 questions; every third one has two gold passages."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    passages = [f"the {WORDS[n % 10]} of {WORDS[(n * 7 + 3) % 10]} was {WORDS[(n + 5) % 10]} in case {n}" for n in range(20)]
    rows = [{"_id": f"p{n}", "title": f"book {n}", "text": text} for n, text in enumerate(passages)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    queries = [{"_id": f"q{n}", "text": f"what was {WORDS[n % 10]} {n} ?", "metadata": {"answers": [f"case {n % 20}"]}} for n in range(30)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    second = [f"q{n}\tp{(n + 10) % 20}\t1" for n in range(0, 30, 3)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(["a\tb\tscore", *(f"q{n}\tp{n % 20}\t1" for n in range(30)), *second]))
    return folder


def config_for(data: Path, checkpoint: Path, output: Path, loop: dict[str, Any] | None = None, **changes: Any) -> RetrieverConfig:
    settings = LoopConfig(epochs=2, batch_examples=8, micro_batch_examples=8, precision="fp32", learning_rate=1e-2)
    config = RetrieverConfig(
        output=str(output),
        checkpoint=str(checkpoint),
        train=str(data),
        held_out=4,
        train_max_tokens=24,
        mined=8,
        matryoshka_dims=(32, 8),
        matryoshka_weights=(1.0, 0.5),
        lora_rank=2,
        lora_alpha=2,
        loop=dataclasses.replace(settings, **(loop or {})),
    )
    return dataclasses.replace(config, **changes)


def nudge(model: torch.nn.Module) -> None:
    """Make the update matter; a fresh one is zero."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)


def gradients(task: RetrieverTask, batch: list[Example]) -> list[torch.Tensor]:
    task.model.zero_grad()
    task.loss(task.model, batch, random.Random(0)).backward()
    return [parameter.grad.clone() for parameter in task.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_cached_gradients_equal_those_of_one_pass_over_the_batch(
    data: Path, tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path, weight: float
) -> None:
    taught = {"reader": str(tiny_reader), "reader_weight": weight, "negatives": (2,)} if weight else {}
    plain = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path, **taught), quiet())
    cached = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path, {"micro_batch_examples": 1}, **taught), quiet())
    for task in (plain, cached):
        nudge(task.model)
    [batch, *_] = plain.batches(0)
    expected, actual = gradients(plain, batch), gradients(cached, batch)
    assert len(expected) == len(actual) > 10
    for one, other in zip(expected, actual, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_caching_holds_the_activations_of_one_chunk_at_a_time(tiny_checkpoint: Path) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    model, encoder = build_retriever(checkpoint, lora_rank=2, lora_alpha=2), TextEncoder(checkpoint)
    rows = encoder.rows([" ".join(WORDS)] * 12, 64)

    def held(recompute: bool) -> int:
        """Bytes of what the forward pass keeps for the backward pass."""
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encode(model, rows, pooling="mean", pad=0, device=torch.device("cpu"), chunk_tokens=24, recompute=recompute)
        return total

    assert held(recompute=True) < held(recompute=False) / 20


@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_vectors_do_not_depend_on_how_texts_are_chunked(tiny_checkpoint: Path, budget: int) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))
    model, encoder = build_retriever(checkpoint, lora_rank=2, lora_alpha=2).eval(), TextEncoder(checkpoint)
    texts = [" ".join(WORDS[: n % 10 + 1]) for n in range(25)]
    done: list[int] = []
    with torch.inference_mode():
        vectors = encode(
            model,
            encoder.rows(texts, 64),
            pooling="mean",
            pad=0,
            device=torch.device("cpu"),
            chunk_tokens=budget,
            report=done.append,
        )
    assert np.allclose(vectors.numpy(), embed(checkpoint, texts), atol=1e-5)
    assert done[-1] == 25
    assert torch.allclose(vectors.norm(dim=1), torch.ones(25))


def test_long_texts_keep_their_closing_token(tiny_checkpoint: Path) -> None:
    encoder = TextEncoder(resolve_checkpoint(str(tiny_checkpoint)))
    [whole], [cut] = encoder.rows([" ".join(WORDS)], 64), encoder.rows([" ".join(WORDS)], 5)
    assert cut == [*whole[:4], whole[-1]]


def test_a_batch_holds_every_passage_once_and_masks_the_other_gold_passages(
    data: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path), quiet())
    seen: dict[str, Any] = {}

    def spy(questions: torch.Tensor, passages: torch.Tensor, gold: torch.Tensor, masked: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.update(questions=questions, passages=passages, gold=gold, masked=masked)
        return questions.sum()

    monkeypatch.setattr("openbook_training.contrastive.matryoshka_loss", spy)
    for batch in task.batches(0):
        task.loss(task.model, batch, random.Random(0))
        used = {row for example in batch for row in (example.gold, *example.negatives)}
        assert seen["passages"].shape[0] == len(used)  # no passage stands in two columns
        for number, example in enumerate(batch):
            others = (set(task.train[example.question].gold) - {example.gold}) & used
            assert int(seen["masked"][number].sum()) == len(others)
            assert not seen["masked"][number, seen["gold"][number]]
            assert torch.equal(seen["passages"][seen["gold"][number]], _vector(task, example.gold, seen, batch))


def _vector(task: RetrieverTask, row: int, seen: dict[str, Any], batch: list[Example]) -> torch.Tensor:
    columns = list(dict.fromkeys(z for example in batch for z in (example.gold, *example.negatives)))
    vector: torch.Tensor = seen["passages"][columns.index(row)]
    return vector


def test_hard_negatives_are_none_of_the_gold_passages_and_hold_no_answer(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path, negatives=(2,)), quiet())
    corpus = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    drawn = 0
    for batch in task.batches(0):
        for example in batch:
            question = task.train[example.question]
            assert example.gold in question.gold
            for negative in example.negatives:
                assert negative not in question.gold
                assert not occurrences(corpus[negative], question.answers)
                drawn += 1
    assert drawn > len(task.train)


def test_every_epoch_sees_every_training_question_once_in_another_order(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path), quiet())
    epochs = [[example.question for batch in task.batches(epoch) for example in batch] for epoch in (0, 1, 0)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(task.train)))
    assert epochs[0] == epochs[2] != epochs[1]


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_stopped_run_resumes_to_the_same_losses_as_an_uninterrupted_one(
    data: Path, tiny_checkpoint: Path, tmp_path: Path, killed_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    loop = {"micro_batch_examples": 2, "checkpoint_minutes": 0.0}
    metrics = train(OBJECTIVES["retriever"], config_for(data, tiny_checkpoint, tmp_path / "whole", loop), resume=False, console=quiet())
    halves = config_for(data, tiny_checkpoint, tmp_path / "halves", loop)

    with killed_after(4):
        train(OBJECTIVES["retriever"], halves, resume=False, console=quiet())
    again = train(OBJECTIVES["retriever"], halves, resume=True, console=quiet())
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "whole")) == 6
    assert again == pytest.approx(metrics, rel=1e-5)
    expected = {f"held_out_{name}" for name in ("recall@1", "recall@5", "recall@20", "mrr", "ndcg@10")}
    assert set(metrics) == expected | {f"dim8/{name}" for name in expected} | {"untouched_ndcg@10", "drift/one_minus_cosine", "score"}
    assert metrics["score"] == metrics["held_out_ndcg@10"]
    best = tmp_path / "whole" / "best"
    assert {file.name for file in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "retriever.json"}
    settings = json.loads((best / "retriever.json").read_text())
    digest = resolve_checkpoint(str(tiny_checkpoint)).digest()
    assert settings == {"base_checkpoint": str(tiny_checkpoint), "base_digest": digest, "dims": [32, 8], "max_tokens": 128}
    with safe_open(best / "adapter_model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_training_lowers_the_loss_and_the_anchor_keeps_vectors_near_the_untouched_ones(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    drift = {}
    for weight in (0.0, 20.0):
        config = config_for(data, tiny_checkpoint, tmp_path / str(weight), {"epochs": 10}, anchor_weight=weight)
        drift[weight] = train(OBJECTIVES["retriever"], config, resume=False, console=quiet())["drift/one_minus_cosine"]
    history = list(losses(tmp_path / "0.0").values())
    assert sum(history[-4:]) < 0.8 * sum(history[:4])
    assert drift[20.0] < 0.3 * drift[0.0]


def test_a_text_is_held_to_the_vector_that_the_untouched_embedder_gives_what_is_read_of_it(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    cut = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path / "cut", train_max_tokens=8), quiet())
    whole = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path / "whole"), quiet())
    assert cut._mined == whole._mined
    batch = cut.batches(0)[0]
    with torch.inference_mode():
        free = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path / "free", train_max_tokens=8, anchor_weight=0.0), quiet())
        rng, model = random.Random(0), cut.model.eval()  # untrained: it has not moved from any anchor
        assert float(cut.loss(model, batch, rng)) == pytest.approx(float(free.loss(model, batch, rng)), abs=1e-5)
    assert len(list((tmp_path / "cut").glob("vectors-*"))) == 2


def test_weights_that_are_pickled_are_not_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "pickled"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointNotFound, match="its weights do not load"):
        embed(resolve_checkpoint(str(folder)), ["red"])


def test_an_untrained_retriever_is_the_untouched_embedder(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    task = RetrieverTask(config_for(data, tiny_checkpoint, tmp_path), quiet())
    with torch.inference_mode():
        metrics = task.evaluate(task.model)
    assert metrics["drift/one_minus_cosine"] == pytest.approx(0.0, abs=1e-3)
    assert metrics["held_out_ndcg@10"] == pytest.approx(metrics["untouched_ndcg@10"])


def test_vectors_are_embedded_once_for_the_same_texts(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve_checkpoint(str(tiny_checkpoint))

    def vectors(texts: list[str]) -> np.ndarray:
        return embed_once(checkpoint, texts, tmp_path, precision="fp32", console=quiet(), purpose="test")

    first = vectors(["red", "blue king"])
    assert np.array_equal(first, embed(checkpoint, ["red", "blue king"]))
    monkeypatch.setattr("openbook_training.negatives.embed", lambda *arguments, **settings: pytest.fail("embedded again"))
    assert np.array_equal(vectors(["red", "blue king"]), first)
    with pytest.raises(pytest.fail.Exception):
        vectors(["red", "blue book"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"matryoshka_dims": (16, 8)}, InvalidConfig, "begin with the checkpoint's 32"),
        ({"matryoshka_dims": (32, 64)}, InvalidConfig, "begin with the checkpoint's 32"),
        ({"matryoshka_weights": (1.0,)}, InvalidConfig, "one weight"),
        ({"temperature": 0.0}, InvalidConfig, "temperature: 0.0"),
        ({"anchor_weight": -1.0}, InvalidConfig, "anchor_weight: -1.0"),
        ({"train_max_tokens": 2}, InvalidConfig, "train_max_tokens: 2 is below 3"),
        ({"held_out": 1000}, InvalidData, "lower held_out"),
        ({"loop": {"micro_batch_examples": 0}}, InvalidConfig, "micro_batch_examples"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    data: Path, tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(OBJECTIVES["retriever"], config_for(data, tiny_checkpoint, tmp_path, **changes), resume=False, console=quiet())
