"""The process that serves a GGUF file: llama.cpp's server, from the wheel xllamacpp.

It is a process of its own since the server's end waits for ever now and then, most often on a busy
machine: its loop misses a stop request that comes as it goes to sleep (xllamacpp 2026.10). A
process needs no such end, and a fault of llama.cpp in it is an error here rather than the end of
`tunesmith`. No torch is imported: it starts in a tenth of a second.
"""

import os
import sys

import xllamacpp


def serve_file() -> None:
    """Serve until standard input ends, as it does where the parent is killed.

    The arguments are the parameters of `LlamaCpp`, "" for no adapter. The address is printed on
    standard output, and messages of llama.cpp on standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    # A message of llama.cpp must not fill the pipe, which nobody reads after the address.
    os.dup2(2, 1)
    _, file, adapter, threads, context = sys.argv
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_gpu_layers = 0
    params.n_parallel = 1
    params.n_ctx = int(context)
    params.warmup = False
    params.cpuparams.n_threads = int(threads)
    params.port = 0  # any that is free
    params.verbosity = 1  # errors, which have the cause
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    print(server.listening_address, file=answers, flush=True)
    # The parent's end closes the pipe, also where it was killed.
    sys.stdin.read()
    # Past the server's destructor, which is what may wait for ever
    os._exit(0)


if __name__ == "__main__":
    serve_file()
