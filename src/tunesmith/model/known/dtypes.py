"""The dtypes by their names in recipes and in safetensors files, without importing Transformers."""

import torch

# Names in the recipe.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Names in safetensors files.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,  # scales that are powers of two
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# fp8 weights need scales, so they are not read as plain weights. Their codes are read as bytes.
FP8_CODES = "F8_E4M3"
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
SAFETENSORS_NAMES[torch.float8_e4m3fn] = FP8_CODES
