"""The command line: finds the command, imports only that one, ends with a message and an exit code.

Each command is a module, of this package or of a tool's, with `add_arguments(parser)` and
`run(args)`, which returns an exit code unless that is 0. Its docstring begins its help page: a
sentence, then examples that work, then what else a user needs. Its `EPILOG`, if any, ends the page.
Work that takes long to load is a module of its own, which `run` imports when it has checked what
words and files alone can tell.
`LOADS_TORCH` is "here" in one that loads torch or Transformers, and "in ranks" in one that starts
processes which do.

Exit codes: 0 success, 1 failed, 2 the command or recipe is wrong, 75 stopped with all saved, 130
interrupted before there was anything to save, 141 nobody reads the output any more.
"""

import argparse
import difflib
import errno
import faulthandler
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NoReturn

from tunesmith import __version__
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_OK,
    MachineError,
    OtherRankError,
    TunesmithError,
    UsageError,
    disk_fault,
    first_line,
    is_fault,
    is_out_of_memory,
)
from tunesmith.host.ending import run_and_exit
from tunesmith.host.logger import lines_on_stderr
from tunesmith.host.packages import pip_install
from tunesmith.host.shell import shell_path
from tunesmith.host.signals import StopRequest, ignore_stop_signals
from tunesmith.host.streams import fault_of, folded, lasting, visible, width_of
from tunesmith.runtime.host import bound_shape_caches, prepare_threads

# 128 + SIGINT and 128 + SIGPIPE, as shells count.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# group -> command -> (module, what it does), of the engine's own commands.
Verbs = dict[str, dict[str, tuple[str, str]]]
ENGINE_VERBS: Verbs = {
    "start here": {
        "train": ("tunesmith.cli.train", "fine-tune a model on your rows or from a recipe"),
        "recipes": ("tunesmith.cli.recipes", "list, show and copy shipped recipes"),
        "models": ("tunesmith.cli.models", "list model types and what works with each"),
    },
    "look at the data": {
        "data": ("tunesmith.cli.data", "show which tokens a recipe trains on"),
        "fetch": ("tunesmith.cli.fetch", "check license and disk, then download model and data"),
    },
    "train": {},
    "use the result": {},
    "machines": {
        "completion": ("tunesmith.cli.completion", "print a shell completion script"),
    },
}


def find_verbs() -> Verbs:
    """Find the engine's commands and those of each folder of tools/, by group.

    A tool's `__init__` has its `COMMANDS` in the same form. It imports nothing, so that
    `tunesmith --help` is quick.
    """
    groups = {group: dict(verbs) for group, verbs in ENGINE_VERBS.items()}
    for tool in iter_modules([str(Path(__file__).parents[1] / "tools")], "tunesmith.tools."):
        for group, verbs in import_module(tool.name).COMMANDS.items():
            groups[group].update(verbs)
    return groups


