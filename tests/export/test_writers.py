"""Models that write text in a bundle: graphs that write what PyTorch writes, gates that refuse others, bundles that make sense."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from openbook_export.decoders import TextGraph
from openbook_export.errors import CheckpointUnsupported, ExportFailed
from openbook_export.export import ExportOptions, export_bundle
from openbook_export.optimise import fuse_writer
from openbook_export.writers import export_writer, load_writer
from openbook_server.binding import Arrays
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.command_info import _bundle as describe
from openbook_server.errors import BundleInvalid
from openbook_server.golden import verify_golden
from openbook_server.runtime import Graph, build_device
from openbook_training.checkpoint import resolve_checkpoint
from openbook_training.errors import CheckpointNotFound, InvalidConfig
from openbook_training.generator import AnswerEncoder, GeneratorSettings, build_generator, load_generator, save_generator
from openbook_training.language_model import Prompts, ReadingConfig, load_language_model, new_model, new_tokenizer, save_language_model
from safetensors.torch import load_file, save_file

TEXT = "the king of the red city read one book by the blue river"


def silent(line: str) -> None:
    """Progress goes nowhere."""


def loud(network: torch.nn.Module) -> None:
    """Random weights so large that tokens differ and a wrong step shows."""
    for parameter in network.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)


def encoder_decoder(kind: str, tiny_checkpoint: Path, folder: Path) -> Path:
    """A T5 or BART of two layers with the tokenizer of the tiny BERT; the tiny BERT itself as it is."""
    if kind == "bert2bert":
        return tiny_checkpoint
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    shared = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3 if kind == "bart" else 0}
    if kind == "t5":
        network = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **shared))
    else:
        halves = {
            f"{half}_{name}": value
            for half in ("encoder", "decoder")
            for name, value in (("layers", 2), ("attention_heads", 2 if half == "encoder" else 4), ("ffn_dim", 32))
        }
        network = BartForConditionalGeneration(BartConfig(d_model=16, bos_token_id=2, forced_eos_token_id=None, **halves, **shared))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert2bert", "t5", "bart"])
def generator(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    checkpoint = resolve_checkpoint(str(encoder_decoder(request.param, tiny_checkpoint, folder / "checkpoint")))
    settings = GeneratorSettings(passages=2, max_tokens=64, max_answer_tokens=8, embedder=str(tiny_checkpoint))
    encoder = AnswerEncoder(checkpoint, max_tokens=64, max_answer_tokens=8)
    model = build_generator(checkpoint, encoder, dropout=0.0)
    loud(model)
    save_generator(model, encoder, settings, folder / "best")
    return folder / "best"


@pytest.fixture(scope="module")
def language_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language_model") / "best"
    torch.manual_seed(4)
    prompts = Prompts(new_tokenizer([TEXT], 300))
    model = new_model(prompts.tokenizer, layers=2, dim=16, heads=2, positions=80, dropout=0.0)
    loud(model)
    settings = ReadingConfig(stride_tokens=16, context_tokens=16, passage_tokens=16, query_tokens=8, embedder=str(tiny_checkpoint))
    save_language_model(model, prompts, settings, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, generator: Path, language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    options = ExportOptions(checkpoint=str(tiny_checkpoint), bundle=folder, generator=generator, language_model=language_model)
    return export_bundle(options, silent)


def graph(bundle: Bundle, model: str) -> Graph:
    return Graph(bundle.graph_path(model, "fp32"), build_device("cpu", "fp32", 1))


def test_the_graphs_write_the_answer_that_transformers_generates(bundle: Bundle, generator: Path) -> None:
    """The oracle is `generate` on the fused states, with its own cache; two passages are laid end to end, without their padding."""
    model, encoder, settings = load_generator(str(generator))
    inputs = encoder.inputs([("who read ?", ["the red king of the city", TEXT])], torch.device("cpu"))
    with torch.inference_mode():
        [expected] = model.write(inputs, beams=1, max_answer_tokens=settings.max_answer_tokens)
    cross, step = graph(bundle, "generator_encoder"), graph(bundle, "generator_decoder")
    found = cross.run({"input_ids": inputs.ids.numpy(), "attention_mask": inputs.mask.numpy()})
    lengths = inputs.mask.sum(1).tolist()
    feed = {
        name.replace("present", "past_key_values"): np.concatenate([values[[0], :, : lengths[0]], values[[1], :, : lengths[1]]], axis=2)
        for name, values in found.items()
    }
    feed |= {name.replace("encoder", "decoder"): values[:, :, :0] for name, values in feed.items() if "pointer" not in name}
    feed["encoder_attention_mask"] = np.ones((1, sum(lengths)), np.int64)
    if "encoder_input_ids" in step.input_names:
        feed["encoder_input_ids"] = inputs.ids[inputs.mask.bool()].numpy()[None]
    written = [bundle.writers["generator"].start_token]
    for _ in range(settings.max_answer_tokens):
        outputs = step.run(feed | {"input_ids": np.array([written[-1:]])})
        written.append(int(outputs["logits"][0, -1].argmax()))
        feed |= {name.replace("present", "past_key_values"): values for name, values in outputs.items() if name != "logits"}
        if written[-1] == bundle.writers["generator"].end_token:
            break
    assert written == expected
    assert len(set(written)) > 1


def test_one_language_model_graph_reads_a_text_at_once_and_goes_on_token_by_token(bundle: Bundle, language_model: Path) -> None:
    model, prompts, _ = load_language_model(str(language_model))
    row = [prompts.start, *prompts.tokenizer.encode(TEXT)][:30]
    with torch.inference_mode():
        expected = model.network.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
    step, written, read = graph(bundle, "language_model"), list(row), list(row)
    feed = {name: np.zeros((1, 2, 0, 8), np.float32) for name in step.input_names if name.startswith("past")}
    for _ in range(12):
        outputs = step.run(
            feed
            | {
                "input_ids": np.array([read]),
                "position_ids": np.arange(len(written) - len(read), len(written))[None],
                "attention_mask": np.ones((1, len(written)), np.int64),
            }
        )
        read = [int(outputs["logits"][0, -1].argmax())]
        written += read
        feed = {name.replace("present", "past_key_values"): values for name, values in outputs.items() if name != "logits"}
    assert written == expected


def test_the_manifest_states_gates_limits_and_digests(bundle: Bundle, generator: Path, language_model: Path) -> None:
    manifest, architecture = bundle.manifest, bundle.writers["generator"].architecture
    assert generator.parent.name == f"{architecture}0"
    assert (bundle.reader, bundle.tasks) == (None, ("embed", "generate"))
    assert manifest["generator"] | {"passages": 2, "max_tokens": 64, "max_answer_tokens": 8} == manifest["generator"]
    assert manifest["language_model"]["passage_tokens"] == 16
    for model in ("generator_encoder", "language_model"):
        table = manifest[model.split("_encoder")[0]][model]
        for precision, most in (("fp32", 1e-4), ("fp16", 0.1)):
            assert table["measured"][precision]["parity"]["difference"] <= most
            fused = table["measured"][precision]["fused"]
            assert sum(count for kind, count in fused.items() if kind.endswith("LayerNormalization")) == 5
        assert table["measured"]["fp32"]["parity"]["same_tokens"] is True
    if architecture != "t5":
        assert manifest["generator"]["generator_encoder"]["measured"]["fp32"]["fused"]["Attention"] == 2
    for folder, name in ((generator, "generator"), (language_model, "language_model")):
        assert manifest["source"][f"{name}_digest"] == resolve_checkpoint(str(folder)).digest()
        assert f"{name}.tokenizer.json" in manifest["files"]
    assert str(generator.parent) not in json.dumps(manifest)
    facts = describe(bundle.folder)
    assert facts["generator"] == f"{architecture}, 64 tokens a question and passage, 2 graphs in fp16, fp32"
    assert facts["language_model"] == "gpt2, 80 tokens read and written, 1 graphs in fp16, fp32"


def test_golden_vectors_cover_both_and_catch_another_graph(bundle: Bundle, tmp_path: Path) -> None:
    models = ("generator_encoder", "generator_decoder", "language_model")
    measured = verify_golden(bundle, {model: graph(bundle, model) for model in models}, build_device("cpu", "fp32", 1))
    assert measured["generator_encoder_cosine"] > 0.9999
    assert max(measured["generator_decoder_difference"], measured["language_model_difference"]) < 1e-4
    golden = bundle.golden()
    wrong = golden | {"language_model/logits": golden["language_model/logits"][::-1]}
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    np.savez(copy / "golden.npz", **wrong)
    with pytest.raises(BundleInvalid, match="golden.npz has"):
        load_bundle(copy)


def test_a_missing_file_of_a_writer_is_named(bundle: Bundle, tiny_bundle: Path, tmp_path: Path) -> None:
    for file in ("generator.tokenizer.json", "language_model.fp16.onnx"):
        copy = Path(shutil.copytree(bundle.folder, tmp_path / file))
        (copy / file).unlink()
        with pytest.raises(BundleInvalid, match=f"lacks {file}"):
            load_bundle(copy)
    plain = load_bundle(tiny_bundle)
    assert plain.writers == {}
    with pytest.raises(BundleInvalid, match=r"it has no generator_decoder, .*`openbook export --generator` adds one"):
        plain.graph_path("generator_decoder", "fp32")
    with pytest.raises(BundleInvalid, match=r"`openbook export --language-model` adds one"):
        plain.graph_path("language_model", "fp32")


def test_a_graph_that_writes_something_else_is_refused(language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that a step gets wrong: the first run is right, only what follows it differs."""
    writer = load_writer("language_model", language_model)
    forward = TextGraph.forward
    monkeypatch.setattr(TextGraph, "forward", lambda self, ids, places, *rest: forward(self, ids, places * 0, *rest))
    with pytest.raises(ExportFailed, match=r"the language_model in fp32 is not the model .* logits differ by .*, other tokens"):
        export_writer(writer, tmp_path, silent)


