"""Encoders of other kinds than BERT, all the way: what was trained is what is exported, and what a server answers with."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from openbook.client import AsyncClient
from openbook.results import AnswerResult, Classified, Document
from openbook_export.errors import CheckpointUnsupported
from openbook_export.export import ExportOptions, export_bundle
from openbook_export.graphs import SPANS
from openbook_export.heads import load_head, require_one_template
from openbook_export.models import KINDS as EXPORTED
from openbook_export.models import load_reader
from openbook_server.bundle import Bundle, load_bundle
from openbook_server.config import ServerConfig
from openbook_server.knowledge import open_knowledge_base
from openbook_server.ranking import normalise
from openbook_server.rows import Row
from openbook_server.runtime import HIDDEN_STATES, Graph, build_device
from openbook_server.serving import running_server
from openbook_server.tokenization import TextEncoder, load_tokenizer
from openbook_training.checkpoint import Checkpoint, resolve_checkpoint
from openbook_training.config import LoopConfig
from openbook_training.embedding import encode
from openbook_training.errors import CheckpointNotFound
from openbook_training.heads import RowEncoder, load_head_model
from openbook_training.negatives import embed
from openbook_training.objectives import null_scores, span_scores
from openbook_training.pretrained import load_backbone
from openbook_training.reader import PairEncoder, forward, passage_tokens, trained_reader
from openbook_training.run import train
from openbook_training.tasks import OBJECTIVES
from openbook_training.tasks.reader import ReaderConfig
from openbook_training.tasks.verification import VerificationConfig
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering

KINDS = ("distilbert", "mpnet", "roberta", "xlm-roberta")
WORDS = "red blue green one two three city river king book".split()
PASSAGES = ["the red city by the river", "the blue king of one city", "red,  book in case"]
QUESTION = "what was the king in ?"
LIMITS = {"max_tokens": 64, "max_question_tokens": 24}
MOST = 2  # tokens of an answer: so all spans of a short passage are among those that the graph lists
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Made:
    """What `openbook train` and `openbook export` left for one kind."""

    checkpoint: Checkpoint
    reader: Path
    claims: Path
    bundle: Bundle

    def graph(self, model: str, precision: str = "fp32") -> Graph:
        return Graph(self.bundle.graph_path(model, precision), build_device("cpu", precision, 1))

    def encoder(self) -> TextEncoder:
        """As the server has it."""
        return TextEncoder(load_tokenizer(self.bundle.tokenizer_path), self.bundle.tokenizer_digest)

    def windows(self) -> PairEncoder:
        """As training has it."""
        return PairEncoder(self.checkpoint, stride=8, **LIMITS)


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tiny_kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, source = tmp_path_factory.mktemp("made"), tiny_kinds[request.param]
    rows, claims = [], []
    for number in range(12):
        answer = WORDS[number % 10]
        context = f"the {WORDS[(number + 3) % 10]} of {answer} was {WORDS[(number + 5) % 10]} in case {number}"
        rows.append({"id": f"q{number}", "question": f"what was {answer} ?", "context": context, "answers": {"text": [answer]}})
        claims.append({"claim": f"{answer} was it", "label": ("no", "yes")[number % 2], "evidence": [context]})
    for name, lines in (("questions", rows), ("claims", claims)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared = {"checkpoint": str(source), "lora_rank": 2, "lora_alpha": 2, "held_out": 4, "max_tokens": LIMITS["max_tokens"]}
    loop = LoopConfig(epochs=2, batch_examples=4, precision="fp32", learning_rate=1e-2, average_decay=0.5, threads=1)
    reader = ReaderConfig(
        output=str(folder / "reader"),
        train=str(folder / "questions.jsonl"),
        stride=8,
        max_question_tokens=LIMITS["max_question_tokens"],
        max_answer_tokens=MOST,
        negatives=(1,),
        mined=5,
        loop=loop,
        **shared,  # type: ignore[arg-type]
    )
    verification = VerificationConfig(output=str(folder / "verifier"), train=str(folder / "claims.jsonl"), loop=loop, **shared)  # type: ignore[arg-type]
    for objective, config in (("reader", reader), ("verification", verification)):
        train(OBJECTIVES[objective], config, resume=False, console=Console(file=io.StringIO()))
    trained = {"reader": folder / "reader" / "best", "heads": {"claims": folder / "verifier" / "best"}}
    options = ExportOptions(checkpoint=str(source), bundle=folder / "bundle", int8=True, name=request.param, **trained)  # type: ignore[arg-type]
    bundle = export_bundle(options, lambda line: None)
    return Made(resolve_checkpoint(str(source)), folder / "reader" / "best", folder / "verifier" / "best", bundle)


def read_in_training(made: Made, passages: Sequence[str]) -> tuple[dict[str, float], float]:
    """By PyTorch: the probability of every answer to QUESTION, and that there is none."""
    encoder, model = made.windows(), trained_reader(made.checkpoint, str(made.reader)).eval()
    pairs = list(encoder.pairs(QUESTION, passages, 0))
    assert max(MOST * len(pair.offsets) - 1 for pair in pairs) <= SPANS
    with torch.inference_mode():
        start, end = forward(model, pairs, encoder, CPU)
    spans, null = span_scores(start, end, passage_tokens(pairs, start.shape[1]), MOST), null_scores(start, end)
    total = float(torch.logsumexp(torch.cat([spans.flatten(), null]), dim=0))
    probabilities: dict[str, float] = defaultdict(float)
    for row, pair in enumerate(pairs):
        for first in range(len(pair.offsets)):
            for last in range(first, min(first + MOST, len(pair.offsets))):
                text = passages[pair.passage][pair.offsets[first][0] : pair.offsets[last][1]]
                probabilities[normalise(text)] += math.exp(float(spans[row, pair.first + first, last - first]) - total)
    return probabilities, math.exp(float(torch.logsumexp(null, dim=0)) - total)


def test_a_server_builds_the_rows_that_training_built(made: Made) -> None:
    encoder, passages = made.encoder(), [*PASSAGES, "red, green " * 60]
    windows = {pair.passage: pair for pair in reversed(list(made.windows().pairs(QUESTION, passages, 0)))}  # the first of each passage
    kept = encoder.kept(passages)
    for tokens in ((), kept):
        for number, pair in enumerate(encoder.pairs(QUESTION, passages, LIMITS["max_tokens"], tokens)):
            window = windows[number]
            assert list(pair.row.ids) == window.ids
            assert pair.row.types is not None
            assert list(pair.row.types) == [int(at >= window.first) for at in range(len(window.ids))]
            assert pair.first == window.first
            places = range(pair.first, pair.first + len(window.offsets))
            assert list(zip(*pair.characters(places, places), strict=True)) == window.offsets
    trained = RowEncoder(made.checkpoint, max_tokens=LIMITS["max_tokens"]).rows([(QUESTION, text) for text in PASSAGES])
    assert [(list(pair.row.ids), list(pair.row.types or ())) for pair in encoder.pairs(QUESTION, PASSAGES, LIMITS["max_tokens"])] == trained


def test_a_graph_is_fed_what_something_in_it_reads(made: Made) -> None:
    """Which text a token is of is read by the scoring of spans alone: none of these models knows segments."""
    alone = ["input_ids", "attention_mask"]
    assert [made.graph(model).input_names for model in ("embedder", "claims", "reader")] == [alone, alone, [*alone, "token_type_ids"]]
    for model in ("embedder", "claims", "reader"):
        for precision in ("fp32", "fp16"):
            facts = made.bundle.manifest["heads"]["claims"] if model == "claims" else made.bundle.manifest[model]
            fused = facts["measured"][precision]["fused"]
            assert fused["PaddingFreeAttention" if (model, precision) == ("embedder", "fp32") else "Attention"] == 2


def test_texts_of_every_length_get_the_vectors_of_pytorch(made: Made) -> None:
    """To the last position, and padded as the server pads them: with zeros, whatever token that is."""
    assert made.bundle.embedder.max_tokens == made.checkpoint.max_tokens == 128
    ids = made.encoder().texts([" ".join(WORDS)])[0].ids
    rows = [[*(list(ids[1:-1]) * 128)[: tokens - 2], ids[-1]] for tokens in (3, 8, 23, 127, 128)]
    rows = [[ids[0], *row] for row in rows]
    with torch.inference_mode():
        model = load_backbone(made.checkpoint, dropout=0.0).eval()
        wanted = encode(model, rows, pooling="mean", pad=RowEncoder(made.checkpoint, max_tokens=8).pad, device=CPU).numpy()
    for precision, least in (("fp32", 0.99999), ("fp16", 0.999), ("int8", 0.95)):
        graph = made.graph("embedder", precision)
        for row, vector in zip(rows, wanted, strict=True):
            found = graph.run_rows([Row(row), Row(row[:1] + row[-2:])], graph.buckets.padded_length(len(row)))["sentence_embedding"]
            assert float((found[0] * vector).sum()) >= least, (precision, len(row))
    states = made.graph("embedder").run({"input_ids": np.array([rows[1]]), "attention_mask": np.ones((1, 8), np.int64)}, states=True)
    assert states[HIDDEN_STATES].shape == (1, 8, 32)
    texts = [*PASSAGES, QUESTION]
    graph, encoder = made.graph("embedder"), made.encoder()
    vectors = [graph.run_rows([row], len(row.ids))["sentence_embedding"][0] for row in encoder.texts(texts)]
    np.testing.assert_allclose(np.stack(vectors), embed(made.checkpoint, texts), atol=1e-5)


def test_int8_leaves_no_bias_of_positions_out(made: Made) -> None:
    """onnxruntime's operator in int8 takes none, and would drop it without a word."""
    kinds = [node.op_type for node in onnx.load(made.bundle.graph_path("reader", "int8")).graph.node]
    assert (kinds.count("Attention"), kinds.count("QAttention")) == ((2, 0) if made.bundle.name == "mpnet" else (0, 2))
    assert kinds.count("MatMulInteger") >= 4


