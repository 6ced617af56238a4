"""``efficientformer download``: a network's weights into the cache."""

from __future__ import annotations

from typing import Annotated

import typer


def download(
    model: Annotated[str, typer.Argument(help="A zoo name or alias, hf-hub:OWNER/NAME, or an address.")],
    source: Annotated[str, typer.Option(help="Whose weights: timm, mmpretrain, snap, transformers ...")] = "",
    verify: Annotated[bool, typer.Option("--verify", help="Read a file that is there already in full.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Only look into the cache.")] = False,
) -> None:
    """Fetch a network's weights and print where they are."""
    from efficientformer.export.deployable import file_of
    from efficientformer.spec.errors import UsageError
    from efficientformer.spec.zoo import is_remote, resolve
    from efficientformer.weights.download import fetch
    from efficientformer.weights.progress import terminal_progress

    if is_remote(model):
        if source:
            raise UsageError("Only networks of the zoo have several sources", found=f"--source {source}")
        typer.echo(file_of(model, offline=offline or None))
        return
    found = resolve(model)
    card, wanted = found.card, found.source
    if source:
        wanted = card.source(source)
        if wanted is None:
            known = ", ".join(each.name for each in card.sources) or "none: its weights are in the package"
            raise UsageError(f"{card.name} has no source {source!r}", expected=known)
    if not card.sources:
        typer.echo(f"The weights of {card.name} are in the package; there is nothing to download.", err=True)
        return
    with terminal_progress() as progress:
        path = fetch(
            card.name,
            (wanted,) if wanted else card.sources,
            offline=offline or None,
            progress=progress,
            verify=verify,
        )
    typer.echo(path)
