"""`make demo`: the shipped model, from checkpoint to TensorRT engine and text, with the selection off and on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lynx_trt.console import Progress, new_app, run, size

if TYPE_CHECKING:
    from lynx_trt.artifact import Artifact
    from lynx_trt.runtime.decode import Generated, Statistics

# Sixteen, since batching is what the method is about: one sequence alone loads only its own experts.
PROMPTS = [
    "def read_config(path):\n    ",
    "    def __repr__(self):\n        ",
    "import os\nimport sys\n\n",
    "def parse_args(self, args=None):\n        ",
    "    for line in lines:\n        ",
    "    if not isinstance(value, str):\n        ",
    "class Error(Exception):\n    ",
    "def main():\n    ",
    "class Queue:\n    def __init__(self, maxsize=0):\n        ",
    "    try:\n        import ",
    "    with open(filename, 'rb') as f:\n        ",
    "def _check(self, other):\n    ",
    "    def close(self):\n        ",
    "from collections import ",
    "    while True:\n        ",
    "    return self._",
]
SHOWN = 2

app = new_app()


@app.command()
def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact folder.")] = Path("out/demo"),
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write for each prompt.", min=2)] = 48,
) -> None:
    """Build the shipped model and write text with it, with the selection off and on."""
    from lynx_trt.build import BuildOptions, build, shipped_model
    from lynx_trt.generate import generate_text

    with Progress() as progress:
        artifact = build(BuildOptions(model=shipped_model(), output=output, overwrite=True), progress)
        update = progress.phase(f"Decoding {len(PROMPTS)} prompts as one batch, selection off")
        off = generate_text(artifact, PROMPTS, budget="1.0", max_new_tokens=max_new_tokens)
        update(1.0)
        update = progress.phase(f"Decoding {len(PROMPTS)} prompts as one batch, selection on")
        on = generate_text(artifact, PROMPTS, max_new_tokens=max_new_tokens)
        update(1.0)
    for number in range(SHOWN):
        _show(number, off[0][number], on[0][number])
    _table(artifact, off[1], on[1])
    if artifact.manifest.engine:
        typer.echo(f"\nTensorRT engine: {artifact.path('engine.plan')}")
    typer.echo(f'Your turn: python -m lynx_trt.generate {artifact.folder} --prompt "def main():"')


def _show(number: int, off: Generated, on: Generated) -> None:
    for label, sequence in (("selection off, all experts", off), ("selection on", on)):
        typer.secho(f"\n--- prompt {number + 1}, {label} ---", dim=True)
        typer.echo(PROMPTS[number] + sequence.text)


def _table(artifact: Artifact, off: Statistics, on: Statistics) -> None:
    from rich.console import Console
    from rich.table import Table

    from lynx_trt.generate import expert_bytes_a_token

    manifest = artifact.manifest
    model, engine = manifest.model, manifest.engine
    experts = model.moe_layers[0]
    table = Table(title=f"\n{model.name} ({model.architecture}, {model.precision})", title_justify="left")
    table.add_column("")
    table.add_column("selection off", justify="right")
    chosen = manifest.selection
    dial = f"floor {max(chosen.floors):.2g}" if any(chosen.floors) else f"budget {max(chosen.budgets)}"
    table.add_column(f"{chosen.preset}, {dial}", justify="right")
    table.add_row("layers (MoE)", f"{model.layers} ({len(model.moe_layers)})", "same")
    table.add_row("experts a layer, a token", f"{experts.experts}, {experts.experts_per_token}", "same")
    if engine:
        table.add_row("engine size", size(engine.plan_bytes), "same engine")
        table.add_row("TensorRT build", f"{engine.seconds:.1f} s", "")
    table.add_row(f"active experts a layer, batch {len(PROMPTS)}", f"{off.mean_active:.1f}", f"{on.mean_active:.1f}")
    loads = [size(expert_bytes_a_token(manifest, statistics)) for statistics in (off, on)]
    table.add_row("bytes of expert weights a token", *loads)
    Console().print(table)


if __name__ == "__main__":
    run(app)
