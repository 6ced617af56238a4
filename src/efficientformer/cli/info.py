"""``efficientformer info``: all that is known of one network, or of one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from efficientformer.spec.arch import ArchSpec, BlockSpec
    from efficientformer.spec.manifest import Manifest
    from efficientformer.spec.zoo import ModelCard


def info(
    model: Annotated[str, typer.Argument(help="A zoo name or alias, hf-hub:OWNER/NAME, a weights or exported file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a network: architecture, true and published counts, stages, preprocessing, sources; or what a file holds."""
    from rich.console import Console

    from efficientformer.export.deployable import file_of
    from efficientformer.spec.zoo import resolve

    console = Console(highlight=False)
    file = file_of(model)
    if file is not None and Path(file).is_file():
        held = _read(Path(file))
        if as_json:
            typer.echo(json.dumps(held.as_dict(), indent=2))
            return
        _print_held(console, held)
        _print_stages(console, held.manifest.spec)
        return
    card = resolve(model).card
    if as_json:
        typer.echo(json.dumps(_as_dict(card), indent=2))
        return
    _print_facts(console, card)
    _print_stages(console, card.spec)
    _print_sources(console, card)


@dataclass(frozen=True)
class _Held:
    """What a file holds.

    Attributes:
        file: The file.
        layout: Whose names its tensors have; ``exported`` of a file for engines.
        sha256: Digest of its bytes.
        manifest: Architecture, preprocessing, labels, figures, origin.
        notes: What was noticed while it was read.
    """

    file: Path
    layout: str
    sha256: str
    manifest: Manifest
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        manifest = self.manifest
        return {
            "file": str(self.file),
            "layout": self.layout,
            "sha256": self.sha256,
            "notes": list(self.notes),
            **_counts(manifest.spec),
            "preprocess": manifest.preprocess.to_dict(),
            "labels": list(manifest.labels),
            "metrics": dict(manifest.metrics),
            "provenance": dict(manifest.provenance),
            "parts": _parts(manifest.spec),
            "spec": manifest.spec.to_dict(),
        }


def _read(file: Path) -> _Held:
    """Read a file: an exported one without torch, weights with it."""
    if file.suffix == ".onnx":
        from efficientformer.runtime.engines import open_engine
        from efficientformer.weights.cache import sha256_of

        manifest = open_engine(file, "onnxruntime").manifest
        return _Held(file, "exported", sha256_of(file), manifest)
    from efficientformer.spec.errors import require
    from efficientformer.weights.kinds import check_kind

    check_kind(file)
    require("torch", "Reading weights", "torch")
    from efficientformer.weights.pretrained import load_named

    checkpoint, manifest = load_named(str(file), str(file))
    return _Held(file, checkpoint.layout, checkpoint.sha256, manifest, tuple(checkpoint.report.notes))


def _counts(spec: ArchSpec) -> dict[str, int]:
    from efficientformer.spec.count import count

    total = count(spec)
    names = ("params", "macs", "conv_macs", "linear_macs", "attention_macs")
    return {name: getattr(total, name) for name in names}


def _parts(spec: ArchSpec) -> list[dict[str, Any]]:
    from efficientformer.spec.count import count_parts

    return [
        {
            "name": part.name,
            "kind": part.kind,
            "params": part.count.params,
            "macs": part.count.macs,
            "shape": part.shape,
        }
        for part in count_parts(spec)
    ]


def _as_dict(card: ModelCard) -> dict[str, Any]:
    manifest = _manifest(card)
    sources = [
        {
            "name": source.name,
            "url": source.url,
            "alias": source.alias,
            "sha256_prefix": source.sha256 or None,
            "top1": source.top1,
            "top5": source.top5,
            "preprocess": source.preprocess.to_dict(),
        }
        for source in card.sources
    ]
    return {
        "name": card.name,
        "aliases": card.aliases,
        "data_set": card.data_set,
        "paper": card.paper or None,
        "training": card.training,
        **_counts(card.spec),
        "published_params_m": card.published_params,
        "published_macs_g": card.published_macs,
        "published_latency_ms": card.latency_ms,
        "note": card.note,
        "preprocess": manifest.preprocess.to_dict(),
        "metrics": dict(manifest.metrics),
        "sources": sources,
        "parts": _parts(card.spec),
        "spec": card.spec.to_dict(),
    }


def _manifest(card: ModelCard) -> Manifest:
    """Return the manifest of the weights tried first; those in the package have their own, with what was measured."""
    from efficientformer.weights.embedded import embedded_manifest

    return card.manifest(card.best_source) if card.sources else embedded_manifest()