VERB_GROUPS = find_verbs()
# What somebody may type who has not found the command.
OTHER_NAMES = {
    "serve": "tunesmith chat RUN; or, for a server: tunesmith export RUN --to vllm --output FOLDER",
    "compare": "tunesmith report A B (curves and losses), or tunesmith eval A B (row by row)",
}
# Options, or one of their choices, that went -> what does the same.
OTHER_OPTIONS = {
    "tunesmith data --write-held-out": (
        "name your own held-out rows in data.validation; held-out.txt in the run directory lists "
        "the rows that data.hold_out drew"
    ),
    "tunesmith doctor --fix": "tunesmith doctor: each fault has its command",
    "tunesmith doctor RECIPE": "tunesmith fetch RECIPE --dry-run",
    "tunesmith launch slurm --site": "the flags: --partition, --account, --setup, --sbatch-arg",
    "tunesmith fetch --hosts": "ssh HOST tunesmith fetch --remove NAME",
    **dict.fromkeys(
        ("tunesmith export --quant nvfp4", "tunesmith export --quant fp8"),
        "--quant bf16, and quantize as vLLM loads it: vllm serve FOLDER --quantization fp8",
    ),
    **dict.fromkeys(
        ("tunesmith bench --ablation", "tunesmith bench --only", "tunesmith bench --rounds"),
        "bench with the other value of a key, beside bench without it; in turns, "
        "benchmarks/speed/ablation.py --only key=value",
    ),
    "tunesmith bench --cold": (
        "bench twice with one new TORCHINDUCTOR_CACHE_DIR: the second finds what the first has "
        "compiled"
    ),
    "tunesmith bench --picture": "bench on the recipe's own rows",
    "tunesmith bench --plain": "nothing: the table is plain text",
    "tunesmith plan --price": "multiply: hours x GPUs x price; `hours` is in plan --json",
    "tunesmith plan --assume": (
        "--on with the GPU of the table that is nearest to yours, or plan on the machine itself; "
        "an unknown bandwidth of a link only leaves the times out"
    ),
    "tunesmith plan --all": (
        "remove it: plan shows the mesh that train takes; parallel.shard=N parallel.tensor=N plans "
        "another one"
    ),
    "tunesmith eval --tasks": (
        "pip install lm-eval, then: lm-eval run --model hf --model_args "
        "pretrained=BASE,peft=RUN/final --tasks NAME (docs/evaluate.md)"
    ),
    "tunesmith eval --exact-match": "--score exact",
    "tunesmith chat --side-by-side": "tunesmith chat RUN, and tunesmith chat RUN --base",
    "tunesmith report --markdown": "the page, or --json for a script",
    "tunesmith watch --json": "tunesmith report --json, or tunesmith status --json",
    "tunesmith sweep --candidates": "list the values: train.learning_rate=1e-5,1e-4,1e-3",
    "tunesmith sweep --rungs": (
        "remove it: every candidate trains to its end. To stop candidates early, use Optuna: its "
        "TrialPruned may be raised in on_record of tunesmith.train (docs/python.md)"
    ),
    "tunesmith sweep --to-the-end": "remove it: every candidate trains to its end",
}
VERBS = {name: verb for group in VERB_GROUPS.values() for name, verb in group.items()}
LAUNCHES = [name for name in VERBS if name.startswith("launch ")]

_PATH_FAULTS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


# How often a positional argument may occur, as usage lines write it.
_USAGE: dict[int | str | None, str] = {
    None: "{}",
    "?": "[{}]",
    "*": "[{} ...]",
    "+": "{0} [{0} ...]",
}


class Parser(argparse.ArgumentParser):
    """argparse with our errors: exit code 2, and no usage page above the message.

    The message names the nearest option or recipe key.
    """

    def short_usage(self) -> str:
        """`tunesmith train [RECIPE] [key=value ...] [options]`: options have their own list."""
        words = [self.prog]
        for action in self._actions:
            if action.option_strings:
                if action.required:
                    words.append(f"{action.option_strings[-1]} {action.metavar}")
            else:
                words.append(_USAGE[action.nargs].format(action.metavar or action.dest))
        return " ".join([*words, "[options]"])

    def typed_options(self, args: argparse.Namespace) -> dict[str, str]:
        """The options with another value than their default: attribute of `args` -> as typed."""
        typed = {}
        for action in self._actions:
            if action.option_strings and vars(args).get(action.dest) != action.default:
                typed[action.dest] = action.option_strings[0]
        return typed

    def error(self, message: str) -> NoReturn:
        fix = self._fix_of(message) or f"{self.prog} --help"
        raise UsageError(message, where=f"command line: {self.prog}", fix=fix)

    def _fix_of(self, message: str) -> str | None:
        """Name what goes in place of a word that went or is nearly an option or a recipe key."""
        choice = re.match(r"argument (\S+): invalid choice: '(.*?)'", message)
        if choice:
            return OTHER_OPTIONS.get(f"{self.prog} {choice[1]} {choice[2]}")
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if not unknown:
            return None
        word = unknown[1]
        option = word.partition("=")[0] if word.startswith("-") else "RECIPE"
        other = OTHER_OPTIONS.get(f"{self.prog} {option}")
        if other:
            return other
        # A hidden option is for processes that a command starts.
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        options = [option for action in shown for option in action.option_strings]
        near = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
        if near:
            return f"did you mean {near[0]}? see {self.prog} --help"
        takes_keys = any("key=value" in str(action.metavar) for action in shown)
        if not word.startswith("--") or not takes_keys:
            return None
        from tunesmith.config.names import keys, suggest_key

        name = word.lstrip("-").partition("=")[0].replace("-", "_").lower()
        key = f"{name}=VALUE" if name in keys() else suggest_key("", name)
        return f"keys of a recipe are written key=value, without dashes: {key}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: the words after `tunesmith` (None: those of the process) -> exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return framed(lambda: dispatch(words), process=argv is None)