async def test_a_server_answers_with_what_pytorch_reads(made: Made, tmp_path: Path) -> None:
    open_knowledge_base(tmp_path / "kb", made.bundle, create=True).close()
    config = ServerConfig(port=0, device="cpu", threads=1, drain_seconds=1.0)
    documents = [Document(id=str(number), text=text) for number, text in enumerate(PASSAGES)]
    async with running_server(made.bundle.folder, tmp_path / "kb", config) as port, AsyncClient(f"127.0.0.1:{port}") as client:
        assert [written.outcome async for written in client.upsert(documents)] == ["created"] * len(documents)
        [answered] = await client.answer([QUESTION], top_k=len(PASSAGES), max_answers=3)
        [classified] = await client.classify([QUESTION], classifier="claims", evidence=[PASSAGES[:1]])
    assert isinstance(answered, AnswerResult)
    probabilities, nothing = read_in_training(made, [hit.text for hit in answered.hits])
    assert answered.passages_read == len(PASSAGES)
    assert answered.no_answer_probability == pytest.approx(nothing, abs=1e-4)
    assert normalise(answered.answers[0].text) == max(probabilities, key=probabilities.__getitem__)
    for answer in answered.answers:
        assert answer.text == PASSAGES[int(answer.document_id)][answer.start : answer.end]
        assert answer.probability == pytest.approx(probabilities[normalise(answer.text)], abs=1e-4)
    assert isinstance(classified, Classified)
    head, settings = load_head_model(made.checkpoint, made.claims)
    encoder = RowEncoder(made.checkpoint, max_tokens=settings["max_tokens"])
    with torch.inference_mode():
        [expected] = head(encoder.batch(encoder.rows([(QUESTION, PASSAGES[0])]), CPU)).exp().tolist()
    found = {label.label: label.probability for label in classified.labels}
    assert [found[label] for label in settings["labels"]] == pytest.approx(expected, abs=1e-4)