def _print_facts(console: Console, card: ModelCard) -> None:
    from efficientformer.spec.count import count

    total, spec = count(card.spec), card.spec
    console.print(f"[bold]{card.name}[/bold]  also: {', '.join(card.aliases)}", soft_wrap=True)
    facts = {
        "paper": f"arXiv {card.paper}" if card.paper else "",
        "training": card.training,
        "input": f"{spec.in_chans}x{'x'.join(map(str, spec.input_size))}; {spec.legal_sizes()}",
        "classes": f"{spec.num_classes} ({card.data_set})" + (", two heads (distilled)" if spec.distilled else ""),
        "parameters": f"{total.params:,}"
        + (f" (published: {card.published_params} M)" if card.published_params else ""),
        "MACs": f"{total.macs:,}" + (f" (published: {card.published_macs} G)" if card.published_macs else ""),
        "of which": f"convs {total.conv_macs:,}, linear {total.linear_macs:,}, attention {total.attention_macs:,}",
        "note": card.note,
        "latency": f"{card.latency_ms} ms on an iPhone 12 with Core ML, as published" if card.latency_ms else "",
    }
    for name, fact in facts.items():
        if fact:
            console.print(f"  {name:<11} {fact}", soft_wrap=True, markup=False)


def _print_held(console: Console, held: _Held) -> None:
    from rich.markup import escape

    from efficientformer.spec.text import printable

    manifest = held.manifest
    spec, labels = manifest.spec, manifest.labels
    counts = _counts(spec)
    some = ", ".join(labels[:6]) + (" ..." if len(labels) > 6 else "")
    facts = {
        "layout": held.layout,
        "sha256": held.sha256,
        "input": f"{spec.in_chans}x{'x'.join(map(str, spec.input_size))}; {spec.legal_sizes()}",
        "preprocess": manifest.preprocess.describe(),
        "classes": f"{spec.num_classes}" + (f": {some}" if labels else ", without names")
        + (", two heads (distilled)" if spec.distilled else ""),
        "parameters": f"{counts['params']:,}",
        "MACs": f"{counts['macs']:,}",
        "figures": ", ".join(f"{name} {value:g}" for name, value in manifest.metrics.items()),
        "origin": ", ".join(f"{name} {value}" for name, value in manifest.provenance.items() if name != "sha256"),
        "notes": "; ".join(held.notes),
    }  # fmt: skip
    console.print(f"[bold]{escape(printable(str(held.file)))}[/bold]", soft_wrap=True)
    for name, fact in facts.items():
        if fact:
            console.print(f"  {name:<11} {printable(fact)}", soft_wrap=True, markup=False)


def _print_stages(console: Console, spec: ArchSpec) -> None:
    from efficientformer.cli.tables import print_table
    from efficientformer.spec.count import Count, count_parts

    parts, rows = count_parts(spec), []
    groups = ["stem", *(f"stages.{i}" for i in range(len(spec.stages))), "norm", "head"]
    for group in groups:
        members = [part for part in parts if part.name.startswith(group)]
        total = sum((part.count for part in members), Count())
        blocks = _blocks(spec.stages[int(group[-1])].blocks) if group.startswith("stages") else ""
        title = f"stage {int(group[-1]) + 1}" if group.startswith("stages") else group
        shape = "x".join(map(str, members[-1].shape)) if members else ""
        if group.startswith("stages") and not members:
            shape = "x".join(map(str, parts[0].shape))
        rows.append((title, blocks, shape, f"{total.params:,}", f"{total.macs:,}"))
    console.print()
    print_table(console, ("part", "blocks", "output", "params", "MACs"), rows, left=3)


def _blocks(blocks: tuple[BlockSpec, ...]) -> str:
    """Say a stage's blocks, runs of equal ones together: ``2 ffn x4, 1 attn_ffn x3``."""
    from itertools import groupby

    runs = [(len(list(run)), block) for block, run in groupby(blocks)]
    return ", ".join(
        f"{count} {block.kind} x{block.expansion:g}" + (" stride 2" if block.stride == 2 else "")
        for count, block in runs
    )


def _print_sources(console: Console, card: ModelCard) -> None:
    console.print()
    if not card.sources:
        manifest = _manifest(card)
        accuracy = _accuracy(manifest.metrics.get("top1"), manifest.metrics.get("top5"))
        data = manifest.provenance.get("data", card.data_set)
        console.print(f"weights      in the package: {accuracy}, measured on {data}", soft_wrap=True, markup=False)
        console.print(f"preprocess   {manifest.preprocess.describe()}", soft_wrap=True, markup=False)
        return
    console.print("[bold]weights, in the order they are tried[/bold]")
    for source in card.sources:
        accuracy = _accuracy(source.top1, source.top5)
        console.print(f"  {source.name:<13} {accuracy}; {source.alias}", soft_wrap=True, markup=False)
        console.print(f"  {'':<13} {source.preprocess.describe()}", soft_wrap=True, markup=False)
        console.print(f"  {'':<13} {source.url}", soft_wrap=True, markup=False)


def _accuracy(top1: float | None, top5: float | None) -> str:
    return "top-1 " + (f"{top1:.2f}" if top1 else "-") + (f", top-5 {top5:.2f}" if top5 else "")
