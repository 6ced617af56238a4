"""``efficientformer info``: all that is known of one network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from efficientformer.spec.zoo import ModelCard


def info(
    model: Annotated[str, typer.Argument(help="A zoo name or alias.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a network: architecture, true and published counts, stages, preprocessing, sources."""
    from efficientformer.spec.errors import UnknownModelError, UsageError
    from efficientformer.spec.zoo import resolve

    try:
        card = resolve(model).card
    except UnknownModelError:
        if not Path(model).is_file():
            raise
        hint = "For a file: efficientformer test measures it, profile shows its parts"
        raise UsageError(f"{model} is a file", expected="a name of the zoo", hint=hint) from None
    if as_json:
        typer.echo(json.dumps(_as_dict(card), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    _print_facts(console, card)
    _print_stages(console, card)
    _print_sources(console, card)


def _as_dict(card: ModelCard) -> dict[str, Any]:
    from efficientformer.spec.count import count, count_parts

    total = count(card.spec)
    parts = [
        {
            "name": part.name,
            "kind": part.kind,
            "params": part.count.params,
            "macs": part.count.macs,
            "shape": part.shape,
        }
        for part in count_parts(card.spec)
    ]
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
        "params": total.params,
        "macs": total.macs,
        "conv_macs": total.conv_macs,
        "linear_macs": total.linear_macs,
        "attention_macs": total.attention_macs,
        "published_params_m": card.published_params,
        "published_macs_g": card.published_macs,
        "published_latency_ms": card.latency_ms,
        "note": card.note,
        "preprocess": card.manifest(card.best_source).preprocess.to_dict(),
        "sources": sources,
        "parts": parts,
        "spec": card.spec.to_dict(),
    }


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


def _print_stages(console: Console, card: ModelCard) -> None:
    from rich.table import Table

    from efficientformer.spec.count import Count, count_parts

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("part", "blocks", "output", "params", "MACs"):
        table.add_column(heading, justify="left" if heading in ("part", "blocks", "output") else "right")
    parts = count_parts(card.spec)
    groups = ["stem", *(f"stages.{i}" for i in range(len(card.spec.stages))), "norm", "head"]
    for group in groups:
        members = [part for part in parts if part.name.startswith(group)]
        total = sum((part.count for part in members), Count())
        blocks = _blocks(card.spec.stages[int(group[-1])].blocks) if group.startswith("stages") else ""
        title = f"stage {int(group[-1]) + 1}" if group.startswith("stages") else group
        shape = "x".join(map(str, members[-1].shape)) if members else ""
        if group.startswith("stages") and not members:
            shape = "x".join(map(str, parts[0].shape))
        table.add_row(title, blocks, shape, f"{total.params:,}", f"{total.macs:,}")
    console.print()
    console.print(table)


def _blocks(blocks: Any) -> str:  # noqa: ANN401 (a tuple of BlockSpec)
    """Say a stage's blocks, runs of equal ones together: ``2 x ffn (x4), attn_ffn (x3)``."""
    from itertools import groupby

    runs = [(len(list(run)), block) for block, run in groupby(blocks)]
    return ", ".join(
        f"{count} {block.kind} x{block.expansion:g}" + (" stride 2" if block.stride == 2 else "")
        for count, block in runs
    )


def _print_sources(console: Console, card: ModelCard) -> None:
    console.print()
    if not card.sources:
        console.print("weights      in the package", markup=False)
        console.print(f"preprocess   {card.manifest(None).preprocess.describe()}", soft_wrap=True, markup=False)
        return
    console.print("[bold]weights, in the order they are tried[/bold]")
    for source in card.sources:
        accuracy = "top-1 " + (f"{source.top1:.2f}" if source.top1 else "-")
        accuracy += f", top-5 {source.top5:.2f}" if source.top5 else ""
        console.print(f"  {source.name:<13} {accuracy}; {source.alias}", soft_wrap=True, markup=False)
        console.print(f"  {'':<13} {source.preprocess.describe()}", soft_wrap=True, markup=False)
        console.print(f"  {'':<13} {source.url}", soft_wrap=True, markup=False)
