"""REALM on a tiny checkpoint: what is retrieved, weighed, read and learned; warm starts; and a run that is killed and resumed."""

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
from openbook_training.config import LoopConfig
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData
from openbook_training.index_refresh import IndexConfig
from openbook_training.masked_language_model import build_masked_lm
from openbook_training.realm import Masked
from openbook_training.retriever import build_retriever
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.inverse_cloze import InverseClozeConfig
from openbook_training.tasks.masked_lm import MaskedLmConfig
from openbook_training.tasks.realm import RealmConfig, RealmTask
from openbook_training.tasks.vocab_head import VocabHeadConfig
from rich.console import Console

WORDS = "red blue green one two three city river king book".split()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> RealmConfig:
    """Passages in pairs: what one says of its king, the other one says in other words; with a question on each."""
    rows = []
    for n in range(24):
        about, king = WORDS[n // 2 % 10], ["Red King", "Blue River", "Green Book"][n // 2 % 3]
        case = (
            f"Who was the {king} of the {about} in case {n // 2} ?" if n % 2 else f"It was the {king} who read of {about} in case {n // 2}."
        )
        context = f"{case} A {about} is to be read by {n}."
        rows.append({"id": f"q{n}", "question": f"what is the {about} {n} ?", "context": context, "answers": [king]})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return RealmConfig(
        output=str(tmp_path / "run"),
        checkpoint=str(tiny_checkpoint),
        train=str(tmp_path / "train.jsonl"),
        held_out=4,
        query_tokens=24,
        passage_tokens=32,
        passages=2,
        evaluated_questions=6,
        lora_rank=2,
        lora_alpha=2,
        index=IndexConfig(refresh="full", every_steps=2, probe_steps=1, probe_passages=8),
        loop=LoopConfig(
            epochs=2, batch_examples=5, micro_batch_examples=3, precision="fp32", learning_rate=1e-2, average_decay=0.5, threads=1
        ),
    )


def with_index(config: RealmConfig, **settings: Any) -> RealmConfig:
    return dataclasses.replace(config, index=IndexConfig(**{"probe_passages": 8, **settings}))


def ready(config: RealmConfig) -> RealmTask:
    """A task whose updates matter, with its first index."""
    Path(config.output).mkdir(exist_ok=True)
    task = RealmTask(config, quiet())
    torch.manual_seed(3)
    for name, parameter in task.model.named_parameters():
        if "lora_B" in name or "head.transform.weight" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    task.model.eval()
    task.before_step(task.model, 0, 10)
    return task


@pytest.mark.parametrize("fixed", [False, True])
def test_retrieved_passages_are_weighed_by_their_scores_and_read_one_at_a_time(config: RealmConfig, fixed: bool) -> None:
    task = ready(config)
    model: Any = task.model
    masked = [Masked([2, 40, 4, 41, 3], [2], [44]), Masked([2, 4, 4, 45, 46, 47, 3], [1, 2], [50, 51]), Masked([2, 4, 43, 3], [1], [40])]
    found = [[3, 0], [], [7]]
    vectors = torch.nn.functional.normalize(torch.randn(24, 32), dim=1) if fixed else None
    with torch.no_grad():
        reading = model(masked, task._passages, 2, lambda queries: found, vectors)
        embedded = [model.embed([row])[0].double() for row in task._passages.embedded]
        for x, text in enumerate(masked):
            query = model.embed([text.ids])[0].double()
            scores = [float(query @ (vectors[z].double() if vectors is not None else embedded[z])) for z in found[x]]
            weights = [np.exp(score / config.temperature) for score in [*scores, config.null_score]]
            slots = [*range(len(scores)), 2]
            for slot, weight in zip(slots, weights, strict=True):
                assert float(reading.prior[x, slot].exp()) == pytest.approx(weight / sum(weights), rel=1e-3)
            targets = torch.nonzero(reading.texts == x)[:, 0]
            assert len(targets) == len(text.hidden)
            for slot, z in zip(slots, [*found[x], None], strict=True):
                body = [] if z is None else [*task._passages.read[z], text.ids[-1]]
                ids, segments = [*text.ids, *body], [0] * (len(text.ids) + len(body))
                inputs = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "token_type_ids": [segments]}
                states = model.language_model.backbone(**{name: torch.tensor(value) for name, value in inputs.items()}).last_hidden_state[0]
                for target, position, token in zip(targets, text.hidden, text.tokens, strict=True):
                    expected = float(model.language_model.head(states[position][None])[0, token].exp())
                    if z is not None:  # one hidden token in ten is copied from the passage, from what is most like it
                        weights = [np.exp(float(states[position] @ states[at]) / np.sqrt(32)) for at in range(len(text.ids), len(ids))]
                        copied = sum(w for w, of in zip(weights, body, strict=True) if of == token) / sum(weights)
                        expected = 0.9 * expected + 0.1 * copied
                    assert float(reading.given[target, slot].exp()) == pytest.approx(expected, rel=1e-3)


