"""`expertwire experts`: the load of experts and ranks, as a heat map in the terminal and as PNG.

L layers, E logical experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.deploy.grpc.credentials import ssl_credentials
from expertwire.moe.eplb.load import hottest, over_mean

_SHADES = " ░▒▓█"
_STEPS = (0.5, 1.0, 2.0, 4.0)  # multiples of the mean load at which the next shade begins
_WIDTH = 128  # columns; of more experts, several share a column, which shows the maximum
_FIELDS = ("expert_load", "layer_spread", "rank_rows", "rank_tax")


def read(source: str, *, ca_certs: str | None = None, token_file: str | None = None) -> dict[str, Any]:
    """Return `ExpertLoad.summary` of a server at `host:port`, or from a file written by `--json`.

    Args:
        source: the server or file.
        ca_certs: PEM file of the authority of a server with TLS; None speaks plain text.
        token_file: file with a bearer token for the server.

    Raises:
        ValueError: the source is neither, or the model has no experts.
    """
    try:
        values = json.loads(Path(source).read_text()) if Path(source).is_file() else _ask(source, ca_certs, token_file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is no JSON file: {error}") from None
    missing = [name for name in _FIELDS if not isinstance(values, dict) or name not in values]
    if missing or not any(map(any, values["expert_load"])):
        what = f"has no {', '.join(missing)}" if missing else "has no tokens of experts yet"
        raise ValueError(f"{source} {what}")
    return {name: values[name] for name in _FIELDS}


def _ask(address: str, ca_certs: str | None, token_file: str | None) -> dict[str, Any]:
    credentials = None if ca_certs is None else ssl_credentials(ca_certs)
    token = None if token_file is None else Path(token_file).read_text().strip()
    try:
        with Client(address, credentials=credentials, token=token) as client:
            return client.stats()
    except ServerError as error:
        raise ValueError(f"{address} is neither a file nor a server that answers: {error}") from None


def lines(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the heat map and its summary."""
    rows_LE = np.array(_even(values["expert_load"]), float)
    times_LE = over_mean(rows_LE)
    shown = -(-rows_LE.shape[1] // _WIDTH)
    bins = -(-times_LE.shape[1] // shown)
    padded = np.zeros((len(times_LE), bins * shown))
    padded[:, : times_LE.shape[1]] = times_LE
    legend = "  ".join(f"{_SHADES[i + 1]} >= {step:g}x" for i, step in enumerate(_STEPS))
    yield f"rows of each expert, over the layer's mean ({legend})"
    if shown > 1:
        yield f"a column is the hottest of {shown} experts"
    for layer, times in enumerate(padded.reshape(len(padded), bins, shown).max(axis=2)):
        if times.any():
            shades = "".join(_SHADES[i] for i in np.searchsorted(_STEPS, times, side="right"))
            yield f"layer {layer:>3} |{shades}| fullest rank {values['layer_spread'][layer]:.2f} of the mean"
    yield "hottest: " + ", ".join(f"layer {la} expert {e} {times:.1f}x" for la, e, times in hottest(rows_LE))
    total = sum(values["rank_rows"])
    for rank, (rows, tax) in enumerate(zip(values["rank_rows"], values["rank_tax"], strict=True)):
        yield f"rank {rank:>3}  {rows / total:6.1%} of the rows, costs the others {tax:.1%}"
    yield f"all of it, waiting for the fullest rank of each layer: {sum(values['rank_tax']):.1%}"


def save_png(values: Mapping[str, Any], file: Path) -> None:
    """Write the heat map as PNG, with a cell for each expert; layers without tokens are grey.

    Raises:
        ValueError: matplotlib is not installed, or cannot write there.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ValueError("--png needs matplotlib; pip install matplotlib") from None
    times_LE = over_mean(np.array(_even(values["expert_load"]), float))
    num_layers, num_experts = times_LE.shape
    figure = Figure(figsize=(min(16.0, 4.5 + num_experts / 12), min(14.0, 2.5 + num_layers / 6)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    drawn_LE = np.where(times_LE.any(axis=1, keepdims=True), times_LE.clip(0.1, 10), np.nan)
    image = axes.imshow(drawn_LE, norm=LogNorm(0.1, 10), cmap="RdBu_r", aspect="auto", interpolation="nearest")
    axes.set_xlabel("logical expert")
    axes.set_ylabel("layer")
    for axis in (axes.yaxis, axes.xaxis):
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    lost = f"waiting for the fullest of {len(values['rank_rows'])} ranks: {sum(values['rank_tax']):.1%}"
    figure.suptitle(f"Rows of each expert over the layer's mean\n{lost}", fontsize="medium")
    scale = figure.colorbar(image, ax=axes, extend="both", ticks=[0.1, 0.2, 0.5, 1, 2, 5, 10])
    scale.ax.set_yticklabels(["0.1x", "0.2x", "0.5x", "1x", "2x", "5x", "10x"])
    try:
        figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise ValueError(f"--png: {error}") from None


def _even(layers: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the layers, those without experts filled with zeros."""
    longest = max(map(len, layers))
    return [layer if len(layer) else [0] * longest for layer in layers]
