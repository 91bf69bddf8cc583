"""The `align` command. Thin, and light until something heavy is really needed."""

import json
import sys
from typing import Annotated

import typer

from align.errors import BadInput
from align.wording import safe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SFT, reward model and PPO over one base model, from recipes, under accelerate.",
)

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that travels with align, such as `quickstart`."
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=value ...]", help="Keys of the recipe to change.")]


@app.command()
def run(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Run a stage or a whole pipeline; what is finished is passed over, what was stopped goes on."""
    from align.pipeline import run_recipe
    from align.recipe import load_recipe

    raise typer.Exit(run_recipe(load_recipe(recipe, overrides or []), overrides or []))


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Validate a recipe and show what it would do: files, trainable parameters, and tokens that carry loss."""
    from align.door import check_recipe
    from align.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    states = check_recipe(loaded)
    from align.report.checking import show

    show(loaded, states)


@app.command()
def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="The stage, where the recipe has several.")] = None,
    methods: Annotated[str, typer.Option(help="Such as lora,ia3,lora:r=4; all seven if left out.")] = "",
    budget: Annotated[str, typer.Option(help="Of each run: steps (150) or minutes (5m).")] = "100",
    sweep_steps: Annotated[
        int | None, typer.Option(help="Try rates so long only; then the best for the budget.")
    ] = None,
    rates: Annotated[list[str] | None, typer.Option(help="lora=1e-4,2e-4 instead of the sources' rates.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of runs and report; <output>-compare if left out.")] = None,
) -> None:
    """Run a stage with each tuning method on your data, and show which one to take."""
    from align.compare import compare as compare_methods
    from align.compare import order_of

    order = order_of(
        recipe,
        overrides or [],
        stage=stage,
        methods=methods,
        budget=budget,
        sweep_steps=sweep_steps,
        rates=rates or [],
        out=out,
    )
    raise typer.Exit(compare_methods(order))


@app.command()
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of an sft or ppo run.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new folder.")],
) -> None:
    """Merge a run's adapter into its base: a plain transformers folder."""
    from align.artifact import read_manifest

    read_manifest(run)  # fails in milliseconds
    from align.worker import quiet_libraries

    quiet_libraries()
    from align.models.merging import merge as merge_run

    drift = merge_run(run, out)
    typer.echo(f"{out}: merged; largest difference of a logit to the adapter's on a probe: {drift:.2g}")


@app.command()
def recipes() -> None:
    """List the recipes that travel with align."""
    from align.resources import recipes_folder

    folder = recipes_folder()
    for path in sorted(folder.rglob("*.yaml")):
        if path.parent.name != "accelerate":
            typer.echo(str(path.relative_to(folder)))


@app.command()
def status(run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Print a run's manifest."""
    from align.artifact import read_manifest

    typer.echo(json.dumps(read_manifest(run), indent=2))


def main() -> None:
    """Entry point: bad input is one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except BadInput as error:
        print(safe(f"align: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
