"""The commands around people's labels: `align label` and `align feedback`."""

from typing import Annotated

import typer

from align.cli_words import FOLDERS, StoreAt, at_home

feedback = typer.Typer(no_args_is_help=True, help="Bring labels into a loop's store, and out of it.")


def label(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", callback=at_home, help="A loop's folder, its store.db, or a database URL."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8765,
    add: Annotated[list[str] | None, typer.Option(help="NAME of a person who gets a new sign-in link.")] = None,
    admin: Annotated[list[str] | None, typer.Option(help="The same, for one who sees the overview too.")] = None,
    guidelines: Annotated[
        str | None, typer.Option(callback=at_home, help="A Markdown file shown above the answers.")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A name by which people reach the page.")] = None,
    lease_seconds: Annotated[float, typer.Option(help="How long a pair waits for a page that has gone away.")] = 120.0,
    store: StoreAt = None,
) -> None:
    """Serve the page on which people say which of two answers is better."""
    from align.feedback.page.command import label as serve_page

    FOLDERS.append(run)
    serve_page(
        run,
        host=host,
        port=port,
        add=add or [],
        admin=admin or [],
        guidelines=guidelines,
        allow_hosts=allow_host or [],
        lease_seconds=lease_seconds,
        echo=typer.echo,
        store_at=store,
    )


@feedback.command("export")
def export_feedback(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", callback=at_home, help="A loop's folder, its store.db, or a database URL."),
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", callback=at_home, help="A new file: .jsonl or .json.")],
    format: Annotated[
        str, typer.Option(help="trl, openai, argilla, label_studio: pairs as these read them; labels: every label.")
    ] = "trl",
    with_ties: Annotated[bool, typer.Option("--with-ties", help="Also pairs left undecided.")] = False,
    store: StoreAt = None,
) -> None:
    """Write what has been labelled to a file."""
    from align.feedback.exchange import export_run

    FOLDERS.append(run)
    typer.echo(export_run(run, file, format, with_ties=with_ties, store_at=store))


@feedback.command("import")
def import_feedback(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", callback=at_home, help="A loop's folder, its store.db, or a database URL."),
    ],
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", callback=at_home, help="Preferences in a format that the reward stage reads."),
    ],
    format: Annotated[
        str,
        typer.Option(help="As a recipe's data: auto, hh_rlhf, openai, kto, argilla, label_studio, file.py:function."),
    ] = "auto",
    store: StoreAt = None,
) -> None:
    """Take preferences that people have given elsewhere, as labels of round 0."""
    from align.feedback.exchange import import_run

    FOLDERS.append(run)
    typer.echo(import_run(run, file, store_at=store, format=format))


Kept = Annotated[
    str,
    typer.Argument(
        metavar="RUN", callback=at_home, help="A loop's recipe, its folder, its store.db, or a database URL."
    ),
]


@feedback.command("backup")
def back_up(
    run: Kept,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", callback=at_home, help="A new file; RUN/backups keeps it if left out."),
    ] = None,
) -> None:
    """Copy a store, whole and at one moment, whoever writes to it: one SQLite file, of PostgreSQL too."""
    from align.loop.keeping import backup

    typer.echo(backup(run, file))


@feedback.command("restore")
def bring_back(
    run: Kept,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", callback=at_home, help="A copy; the newest of RUN/backups if left out."),
    ] = None,
) -> None:
    """Bring a copy of a store back; what is in its place is kept beside."""
    from align.loop.keeping import restore

    typer.echo(restore(run, file))
