"""SSE-H as a transformers model: a packed core, and the padded forms that Hugging Face expects."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sse_kernels import add_rms_norm, linear_logits, linear_logprob, silu_mul
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from sse_rl.model.attention import SoftmaxAttention
from sse_rl.model.balance import load_balance_loss
from sse_rl.model.cache import PackedInputs
from sse_rl.model.configuration import SSEConfig
from sse_rl.model.generation import GenerationCache
from sse_rl.model.joined import product
from sse_rl.model.mixer import SSEMixer
from sse_rl.model.outputs import PackedOutput, SSECausalLMOutput, SSEModelOutput
from sse_rl.model.padding import sequence_starts, unpad


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: SSEConfig) -> None:
        super().__init__()
        d, width = config.hidden_size, config.mlp_width
        self.gate_proj = nn.Linear(d, width, bias=False)
        self.up_proj = nn.Linear(d, width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = product(x, (self.gate_proj, self.up_proj))
        if both is not None:
            return self.down_proj(silu_mul(both))
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class SSEBlock(nn.Module):
    """Pre-norm mixer and MLP, each with its residual."""

    def __init__(self, config: SSEConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        if layer in config.attention_layers:
            self.attn = SoftmaxAttention(config, config.attention_layers.index(layer))
        else:
            self.attn = SSEMixer(config, config.sse_layers.index(layer))
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)
        self.eps = config.norm_eps

    def forward(
        self, x: Tensor, seqs: PackedInputs, replay: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [T, d] -> (x [T, d], ids [T, K] and probs [T, N] of the router, if there is one)."""
        ids = probs = None
        normed = self.attn_norm(x)
        if isinstance(self.attn, SSEMixer):
            mixed, routing = self.attn(normed, seqs, replay)
            ids, probs = routing.ids, routing.probs
        else:
            mixed = self.attn(normed, seqs)
        x, normed = self._add_and_norm(x, mixed)
        return x + self.mlp(normed), ids, probs

    def _add_and_norm(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.mlp_norm
        if torch.is_grad_enabled() or not x.dtype == mixed.dtype == norm.weight.dtype:
            x = x + mixed
            return x, norm(x)
        return add_rms_norm(x, mixed, norm.weight, eps=self.eps)


class SSEPreTrainedModel(PreTrainedModel):
    config: SSEConfig
    config_class = SSEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SSEBlock"]  # noqa: RUF012
    _is_stateful = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' own, but a tensor that does not fit its config is a ValueError."""
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        model, info = loaded
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            message = _explain_mismatch(model.config, sorted(info["mismatched_keys"]))
            raise ValueError(f"{pretrained_model_name_or_path}: {message}")
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights; decays as in Mamba: time steps log-uniform in 0.001..0.1, rates 0..16."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, SSEMixer) and self.config.linear_attn_type == "gdn":
            rates = torch.empty_like(module.A_log, dtype=torch.float32).uniform_(0.001, 16)
            init.copy_(module.A_log, rates.log())
            low, high = math.log(0.001), math.log(0.1)
            steps = torch.empty_like(module.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
            init.copy_(module.dt_bias, steps + torch.log(-torch.expm1(-steps)))


class SSEModel(SSEPreTrainedModel):
    """The backbone: embeddings, blocks, final norm."""

    def __init__(self, config: SSEConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SSEBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def packed(
        self,
        tokens: Tensor,
        seqs: PackedInputs,
        *,
        keep_layers: bool = False,
        between: Callable[[], None] | None = None,
    ) -> PackedOutput:
        """tokens [T] ids, or [T, d] embeddings, of the sequences that `seqs` describes.

        between: called after each layer; it may run the model on other slots of the cache.
        """
        x = tokens if tokens.is_floating_point() else self.embeddings(tokens)
        ids: list[Tensor] = []
        probs: list[Tensor] = []
        kept: list[Tensor] = []
        for layer in self.layers:
            if keep_layers:
                kept.append(x)
            replay = None
            if seqs.replay is not None and isinstance(layer.attn, SSEMixer):
                replay = seqs.replay[:, layer.attn.index]
            run = self._checkpointed if self.gradient_checkpointing and self.training else _run
            x, layer_ids, layer_probs = run(layer, x, seqs, replay)
            if layer_ids is not None and layer_probs is not None:
                ids.append(layer_ids.to(torch.uint8))
                probs.append(layer_probs)
            if between is not None:
                between()
        shape = (x.shape[0], 0, self.config.num_writer)
        routing = torch.stack(ids, 1) if ids else x.new_empty(shape, dtype=torch.uint8)
        return PackedOutput(self.norm(x), routing, probs, kept)

    def _checkpointed(
        self, layer: nn.Module, x: Tensor, seqs: PackedInputs, replay: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Recomputes the layer in the backward pass, with the partitions chosen in the forward."""
        chosen = replay

        def run(x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
            nonlocal chosen
            x, ids, probs = layer(x, seqs, chosen)
            chosen = ids
            return x, ids, probs

        return self._gradient_checkpointing_func(run, x)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool = False,
        routing: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> SSEModelOutput:
        """See `SSEForCausalLM.forward`."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cached = past_key_values is not None
        if cached and (cu_seq_lens_q is not None or seq_idx is not None):
            raise ValueError("past_key_values: packed sequences cannot be continued, pad them")
        if cached and attention_mask is not None:
            attention_mask = attention_mask[:, -tokens.shape[1] :]
        starts = sequence_starts(
            tokens,
            attention_mask=attention_mask,
            position_ids=None if cached else position_ids,
            cu_seqlens=cu_seq_lens_q,
            seq_idx=seq_idx,
        )
        rows = unpad(tokens, attention_mask=attention_mask, starts=starts, routing=routing)
        if past_key_values is None and self._wants_cache(use_cache, rows.is_packed):
            past_key_values = GenerationCache(self.config, tokens.shape[0], self.dtype, self.device)
        seqs = rows.seqs
        if past_key_values is not None:
            seqs = past_key_values.extend(rows)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.packed(rows.tokens, seqs, keep_layers=bool(output_hidden_states))
        hidden = rows.repad(out.hidden)
        layers = None
        if output_hidden_states:
            layers = (*(rows.repad(x) for x in out.layers), hidden)
        return SSEModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=layers,
            aux_loss=_aux_loss(out),
            routing=rows.repad(out.routing_ids) if output_routing else None,
        )

    def _wants_cache(self, use_cache: bool | None, is_packed: bool) -> bool:
        if use_cache is None:
            return self.config.use_cache and not is_packed and not torch.is_grad_enabled()
        if use_cache and is_packed:
            raise ValueError("use_cache: packed sequences cannot be continued, pad them")
        if use_cache and torch.is_grad_enabled():
            raise ValueError("use_cache: the cache carries no gradient, call under torch.no_grad()")
        return use_cache


class SSEForCausalLM(SSEPreTrainedModel, GenerationMixin):
    """SSE-H with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: SSEConfig) -> None:
        super().__init__(config)
        self.model = SSEModel(config)
        linear = _WideLinear if config.fp32_head else nn.Linear
        self.lm_head = linear(config.hidden_size, config.vocab_size, bias=False)
        if config.fp32_head:
            self._keep_in_fp32_modules_strict = {"lm_head"}
        self._head_dtype = torch.float32 if config.fp32_head else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def packed(
        self,
        input_ids: Tensor,
        seqs: PackedInputs,
        *,
        between: Callable[[], None] | None = None,
    ) -> PackedOutput:
        """input_ids [T] of the sequences that `seqs` describes; advances `seqs.cache` in place.
        `between` is called after each layer."""
        return self.model.packed(input_ids, seqs, between=between)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] after the final norm -> fp32 logits [..., V], never rounded to less."""
        return linear_logits(hidden, self.lm_head.weight, dtype=self._head_dtype)

    def logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """log softmax(logits / temperature) of [T, d] at targets [T], and the entropy; [T] each,
        from blocks of logits: the [T, V] never exist."""
        return linear_logprob(
            hidden, self.lm_head.weight, targets, temperature=temperature, dtype=self._head_dtype
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool = False,
        routing: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> SSECausalLMOutput:
        """Padded [B, L] with `attention_mask` (left or right), or packed sequences in rows.

        Packed boundaries come from `cu_seq_lens_q` [n+1], from `seq_idx` [1, T], or from
        `position_ids` that restart at 0, as TRL's collator gives them.

        Args:
            labels: [B, L], -100 ignored, as the first token of each sequence is; the loss includes
                aux_loss_coef * aux_loss.
            routing: [B, L, L_sse, K] recorded partitions to use instead of the router's choice.
            output_routing: return the partitions in that shape.
            logits_to_keep: the last n positions (0: all), or the positions to keep.
            kwargs: `num_items_in_batch` divides the loss; transformers' other arguments
                (`cu_seq_lens_k`, `max_length_q`, ...) have nothing to add here.
        """
        out: SSEModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_routing=output_routing,
            routing=routing,
            cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx,
            return_dict=True,
        )
        hidden, tokens = (
            out.last_hidden_state,
            input_ids if inputs_embeds is None else inputs_embeds,
        )
        assert hidden is not None and tokens is not None and out.aux_loss is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(hidden[:, keep])
        loss = None
        if labels is not None:
            starts = sequence_starts(
                tokens,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seqlens=cu_seq_lens_q,
                seq_idx=seq_idx,
            )
            loss = self.loss_function(
                logits=logits,
                labels=labels.masked_fill(starts, -100),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
            loss = loss + self.config.aux_loss_coef * out.aux_loss
        return SSECausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            aux_loss=out.aux_loss,
            routing=out.routing,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to the first forward, which makes a `GenerationCache`."""
        return False


class _WideLinear(nn.Linear):
    """A linear layer that no cast of its model narrows: loading alone would keep it in fp32."""

    def _apply(self, fn: Any, recurse: bool = True) -> _WideLinear:
        def widest(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.itemsize >= x.itemsize else x.to(y.device)

        return super()._apply(widest, recurse)


def _run(
    layer: nn.Module, x: Tensor, seqs: PackedInputs, replay: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return layer(x, seqs, replay)


def _aux_loss(out: PackedOutput) -> Tensor:
    losses = (
        load_balance_loss(probs, ids)
        for probs, ids in zip(out.router_probs, out.routing_ids.unbind(1), strict=True)
    )
    return sum(losses, start=out.hidden.new_zeros((), dtype=torch.float32))


def _explain_mismatch(config: SSEConfig, keys: list[tuple[str, torch.Size, torch.Size]]) -> str:
    """Names the config key behind the first projection that does not fit, else the tensor."""
    for name, stored, expected in keys:
        if name.endswith("attn.q_proj.weight"):
            layer = int(name.split("layers.")[1].split(".")[0])
            softmax = layer in config.attention_layers
            key = "attn.head_dim" if softmax else "head_dim"
            heads = config.attn["num_heads"] if softmax and config.attn else config.num_heads
            return (
                f"{key}: {name} has {stored[0]} rows for {heads} heads, "
                f"the configuration implies {expected[0]}"
            )
    name, stored, expected = keys[0]
    return f"{name} has shape {list(stored)}, the configuration implies {list(expected)}"
