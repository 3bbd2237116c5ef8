"""Check license, access and disk, then download a model and a recipe's data.

example:
  tunesmith fetch smollm2-135m-lora  # the model and the data of a recipe
  # license, access and sizes; downloads nothing
  tunesmith fetch Qwen/Qwen3-8B --dry-run

An interrupted download resumes where it stopped. `hf cache ls` lists the
cache, and `hf cache rm` deletes from it. The variable HF_HOME is its folder,
and HF_TOKEN is your access token.
"""

import argparse
from pathlib import Path

from tunesmith.cli.options import add_json
from tunesmith.cli.recipe_options import add_overrides
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Model, Source
from tunesmith.config.shipped import shipped
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_word
from tunesmith.rows.source.open_source import is_local


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RECIPE|MODEL",
        help="a recipe, or a model: a Hub id or a folder",
    )
    add_overrides(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a model (not with a recipe)")
    parser.add_argument(
        "--update", action="store_true", help="ask the Hub for a newer commit of a cached model"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only check license, access and disk, and show what would be downloaded",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    # Check the arguments first, because the import of huggingface_hub is slow.
    model, sources = _model_and_sources(args)
    from tunesmith.cli.run_fetch import fetch_all

    fetch_all(model, sources, dry=args.dry_run, update=args.update, as_json=args.json)


def _model_and_sources(args: argparse.Namespace) -> tuple[Model, list[Source]]:
    """Return the model and the data sets on the Hub that the command line asks for."""
    if args.name is None:
        raise UsageError(
            "fetch requires a recipe or a model",
            where="command line",
            fix="run `tunesmith fetch smollm2-135m-lora`",
        )
    is_recipe = args.name in shipped() or Path(args.name).suffix in (".yaml", ".yml")
    command = f"tunesmith fetch {shell_word(args.name)}"
    if is_recipe and args.revision is not None:
        raise UsageError(
            f"--revision is for a model, but {args.name} is a recipe",
            where="command line",
            fix=f"run `{command} model.revision=REVISION`",
        )
    if args.overrides and not is_recipe:
        raise UsageError(
            f"{args.name} is not a recipe, so its keys cannot be set with key=value",
            where="command line",
            fix=f"run `{command}`; to choose the commit of a model, add --revision REVISION",
        )
    if is_recipe:
        recipe = load_recipe(args.name, args.overrides)
        # Add each data set only once, even if several sources use splits of the same data set.
        sources = {
            (source.source, source.name, source.revision): source
            for source in (*recipe.data.train, *recipe.data.validation)
            if not is_local(source.source)
        }
        return recipe.model, list(sources.values())
    return Model(name=args.name, revision=args.revision), []
