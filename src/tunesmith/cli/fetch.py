"""Check license, access and disk, then download a model and a recipe's data.

example:
  tunesmith fetch smollm2-135m-lora  # the model and the data of a recipe
  # license, access and sizes; downloads nothing
  tunesmith fetch Qwen/Qwen3-8B --dry-run
  tunesmith fetch --list
  tunesmith fetch --remove Qwen/Qwen3-8B
  ssh spark-b tunesmith fetch --remove "'meta-llama/*'" --dry-run

An interrupted download resumes where it stopped. HF_HOME names the cache,
HF_TOKEN is your access token.
"""

import argparse
from pathlib import Path

from tunesmith.cli.options import add_json
from tunesmith.cli.recipe_options import add_overrides
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Source
from tunesmith.config.shipped import shipped
from tunesmith.data.source.open_source import is_local
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RECIPE|MODEL",
        help="a recipe, or a Hub id, folder or .gguf file",
    )
    add_overrides(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a model, without a recipe")
    parser.add_argument(
        "--update", action="store_true", help="ask the Hub for a newer commit of a cached model"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only check and show; download or remove nothing"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the contents of the caches, largest first"
    )
    what = "delete a model or data set from the cache; patterns work"
    parser.add_argument("--remove", metavar="NAME", help=what)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    # What the words name is told before the Hub's library is loaded.
    named = None
    if not args.list and args.remove is None:
        named = _model_and_sources(args)
    from tunesmith.cli.run_fetch import fetch_all, list_caches, remove_from_caches

    if named is not None:
        fetch_all(*named, dry=args.dry_run, update=args.update, as_json=args.json)
    elif args.list:
        list_caches(as_json=args.json)
    else:
        remove_from_caches(args.remove, dry=args.dry_run, as_json=args.json)


def _model_and_sources(args: argparse.Namespace) -> tuple[Model, list[Source]]:
    """The model and the Hub's data sets that the command line asks for."""
    if args.name is None:
        fix = "tunesmith fetch smollm2-135m-lora, or --list"
        raise UsageError("fetch requires a recipe or a model", where="command line", fix=fix)
    is_recipe = args.name in shipped() or Path(args.name).suffix in (".yaml", ".yml")
    if (is_recipe and args.revision is not None) or (args.overrides and not is_recipe):
        raise UsageError(
            "key=value is for a recipe, and --revision for a model",
            where="command line",
            fix=f"tunesmith fetch {shell_word(args.name)} "
            + ("model.revision=REVISION" if is_recipe else "--revision REVISION"),
        )
    if is_recipe:
        recipe = load_recipe(args.name, args.overrides)
        sources = {}
        # A data set may be the source of several splits: it is fetched once.
        for source in (*recipe.data.train, *recipe.data.validation):
            if not is_local(source.source):
                sources[source.source, source.name, source.revision] = source
        return recipe.model, list(sources.values())
    return Model(name=args.name, revision=args.revision), []