def run_process() -> NoReturn:
    """The program `tunesmith`: run the words of this process, which ends with the exit code."""
    StopRequest.is_of_command = True
    run_and_exit(main)


@lines_on_stderr()
def framed(command: Callable[[], int], *, process: bool) -> int:
    """Run a command; whatever ends it becomes a message and an exit code.

    process: whether the process ends with it.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  it lives as long as the process
    sys.stdout = lasting(sys.stdout, raises=True)
    sys.stderr = lasting(sys.stderr)
    if process:
        # A crash in a library ends a process without a word: it says where each thread was.
        faulthandler.enable()
    # bitsandbytes warns of a CPU kernel that it would fetch from the Hub, unasked.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Llama 4 was released with equal factors of low and high frequencies, which are warned of.
    rope = logging.getLogger("transformers.modeling_rope_utils")
    rope.addFilter(lambda record: "high_freq_factor" not in record.getMessage())
    # One of the two is read when torch is loaded.
    bound_shape_caches()
    failure: BaseException | None = None
    try:
        code = command()
        sys.stdout.flush()
    except SystemExit as stop:
        # argparse ends --help so, and rich where no one reads.
        code = EXIT_FAILED if stop.code else EXIT_OK
        if isinstance(stop.code, int):
            code = stop.code
    except KeyboardInterrupt as error:
        code = EXIT_INTERRUPTED
        failure = error
    except BaseException as error:
        if not is_fault(error):
            raise
        failure = error
        reported = error if isinstance(error, TunesmithError) else _machine_error(error)
        code = reported.exit_code if reported else EXIT_FAILED
    # As in `tunesmith recipes | head -1`.
    if isinstance(fault_of(sys.stdout), BrokenPipeError):
        code = EXIT_BROKEN_PIPE
        failure = None
    if process:
        ignore_stop_signals()
    if failure is not None:
        _report(failure)
    return code


def dispatch(words: list[str]) -> int:
    """Run the command that these words name -> exit code; errors are raised."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_OK
    if words[0] in ("-V", "--version"):
        print(f"tunesmith {__version__}")
        return EXIT_OK
    verb, *rest = words
    # `launch` alone is no command: `launch local` is.
    if verb == "launch":
        if rest[:1] in ([], ["-h"], ["--help"]):
            print(_launch_help())
            return EXIT_OK
        verb = " ".join(words[:2])
        rest = rest[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        fix = f"did you mean tunesmith {near[0]}?" if near else "tunesmith --help"
        fix = OTHER_NAMES.get(verb, fix)
        raise UsageError(f"there is no command {verb!r}", where="command line", fix=fix)
    name, purpose = VERBS[verb]
    module = import_module(name)
    parser = Parser(
        prog=f"tunesmith {verb}",
        description=(module.__doc__ or purpose).strip(),
        epilog=vars(module).get("EPILOG"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # A verb's flags are defined by its module, which is imported for this verb alone.
    module.add_arguments(parser)
    parser.usage = parser.usage or parser.short_usage()
    args = parser.parse_intermixed_args(rest)
    args.typed = parser.typed_options(args)
    # Before torch is loaded: libgomp reads its variables once.
    if vars(module).get("LOADS_TORCH") == "here":
        prepare_threads()
    return module.run(args) or EXIT_OK


def _overview() -> str:
    """The page of `tunesmith --help`."""
    lines = [
        "usage: tunesmith COMMAND [...]",
        "",
        "Fine-tune open-weight language models from one recipe file.",
        "",
        "example:",
        "  tunesmith train --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv",
        "  tunesmith chat runs/faq-smollm2-135m-instruct",
    ]
    for group, verbs in VERB_GROUPS.items():
        lines += ["", f"{group}:", *_listed(verbs)]
    lines += [
        "",
        "  tunesmith COMMAND --help    options of a command, with examples",
        "  tunesmith --version",
    ]
    return "\n".join(lines)


def _launch_help() -> str:
    """The page of `tunesmith launch --help`."""
    lines = [
        "usage: tunesmith launch KIND RECIPE [key=value ...] [options]",
        "",
        "Train a recipe on one or more machines; results are the same as with `train`.",
        "",
        "example:",
        "  tunesmith launch local my-recipe.yaml --detach",
        "  tunesmith status",
        "",
        "kinds:",
        *_listed(LAUNCHES),
        "",
        "  tunesmith launch KIND --help    options of a kind, with examples",
    ]
    return "\n".join(lines)


def _listed(verbs: Iterable[str]) -> list[str]:
    """A line for each command, with what it does."""
    width = max(map(len, VERBS)) + 2
    return [f"  {verb:<{width}}{VERBS[verb][1]}" for verb in verbs]


def _report(error: BaseException) -> None:
    """Print what a user should read about an error."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return
    trace = "".join(traceback.format_exception(error))
    if os.environ.get("TUNESMITH_DEBUG") == "1":
        print(trace, file=sys.stderr)
    # That rank reports it.
    if isinstance(error, OtherRankError):
        return
    if not isinstance(error, TunesmithError):
        error = _machine_error(error) or _internal_error(error, trace)
    width = width_of(sys.stderr)
    for line in visible(error.text()).splitlines():
        # Places and commands are copied: a long line of commands has each choice on its own line.
        if line.startswith("  fix: ") and len(line) > width:
            shown = line.replace("; or ", ";\n    or ")
        elif line.startswith(("  where: ", "  fix: ")):
            shown = line
        else:
            shown = folded(line, width)
        print(shown, file=sys.stderr)


def _machine_error(error: BaseException) -> MachineError | None:
    """Say what this machine lacks, met where nothing checked for it: room on a disk, a package."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        # A missing module of ours is no package to install.
        if package and not package.startswith("tunesmith"):
            what = f"the Python package {package} is missing"
            return MachineError(what, fix=pip_install(package))
    if is_out_of_memory(error):
        why = first_line(error)[:300]
        fix = "a smaller batch (--batch-size), a smaller model, or a machine with more memory"
        fix += "; ulimit -v unlimited, if `ulimit -v` shows a limit"
        return MachineError("out of memory", where="this machine", why=why, fix=fix)
    where = ""
    if isinstance(error, OSError):
        where = str(error.filename or "")
    full_disk = disk_fault(error)
    if full_disk is not None:
        if error is fault_of(sys.stdout):
            where = "standard output"
        fix = "free disk space (df -h), then run the same command again"
        return MachineError(full_disk, where=where, fix=fix, cause="disk")
    # Without a path nobody knows what to change.
    if not isinstance(error, OSError) or not where or error.errno not in _PATH_FAULTS:
        return None
    path = Path(where)
    # A file that could not be made is not there to be listed: its folder is.
    place = next((place for place in (path, *path.parents) if os.path.lexists(place)), path)
    fix = f"ls -ld {shell_path(place)}; choose a writable folder, or move what is in the way"
    return MachineError(f"this path cannot be used: {error.strerror}", where=where, fix=fix)


def _internal_error(error: BaseException, trace: str) -> TunesmithError:
    """A fault of ours; the traceback goes to a file, because few who meet it can use it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tunesmith-", suffix=".log", delete=False
        ) as file:
            file.write(f"tunesmith {__version__}, python {sys.version}\n{trace}")
        fix = f"please report it with {file.name}; TUNESMITH_DEBUG=1 shows the traceback here"
    except OSError:
        print(trace, file=sys.stderr)
        fix = "please report it with the traceback above"
    message = (str(error).strip().splitlines() or ["no message"])[0]
    return TunesmithError(f"internal error: {type(error).__name__}: {message}", fix=fix)
