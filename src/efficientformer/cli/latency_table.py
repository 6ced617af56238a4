"""``efficientformer latency-table``: measure what each block costs on an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from efficientformer.cli.targets import check_file
from efficientformer.runtime.engines import ENGINES, PRECISIONS
from efficientformer.spec.errors import UsageError

if TYPE_CHECKING:
    from efficientformer.latency.design import TableSpace
    from efficientformer.spec.arch import ArchSpec

N = TypeVar("N", int, float)


def latency_table(
    output: Annotated[Path, typer.Option("--output", "-o", help="The table's file, .json.")],
    engine: Annotated[str, typer.Option(help=f"Engine: {', '.join(ENGINES)}.")] = "auto",
    precision: Annotated[str, typer.Option(help=f"Precision: {', '.join(PRECISIONS)}.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")] = None,
    like: Annotated[
        str, typer.Option(help="Take what is not given below from a zoo network, or from a spec in a .json file.")
    ] = "",
    widths: Annotated[str, typer.Option(help="Widths of any stage: FIRST:LAST:STEP, or a list 32,48,64.")] = "",
    depths: Annotated[str, typer.Option(help="Most blocks of the four stages, such as 3,3,6,4.")] = "",
    expansions: Annotated[str, typer.Option(help="Expansion ratios of any block, such as 3,4.")] = "",
    input_size: Annotated[str, typer.Option(help="Input sizes in pixels, such as 32 or 192x256,224.")] = "",
    stem_stride: Annotated[str, typer.Option(help="Total strides of the stem, such as 1,2.")] = "",
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes.")] = None,
    networks: Annotated[int, typer.Option(min=8, help="How many networks to measure.")] = 160,
    max_spread: Annotated[
        float, typer.Option(min=0.0001, max=1.0, help="Measure until latencies repeat within this share.")
    ] = 0.01,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Measure a latency table: what each block, stem, embedding and head of a space costs on an engine.

    Without other options the space is that of small V1 networks for 32-pixel images.
    """
    _check_target(output)
    space = _space(like, widths, depths, expansions, input_size, stem_stride, classes)
    from efficientformer.cli.progress import step_bars
    from efficientformer.latency.measure import build_table

    with step_bars(quiet) as progress:
        table = build_table(
            space,
            engine=engine,
            precision=precision,
            threads=threads,
            networks=networks,
            max_spread=max_spread,
            progress=progress,
        )
    table.save(output)
    if not quiet:
        typer.echo(
            f"{len(table.costs):,} parts from {table.networks} networks on {table.environment['engine']}; networks the "
            f"fit had not seen were predicted within {table.spread:.1%} (one standard error)",
            err=True,
        )
    typer.echo(output)


def _check_target(output: Path) -> None:
    """Find out now, not after minutes of measuring, that the file cannot be written."""
    if output.exists():
        raise UsageError(f"{output} exists", hint="Choose another name, or remove it")
    check_file(output)


def _space(
    like: str, widths: str, depths: str, expansions: str, input_size: str, stem_stride: str, classes: int | None
) -> TableSpace:
    import dataclasses

    from efficientformer.latency.design import TableSpace

    space = _space_of(_read_spec(like)) if like else TableSpace()
    given: dict[str, Any] = {}
    if widths:
        given |= {"widths": _widths(widths), "max_widths": ()}
    if depths:
        given["depths"] = _numbers("--depths", depths, int)
    if expansions:
        given["expansions"] = _numbers("--expansions", expansions, float)
    if input_size:
        given["input_sizes"] = tuple(_size(text) for text in input_size.split(","))
    if stem_stride:
        given["stem_strides"] = _numbers("--stem-stride", stem_stride, int)
    if classes is not None:
        given["num_classes"] = classes
    return dataclasses.replace(space, **given)


def _read_spec(like: str) -> ArchSpec:
    from efficientformer.spec.arch import read_spec
    from efficientformer.spec.zoo import resolve

    return read_spec(Path(like)) if like.endswith(".json") else resolve(like).card.spec


def _space_of(spec: ArchSpec) -> TableSpace:
    """Return the space below a network, as slimming searches it: widths in steps of 16, depths, ratios down to 1."""
    from efficientformer.slimming.space import Space, table_space

    return table_space(Space(spec))


def _widths(text: str) -> tuple[int, ...]:
    if ":" not in text:
        return _numbers("--widths", text, int)
    ends = _numbers("--widths", text.replace(":", ","), int)
    if len(ends) != 3 or ends[2] < 1:
        raise UsageError("Illegal --widths", expected="FIRST:LAST:STEP or a list of widths", found=text)
    return tuple(range(ends[0], min(ends[1], 8192) + 1, ends[2]))


def _size(text: str) -> tuple[int, int]:
    sides = _numbers("--input-size", text.replace("x", ","), int)
    if len(sides) > 2:
        raise UsageError("Illegal --input-size", expected="a side or HEIGHTxWIDTH", found=text)
    return sides[0], sides[-1]


def _numbers(option: str, text: str, kind: type[N]) -> tuple[N, ...]:
    try:
        return tuple(kind(each) for each in text.split(","))
    except ValueError:
        kinds = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"Illegal {option}", expected=f"{kinds} with commas between", found=text) from None
