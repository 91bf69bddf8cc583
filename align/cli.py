"""The `align` command. Thin, and light until something heavy is really needed."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli_people import feedback, label
from align.cli_words import FOLDERS, Changes, NewFolder, Overrides, RecipeName, ShardSize, StoreAt, at_home
from align.endings import FAILED, REFUSED, Ending, ending_of, last, last_words_went_nowhere, open_streams, take_signals
from align.errors import BadInput

UsageError: Any = typer.BadParameter.__mro__[1]  # which has no public name of its own

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SFT, reward model, DPO and PPO over one base model, from recipes, under accelerate.",
)

app.add_typer(feedback, name="feedback")


def _version(is_asked: bool) -> None:
    """Prints the version, and those of what decides how it computes."""
    if is_asked:
        from align.artifact import VERSIONED, version_of

        typer.echo("\n".join(f"{name} {version_of(name)}" for name in VERSIONED))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions that matter.")
    ] = False,
) -> None:
    pass


@app.command()
def run(recipe: RecipeName, overrides: Overrides = None, changes: Changes = None) -> None:
    """Run a stage or a whole pipeline; what is finished is passed over, what was stopped goes on."""
    from align.pipeline import run_recipe
    from align.recipe import load_recipe

    words = [*(overrides or []), *(changes or [])]
    loaded = load_recipe(recipe, words)
    FOLDERS.extend(stage.output for stage in loaded.stages.values())
    raise typer.Exit(run_recipe(loaded, words, changes or []))


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Show what each key is that the recipe leaves out, too.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan memory and time: `here`, or for a GPU of a size such as 24GB, which need not be here."),
    ] = None,
    row: Annotated[
        str | None, typer.Option(help="Show what becomes of this row: 17 of the first file, or rows.jsonl:17.")
    ] = None,
) -> None:
    """Validate a recipe and show what it would do: files, trainable parameters, and tokens that carry loss."""
    from align.recipe import is_of_loop, load_recipe
    from align.recipe_file import read_recipe
    from align.sizes import size_of

    if is_of_loop(read_recipe(recipe, overrides or [])[1]):
        _check_loop(recipe, overrides or [], defaults, {"--memory": memory, "--row": row})
        return

    is_elsewhere = memory is not None and size_of(memory) is not None  # how it would start here is nothing to it
    loaded = load_recipe(recipe, overrides or [])
    from align.preflight import check_recipe, launches, remarks

    states = check_recipe(loaded)
    starting = [] if is_elsewhere else [name for name in loaded.stages if states[name] != "finished"]
    plans = launches(loaded, starting)
    from align.libraries import quiet_libraries

    quiet_libraries()
    from align.report.checking import show

    quiet_libraries()
    plans_told = {name: plan.description for name, plan in plans.items()}
    show(loaded, states, plans_told, remarks(loaded), defaults=defaults, row=row)
    if memory is not None:
        from align.planning.shown import show_plans

        show_plans(loaded, memory, plans)


def _check_loop(recipe: str, overrides: list[str], defaults: bool, unused: dict[str, str | None]) -> None:
    for name, value in unused.items():
        if value is not None:
            raise BadInput(f"`{name}` is for recipes of stages, and {recipe} is a loop's; leave it out")
    from align.loop.rounds import load_loop

    loop = load_loop(recipe, overrides)
    from align.libraries import quiet_libraries

    quiet_libraries()
    from align.loop.checking import show_loop

    show_loop(loop, defaults=defaults)


@app.command()
def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="The stage, where the recipe has several.")] = None,
    methods: Annotated[str, typer.Option(help="Such as lora,ia3,lora:r=4; all seven if left out.")] = "",
    budget: Annotated[str | None, typer.Option(help="Of each run: steps (100 if left out) or minutes (5m).")] = None,
    sweep_steps: Annotated[
        int | None, typer.Option(help="Try rates so long only; then the best for the budget.")
    ] = None,
    rates: Annotated[list[str] | None, typer.Option(help="lora=1e-4,2e-4 instead of the sources' rates.")] = None,
    algorithms: Annotated[
        str | None,
        typer.Option(help="Stages of a pipeline that make policies, instead of methods: dpo,rloo, or all."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Of each algorithm; 5 if left out.")] = None,
    out: Annotated[
        str | None,
        typer.Option(callback=at_home, help="Folder of runs and report; else beside the recipe's output."),
    ] = None,
) -> None:
    """Run a stage with each tuning method, or a pipeline's algorithms over seeds, and show which one to take."""
    if algorithms is not None:
        from align.algorithms import compare_algorithms, order_of_algorithms

        names = {"--stage": stage, "--methods": methods or None, "--sweep-steps": sweep_steps, "--rates": rates}
        asked = order_of_algorithms(
            recipe,
            overrides or [],
            algorithms=algorithms,
            seeds=5 if seeds is None else seeds,
            budget=budget,
            out=out,
            unused=names,
        )
        raise typer.Exit(compare_algorithms(asked))
    if seeds is not None:
        raise BadInput("`--seeds` is for comparing algorithms, and has no meaning without `--algorithms`; leave it out")
    from align.compare import compare as compare_methods
    from align.compare import order_of

    order = order_of(
        recipe,
        overrides or [],
        stage=stage,
        methods=methods,
        budget=budget or "100",
        sweep_steps=sweep_steps,
        rates=rates or [],
        out=out,
    )
    raise typer.Exit(compare_methods(order))


