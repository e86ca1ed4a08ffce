"""The graphs of a bundle as PyTorch modules, and their export to ONNX through optimum.

What the server would otherwise have to know of a model is inside: pooling, normalisation, span scoring and softmax. B texts
or pairs share a batch, padded on the right to length L; d is the embedder's dimension, N the spans a pair returns.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from openbook_server.runtime import HIDDEN_STATES
from openbook_training.objectives import NEGATIVE
from openbook_training.pretrained import model_inputs
from optimum.exporters.onnx import export
from optimum.exporters.onnx.model_configs import BertOnnxConfig
from torch import Tensor, nn
from torch.jit._trace import TracerWarning  # torch.jit names it too, but not to type checkers

from openbook_export.attention import traceable

OPSET = 18
SPANS = 16  # spans a pair returns; an answer's probability sums over the passages it stands in, so a few of each are enough
# Prefixes of the node names of what follows the transformer; see optimise.to_float16.
HEADS = ("/pooling/", "/scoring/", "/network/pointer/")


class Pooling(nn.Module):
    """Token states to one vector, as openbook_training.pooling does, the same bits for a text whatever shares its batch.

    onnxruntime adds in another order where a reduction's leading axes multiply to 1, that is for a batch of one. So the
    mean is a product with the mask.
    """

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        self.kind, self.dim = kind, dim  # "mean" or "cls"; d

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, d) states and (B, L) mask to (B, d) vectors."""
        if self.kind == "cls":
            return states[:, 0]
        mask = attention_mask.to(states.dtype)
        return torch.bmm(mask.unsqueeze(1), states).squeeze(1) / mask.sum(1, keepdim=True)  # a sum of ones is exact


