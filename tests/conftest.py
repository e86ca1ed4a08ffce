"""Tiny real models for every suite: a random BERT of two layers, a reader on it, and the bundle that the export makes of them."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest

WORDS = "red blue green one two three city river king book the of was in case what who read and a to is it by"
DIM = 32
LABELS = ["cold", "leafy", "warm"]
HEADS: dict[str, dict[str, object]] = {
    "topics": {
        "objective": "classifier",
        "pair": False,
        "max_tokens": 24,
        "labels": LABELS,
        "temperature": 0.05,
        "neighbours": 5,
        "label_column": "shelf",
        "mixture": {"weight": 0.6, "temperature": 0.1},
    },
    "claims": {
        "objective": "verification",
        "pair": True,
        "max_tokens": 40,
        "labels": ["no", "yes"],
        "temperature": 0.0,
        "one_segment": True,
    },
    "words": {"objective": "vocab_head", "pair": False, "max_tokens": 24, "tied": True},
    "own_words": {"objective": "vocab_head", "pair": False, "max_tokens": 24, "tied": False},
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: BERT with 2 layers of 32, and a WordPiece tokenizer that knows `WORDS` and single letters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    characters = string.ascii_lowercase + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *string.punctuation, *characters, *(f"##{character}" for character in characters), *WORDS.split()]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,  # ten times BERT's: texts must differ although nothing was learned
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_kinds(tiny_checkpoint: Path) -> dict[str, Path]:
    """Folders as `tiny_checkpoint`, of the kinds of encoder that know no segments, each with a tokenizer such as its kind has."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    characters = string.ascii_lowercase + string.digits
    word_pieces = [*special, *string.punctuation, *characters, *(f"##{character}" for character in characters), *WORDS.split()]
    mpnet = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(dict.fromkeys(word_pieces))}, unk_token=special[3]))
    mpnet.normalizer = normalizers.BertNormalizer(lowercase=True)
    mpnet.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    roberta = Tokenizer(models.BPE(unk_token=special[3]))
    roberta.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    roberta.train_from_iterator([f" {WORDS}"] * 4, trainer)
    for tokenizer in (mpnet, roberta):
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    pieces = [(f"\u2581{word}", -2.0) for word in WORDS.split()] + [(piece, -4.0) for piece in ("\u2581", *characters, *string.punctuation)]
    xlm = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *dict.fromkeys(pieces)], unk_id=3))
    xlm.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    xlm.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    folders = {"distilbert": tiny_checkpoint.parent / "distilbert"}
    PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint).save_pretrained(folders["distilbert"])
    for kind, tokenizer in (("mpnet", mpnet), ("roberta", roberta), ("xlm-roberta", xlm)):
        names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special, strict=True))
        folders[kind] = tiny_checkpoint.parent / kind
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folders[kind])
    torch.manual_seed(6)
    for kind, folder in folders.items():
        sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 1}
        if kind == "distilbert":
            sizes = {"dim": DIM, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 0}
        elif kind != "mpnet":
            sizes["type_vocab_size"] = 1
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
        positions = 128 if kind == "distilbert" else 130  # of which two are no token's
        config = AutoConfig.for_model(kind, **sizes, vocab_size=vocabulary, max_position_embeddings=positions, initializer_range=0.2)
        AutoModel.from_config(config).save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def tiny_reader(tiny_checkpoint: Path) -> Path:
    """An adapter to `tiny_checkpoint`, as `openbook train reader` leaves one; random, so that merging it matters."""
    import torch
    from openbook_training.checkpoint import resolve_checkpoint
    from openbook_training.reader import build_reader

    torch.manual_seed(1)
    checkpoint, folder = resolve_checkpoint(str(tiny_checkpoint)), tiny_checkpoint.parent / "reader"
    model = build_reader(checkpoint, lora_rank=2, lora_alpha=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    limits = {"max_tokens": 64, "max_question_tokens": 16, "max_answer_tokens": 5}
    settings = {"base_checkpoint": str(tiny_checkpoint), "base_digest": checkpoint.digest(), "one_segment": True, **limits}
    (folder / "reader.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tiny_reader: Path) -> Path:
    """The bundle that `openbook export` makes of `tiny_checkpoint` and `tiny_reader`, with int8 graphs. Copy it before you change it."""
    from openbook_export.export import ExportOptions, export_bundle

    folder = tiny_checkpoint.parent / "bundle"
    export_bundle(
        ExportOptions(checkpoint=str(tiny_checkpoint), bundle=folder, reader=tiny_reader, int8=True, name="tiny", license="Apache-2.0"),
        lambda line: None,
    )
    return folder


@pytest.fixture(scope="session")
def tuned_bundle(tiny_checkpoint: Path, tiny_reader: Path) -> Path:
    """As `tiny_bundle` with another embedder: what `openbook export --embedder` makes of a retriever's adapter."""
    import torch
    from openbook_export.export import ExportOptions, export_bundle
    from openbook_training.checkpoint import resolve_checkpoint
    from openbook_training.retriever import build_retriever, save_retriever

    torch.manual_seed(2)
    checkpoint, folder = resolve_checkpoint(str(tiny_checkpoint)), tiny_checkpoint.parent / "tuned"
    model = build_retriever(checkpoint, lora_rank=2, lora_alpha=2).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.half().float()
    save_retriever(model, folder / "adapter", checkpoint, [DIM])
    options = ExportOptions(
        checkpoint=str(tiny_checkpoint), bundle=folder / "bundle", embedder=folder / "adapter", reader=tiny_reader, name="tuned"
    )
    export_bundle(options, lambda line: None)
    return folder / "bundle"


@pytest.fixture(scope="session")
def tiny_heads(tiny_checkpoint: Path) -> dict[str, Path]:
    """A folder of every objective in `HEADS` as `openbook train` leaves one; random, so that adapter and head matter."""
    import torch
    from openbook_training.checkpoint import resolve_checkpoint
    from openbook_training.heads import LabelHead, VocabHead, build_head_model
    from openbook_training.pretrained import load_backbone

    torch.manual_seed(2)
    checkpoint, folders = resolve_checkpoint(str(tiny_checkpoint)), {}
    for name, settings in HEADS.items():
        backbone, labels = load_backbone(checkpoint, one_segment="one_segment" in settings), settings.get("labels")
        head: torch.nn.Module = (
            LabelHead(DIM, len(labels), temperature=settings["temperature"])  # type: ignore[arg-type]
            if isinstance(labels, list)
            else VocabHead(backbone.embeddings.word_embeddings.weight, tied=bool(settings["tied"]))
        )
        model = build_head_model(checkpoint, head, backbone, lora_rank=2, lora_alpha=2)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        folders[name] = tiny_checkpoint.parent / "heads" / name
        model.save(folders[name], checkpoint, settings)
    return folders


@pytest.fixture(scope="session")
def labelling_bundle(tiny_checkpoint: Path, tiny_reader: Path, tiny_heads: dict[str, Path]) -> Path:
    """As `tiny_bundle`, without int8 graphs, with every one of `tiny_heads`."""
    from openbook_export.export import ExportOptions, export_bundle

    folder = tiny_checkpoint.parent / "labelling"
    export_bundle(
        ExportOptions(checkpoint=str(tiny_checkpoint), bundle=folder, reader=tiny_reader, heads=tiny_heads, name="labelling"),
        lambda line: None,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_language_model(tiny_checkpoint: Path) -> Path:
    """A GPT-2 of two layers that reads two passages, as `openbook train causal_lm` leaves one; random, and loud, so that tokens differ."""
    import torch
    from openbook_training.language_model import Prompts, ReadingConfig, new_model, new_tokenizer, save_language_model

    torch.manual_seed(4)
    folder = tiny_checkpoint.parent / "language_model"
    prompts = Prompts(new_tokenizer([WORDS], 300))
    model = new_model(prompts.tokenizer, layers=2, dim=16, heads=2, positions=100, dropout=0.0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    settings = ReadingConfig(
        stride_tokens=16, context_tokens=16, passages=2, passage_tokens=16, query_tokens=8, embedder=str(tiny_checkpoint)
    )
    save_language_model(model, prompts, settings, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_generator(tiny_checkpoint: Path) -> Path:
    """`tiny_checkpoint` twice, as `openbook train generator` leaves it; random, and loud, so that tokens differ."""
    import torch
    from openbook_training.checkpoint import resolve_checkpoint
    from openbook_training.generator import AnswerEncoder, GeneratorSettings, build_generator, save_generator

    torch.manual_seed(3)
    checkpoint, folder = resolve_checkpoint(str(tiny_checkpoint)), tiny_checkpoint.parent / "generator"
    encoder = AnswerEncoder(checkpoint, max_tokens=64, max_answer_tokens=8)
    model = build_generator(checkpoint, encoder, dropout=0.0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    settings = GeneratorSettings(passages=2, max_tokens=64, max_answer_tokens=8, embedder=str(tiny_checkpoint))
    save_generator(model, encoder, settings, folder)
    return folder


@pytest.fixture(scope="session")
def writing_bundle(tiny_checkpoint: Path, tiny_reader: Path, tiny_generator: Path, tiny_language_model: Path) -> Path:
    """As `tiny_bundle`, without int8 graphs, with both models that write."""
    from openbook_export.export import ExportOptions, export_bundle

    folder = tiny_checkpoint.parent / "writing"
    export_bundle(
        ExportOptions(
            checkpoint=str(tiny_checkpoint),
            bundle=folder,
            reader=tiny_reader,
            generator=tiny_generator,
            language_model=tiny_language_model,
            name="writing",
        ),
        lambda line: None,
    )
    return folder
