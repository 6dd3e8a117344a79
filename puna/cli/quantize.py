"""``puna quantize``: a model in fewer bits."""

from __future__ import annotations

import json
from pathlib import Path

import click

from puna.cli.fidelity import Deriving, deriving_options
from puna.cli.options import json_option, parse_size
from puna.cli.progress import human_bytes
from puna.cli.quantize_into import is_store_name, quantize_into_file, quantize_into_store

_file = click.Path(path_type=Path)


def _parse_fit(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(context, parameter, value)


@click.command()
@click.argument("source")
@click.argument("destination", type=_file)
@click.option("--type", "mix", metavar="TYPE", help="Q4_K_M, Q5_K_S, Q6_K, Q8_0, IQ4_XS, … (docs/quantize.md).")
@click.option("--fit", metavar="SIZE", callback=_parse_fit, help="The best mix of types in a file of this size: 6GB.")
@click.option("--max-kl", type=float, metavar="NATS", help="The smallest mix whose mean KL to SOURCE is at most this.")
@click.option("--calibrate", type=_file, metavar="TEXT", help="Measure on this text which columns count most.")
@click.option("--imatrix", type=_file, metavar="FILE", help="Take that from llama.cpp's importance matrix instead.")
@click.option("--save-imatrix", type=_file, metavar="FILE", help="Keep what was measured, for this and llama.cpp.")
@click.option(
    "--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="Set the type of some tensors."
)
@click.option("--keep-head", "head", metavar="TYPE", help="Set the type of the head (the embedding, where tied).")
@click.option(
    "--group-size", type=int, default=128, show_default=True, help="INT4, GPTQ: columns of a scale; -1: a row."
)
@click.option("--symmetric", is_flag=True, help="INT4, GPTQ: no zero points.")
@click.option(
    "--layout",
    type=click.Choice(["compressed-tensors", "gptq", "awq"]),
    help="INT4, GPTQ, AWQ: whose layout the folder has (by default the method's own).",
)
@click.option(
    "--act-order/--no-act-order", default=True, show_default=True, help="GPTQ: columns of the largest inputs first."
)
@click.option(
    "--static-groups/--no-static-groups",
    default=True,
    show_default=True,
    help="GPTQ: groups stay runs of columns, whatever their order (desc_act is false then).",
)
@click.option(
    "--true-sequential/--no-true-sequential",
    default=True,
    show_default=True,
    help="GPTQ: each linear sees what the quantized ones before it in its layer make.",
)
@click.option(
    "--zero-points",
    type=click.Choice(["v1", "v2"]),
    default="v1",
    show_default=True,
    help="Layout gptq: stored one less, as all loaders read them, or as they are.",
)
@click.option("--requantize", is_flag=True, help="Accept a SOURCE that is quantized already, and its further loss.")
@deriving_options(report=True)
@json_option
def quantize(
    source: str,
    destination: Path,
    mix: str | None,
    fit: int | None,
    max_kl: float | None,
    calibrate: Path | None,
    imatrix: Path | None,
    save_imatrix: Path | None,
    tensor_types: tuple[str, ...],
    head: str | None,
    group_size: int,
    symmetric: bool,
    layout: str | None,
    act_order: bool,
    static_groups: bool,
    true_sequential: bool,
    zero_points: str,
    requantize: bool,
    deriving: Deriving,
    as_json: bool,
) -> None:
    """Quantize SOURCE (a stored model, .gguf file or checkpoint folder) to DESTINATION: a .gguf file, or a name in the
    store.

    One of --type, --fit and --max-kl says how far. When it is cut off, the same command continues. With --type INT8,
    INT4, NF4, FP8, GPTQ, AWQ or W8A8, DESTINATION is a Hugging Face folder instead (docs/hf-quantized.md).
    """
    from puna.quantize import (
        METHODS,
        FolderSettings,
        Quantized,
        QuantizedFolder,
        QuantizeSettings,
        quantize_to_folder,
    )

    settings = QuantizeSettings(
        mix=mix,
        fit=fit,
        max_kl=max_kl,
        calibrate=calibrate,
        imatrix=imatrix,
        save_imatrix=save_imatrix,
        tensor_types=tensor_types,
        head=head,
        requantize=requantize,
        overwrite=deriving.force,
    )
    result: Quantized | QuantizedFolder
    if mix is not None and mix.lower() in METHODS:
        if fit or max_kl or imatrix or save_imatrix or tensor_types or head:
            raise click.UsageError(f"--type {mix} writes a folder of one type; only --calibrate goes with it")
        folder = FolderSettings(
            mix.lower(),
            group_size,
            symmetric,
            act_order,
            static_groups,
            true_sequential,
            layout,
            zero_points,
            requantize,
        )
        with deriving.watched(source, destination) as (progress, review):
            result = quantize_to_folder(
                source, destination, folder, calibrate, deriving.force, deriving.threads, progress, check=review
            )
        kept = deriving.keep(review, destination)
    elif is_store_name(destination):
        result, kept = quantize_into_store(source, str(destination), settings, deriving)
    else:
        result, kept = quantize_into_file(source, destination, settings, deriving)
    if as_json:
        facts = result.as_json() | {"report": kept.as_json() if kept else None}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    measured, steps = "", "layers"
    if isinstance(result, Quantized):
        steps = "tensors"
        for note in result.notes:
            click.echo(f"Note: {note}", err=True)
        if result.divergence is not None:
            measured = f", KL {result.divergence:.5f} on the calibration text"
    continued = f"; {result.continued} {steps} were there already" if result.continued else ""
    click.echo(
        f"wrote {destination}: {human_bytes(result.size)}, {result.bits_per_weight:.2f} bits per weight{measured}, "
        f"in {result.seconds:.1f} s{continued}",
        err=True,
    )
