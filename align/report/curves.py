"""curves.png of a run: losses, and for PPO the score against the KL it was bought with."""

from pathlib import Path
from typing import Any

from align.files import write_atomically
from align.track import read_metrics

INK, ACCENT, PALE, PALE_BLUE = "#1f2a44", "#c2410c", "#94a3b8", "#bfdbfe"


def new_figure(columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e2e8f0", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, folder: Path) -> None:
    write_atomically(folder / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def _series(rows: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def _line(axis: Any, rows: list[dict[str, Any]], key: str, title: str, *, x: str, held_out: str | None = None) -> None:
    axis.plot(*_series(rows, key), color=PALE if held_out else INK, linewidth=1.4, label="training")
    if held_out and _series(rows, held_out)[0]:
        axis.plot(*_series(rows, held_out), color=ACCENT, marker="o", markersize=3.5, linewidth=1.4, label="held out")
        axis.legend(frameon=False, fontsize=8)
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=8)


def sft_curves(folder: Path) -> None:
    """Loss and token accuracy over steps."""
    rows = read_metrics(folder)
    figure, axes = new_figure(2)
    _line(axes[0], rows, "loss", "loss", x="step", held_out="eval_loss")
    _line(axes[1], rows, "mean_token_accuracy", "token accuracy", x="step", held_out="eval_mean_token_accuracy")
    _save(figure, folder)


def reward_curves(folder: Path) -> None:
    """Loss and pair accuracy over steps."""
    rows = read_metrics(folder)
    figure, axes = new_figure(2)
    _line(axes[0], rows, "loss", "pair loss", x="step", held_out="eval_loss")
    _line(axes[1], rows, "accuracy", "pair accuracy", x="step", held_out="eval_accuracy")
    _save(figure, folder)


def dpo_curves(folder: Path) -> None:
    """Loss, pair accuracy and implicit rewards over steps."""
    rows = read_metrics(folder)
    figure, axes = new_figure(3)
    _line(axes[0], rows, "loss", "loss", x="step", held_out="eval_loss")
    _line(axes[1], rows, "accuracy", "pairs told rightly", x="step", held_out="eval_accuracy")
    _line(axes[2], rows, "rewards_chosen", "implicit rewards", x="step")
    axes[2].lines[0].set_label("chosen")
    axes[2].plot(*_series(rows, "rewards_rejected"), color=ACCENT, linewidth=1.4, label="rejected")
    axes[2].legend(frameon=False, fontsize=8)
    _save(figure, folder)


def ppo_curves(folder: Path) -> None:
    """Score against KL, and score, KL and losses over iterations."""
    from matplotlib.colors import LinearSegmentedColormap

    rows = read_metrics(folder)
    figure, axes = new_figure(3)
    trained = [row for row in rows if {"score", "kl"} <= row.keys()]
    points = axes[0].scatter(
        [r["kl"] for r in trained],
        [r["score"] for r in trained],
        s=9,
        c=[r["step"] for r in trained],
        cmap=LinearSegmentedColormap.from_list("iterations", [PALE_BLUE, INK]),
    )
    evaluated = [row for row in rows if {"eval_score", "eval_kl"} <= row.keys()]
    if evaluated:
        axes[0].plot(
            [r["eval_kl"] for r in evaluated],
            [r["eval_score"] for r in evaluated],
            color=ACCENT,
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            label="held out",
        )
        axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    if trained:
        figure.colorbar(points, ax=axes[0], label="iteration", shrink=0.8)
    axes[0].set_title("score against KL to the reference", loc="left", fontsize=10, color=INK)
    axes[0].set_xlabel("sequence KL (nats)", fontsize=8)
    _line(axes[1], trained, "score", "score", x="iteration")
    if evaluated:
        axes[1].plot(*_series(evaluated, "eval_score"), color=ACCENT, marker="o", markersize=3.5, linewidth=1.2)
    axes[2].plot(*_series(trained, "policy_loss"), color=INK, linewidth=1.2, label="policy")
    if any("value_loss" in row for row in trained):
        axes[2].plot(*_series(trained, "value_loss"), color=ACCENT, linewidth=1.2, label="value")
    axes[2].set_title("losses", loc="left", fontsize=10, color=INK)
    axes[2].set_xlabel("iteration", fontsize=8)
    axes[2].legend(frameon=False, fontsize=8)
    _save(figure, folder)
