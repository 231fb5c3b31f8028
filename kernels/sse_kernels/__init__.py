"""The operators of Sparse State Expansion: routing, SSE-GLA, SSE-GDN, norm, convolution, LM head,
and attention over pages for the layers between.

Knows nothing of models. Needs torch alone.
"""

from .activations import classify, gdn_beta, gdn_log_decay, gla_log_decay
from .attention.op import paged_attention, rotate_into_pages
from .attention.rope import rotate
from .conv import causal_conv, causal_conv_step
from .delta.chunk import chunk_sse_gdn
from .delta.naive import naive_sse_gdn
from .delta.op import sse_gdn, sse_gdn_step
from .delta.recurrent import recurrent_sse_gdn, recurrent_sse_gdn_step
from .elementwise import add_rms_norm, silu_mul
from .gla.chunk import chunk_sse_gla
from .gla.naive import naive_sse_gla
from .gla.op import sse_gla, sse_gla_step
from .gla.recurrent import recurrent_sse_gla, recurrent_sse_gla_step
from .head.op import linear_logits, linear_logprob
from .layer import sse_gdn_layer, sse_gla_layer
from .layer_inputs import InputWeights, LayerInputs
from .layer_step import sse_gdn_layer_step, sse_gla_layer_step
from .norm import gated_rms_norm
from .routing import Routing, route
from .rows import Selection, select_rows, take_rows

__all__ = [
    "InputWeights",
    "LayerInputs",
    "Routing",
    "Selection",
    "add_rms_norm",
    "causal_conv",
    "causal_conv_step",
    "chunk_sse_gdn",
    "chunk_sse_gla",
    "classify",
    "gated_rms_norm",
    "gdn_beta",
    "gdn_log_decay",
    "gla_log_decay",
    "linear_logits",
    "linear_logprob",
    "naive_sse_gdn",
    "naive_sse_gla",
    "paged_attention",
    "recurrent_sse_gdn",
    "recurrent_sse_gdn_step",
    "recurrent_sse_gla",
    "recurrent_sse_gla_step",
    "rotate",
    "rotate_into_pages",
    "route",
    "select_rows",
    "silu_mul",
    "sse_gdn",
    "sse_gdn_layer",
    "sse_gdn_layer_step",
    "sse_gdn_step",
    "sse_gla",
    "sse_gla_layer",
    "sse_gla_layer_step",
    "sse_gla_step",
    "take_rows",
]