def test_the_bundle_opens_as_every_bundle_does(made: Made) -> None:
    assert load_bundle(made.bundle.folder).id == made.bundle.id
    assert made.bundle.reader is not None
    assert (made.bundle.reader.max_tokens, made.bundle.heads["claims"].max_tokens) == (64, 64)


def test_camembert_which_is_a_roberta_is_exported_as_one(tiny_kinds: dict[str, Path], tmp_path: Path) -> None:
    assert set(EXPORTED) == {"bert", "camembert", *KINDS}
    folder = Path(shutil.copytree(tiny_kinds["roberta"], tmp_path / "camembert"))
    config = AutoConfig.from_pretrained(folder).to_dict() | {"model_type": "camembert"}
    AutoModel.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    bundle = export_bundle(ExportOptions(checkpoint=str(folder), bundle=tmp_path / "bundle"), lambda line: None)
    assert bundle.embedder.max_tokens == 128
    graph = Graph(bundle.graph_path("embedder", "fp32"), build_device("cpu", "fp32", 1))
    [row] = TextEncoder(load_tokenizer(bundle.tokenizer_path)).texts(PASSAGES[:1])
    vectors = graph.run_rows([row], len(row.ids))["sentence_embedding"]
    np.testing.assert_allclose(vectors, embed(resolve_checkpoint(str(folder)), PASSAGES[:1]), atol=1e-5)


