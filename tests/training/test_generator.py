"""Fusion-in-decoder on tiny encoders and encoder-decoders: what is fused, what is learned, what is left."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.errors import CheckpointNotFound, InvalidConfig, InvalidData
from openbook_training.generator import AnswerEncoder, FusionInDecoder, answer_all, build_generator, load_generator, save_generator
from openbook_training.loop import Loop, Stopped
from openbook_training.reader import trained_reader
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.generator import Example, GeneratorConfig, GeneratorTask
from rich.console import Console
from transformers import EncoderDecoderModel

WORDS = "red blue green one two three city river king book".split()


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(params=["bert", "t5", "bart"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """One folder of each kind; the encoder-decoders with the tokenizer of the tiny BERT."""
    if request.param == "bert":
        return tiny_checkpoint
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    shared = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "eos_token_id": 3,
        "decoder_start_token_id": 3 if request.param == "bart" else 0,
    }
    torch.manual_seed(0)
    if request.param == "t5":
        network = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **shared))
    else:
        halves = {
            f"{half}_{name}": value
            for half in ("encoder", "decoder")
            for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
        }
        network = BartForConditionalGeneration(BartConfig(d_model=16, bos_token_id=2, **halves, **shared))
    network.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def write(file: Path, rows: int) -> Path:
    lines = []
    for n in range(rows):
        answer = WORDS[(3 * n) % 10]
        context = f"the {WORDS[n % 10]} of {WORDS[(n + n // 10) % 10]} {n} was {answer} ."
        lines.append({"id": f"q{n}", "question": f"what was {WORDS[n % 10]} {n} ?", "context": context, "answers": [answer]})
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> GeneratorConfig:
    return GeneratorConfig(
        output=str(tmp_path / "run"),
        checkpoint=str(tiny_checkpoint),
        train=str(write(tmp_path / "train.jsonl", 24)),
        held_out=6,
        passages=2,
        max_tokens=48,
        max_answer_tokens=6,
        embedder=str(tiny_checkpoint),
        loop=LoopConfig(epochs=2, batch_examples=8, micro_batch_examples=4, precision="fp32", learning_rate=3e-3, average_decay=0.5),
    )


def test_the_decoder_reads_what_the_encoder_made_of_each_passage_alone(checkpoint: Path) -> None:
    found = resolve_checkpoint(str(checkpoint))
    encoder = AnswerEncoder(found, max_tokens=40, max_answer_tokens=6)
    model = build_generator(found, encoder, dropout=0.0).eval()
    questions = [("what was red ?", ["the red king", "one river of the blue city"]), ("who ?", [])]
    with torch.no_grad():
        source, mask = model.fused(encoder.inputs(questions, torch.device("cpu")))
        states = source.last_hidden_state
        for row, (text, passages) in enumerate(questions):
            alone = []
            for passage in passages or [""]:
                single = encoder.inputs([(text, [passage] if passage else [])], torch.device("cpu"))
                alone.append(model.network.get_encoder()(input_ids=single.ids, attention_mask=single.mask).last_hidden_state[0])
            assert states[row][mask[row].bool()].numpy() == pytest.approx(torch.cat(alone).numpy(), abs=1e-4)


def test_the_decoder_begins_by_attending_to_what_is_alike(tiny_checkpoint: Path) -> None:
    found = resolve_checkpoint(str(tiny_checkpoint))
    model = build_generator(found, AnswerEncoder(found, max_tokens=40, max_answer_tokens=6), dropout=0.0)
    for layer in model.network.decoder.base_model.encoder.layer:
        for name, weight in layer.attention.state_dict().items():
            assert torch.equal(weight, layer.crossattention.state_dict()[name])


def test_a_new_pointer_goes_on_to_the_right_of_what_was_written(tiny_checkpoint: Path) -> None:
    found = resolve_checkpoint(str(tiny_checkpoint))
    encoder = AnswerEncoder(found, max_tokens=40, max_answer_tokens=6)
    model = build_generator(found, encoder, dropout=0.0).eval()
    inputs = encoder.inputs([("who ?", ["the red king", "one river of the blue city"]), ("what was red ?", [])], torch.device("cpu"))
    with torch.no_grad():
        source, mask = model.fused(inputs)
        written = torch.tensor([[encoder.start, 7], [encoder.start, 9]])
        asked = {"encoder_outputs": source, "attention_mask": mask, "decoder_input_ids": written, "use_cache": False}
        output = model.network(**asked)
        plain = EncoderDecoderModel.forward(model.network, output_hidden_states=True, **asked)
    states, read = plain.decoder_hidden_states[-1].double().numpy(), source.last_hidden_state.double().numpy()
    length = inputs.ids.shape[1]
    for row in range(2):
        keys = [read[row, j - 1 if j % length else j] for j in range(2 * length)]  # each pair begins anew
        for t in range(2):
            weights = [np.exp(states[row, t] @ key / np.sqrt(key.size)) * int(mask[row, j]) for j, key in enumerate(keys)]
            logits = plain.logits[row, t].double().numpy()
            expected = np.exp(logits) / np.exp(logits).sum() / 2
            for j, weight in enumerate(weights):
                expected[source.pointer_ids[row, j]] += weight / sum(weights) / 2
            assert output.logits[row, t].exp().numpy() == pytest.approx(expected, abs=1e-5)


def test_a_generator_that_cannot_point_is_read_as_it_was_written(tiny_checkpoint: Path, config: GeneratorConfig, tmp_path: Path) -> None:
    """Folders of openbook before decoders pointed, and of transformers' own BERT2BERT."""
    found = resolve_checkpoint(str(tiny_checkpoint))
    encoder = AnswerEncoder(found, max_tokens=48, max_answer_tokens=6)
    halves = build_generator(found, encoder, dropout=0.0).network
    network = EncoderDecoderModel(encoder=halves.encoder, decoder=halves.decoder)
    network.generation_config.decoder_start_token_id = network.config.decoder_start_token_id = encoder.start
    save_generator(FusionInDecoder(network), encoder, config, tmp_path / "plain")
    model, encoder, _ = load_generator(str(tmp_path / "plain"))
    assert type(model.network) is EncoderDecoderModel
    inputs, written = encoder.inputs([("who ?", ["the red king"])], torch.device("cpu")), torch.tensor([[encoder.start, 7]])
    with torch.no_grad():
        assert model(inputs, written).numpy() == pytest.approx(FusionInDecoder(network.eval())(inputs, written).numpy(), abs=1e-5)


