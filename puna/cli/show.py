"""``puna show``: what a model is, read from its files without loading them."""

from __future__ import annotations

import json
from typing import Any

import click

from puna.cli.options import json_option
from puna.cli.progress import file_size, human_bytes


@click.command()
@click.argument("model")
@click.option("--template", "part", flag_value="template", help="Only the chat template.")
@click.option("--system", "part", flag_value="system", help="Only the system prompt.")
@click.option("--parameters", "part", flag_value="parameters", help="Only the default parameters.")
@click.option("--modelfile", is_flag=True, help="The Modelfile that makes the model again.")
@click.option("--license", "--licence", "part", flag_value="licence", help="Only the licence.")
@json_option
def show(model: str, part: str | None, modelfile: bool, as_json: bool) -> None:
    """Show what MODEL is: its shape, encoding, licence, template and defaults."""
    if modelfile:
        click.echo(modelfile_text(model), nl=False)
        return
    facts = model_facts(model)
    if part is not None:
        facts = {part: facts[part]}
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    elif part is not None:
        value = facts[part]
        if isinstance(value, dict):
            value = "\n".join(f"{k} {v}" for k, v in value.items())
        click.echo(value or "")
    else:
        for section, values in facts.items():
            if values:
                _print_section(section, _report_text(values) if section == "report" else values)


def model_facts(model: str) -> dict[str, Any]:
    """Everything there is to say about a model, as JSON values by section."""
    from puna.checkpoint import open_checkpoint
    from puna.evaluate.sides import stored_bytes, tensor_types
    from puna.evaluate.store import load_report
    from puna.model.shapes import flops_per_token, kv_bytes_per_token, parameter_count
    from puna.store import resolve

    found = resolve(model)
    checkpoint = open_checkpoint(found.path)
    config, manifest = checkpoint.config, found.manifest
    report = load_report(found, checkpoint)
    total_bytes = stored_bytes(found.path, checkpoint)
    parameters = parameter_count(config)
    scaling = config.rope_scaling
    return {
        "model": {
            "architecture": config.architecture,
            "parameters": parameters,
            "context length": config.max_position_embeddings,
            "embedding length": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value of {config.head_dim}",
            "vocabulary": config.vocab_size,
            "rope": f"theta {config.rope_theta:g}" + (f", {scaling.rope_type} × {scaling.factor:g}" if scaling else ""),
            "types": ", ".join(f"{name} × {count}" for name, count in tensor_types(checkpoint).items()),
            "quantization": checkpoint.description.get("quantization"),
            "bits per weight": round(8 * total_bytes / parameters, 2),
            "cache per token": f"{human_bytes(kv_bytes_per_token(config))} at 16 bits",
            "operations per token": f"{flops_per_token(config, 1) / 1e9:.2f} GFLOP",
        },
        "file": {
            "path": str(found.path),
            "size": manifest.size if manifest else total_bytes,
            "packed": file_size(found.packed),
        },
        "licence": ("\n\n".join(manifest.licence_texts) if manifest else None)
        or (manifest.licence if manifest else None)
        or checkpoint.description.get("license"),
        "parameters": dict(manifest.parameters) if manifest else {},
        "system": manifest.system if manifest else None,
        "messages": dict(enumerate(map(": ".join, manifest.messages))) if manifest else {},
        "adapters": {a.name: ", ".join(file.file for file in a.files) for a in manifest.adapters} if manifest else {},
        "template": (manifest.template if manifest else None) or checkpoint.chat_template,
        "report": report.as_json() if report else None,
        "lineage": vars(manifest.lineage) if manifest and manifest.lineage else None,
    }


def modelfile_text(model: str) -> str:
    """The Modelfile of a stored model. Raises StoreError for one that is not stored."""
    from puna.checkpoint import open_checkpoint
    from puna.llm.create import modelfile_of
    from puna.store import Store
    from puna.store.modelfile import write_modelfile

    store = Store()
    manifest = store.find(model)
    template = manifest.template or open_checkpoint(store.path_of(manifest)).chat_template
    return write_modelfile(modelfile_of(manifest, store, template))


def _report_text(facts: dict[str, Any]) -> str:
    from puna.evaluate import Report
    from puna.evaluate.text import report_lines

    return "\n".join(report_lines(Report.from_json(facts, "the report")))


def _print_section(section: str, values: Any) -> None:
    click.echo(f"  {section.capitalize()}")
    if isinstance(values, dict):
        width = max(map(len, values))
        for name, value in values.items():
            if value is None:
                continue
            shown = f"{value:,}" if isinstance(value, int) else value
            click.echo(f"    {name.ljust(width)}  {shown}")
    else:
        for line in str(values).splitlines():
            click.echo(f"    {line}")
    click.echo()