@pytest.fixture(scope="module")
def whole(tiny_kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question-answering checkpoint of RoBERTa's kind as somebody else trained one: with two separators in a pair."""
    folder = tmp_path_factory.mktemp("whole") / "reader"
    shutil.copytree(tiny_kinds["roberta"], folder, ignore=shutil.ignore_patterns("model.safetensors"))
    torch.manual_seed(7)
    AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    (folder / "reader.json").write_text(json.dumps(LIMITS | {"max_answer_tokens": MOST}))
    return folder


def test_a_whole_reader_is_read_with_pairs_in_its_own_form(tiny_kinds: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    rows = [{"id": text, "question": QUESTION, "context": text, "answers": {"text": [text.split()[2]]}} for text in PASSAGES]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ExportOptions(
        checkpoint=str(tiny_kinds["roberta"]), bundle=tmp_path / "bundle", reader=whole, quality=str(tmp_path / "questions.jsonl")
    )
    bundle = export_bundle(options, lambda line: None)
    own = Tokenizer.from_file(str(whole / "tokenizer.json")).encode(QUESTION, PASSAGES[0])
    assert own.tokens.count("</s>") == 3
    [pair] = TextEncoder(load_tokenizer(bundle.tokenizer_path)).pairs(QUESTION, PASSAGES[:1], LIMITS["max_tokens"])
    assert list(pair.row.ids) == own.ids
    assert pair.row.types is not None
    assert list(pair.row.types) == [int(at > own.ids.index(2) + 1) for at in range(len(own.ids))]
    model = AutoModelForQuestionAnswering.from_pretrained(whole).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([own.ids]))
    graph = Graph(bundle.graph_path("reader", "fp32"), build_device("cpu", "fp32", 1))
    outputs = graph.run_rows([pair.row], len(own.ids))
    assert outputs["null_score"][0] == pytest.approx(float(logits.start_logits[0, 0] + logits.end_logits[0, 0]), abs=1e-4)
    quality = bundle.manifest["reader"]["measured"]["fp32"]["quality"]
    assert quality["graph"] == quality["pytorch"]


def test_a_whole_reader_in_whose_pairs_a_bundle_could_not_be_right_is_refused(
    tiny_checkpoint: Path, tiny_heads: dict[str, Path], tiny_kinds: dict[str, Path], tiny_reader: Path, whole: Path, tmp_path: Path
) -> None:
    reader = load_reader(resolve_checkpoint(str(tiny_kinds["roberta"])), whole)
    head = load_head(resolve_checkpoint(str(tiny_checkpoint)), "claims", tiny_heads["claims"])
    require_one_template(reader, {})
    require_one_template(None, {"claims": head})
    with pytest.raises(CheckpointUnsupported, match="--task claims reads pairs with one separator between the texts, --reader with 2"):
        require_one_template(reader, {"claims": head})
    segments = Path(shutil.copytree(tiny_checkpoint, tmp_path / "segments"))
    load_reader(resolve_checkpoint(str(tiny_checkpoint)), tiny_reader).model.save_pretrained(segments)  # type: ignore[operator]
    load_reader(resolve_checkpoint(str(tiny_checkpoint)), segments)
    (segments / "tokenizer.json").write_text((segments / "tokenizer.json").read_text().replace('"type_id": 1', '"type_id": 0'))
    with pytest.raises(CheckpointNotFound, match=r"with type ids \[0, 0, 0, 0, 0\]; it takes .* with 0 for a and 1 for b"):
        load_reader(resolve_checkpoint(str(tiny_checkpoint)), segments)
