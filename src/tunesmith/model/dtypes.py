"""The recipe's names of torch's dtypes, for what does without Transformers."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
