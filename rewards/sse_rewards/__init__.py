"""Rule-based rewards for mathematics that cannot be fooled or stalled.

`score(completion, answer, kind)` is the grader. Importing this package is cheap: math-verify is
loaded in worker processes only, when an answer first needs it.
"""

from .adapters import accuracy_reward, compute_score
from .gold import validate_gold
from .pool import Item, RewardPool, default_pool, score, score_batch
from .result import STATUSES, Kind, Result, Status

__all__ = [
    "STATUSES",
    "Item",
    "Kind",
    "Result",
    "RewardPool",
    "Status",
    "accuracy_reward",
    "compute_score",
    "default_pool",
    "score",
    "score_batch",
    "validate_gold",
]
