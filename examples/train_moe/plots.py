"""Two pictures: the loss curve, and which experts were busy when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # ranks of a batch job have no display

import matplotlib.pyplot as plt
import numpy as np


def plot_loss(steps: list[dict[str, Any]], held_out: float, bigram: float, path: Path) -> None:
    """Training loss (main and multi-token prediction) over steps, with the held-out loss and the byte bigram."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    x = [step["step"] + 1 for step in steps]
    axes.plot(x, [step["main"] for step in steps], label="training, next byte", linewidth=1)
    axes.plot(x, [step["mtp"] for step in steps], label="training, byte after next (MTP)", linewidth=1, alpha=0.7)
    axes.axhline(bigram, color="black", linestyle="--", linewidth=1, label=f"byte bigram, held out: {bigram:.3f}")
    axes.plot(x[-1], held_out, "o", color="C3", label=f"model, held out: {held_out:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Byte-level Shakespeare")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_load(steps: list[dict[str, Any]], path: Path) -> None:
    """Heat map per MoE layer: experts upwards, steps to the right, colour = load / mean load."""
    load = np.array([step["load"] for step in steps], dtype=np.float64)  # [steps, layers, experts]
    relative = load / load.mean(axis=2, keepdims=True)
    num_layers, num_experts = load.shape[1:]
    figure, panels = plt.subplots(
        num_layers, 1, figsize=(8, 0.8 + 1.8 * num_layers), sharex=True, squeeze=False, layout="constrained"
    )
    first, last = steps[0]["step"] + 0.5, steps[-1]["step"] + 1.5
    for layer, axes in enumerate(panels[:, 0]):
        image = axes.imshow(
            relative[:, layer].T,
            aspect="auto",
            origin="lower",
            cmap="coolwarm",
            vmin=0.0,
            vmax=2.0,
            interpolation="nearest",
            extent=(first, last, -0.5, num_experts - 0.5),
        )
        name = "MTP block" if layer == num_layers - 1 else f"MoE layer {layer}"
        axes.set(ylabel="expert", title=name)
    panels[-1, 0].set_xlabel("step")
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="tokens / mean tokens per expert")
    figure.savefig(path, dpi=120)
    plt.close(figure)
