"""SSE-H as a transformers model, known to the Auto classes as `sse`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sse_rl.model.balance import load_balance_loss, partition_share
from sse_rl.model.cache import PackedInputs, SlotCache, packed_inputs
from sse_rl.model.configuration import SSEConfig
from sse_rl.model.modeling import PackedOutput, SSEForCausalLM, SSEModel

AutoConfig.register("sse", SSEConfig, exist_ok=True)
AutoModel.register(SSEConfig, SSEModel, exist_ok=True)
AutoModelForCausalLM.register(SSEConfig, SSEForCausalLM, exist_ok=True)

__all__ = [
    "PackedInputs",
    "PackedOutput",
    "SSEConfig",
    "SSEForCausalLM",
    "SSEModel",
    "SlotCache",
    "load_balance_loss",
    "packed_inputs",
    "partition_share",
]
