"""Main module of the child process that serves a GGUF file with llama.cpp's server (xllamacpp).

The server runs in a separate process for two reasons. First, stopping the server sometimes hangs,
mostly on a busy machine, because its loop misses a stop request that arrives when the loop goes to
sleep (xllamacpp 2026.10). A process can be killed instead. Second, a crash of llama.cpp does not
end `tunesmith`. The module does not import torch, so it starts in a tenth of a second.
"""

import os
import sys

import xllamacpp


def serve_file() -> None:
    """Serve the file until standard input is closed, which also happens if the parent is killed.

    The command-line arguments are the parameters of `LlamaCpp`, with "" for no adapter. The address
    is printed on standard output, and messages of llama.cpp on standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    # Redirect messages of llama.cpp to stderr. They would fill the pipe of stdout, which the parent
    # does not read after the address.
    os.dup2(2, 1)
    _, file, adapter, threads, context = sys.argv
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_gpu_layers = 0
    params.n_parallel = 1
    params.n_ctx = int(context)
    params.warmup = False
    params.cpuparams.n_threads = int(threads)
    params.port = 0  # use any free port
    params.verbosity = 1  # print only errors
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    print(server.listening_address, file=answers, flush=True)
    # Wait until the parent closes the pipe or is killed.
    sys.stdin.read()
    # Exit without the server's destructor, which can hang.
    os._exit(0)


if __name__ == "__main__":
    serve_file()
