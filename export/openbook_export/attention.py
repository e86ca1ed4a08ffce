"""Self-attention as onnxruntime's operator, for the kinds of model in which its optimiser does not find it.

It finds BERT's and RoBERTa's. DistilBERT scales before it multiplies, and MPNet adds a bias for how far two tokens are apart. Of these
two the attention is the operator while a graph is traced, and only then: what the parity gate expects comes from the model as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.symbolic_helper import _optional_input_placeholder_tensor
from transformers.models.distilbert.modeling_distilbert import MultiHeadSelfAttention
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention


class _Operator(torch.autograd.Function):
    """The node. Tracing asks for its shape alone, so in PyTorch it computes nothing."""

    @staticmethod
    def forward(context: Any, states: Tensor, weights: Tensor, biases: Tensor, mask: Tensor, added: Tensor | None, heads: int) -> Tensor:
        return torch.zeros_like(states)

    @staticmethod
    def symbolic(graph: Any, states: Any, weights: Any, biases: Any, mask: Any, added: Any, heads: int) -> Any:
        past = _optional_input_placeholder_tensor(graph)  # type: ignore[no-untyped-call]  # torch's; encoders have no past
        optional = [] if added is None else [past, added]
        node = graph.op("com.microsoft::Attention", states, weights, biases, mask, *optional, num_heads_i=heads)
        return node.setType(states.type())


class _Attention(nn.Module):
    """In the place of a model's own: the weights of queries, keys and values in one (d, 3 d) matrix, and the linear layer after it."""

    def __init__(self, parts: list[nn.Linear], out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.cat([part.weight.T for part in parts], dim=1))
        self.biases = nn.Parameter(torch.cat([part.bias for part in parts]))
        self.out, self.heads = out, heads

    def attended(self, states: Tensor, mask: Tensor, added: Tensor | None = None) -> tuple[Tensor]:
        """(B, L, d) states, (B, L) mask and what is added to scores, (1, heads, L, L), to (B, L, d)."""
        operator: Any = _Operator.apply
        return (self.out(operator(states, self.weights, self.biases, mask.to(torch.int32), added, self.heads)),)


class _DistilBertAttention(_Attention):
    def forward(self, *, query: Tensor, mask: Tensor, **others: object) -> tuple[Tensor]:
        return self.attended(query, mask)


class _MPNetAttention(_Attention):
    def forward(self, states: Tensor, mask: Tensor, head_mask: None, position_bias: Tensor, **others: object) -> tuple[Tensor]:
        return self.attended(states, mask[:, 0, 0] == 0, position_bias)  # the mask that comes is one to be added to scores


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, MultiHeadSelfAttention):
        return _DistilBertAttention([module.q_lin, module.k_lin, module.v_lin], module.out_lin, module.n_heads)
    if isinstance(module, MPNetSelfAttention):
        return _MPNetAttention([module.q, module.k, module.v], module.o, module.num_attention_heads)
    return None


def _position_bias(encoder: Any) -> Callable[[Tensor], Tensor]:
    """MPNet's `compute_position_bias` by a table: half precision would round the logarithms of distances to other rows of its weights."""
    most = int(encoder.config.max_position_embeddings)
    rows = encoder.relative_position_bucket(torch.arange(1 - most, most))  # of every distance there is
    table: Tensor = encoder.relative_attention_bias(rows).detach()  # (2 most - 1, heads)

    def bias(states: Tensor) -> Tensor:
        """(B, L, d) to (1, heads, L, L)."""
        places = torch.arange(states.shape[1])
        return table[places - places[:, None] + most - 1].permute(2, 0, 1).unsqueeze(0)

    return bias


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Within, every self-attention in `model` is one that is traced to a fused graph."""
    with contextlib.ExitStack() as undo:
        modules: list[Any] = list(model.modules())
        for module in modules:
            if isinstance(module, MPNetEncoder):
                undo.callback(delattr, module, "compute_position_bias")
                vars(module)["compute_position_bias"] = _position_bias(module)
            for name, child in list(module.named_children()):
                if (replacement := _replacement(child)) is not None:
                    undo.callback(setattr, module, name, child)
                    setattr(module, name, replacement)
        yield