def test_a_step_without_numbers_is_within_no_tolerance(language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second row only, and not in its last step: in half precision other tokens are allowed, NaN is not."""
    writer = load_writer("language_model", language_model)
    run, calls = Graph.run, 0

    def broken(self: Graph, inputs: Arrays) -> Arrays:
        nonlocal calls
        outputs, calls = run(self, inputs), calls + 1
        if calls == 20:
            outputs["logits"] = outputs["logits"] * np.nan
        return outputs

    monkeypatch.setattr(Graph, "run", broken)
    with pytest.raises(ExportFailed, match="logits differ by inf"):
        export_writer(writer, tmp_path, silent)
    assert calls > 20


def test_a_graph_without_its_fused_nodes_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match="fused 5 of 9 normalisations"):
        fuse_writer(bundle.graph_path("language_model", "fp32"), tmp_path / "fused.onnx", heads=(2, 16), norms=9, attention=0)


def test_what_cannot_be_exported_is_refused_with_a_reason(tiny_checkpoint: Path, language_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"generator.json cannot be read"):
        load_writer("generator", tiny_checkpoint)
    with pytest.raises(CheckpointUnsupported, match=r"its architecture is 'bert'; export verifies GPT-2"):
        load_writer("language_model", tiny_checkpoint)
    from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(vocab_size=300, hidden_size=16, num_layers=1, attention_types=[[["global"], 1]], num_heads=2, bos_token_id=0)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(language_model).save_pretrained(tmp_path)
    with pytest.raises(CheckpointUnsupported, match=r"its architecture is 'gpt_neo'; export verifies GPT-2"):
        load_writer("language_model", tmp_path)


@pytest.mark.parametrize(
    ("stated", "problem"),
    [
        ('{"max_tokens": -1}', "max_tokens: -1 is not a whole number"),
        ('{"max_tokens": "64"}', "max_tokens: '64' is not a whole number"),
        ('{"max_tokens": null}', "max_tokens: None is not a whole number"),
        ('{"passages": 0}', "passages: 0 is below 1"),
        ('{"z": 1}', "z: unknown key"),
        ("[]", "holds no JSON object"),
    ],
)
def test_settings_of_a_generator_that_cannot_work_are_named(tiny_checkpoint: Path, tmp_path: Path, stated: str, problem: str) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "generator"))
    (folder / "generator.json").write_text(stated)
    with pytest.raises((InvalidConfig, CheckpointNotFound), match=problem):
        load_writer("generator", folder)


def test_a_writer_without_some_of_its_weights_is_refused(generator: Path, language_model: Path, tmp_path: Path) -> None:
    for name, folder in (("generator", generator), ("language_model", language_model)):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        weights = load_file(copy / "model.safetensors")
        lacking = next(key for key in weights if ".0." in key and (name == "language_model" or "decoder" in key))
        del weights[lacking]
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointNotFound, match=rf"lacks {re.escape(lacking)}, weights of a"):
            load_writer(name, copy)
