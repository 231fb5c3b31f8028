"""The configuration of SSE-H: which layers, how wide, how many partitions."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import PretrainedConfig

_ATTN_DEFAULTS: dict[str, Any] = {
    "window_size": None,
    "rope_theta": 10000.0,
    "qkv_bias": False,
    "qk_norm": False,
}
_ATTN_KEYS = {"layers", "num_heads", "num_kv_heads", "head_dim", *_ATTN_DEFAULTS}


class SSEConfig(PretrainedConfig):
    """Sparse State Expansion (arXiv 2507.16577), keys as in the authors' reference.

    Layers named in `attn["layers"]` are softmax attention, all others SSE; without `attn` the
    model is pure SSE. `attn` holds layers, num_heads, num_kv_heads (num_heads), head_dim
    (hidden_size / num_heads), window_size (None: unlimited), rope_theta, qkv_bias and qk_norm
    (Qwen3's RMSNorm of each head's query and key; not in the reference). Keys of the reference
    that choose one of its implementations are accepted and kept, without effect.

    Logits are fp32 in any case. With `fp32_head` the head's weight stays fp32 too, and multiplies
    as such, in a model that is otherwise bf16 (MiniMax-M1, arXiv 2506.13585, section 3.2).

    Raises:
        ValueError: an impossible combination; the message names the key.
    """

    model_type = "sse"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    hidden_size: int = 2048
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    expand_v: float = 1
    num_sparse_partition: int = 4
    num_writer: int = 2
    num_reader: int = 2
    linear_attn_type: str = "gla"
    use_output_gate: bool = True
    use_short_conv: bool = False
    conv_size: int = 4
    allow_neg_eigval: bool = False
    row_topk: int | None = None
    gate_after_norm: bool = False
    aux_loss_coef: float = 0.01
    attn: dict[str, Any] | None = None
    hidden_ratio: int = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 24
    norm_eps: float = 1e-6
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    fp32_head: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_v_heads = self.value_heads
        if self.attn is not None:
            self.attn = self._complete_attn(self.attn)
        self._check()

    @property
    def value_heads(self) -> int:
        """Hv."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def value_dim(self) -> int:
        """Dv, the width of one value head and the rank of the low-rank maps."""
        return int(self.head_dim * self.expand_v)

    @property
    def mlp_width(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * self.hidden_ratio * 2 / 3)
        return 256 * ((width + 255) // 256)

    @property
    def attention_layers(self) -> list[int]:
        return sorted(self.attn["layers"]) if self.attn is not None else []

    @property
    def sse_layers(self) -> list[int]:
        softmax = set(self.attention_layers)
        return [i for i in range(self.num_hidden_layers) if i not in softmax]

    def _complete_attn(self, given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            if key not in _ATTN_KEYS:
                close = difflib.get_close_matches(key, _ATTN_KEYS, n=1)
                hint = f", did you mean attn.{close[0]}?" if close else ""
                raise ValueError(f"attn.{key}: unknown key{hint}")
        for key in ("layers", "num_heads"):
            if given.get(key) is None:
                raise ValueError(f"attn.{key} is required when attn is given")
        attn = _ATTN_DEFAULTS | given
        if attn.get("num_kv_heads") is None:
            attn["num_kv_heads"] = attn["num_heads"]
        if attn.get("head_dim") is None:
            attn["head_dim"] = self.hidden_size // attn["num_heads"]
        return attn

    def _check(self) -> None:
        positive = ("hidden_size", "head_dim", "num_heads", "num_v_heads", "num_sparse_partition")
        positive += ("num_writer", "conv_size", "num_hidden_layers", "vocab_size")
        for key in positive:
            value = getattr(self, key)
            _require(_whole(value) and value >= 1, f"{key} = {value}: must be an integer >= 1")
        n, k = self.num_sparse_partition, self.num_writer
        _require(
            self.num_reader == k,
            f"num_reader = {self.num_reader}, num_writer = {k}: must be equal, "
            "a token reads the partitions that it writes",
        )
        _require(k <= n, f"num_writer = {k}: more than num_sparse_partition = {n}")
        _require(n <= 256, f"num_sparse_partition = {n}: at most 256, routing is kept in a byte")
        _require(
            self.value_heads % self.num_heads == 0,
            f"num_v_heads = {self.num_v_heads}: not a multiple of num_heads = {self.num_heads}",
        )
        _require(self.value_dim >= 1, f"expand_v = {self.expand_v}: leaves no value channel")
        kind = self.linear_attn_type
        _require(kind in ("gla", "gdn"), f"linear_attn_type = {kind!r}: must be 'gla' or 'gdn'")
        if self.row_topk is not None:
            _require(
                _whole(self.row_topk) and 1 <= self.row_topk <= self.head_dim,
                f"row_topk = {self.row_topk}: must be an integer in 1..head_dim = {self.head_dim}",
            )
            _require(kind == "gla", "row_topk: only linear_attn_type = 'gla' selects rows")
        _require(
            not self.gate_after_norm or kind == "gdn",
            "gate_after_norm: only linear_attn_type = 'gdn' normalises its keys",
        )
        _require(
            not getattr(self, "use_q_softmax", False),
            "use_q_softmax: not a key of the SSE configuration, queries are activated by silu",
        )
        _require(
            self.hidden_act in ("swish", "silu"),
            f"hidden_act = {self.hidden_act!r}: only 'swish' ('silu')",
        )
        _require(
            not (self.fp32_head and self.tie_word_embeddings),
            "fp32_head: needs tie_word_embeddings = false, embeddings are not kept in fp32",
        )
        if self.attn is not None:
            self._check_attn(self.attn)

    def _check_attn(self, attn: dict[str, Any]) -> None:
        heads, kv_heads, width = attn["num_heads"], attn["num_kv_heads"], attn["head_dim"]
        for layer in attn["layers"]:
            _require(
                0 <= layer < self.num_hidden_layers,
                f"attn.layers: layer {layer} is outside 0..{self.num_hidden_layers - 1}",
            )
        _require(
            len(set(attn["layers"])) == len(attn["layers"]), "attn.layers: a layer is named twice"
        )
        _require(
            heads >= 1 and kv_heads >= 1 and heads % kv_heads == 0,
            f"attn.num_heads = {heads}: not a multiple of attn.num_kv_heads = {kv_heads}",
        )
        _require(
            width >= 2 and width % 2 == 0,
            f"attn.head_dim = {width}: must be even, RoPE rotates halves",
        )
        window = attn["window_size"]
        _require(
            window is None or window >= 1,
            f"attn.window_size = {window}: must be 1 or more, or null",
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
