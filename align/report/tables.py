"""Tables for the terminal. What a model wrote is shown as plain text: no markup, no control characters."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from align.files import write_lines
from align.track import read_rows
from align.wording import safe

SHOWN = 160  # characters of a text in a cell


def plain(text: str, limit: int = SHOWN, *, keep_spaces: bool = False) -> str:
    """`text` on one line, control and direction characters replaced, cut in the middle to `limit` characters."""
    shown = safe("".join(" " if c in "\n\t\r" else c for c in text))
    shown = shown if keep_spaces else " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit * 2 // 3] + " … " + shown[-(limit // 3) :]


def prompt_text(prompt: Any) -> str:
    """The last message of a conversation, or the plain prompt."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def sample_table(rows: list[dict[str, Any]]) -> Table:
    """Prompt, response, score and KL of some answers, and what reward functions say of them beside."""
    further = [name for name in rows[0] if name not in ("iteration", "prompt", "response", "score", "kl")]
    table = Table(title=f"samples, iteration {rows[0]['iteration']}", title_justify="left", expand=True)
    table.add_column("prompt", ratio=3)
    table.add_column("response", ratio=4)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("KL", justify="right", no_wrap=True)
    for name in further:
        table.add_column(Text(plain(name)), ratio=1)
    for row in rows:
        table.add_row(
            Text(plain(prompt_text(row["prompt"]))),
            Text(plain(row["response"])),
            f"{row['score']:.2f}",
            f"{row['kl']:.2f}",
            *(Text(plain(str(row.get(name, "")))) for name in further),
        )
    return table


def save_samples(folder: Path, iteration: int, rows: list[dict[str, Any]]) -> None:
    """Adds `rows` to samples.jsonl, in place of any from this iteration or later (a resumed run comes here again)."""
    path = folder / "samples.jsonl"
    before = read_rows(path)  # what is damaged was told at the start
    write_lines(path, [row for row in before if row.get("iteration", iteration) < iteration] + rows)


def result_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A plain table: first column to the left, the others to the right."""
    table = Table(title=Text(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """The same as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