def test_a_passage_that_holds_a_text_is_never_read_beside_it_and_some_texts_are_read_alone(
    config: RealmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Path(config.train).read_text().splitlines()
    copy = {**json.loads(lines[0]), "id": "copy", "context": "One more.  " + json.loads(lines[0])["context"].upper()}
    Path(config.train).write_text("\n".join([*lines, json.dumps(copy)]))
    task = ready(dataclasses.replace(config, alone_share=0.3))
    searched, alone, batch = 0, 0, [sentence for part in task.batches(0) for sentence in part]
    original: Any = type(task.model).forward

    def spy(self: Any, texts: Any, passages: Any, k: int, propose: Any, vectors: Any) -> Any:
        def proposed(queries: torch.Tensor) -> list[list[int]]:
            nonlocal searched, alone
            found: list[list[int]] = propose(queries)
            for sentence, rows in zip(batch, found, strict=True):
                assert len(rows) in {0, 2}
                assert not any(" ".join(sentence.folded.split()) in task._folded[z] for z in rows)
                searched, alone = searched + bool(rows), alone + (not rows)
            return found

        return original(self, texts, passages, k, proposed, vectors)

    monkeypatch.setattr(type(task.model), "forward", spy)
    for seed in range(6):
        task.loss(task.model, batch, random.Random(seed))
    assert 0.15 < alone / (alone + searched) < 0.45
    observed = task.observed()
    assert set(observed) == {"retrieval_utility/training", "null_passage/training"}
    assert 0 < observed["null_passage/training"] < 100


def test_the_retriever_learns_from_the_loss_and_passages_too_unless_they_are_fixed(config: RealmConfig) -> None:
    stirred = {}
    for refresh, settings in (("none", {}), ("query_side", {})):
        task = ready(with_index(config, refresh=refresh, **settings))
        model: Any = task.model
        embedded: list[int] = []
        original = model.embed

        def spy(rows: list[list[int]], *more: Any, original: Any = original, embedded: list[int] = embedded) -> torch.Tensor:
            vectors: torch.Tensor = original(rows, *more)
            embedded.append(len(rows) if vectors.requires_grad else 0)
            return vectors

        model.embed = spy
        task.loss(model, task.batches(0)[0], random.Random(1)).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(gradient is not None and bool(gradient.any()) for name, gradient in gradients.items() if name.startswith("retriever"))
        assert gradients["null_score"] is not None
        stirred[refresh] = embedded
    assert len(stirred["none"]) == 2  # q(x), then d(z)
    assert len(stirred["query_side"]) == 1


def test_both_forms_of_the_loss_are_those_of_the_reading(config: RealmConfig) -> None:
    values = {}
    for form in ("token", "sequence"):
        task = ready(dataclasses.replace(config, loss=form, alone_share=0.0))
        readings: list[Any] = []
        task.model.register_forward_hook(lambda _module, _inputs, reading, readings=readings: readings.append(reading))
        loss = task.loss(task.model, task.batches(0)[0], random.Random(1)).item()
        [reading] = readings
        prior, given = reading.prior.detach().exp().double().numpy(), reading.given.detach().exp().double().numpy()
        expected = 0.0
        for x in range(len(prior)):
            own = given[reading.texts.numpy() == x]
            if form == "token":
                expected -= float(np.mean([np.log((prior[x] * row).sum()) for row in own])) / len(prior)
            else:
                expected -= float(np.log((prior[x] * own.prod(axis=0)).sum())) / len(prior)
        assert loss == pytest.approx(expected, rel=1e-4)
        values[form] = loss
    assert values["token"] < values["sequence"]


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_run_killed_after_its_index_was_made_anew_resumes_with_the_index_of_its_checkpoint(
    config: RealmConfig, tmp_path: Path, killed_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    def at(name: str) -> RealmConfig:
        return dataclasses.replace(config, output=str(tmp_path / name))

    metrics = train(OBJECTIVES["realm"], at("whole"), resume=False, console=quiet())

    with killed_after(6):  # the index of step 6 is made, and the last checkpoint is that of the first epoch's end, step 4
        train(OBJECTIVES["realm"], at("halves"), resume=False, console=quiet())
    assert train(OBJECTIVES["realm"], at("halves"), resume=True, console=quiet()) == pytest.approx(metrics, rel=1e-4, abs=1e-4)
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "whole")) == 8
    depths = {"recall@1", "recall@5", "recall@20"}
    recalls = {f"{group}/{more}{name}" for group in ("own_passage", "questions") for more in ("", "warm_up_") for name in depths}
    others = {"masked_token_loss/retrieval", "masked_token_loss/alone", "retrieval_utility/held_out", "null_passage/held_out"}
    assert set(metrics) == recalls | others | {"drift/cosine", "drift/overlap@2", "score"}
    assert metrics["score"] == -metrics["masked_token_loss/retrieval"]
    written = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("drift/probe_cosine" in row and "loss" in row for row in written)
    assert (tmp_path / "whole" / "plots.png").is_file()

    for file in tmp_path.glob("halves/index-*"):
        file.write_bytes(b"torn")
    with pytest.raises(InvalidData, match="copy the whole run folder"):
        train(OBJECTIVES["realm"], at("halves"), resume=True, console=quiet())


