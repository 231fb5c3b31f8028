"""Without a GPU, Triton kernels run in its interpreter, which it decides when first imported."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