@app.command()
def loop(recipe: RecipeName, overrides: Overrides = None, changes: Changes = None) -> None:
    """Run the rounds of a feedback loop; it stops where people have labels to give, and goes on when they are in."""
    from align.loop.rounds import load_loop
    from align.loop.run import run_loop

    loaded = load_loop(recipe, overrides or [], changes or [])
    FOLDERS.append(loaded.out)
    raise typer.Exit(run_loop(loaded))


@app.command()
def serve(
    recipe: RecipeName,
    overrides: Overrides = None,
    start: Annotated[bool, typer.Option("--start", help="Start it here, and end it when this command ends.")] = False,
) -> None:
    """Print the command of the vLLM server that a recipe's `sampling.engine: vllm` draws from."""
    from align.serve import command_of, in_lines, read, serve_here

    command = command_of(read(recipe, overrides or []))
    typer.echo(in_lines(command))
    if start:
        raise typer.Exit(serve_here(command))


@app.command()
def merge(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", callback=at_home, help="Folder of an sft, dpo or ppo run, or any PEFT adapter."),
    ],
    out: NewFolder,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16: what the weights are rounded to, once merged.")
    ] = None,
    max_shard_size: ShardSize = "5GB",
    base: Annotated[
        str | None,
        typer.Option(callback=at_home, help="Of an adapter made elsewhere: its base, if not what its folder names."),
    ] = None,
) -> None:
    """Merge an adapter into its base: a plain transformers folder."""
    from align.identity import has_adapter
    from align.manifest import MANIFEST, read_manifest

    is_run = (Path(run) / MANIFEST).is_file() or not has_adapter(run)
    if is_run:
        read_manifest(run)  # fails in milliseconds
        if base is not None:
            raise BadInput(f"--base is for an adapter made elsewhere; {run} says itself what it stands over")
    from align.hub import name_all
    from align.libraries import quiet_libraries

    name_all(base)
    quiet_libraries()
    from align.models import export

    if is_run:
        drift = export.merge(run, out, dtype=dtype, max_shard_size=max_shard_size)
    else:
        drift = export.merge_adapter(run, out, base=base, dtype=dtype, max_shard_size=max_shard_size)
    typer.echo(f"{out}: merged; largest difference of a logit to the adapter's on a probe: {drift:.2g}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", callback=at_home, help="Folder of a reward run.")],
    out: NewFolder,
    as_: Annotated[str, typer.Option("--as", help="classifier: transformers' sequence classifier of one score.")],
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Write a reward model as transformers opens it by itself."""
    from align.manifest import read_manifest

    if as_ != "classifier":
        raise BadInput(f"--as: {as_} is nothing that a run is exported as; write --as classifier")
    read_manifest(run)
    from align.libraries import quiet_libraries

    quiet_libraries()
    from align.models.export import export_classifier

    drift = export_classifier(run, out, max_shard_size=max_shard_size)
    typer.echo(f"{out}: a classifier; largest difference of a score to the run's on a probe: {drift:.2g}")


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", callback=at_home, help="A run, a folder or a Hub id.")],
    other: Annotated[
        str | None,
        typer.Argument(metavar="[OTHER]", callback=at_home, help="Another beside it; `base`: RUN's base."),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(callback=at_home, help="A reward run or a classifier, whose score is shown.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(callback=at_home, help="A .jsonl file that takes which of two answers is better.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the softmax that answers are drawn from.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
) -> None:
    """Talk with a policy, or with two side by side: score and KL beside each answer."""
    from align.hub import name_all
    from align.libraries import quiet_libraries
    from align.settings import Sampling

    name_all([run, other, reward])
    quiet_libraries()
    from align.chat import Order
    from align.chat import chat as talk

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    talk(Order(run, other, reward, keep, sampling, seed))


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", callback=at_home, help="Folder of a finished run.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The model's name on the Hub.")],
    base: Annotated[str | None, typer.Option(help="The base's name there, where the run had it from a folder.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send it; without, what would be sent is shown.")] = False,
    public: Annotated[bool, typer.Option("--public", help="For all to see, where it is new.")] = False,
) -> None:
    """Send a run's model to the Hub, with its card: first shown, then by --yes sent."""
    from align.push import push as push_run

    for line in push_run(run, name, base=base, is_sent=yes, is_public=public):
        typer.echo(line)