def test_training_lowers_the_loss_and_leaves_two_models_that_go_on(config: RealmConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=20, evaluate_every_epochs=20))
    metrics = train(OBJECTIVES["realm"], config, resume=False, console=quiet())
    history = list(losses(tmp_path / "run").values())
    assert sum(history[-8:]) < 0.85 * sum(history[:8])
    best = tmp_path / "run" / "best"
    assert {file.name for file in best.iterdir()} == {"retriever", "language_model", "realm.json"}
    assert "queries_only" not in json.loads((best / "retriever" / "retriever.json").read_text())
    assert (best / "language_model" / "pointer.safetensors").is_file()
    stated = json.loads((best / "realm.json").read_text())
    again = dataclasses.replace(
        config,
        output=str(tmp_path / "again"),
        retriever=str(best / "retriever"),
        language_model=str(best / "language_model"),
        null_score=stated["null_score"],
    )
    (tmp_path / "again").mkdir()
    task = RealmTask(again, quiet())
    with torch.inference_mode():
        measured = task.evaluate(task.model.eval())
    assert measured["masked_token_loss/retrieval"] == pytest.approx(
        metrics["masked_token_loss/retrieval"], rel=2e-2
    )  # kept in half precision


def test_a_query_encoder_learns_against_the_vectors_of_the_beginning(config: RealmConfig, tmp_path: Path) -> None:
    config = with_index(config, refresh="query_side")
    metrics = train(OBJECTIVES["realm"], config, resume=False, console=quiet())
    assert not any(name.startswith("drift") for name in metrics)
    assert len(list((tmp_path / "run").glob("index-*"))) == 1
    assert json.loads((tmp_path / "run" / "best" / "retriever" / "retriever.json").read_text())["queries_only"] is True


def test_it_goes_on_from_a_language_model_or_a_vocabulary_head_and_from_a_retriever(
    config: RealmConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    loop = LoopConfig(epochs=1, batch_examples=8, precision="fp32", learning_rate=1e-2, average_decay=0.0, threads=1, max_steps=2)
    shared: dict[str, Any] = {"checkpoint": str(tiny_checkpoint), "lora_rank": 2, "lora_alpha": 2, "loop": loop, "held_out": 4}
    (tmp_path / "texts.txt").write_text("\n".join(json.loads(line)["context"] for line in Path(config.train).read_text().splitlines()))
    masked = MaskedLmConfig(output=str(tmp_path / "masked_lm"), train=config.train, frozen_layers=0, **shared)
    words = VocabHeadConfig(output=str(tmp_path / "vocab_head"), train=str(tmp_path / "texts.txt"), common_share=1.0, **shared)
    cloze = InverseClozeConfig(
        output=str(tmp_path / "inverse_cloze"), train=config.train, matryoshka_dims=(32,), matryoshka_weights=(1.0,), **shared
    )
    for name, settings in (("masked_lm", masked), ("vocab_head", words), ("inverse_cloze", cloze)):
        train(OBJECTIVES[name], settings, resume=False, console=quiet())
    best = {name: str(tmp_path / name / "best") for name in ("masked_lm", "vocab_head", "inverse_cloze")}
    for name in ("masked_lm", "vocab_head"):
        task = RealmTask(dataclasses.replace(config, language_model=best[name], retriever=best["inverse_cloze"]), quiet())
        model: Any = task.model
        expected = build_masked_lm(task.checkpoint, lora_rank=1, lora_alpha=1, folder=best[name])
        for one, other in zip(model.language_model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)
        retriever = build_retriever(task.checkpoint, lora_rank=1, lora_alpha=1, folder=best["inverse_cloze"])
        trained = {key for key, value in model.named_parameters() if value.requires_grad}
        assert any("retriever" in key and "lora_A" in key for key in trained)
        assert any("language_model" in key and "lora_A" in key for key in trained)
        assert not any("embeddings" in key for key in trained)
        for one, other in zip(model.retriever.parameters(), retriever.parameters(), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(CheckpointNotFound, match=r"language_model: .* holds no masked_lm\.json or task\.json; train it"):
        RealmTask(dataclasses.replace(config, language_model=best["inverse_cloze"]), quiet())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": "sum"}, InvalidConfig, "'sum' is neither of token, sequence"),
        ({"temperature": 0.0}, InvalidConfig, "temperature: 0.0"),
        ({"alone_share": 1.0}, InvalidConfig, "alone_share: 1.0"),
        ({"passages": 0}, InvalidConfig, "passages: 0 is below 1"),
        (
            {"query_tokens": 64, "passage_tokens": 128},
            InvalidConfig,
            r"query_tokens \+ passage_tokens - 1: 191 is above 128, the positions",
        ),
        ({"held_out": 24}, InvalidData, "24 passages have a salient span, and held_out takes 24"),
        ({"index": IndexConfig()}, InvalidConfig, "index.refresh: full needs every_steps"),
        ({"index": IndexConfig(refresh="rerank", proposed=1)}, InvalidConfig, "index.proposed: 1 are fewer than the"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(
    config: RealmConfig, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(OBJECTIVES["realm"], dataclasses.replace(config, **changes), resume=False, console=quiet())
