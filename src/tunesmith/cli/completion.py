"""Print a shell completion script for commands, options, recipes and keys.

example:
  source <(tunesmith completion bash)  # only for this shell
  # for every new shell
  tunesmith completion bash > \\
    ~/.local/share/bash-completion/completions/tunesmith
  # ~/.zshrc needs fpath+=~/.zfunc before compinit
  tunesmith completion zsh > ~/.zfunc/_tunesmith
  tunesmith completion fish > ~/.config/fish/completions/tunesmith.fish
"""

import argparse
from importlib import import_module
from typing import Any

from tunesmith.cli.main import VERBS
from tunesmith.config.names import keys
from tunesmith.config.schema import is_section
from tunesmith.config.shipped import shipped

# Source code of two completion functions for each shell. `_tunesmith_recipe` completes recipes and
# files. `_tunesmith_key` also completes recipe keys, and files after `key=`.
FUNCTIONS = {
    "bash": """\
_tunesmith_recipe() { compgen -W "RECIPES" -- "$1"; compgen -f -- "$1"; }
_tunesmith_key() {
  if [[ $1 == = || ${COMP_WORDS[COMP_CWORD-1]} == = ]]; then compgen -f -- "${1#=}"; return; fi
  compgen -W "KEYS" -- "$1"; _tunesmith_recipe "$1"
}""",
    "zsh": """\
_tunesmith_recipe() { compadd -- RECIPES; _files }
_tunesmith_key() {
  if compset -P 1 '*='; then _files; else compadd -S '' -- KEYS; _tunesmith_recipe; fi
}""",
    "fish": """\
function _tunesmith_recipe; string join \\n RECIPES; __fish_complete_path (commandline -ct); end
function _tunesmith_key; string join \\n KEYS; _tunesmith_recipe; end""",
}
# Bash code that suppresses the space after a completed key, because the user types the value
# directly after "=".
NO_SPACE = """
_tunesmith() {
  _shtab_tunesmith "$@"
  [[ ${#COMPREPLY[@]} == 1 && $COMPREPLY == *= ]] && compopt -o nospace
}
complete -o bashdefault -F _tunesmith tunesmith"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=list(FUNCTIONS))


def run(args: argparse.Namespace) -> None:
    import shtab

    top = argparse.ArgumentParser(prog="tunesmith")
    groups = {"": top.add_subparsers()}
    for verb, (module, purpose) in VERBS.items():
        group, _, name = verb.rpartition(" ")
        # Create the parser of the group, such as `launch`, before the parser of its first command.
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=purpose).add_subparsers()
        parser = groups[group].add_parser(name, help=purpose, description=purpose)
        import_module(module).add_arguments(parser)
        # Set the attribute `complete`, which shtab reads from each argparse action.
        action: Any
        for action in parser._actions:
            metavar = str(action.metavar or action.dest)
            if "key=value" in metavar:
                action.complete = _by_function("_tunesmith_key")
            elif metavar.partition("|")[0] in ("recipe", "RECIPE", "name"):
                action.complete = _by_function("_tunesmith_recipe")
            elif metavar in ("FILE", "RUN", "DIR", "DIR_OR_ID"):
                action.complete = shtab.FILE
    words = " ".join(f"{key}=" for key, (_, hint) in keys().items() if not is_section(hint))
    functions = FUNCTIONS[args.shell].replace("RECIPES", " ".join(shipped())).replace("KEYS", words)
    script = shtab.complete(top, args.shell, preamble=functions)
    if args.shell == "bash":
        script += NO_SPACE
    print(script)


def _by_function(name: str) -> dict[str, str]:
    """Return the attribute `complete` for an argument that the shell function `name` completes."""
    return {"bash": name, "zsh": name, "fish": f"({name})"}
