"""Mapping from the recipe's dtype names to torch dtypes, without importing Transformers."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
