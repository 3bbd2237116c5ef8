"""Tools that can export each model type to GGUF: tunesmith's own writer or llama.cpp's converter.

This module does not import torch.
"""

from typing import Literal

from tunesmith.model.known.architectures import ARCHITECTURES

# "own": tunesmith's writer. "converter": llama.cpp's converter, whose files give the same results
# as Transformers. "untried": the converter supports the type, but no file was compared with
# Transformers, so only the check of `export` shows the differences. "": no tool supports the type.
GgufWriter = Literal["own", "converter", "untried", ""]

# The package whose sdist contains the converter, and the command that downloads the sdist.
CONVERTER_SDIST = "llama_cpp_python-0.3.36.tar.gz"
CONVERTER_DOWNLOAD = "pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36"

# Model types of Transformers 5.23 or 5.24 that are in the registry of the converter in
# CONVERTER_SDIST, except for the families that tunesmith writes itself. For the types in _COMPARED,
# the log probabilities of llama.cpp and Transformers differ by at most 0.02 (gpt_oss: 0.09).
_COMPARED = frozenset(
    """
    deepseek_v3 exaone4 falcon_h1 gemma4 gemma4_text gemma4_unified glm4 glm4_moe gpt_oss granitemoe
    hunyuan_v1_dense jamba lfm2 lfm2_moe llama4 llama4_text ministral3 mistral3 mixtral muse_glimmer
    nemotron_h olmo3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss
    """.split()
)
_UNTRIED = frozenset(
    """
    afmoe apertus arcee bamba bitnet bloom chameleon cohere cohere2 cohere2_moe dbrx deepseek_v2
    deepseek_v32 deepseek_v4 dots1 dots3_note dots3_note_text ernie4_5 ernie4_5_moe exaone exaone4_5
    exaone_moe falcon falcon_mamba gemma3 gemma3n gemma3n_text gemma4_assistant
    gemma4_unified_assistant glm glm4_moe_lite glm4v glm4v_moe glm5_next glm_moe_dsa glm_ocr gpt-sw3
    gpt2 gpt_bigcode gpt_neox granite_speech granite_speech_plus granite_swa granitemoe_swa
    granitemoehybrid granitemoeshared hrm_text hunyuan_v1_moe hunyuan_vl hy_v3 hy_v4 internlm3
    iquestcoder jais2 janus kimi_linear laguna llava mamba mamba2 mellum mimo_v2_flash minicpm3
    minicpmv4_6 minimax_m2 minimax_m3_vl nemotron olmo olmoe paddleocr_vl phi qwen2_5_vl qwen2_audio
    qwen2_moe qwen2_vl qwen3_asr qwen3_omni_moe qwen3_vl qwen3_vl_moe qwen4_exp qwen4_exp_text
    sarvam_mla sarvam_moe shieldgemma2 solar_open stablelm starcoder2 step3p7 voxtral youtu
    """.split()
)


def gguf_writer(model_type: str, text_type: str = "") -> GgufWriter:
    """Return which tool can write models of a type as GGUF.

    Args:
        text_type: the type of the text model if `model_type` is a multimodal model.
    """
    types = {model_type, text_type or model_type}
    if any(name in ARCHITECTURES and ARCHITECTURES[name].gguf for name in types):
        return "own"
    # The converter lists a multimodal model's text model under the type of the multimodal model.
    types.add(model_type.removesuffix("_text"))
    if types & _COMPARED:
        return "converter"
    return "untried" if types & _UNTRIED else ""


def describe_gguf_export(model_type: str, text_type: str = "") -> str:
    """Return text for the user: whether GGUF export is possible, and which tools it requires."""
    writer = gguf_writer(model_type, text_type)
    if writer == "own":
        return "tunesmith export --to gguf"
    if not writer:
        return (
            "not possible: neither tunesmith nor llama.cpp's converter has "
            f"{text_type or model_type}; "
            "tunesmith merge RUN --output FOLDER writes a Transformers folder"
        )
    untried = ", which is untried with this model type" if writer == "untried" else ""
    return (
        f"by llama.cpp's converter{untried}: {CONVERTER_DOWNLOAD}, then tunesmith export "
        f"--to gguf --converter {CONVERTER_SDIST}; its check needs pip install xllamacpp"
    )