class UnitPooling(Pooling):
    """Token states to one unit vector; a vector's squares are added as two halves, for the reason above."""

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, d) states and (B, L) mask to (B, d) unit vectors."""
        pooled = super().forward(states, attention_mask)
        halves = (pooled * pooled).reshape(-1, 2, self.dim // 2).sum(-1)
        # F.normalize exports to nodes that stop onnxruntime's shape inference, and with it attention fusion.
        return pooled * torch.rsqrt((halves[:, 0] + halves[:, 1]).unsqueeze(1) + 1e-12)


class SpanScoring(nn.Module):
    """The best spans of each pair and the normaliser over all of them: the exported half of openbook_training.objectives."""

    def __init__(self, *, sep_id: int, max_answer_tokens: int) -> None:
        super().__init__()
        self.sep_id, self.max_answer_tokens = sep_id, max_answer_tokens

    def forward(
        self, start: Tensor, end: Tensor, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All arguments (B, L). Returns span_start, span_end, span_score (B, N), null_score and log_normaliser (B,)."""
        inside = (token_type_ids == 1) & (attention_mask == 1) & (input_ids != self.sep_id)
        null = start[:, 0] + end[:, 0]
        start = start.masked_fill(~inside, NEGATIVE)
        end = nn.functional.pad(end.masked_fill(~inside, NEGATIVE), (0, self.max_answer_tokens - 1), value=NEGATIVE)
        first = torch.arange(start.shape[1], device=start.device)
        last = first.unsqueeze(1) + torch.arange(self.max_answer_tokens, device=start.device)  # (L, A)
        spans = torch.clamp(start.unsqueeze(2) + end[:, last], min=NEGATIVE)  # (B, L, A)
        width = -(-self.max_answer_tokens // 16) * 16
        spans = nn.functional.pad(spans, (0, width - self.max_answer_tokens), value=NEGATIVE)  # (B, L, width)
        best, where = torch.topk(spans.flatten(1), SPANS, dim=1)
        span_start = torch.div(where, width, rounding_mode="trunc")
        span_end = where - span_start * (width - 1)  # start + (where mod width)
        # logsumexp written out: some providers implement ReduceLogSumExp without subtracting the maximum, and a row must get
        # the same bits whatever B is (see Pooling). So a start's spans fill whole vector registers, their sums are added over
        # L in order, and the logarithm is taken of whole registers too: Eigen rounds a tail of one to three values otherwise.
        top = torch.maximum(best[:, 0], null)
        total = torch.exp(spans - top[:, None, None]).sum(2).cumsum(1)[:, -1] + torch.exp(null - top)
        logarithm = torch.log(total.unsqueeze(1) * torch.ones(16, device=total.device))[:, 0]
        return span_start, span_end, best, null, top + logarithm


class TaskGraph(nn.Module):
    """What is exported: (B, L) input_ids, attention_mask and token_type_ids in, outputs by name.

    `token_type_ids` are 1 on the second of two texts. A graph in ONNX has those inputs that something in it reads, and is fed no others.
    """

    outputs: ClassVar[dict[str, dict[int, str]]]  # by name, the axes that are left open
    config: Any  # of the transformer: layers, heads, hidden size
    model: nn.Module  # the transformer

    def read(self, *inputs: Tensor) -> Any:
        """What the transformer makes of the inputs, in their order; of token_type_ids nothing where it knows no segments."""
        return self.model(**model_inputs(self.config, *inputs))


class EmbedderGraph(TaskGraph):
    """Token ids to a unit vector and, where that is a mean, to the (B, L, d) states it is the mean of: windows are pooled from them."""

    outputs: ClassVar = {"sentence_embedding": {0: "batch_size"}}

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.config = model.config
        self.model, self.pooling = model, UnitPooling(pooling, self.config.hidden_size)
        if pooling == "mean":
            self.outputs = {**self.outputs, HIDDEN_STATES: {0: "batch_size", 1: "sequence_length"}}  # type: ignore[misc]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        states = self.read(input_ids, attention_mask, token_type_ids).last_hidden_state
        outputs = {"sentence_embedding": self.pooling(states, attention_mask), HIDDEN_STATES: states}
        return {name: outputs[name] for name in self.outputs}


class ReaderGraph(TaskGraph):
    """A question beside a passage to the passage's best spans; token_type_ids is 1 on the passage and its [SEP]."""

    outputs: ClassVar = {name: {0: "batch_size"} for name in ("span_start", "span_end", "span_score", "null_score", "log_normaliser")}

    def __init__(self, model: nn.Module, *, sep_id: int, max_answer_tokens: int) -> None:
        super().__init__()
        self.config = model.config
        self.model, self.scoring = model, SpanScoring(sep_id=sep_id, max_answer_tokens=max_answer_tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        logits = self.read(input_ids, attention_mask, token_type_ids)
        scores = self.scoring(logits.start_logits, logits.end_logits, input_ids, attention_mask, token_type_ids)
        return dict(zip(self.outputs, scores, strict=True))


class Distribution(nn.Module):
    """The probabilities of a head that gives their logarithms."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, d) vectors to (B, classes) probabilities."""
        return torch.exp(self.head(pooled))


class HeadGraph(TaskGraph):
    """A text, or a pair with token_type_ids 1 on its second half, to a distribution over labels or over the vocabulary.

    A classifier's graph reads a text without neighbours; they are in a knowledge base, not in the graph.
    """

    outputs: ClassVar = {"probability": {0: "batch_size"}}

    def __init__(self, model: nn.Module, pooling: str, head: nn.Module) -> None:
        super().__init__()
        self.config = model.config
        self.model, self.pooling, self.scoring = model, Pooling(pooling, self.config.hidden_size), Distribution(head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        states = self.read(input_ids, attention_mask, token_type_ids).last_hidden_state
        return {"probability": self.scoring(self.pooling(states, attention_mask))}


class FirstMask(nn.Module):
    """Token states to the one state at a row's first [MASK]; a row without any has none and gives zeros."""

    def __init__(self, mask_id: int) -> None:
        super().__init__()
        self.mask_id = mask_id

    def forward(self, states: Tensor, input_ids: Tensor) -> Tensor:
        """(B, L, d) states and (B, L) token ids to (B, d)."""
        masks = (input_ids == self.mask_id).to(torch.int64)
        first = ((masks.cumsum(1) == 1) & (masks == 1)).to(states.dtype)
        return torch.bmm(first.unsqueeze(1), states).squeeze(1)


class MaskedGraph(TaskGraph):
    """A text with words hidden by [MASK] to the distribution of its first hidden token over the vocabulary.

    Several hidden tokens are filled one after another from the left: a distribution at every position would be (B, L, vocabulary).
    """

    outputs: ClassVar = {"probability": {0: "batch_size"}}

    def __init__(self, model: nn.Module, mask_id: int, head: nn.Module) -> None:
        super().__init__()
        self.config = model.config
        self.model, self.pooling, self.scoring = model, FirstMask(mask_id), Distribution(head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        states = self.read(input_ids, attention_mask, token_type_ids).last_hidden_state
        return {"probability": self.scoring(self.pooling(states, input_ids))}


def write_onnx(graph: TaskGraph, file: Path) -> None:
    """Trace `graph` into `file` (opset 18, batch and length left open) by optimum's TorchScript exporter."""

    class _Config(BertOnnxConfig):  # type: ignore[misc]  # optimum has no types
        outputs = graph.outputs

    with quiet_tracing(), traceable(graph):
        export(graph, _Config(graph.config), file, opset=OPSET)


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Silence what every TorchScript export of a BERT says; parity with PyTorch at other shapes is measured afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding - Only steps=1", UserWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        yield