def test_the_encoder_begins_as_the_reader_whose_adapter_is_given(tiny_checkpoint: Path, tiny_reader: Path) -> None:
    found = resolve_checkpoint(str(tiny_checkpoint))
    encoder = AnswerEncoder(found, max_tokens=40, max_answer_tokens=6)
    model = build_generator(found, encoder, dropout=0.0, adapter=str(tiny_reader)).eval()
    reader = trained_reader(found, str(tiny_reader), dropout=0.0).eval()
    inputs = encoder.inputs([("what was red ?", ["the red king"])], torch.device("cpu"))
    with torch.no_grad():
        expected = reader.base_model.model.base_model(input_ids=inputs.ids, attention_mask=inputs.mask).last_hidden_state
        plain = build_generator(found, encoder, dropout=0.0).eval().fused(inputs)[0].last_hidden_state
        assert model.fused(inputs)[0].last_hidden_state.numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert (plain - expected).abs().max() > 1e-3
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_reader_of_another_checkpoint_is_refused(tiny_checkpoint: Path, tiny_reader: Path, tmp_path: Path) -> None:
    other = tmp_path / "reader"
    shutil.copytree(tiny_reader, other)
    stated = json.loads((other / "reader.json").read_text())
    (other / "reader.json").write_text(json.dumps(stated | {"base_digest": "0" * 64}))
    found = resolve_checkpoint(str(tiny_checkpoint))
    with pytest.raises(CheckpointNotFound, match="train again"):
        build_generator(found, AnswerEncoder(found, max_tokens=40, max_answer_tokens=6), dropout=0.0, adapter=str(other))


@pytest.mark.parametrize("checkpoint", ["t5", "bart"], indirect=True)
def test_an_encoder_decoder_begins_with_no_reader(checkpoint: Path, tiny_reader: Path) -> None:
    found = resolve_checkpoint(str(checkpoint))
    with pytest.raises(CheckpointNotFound, match="leave it out"):
        build_generator(found, AnswerEncoder(found, max_tokens=40, max_answer_tokens=6), dropout=0.0, adapter=str(tiny_reader))


