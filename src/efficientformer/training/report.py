"""What a finished run leaves for people: curves, an HTML report, a model card."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from efficientformer import __version__
from efficientformer.evaluation.report import add_evaluation
from efficientformer.evaluation.result import Evaluation
from efficientformer.reporting.page import Page, new_figure, png
from efficientformer.spec.count import count
from efficientformer.training.recipe import Recipe
from efficientformer.training.state import Progress, RunFolder
from efficientformer.training.teacher import GIVEN
from efficientformer.training.watch import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN = "The best epoch was chosen by these same pictures, so the figure is a little kind to it."


def write_report(folder: RunFolder, recipe: Recipe, evaluation: Evaluation, progress: Progress) -> None:
    """Write ``curves.png``, ``report.html`` and ``README.md`` (the model card) into a run folder."""
    metrics = folder.metrics()
    curves = draw_curves(metrics)
    (folder.path / "curves.png").write_bytes(png(curves))
    name = evaluation.manifest.provenance["model"]
    page = Page(f"Training of {name}", f"{evaluation.data}, seed {recipe.seed}")
    page.facts(
        [
            ("top-1", f"{evaluation.top1:.2f} %"),
            ("best epoch", f"{progress.best_epoch} of {_epochs(metrics, recipe)}"),
            ("training time", duration(progress.seconds)),
            ("parameters", f"{count(evaluation.manifest.spec).params:,}"),
            ("unreadable training pictures", f"{max((line.get('skipped', 0) for line in metrics), default=0):,}"),
        ]
    )
    page.heading("Curves")
    page.figure(curves, "Loss and top-1 by step; training pictures are augmented, validation pictures are not")
    page.heading("The best weights on the validation pictures")
    page.text(CHOSEN)
    add_evaluation(page, evaluation)
    page.heading("Recipe")
    page.table(("setting", "value"), [(key, str(value)) for key, value in recipe.to_dict().items()])
    page.write(folder.path / "report.html")
    card = model_card(folder, recipe, evaluation, progress)
    (folder.path / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def draw_curves(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Draw loss, top-1 and learning rate over steps from the lines of the metrics."""
    figure = new_figure(9.0, 3.2)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, title, names in (
        (loss, "loss", ("loss", "val_loss")),
        (accuracy, "top-1 (%)", ("train_top1", "val_top1")),
        (rate, "learning rate", ("lr",)),
    ):
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
            if points:
                label = "validation" if name.startswith("val") else "training"
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    return figure


def _epochs(metrics: Sequence[dict[str, Any]], recipe: Recipe) -> str:
    """Return how many epochs were run, and of how many if training stopped early."""
    run = metrics[-1]["epoch"] if metrics else 0
    return str(run) if run == recipe.epochs else f"{run} (stopped early, of {recipe.epochs})"


def model_card(folder: RunFolder, recipe: Recipe, evaluation: Evaluation, progress: Progress) -> str:
    """Return a model card in Markdown: what the network is, how it was trained, what it reached, how to use it."""
    manifest, data = evaluation.manifest, folder.data()
    counts = count(manifest.spec)
    top5 = f", top-5 {evaluation.top5:.2f} %" if evaluation.top5 is not None else ""
    labels = ", ".join(manifest.labels[:20]) + (" ..." if len(manifest.labels) > 20 else "")
    start = manifest.provenance.get("started_from")
    origin = f"weights {start[:16]}" if start else "scratch"
    named = recipe.teacher.replace(GIVEN, "a network in memory with weights ")
    teacher = f"\n* Teacher: {named}, {recipe.distillation} distillation" if recipe.teacher else ""
    weights = shlex.quote(str(folder.path / "best.safetensors"))
    side = "x".join(map(str, manifest.spec.input_size))
    return f"""# {manifest.provenance["model"]} trained on {evaluation.data.rpartition("/")[2]}

* Top-1 {evaluation.top1:.2f} %{top5}, loss {evaluation.loss:.4f} on {evaluation.images:,} validation pictures
  ({data["notes"][0]}). {CHOSEN}
* {counts.params:,} parameters, {counts.macs / 1e6:,.1f} M MACs at {side} pixels
* Preprocessing: {manifest.preprocess.describe()}
* {len(manifest.labels)} classes: {labels}
* Trained on {data["train"]:,} pictures, epochs: {_epochs(folder.metrics(), recipe)}, in {duration(progress.seconds)},
  best epoch {progress.best_epoch}; seed {recipe.seed}; started from {origin}{teacher}
* efficientformer {__version__}; the whole recipe is in recipe.json

```
efficientformer predict PICTURE --model {weights}
efficientformer test {weights} --data {shlex.quote(evaluation.data)} --split val
```
"""
