"""What several commands take: the types of their arguments and options, each with its help."""

from pathlib import Path
from typing import Annotated

import typer

from align.errors import BadInput

FOLDERS: list[str | Path] = []  # where the command's runs are: their error.log takes what nobody foresaw


def at_home(value: str | None) -> str | None:
    """A path of the command line, `~` as the home folder even where the shell has left it."""
    from align.settings import fields

    try:
        return None if value is None else fields.at_home(value)
    except ValueError as error:
        raise BadInput(f"{value!r}: {error}") from error


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that travels with align, such as `quickstart`."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Keys of the recipe to change.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=value",
        help="The same, for what was stopped and goes on: a rate, the seed, the guard, ... is another from there on.",
    ),
]
StoreAt = Annotated[
    str | None,
    typer.Option("--store", callback=at_home, help="The loop's store, where it is not in its folder: a file or a URL."),
]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Of one file of weights, such as 5GB.")]
NewFolder = Annotated[str, typer.Argument(metavar="OUT", callback=at_home, help="A new folder.")]
