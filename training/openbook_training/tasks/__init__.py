"""What can be trained: one module an objective, each a configuration and a task for the loop."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openbook_training.loop import Task


@dataclass(frozen=True, slots=True)
class Objective:
    """Where an objective lives. Its module is imported only when it is wanted: PyTorch takes seconds."""

    module: str
    name: str  # prefix of its Config and its Task
    summary: str

    def config(self) -> type[Any]:
        """The dataclass of its settings; it has `output` and `loop` beside its own."""
        kind: type[Any] = getattr(importlib.import_module(self.module), self.name + "Config")
        return kind

    def task(self) -> type[Task[Any]]:
        kind: type[Task[Any]] = getattr(importlib.import_module(self.module), self.name + "Task")
        return kind


OBJECTIVES = {
    "reader": Objective("openbook_training.tasks.reader", "Reader", "spans of retrieved passages that answer a question"),
    "recurring_spans": Objective("openbook_training.tasks.recurring_spans", "RecurringSpans", "the reader, on unlabelled passages"),
    "retriever": Objective("openbook_training.tasks.retriever", "Retriever", "the embedder, on questions with their passages"),
    "inverse_cloze": Objective(
        "openbook_training.tasks.inverse_cloze", "InverseCloze", "the embedder, on sentences of unlabelled passages"
    ),
    "classifier": Objective("openbook_training.tasks.classifier", "Classifier", "labels of texts, from labelled neighbours and the model"),
    "verification": Objective("openbook_training.tasks.verification", "Verification", "claims that evidence supports or refutes"),
    "causal_lm": Objective("openbook_training.tasks.causal_lm", "CausalLm", "a GPT-2 that reads retrieved passages before its text"),
    "generator": Objective("openbook_training.tasks.generator", "Generator", "answers written from retrieved passages (fusion-in-decoder)"),
    "masked_lm": Objective("openbook_training.tasks.masked_lm", "MaskedLm", "a language model, on words hidden in passages"),
    "realm": Objective("openbook_training.tasks.realm", "Realm", "a language model and its retriever as one, on hidden salient spans"),
    "vocab_head": Objective("openbook_training.tasks.vocab_head", "VocabHead", "words that a text is about, from its pooled vector"),
}