def test_the_loss_is_that_of_the_answer_token_by_token(checkpoint: Path, config: GeneratorConfig) -> None:
    task = GeneratorTask(dataclasses.replace(config, checkpoint=str(checkpoint)), quiet())
    model = task.model.eval()
    assert task.encoder.start == model.network.generation_config.decoder_start_token_id  # type: ignore[union-attr]
    batch = [task.train[0], Example(task.train[1].question, [])]
    expected = 0.0
    for example in batch:
        answer = task.encoder.answer(example.question.answers[0])
        assert answer[-1] == task.encoder.end
        inputs = task.encoder.inputs([(example.question.text, example.passages)], torch.device("cpu"))
        for t in range(len(answer)):
            with torch.no_grad():
                logits = model(inputs, torch.tensor([[task.encoder.start, *answer[:t]]]))[0, -1].double().numpy()
            expected -= np.log(np.exp(logits)[answer[t]] / np.exp(logits).sum()) / 2
    assert task.loss(model, batch, random.Random(0)).item() == pytest.approx(expected, rel=1e-4)


def test_a_trained_folder_writes_the_same_answers(checkpoint: Path, config: GeneratorConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, checkpoint=str(checkpoint))
    metrics = train(OBJECTIVES["generator"], config, resume=False, console=quiet())
    assert set(metrics) == {"held_out_em", "held_out_f1", "held_out_closed_em", "held_out_closed_f1", "score"}
    model, encoder, settings = load_generator(str(tmp_path / "run" / "best"))
    task = GeneratorTask(config, quiet())
    with torch.inference_mode():
        task.model = model
        assert task.evaluate(model) == pytest.approx(metrics)
    beams = dataclasses.replace(settings, beams=3)
    read = [(example.question.text, example.passages) for example in task.held_out]
    assert len(answer_all(model, encoder, read, beams, torch.device("cpu"))) == len(read)


def test_training_lowers_the_loss_and_resumes_to_the_same_losses(config: GeneratorConfig, tmp_path: Path) -> None:
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"), loop=dataclasses.replace(config.loop, epochs=4))
    expected = train(OBJECTIVES["generator"], whole, resume=False, console=quiet())
    halves = dataclasses.replace(whole, output=str(tmp_path / "halves"))
    original = Loop._take_step

    def stops_at_four(self: Loop[object], batch: list[object], total: int) -> float:
        loss = original(self, batch, total)
        if self._step == 4:
            self._stopping.set()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_take_step", stops_at_four)
        with pytest.raises(Stopped, match="step 4 of"):
            train(OBJECTIVES["generator"], halves, resume=False, console=quiet())
    assert train(OBJECTIVES["generator"], halves, resume=True, console=quiet()) == pytest.approx(expected, rel=1e-4)
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "halves")]
    losses = [[row["loss"] for row in run if "loss" in row] for run in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert np.mean(losses[0][-3:]) < 0.8 * np.mean(losses[0][:3])


def test_the_own_passage_is_never_missing_in_training_and_never_added_in_evaluation(config: GeneratorConfig) -> None:
    task = GeneratorTask(dataclasses.replace(config, passages=1), quiet())
    read = [example for batch in task.batches(0) for example in batch]
    assert all(example.passages == [example.question.context] for example in read if example.passages)
    assert any(not example.passages for example in read)
    assert any(example.question.context not in example.passages for example in [*task.held_out, *task.train])


def test_an_answer_takes_the_characters_of_the_passage_it_stands_in(tiny_checkpoint: Path) -> None:
    encoder = AnswerEncoder(resolve_checkpoint(str(tiny_checkpoint)), max_tokens=40, max_answer_tokens=9)
    ids = encoder.answer("31.5 river")
    assert encoder.text(ids, ["a king", "It is 31.5 River !"]) == "31.5 River"
    assert encoder.text(ids, []) == "31. 5 river"
    assert encoder.text([encoder.start, encoder.end], ["a"]) == ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"passages": 0, "beams": 0}, InvalidConfig, r"passages: 0(.|\n)*beams: 0"),
        ({"held_out": 0}, InvalidData, "0 held out"),
        ({"held_out": 999}, InvalidData, "0 questions to train on"),
        ({"checkpoint": "/absent"}, CheckpointNotFound, "no such folder"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    config: GeneratorConfig, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(OBJECTIVES["generator"], dataclasses.replace(config, **changes), resume=False, console=quiet())  # type: ignore[arg-type]