@app.command()
def recipes() -> None:
    """List the recipes that travel with align."""
    from align.resources import recipes_folder

    folder = recipes_folder()
    for path in sorted(folder.rglob("*.yaml")):
        if path.parent.name != "accelerate":
            typer.echo(str(path.relative_to(folder)))


@app.command()
def new(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="sft, reward, dpo, ppo or loop.")],
    base: Annotated[str, typer.Option(callback=at_home, help="Folder or Hub id of a causal language model.")],
    data: Annotated[list[str], typer.Option(help="File or Hub id of what is learnt from; may be given again.")],
    policy: Annotated[
        str | None, typer.Option(callback=at_home, help="dpo, ppo: the run it starts from; loop: the SFT run.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(callback=at_home, help="ppo: a reward run, a classifier, or file.py:function.")
    ] = None,
    unseen: Annotated[
        str | None, typer.Option(callback=at_home, help="loop: prompts that are never trained on.")
    ] = None,
    out: Annotated[str | None, typer.Option(callback=at_home, help="The file; KIND.yaml if left out.")] = None,
) -> None:
    """Write a recipe for a base and data of one's own, with the keys that matter and what each means."""
    from align.new import Given, write_recipe

    found = [str(at_home(each)) for each in data]
    typer.echo(write_recipe(Given(kind, base, tuple(found), policy, reward, unseen), out))


@app.command()
def keys(
    where: Annotated[
        str | None,
        typer.Argument(metavar="[WHERE]", help="A stage, `loop`, a method, or a key: ppo, sft.train, kl_coef."),
    ] = None,
) -> None:
    """Show what a recipe may say: every key with its default, its range and its meaning."""
    from align.keys import show_keys

    show_keys(where)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, by which an editor completes and checks them."""
    from align.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))


app.command()(label)


@app.command()
def status(run: Annotated[str, typer.Argument(metavar="RUN", callback=at_home, help="A run's folder.")]) -> None:
    """Print a run's manifest."""
    from align.manifest import read_manifest

    typer.echo(json.dumps(read_manifest(run), indent=2))


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", callback=at_home, help="Folder of a loop, of a pipeline, or of a run.")
    ],
    others: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN ...]", help="Further runs, to be shown beside it.")
    ] = None,
    out: Annotated[str | None, typer.Option(callback=at_home, help="The folder of several runs' page.")] = None,
    store: StoreAt = None,
) -> None:
    """Write RUN/report.html, one page that opens offline: figures, curves, costs and samples."""
    from align.report.loop_page import report as write_report

    FOLDERS.append(run)
    typer.echo(write_report(run, store, [str(at_home(each)) for each in others or ()], out=out))


@app.command()
def watch(
    run: Annotated[
        str, typer.Argument(metavar="RUN", callback=at_home, help="Folder of a run, of a pipeline, or of a loop.")
    ],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    store: StoreAt = None,
) -> None:
    """Show a run or a loop as it goes on, in the terminal: where it stands, curves, figures, samples. Ctrl-C ends."""
    from align.watch import watch as watch_run

    watch_run(run, every=every, store=store)


def main() -> None:
    """Entry point: however the command ends, its exit code tells how, and its last line why (`align.endings`)."""
    open_streams()
    last.hold()
    received = take_signals()
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()  # else it fails later, where nobody tells
        ending = Ending(int(code), "")
    except UsageError as error:
        ending = _usage(error)
    except SystemExit as left:
        ending = _left(left)
    except BaseException as error:  # else Python shows a traceback
        ending = ending_of(error, *reversed(FOLDERS))
    if received and ending.code:  # whatever it was that the signal broke
        number = received[-1]
        ending = Ending(128 + number, last.ending.line or f"stopped by {signal.Signals(number).name}")
    last.leave(ending)


def _left(error: SystemExit) -> Ending:
    """A way out that is not ours: rich's or typer's where nobody reads what they print, or some library's."""
    if isinstance(error.__context__, BrokenPipeError):
        is_of_output = error.code == 1 and last_words_went_nowhere()
        return Ending(128 + signal.SIGPIPE, "") if is_of_output else ending_of(error.__context__, *reversed(FOLDERS))
    is_code = error.code is None or isinstance(error.code, int)
    return Ending(int(error.code or 0), "") if is_code else Ending(FAILED, str(error.code))  # type: ignore[arg-type]


def _usage(error: Any) -> Ending:
    """Words that the command does not take; none at all: its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return Ending(REFUSED, "")
    command = error.ctx.command_path if error.ctx is not None else "align"
    return Ending(REFUSED, f"{error.format_message().rstrip('.')} (see `{command} --help`)")


if __name__ == "__main__":
    main()
