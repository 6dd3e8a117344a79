"""``puna pack``: what every start computes from the weights, computed once."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.options import threads_option
from puna.cli.progress import human_bytes


@click.command()
@click.argument("model")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it here; puna run --packed FILE uses it."
)
@threads_option
def pack(model: str, out: Path | None, threads: int | None) -> None:
    """Write MODEL's matrices in the order they are computed in, so that it starts at once from then on.

    The packed file goes into the store, or beside MODEL where that is a file or folder, where starts find it; or to
    --out. It is as large as the model.
    """
    from puna.llm.packing import pack_model
    from puna.ops.registry import make_ops
    from puna.store import resolve

    path = pack_model(resolve(model), make_ops(threads=threads), out)
    click.echo(f"packed {model}: {path}, {human_bytes(path.stat().st_size)}")
