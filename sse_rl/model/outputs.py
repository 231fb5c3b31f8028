"""What the model returns: packed rows inside, padded batches to Hugging Face callers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils.generic import ModelOutput

from sse_rl.model.generation import GenerationCache


class PackedOutput(NamedTuple):
    """What one pass over a packed row gives."""

    hidden: Tensor
    """[T, d], after the final norm."""
    routing_ids: Tensor
    """[T, L_sse, K] uint8, ascending in each row."""
    router_probs: list[Tensor]
    """One [T, N] fp32 a SSE layer."""
    layers: list[Tensor]
    """Input of each layer [T, d], if asked for."""


@dataclass
class SSEModelOutput(ModelOutput):
    """The backbone's output; see `SSECausalLMOutput` for the fields they share."""

    last_hidden_state: Tensor | None = None
    """[B, L, d], after the final norm."""
    past_key_values: GenerationCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    routing: Tensor | None = None


@dataclass
class SSECausalLMOutput(ModelOutput):
    """The language model's output."""

    loss: Tensor | None = None
    """Cross-entropy plus aux_loss_coef * aux_loss, if labels were given."""
    logits: Tensor | None = None
    """[B, L, V] fp32."""
    past_key_values: GenerationCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """Input of each layer and the final norm, [B, L, d] each, if asked for."""
    aux_loss: Tensor | None = None
    """Sum of the layers' load-balance losses over the tokens of this call."""
    routing: Tensor | None = None
    """[B, L, L_sse, K] uint8, zero where padded, if asked for."""
