"""llama.cpp's server in this process, from the wheel xllamacpp, and what it says of a GGUF file."""

import json
import urllib.request
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTEXT = 256  # tokens; the prompts of the check are shorter
SECONDS = 600  # of an answer: a large model on a busy machine
# Of a token that the server did not report: less likely than all that it did.
UNREPORTED = -50.0


def has_llama_cpp() -> bool:
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file, and an adapter's beside it, served on a free local port until it is dropped."""

    def __init__(
        self,
        file: Path,
        adapter: Path | None = None,
        *,
        threads: int = 1,
        context: int = CONTEXT,
    ) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_gpu_layers = 0
        params.n_parallel = 1
        params.n_ctx = context
        params.warmup = False
        params.cpuparams.n_threads = threads
        params.port = 0
        params.verbosity = 0
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request of llama.cpp's server."""
        address = self._server.listening_address + path
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)

    def ids(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text, special tokens in it among them."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        ids: list[int] = self.post("/tokenize", body)["tokens"]
        return ids

    def log_probabilities(self, ids: list[int], vocab: int) -> Tensor | None:
        """Of the token after `ids`: fp32 [vocab]; None where the likeliest is half a letter, which
        the server does not report.
        """
        body = {
            "prompt": ids,
            "n_predict": 1,
            "n_probs": vocab,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        answer = self.post("/completion", body)
        if "completion_probabilities" not in answer:
            return None
        values = torch.full((vocab,), UNREPORTED)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            values[token["id"]] = token["logprob"]
        return values

    def answer(self, ids: list[int], tokens: int, stops: list[str]) -> str:
        """What it writes after `ids`, the likeliest token each time."""
        body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "stop": stops}
        text: str = self.post("/completion", body)["content"]
        return text
