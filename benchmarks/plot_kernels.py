"""The roofline of docs/kernels.md: time of a product by rows, and the share of the byte limit at one row.

pip install matplotlib
python benchmarks/plot_kernels.py benchmarks/results/kernels-2026-11-25.json docs/kernels.png

The limit is the larger of two times: reading the weight once at 3.0 TB/s, and 2 M N K operations at 750 TFLOP/s.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

BANDWIDTH, RATE = 3.0e12, 750e12
SHAPE = (28672, 8192)
SCHEMES = ((2, 64), (3, 128), (4, 128))
COLORS = {"ours": "#c0392b", "humming": "#2471a3", "cublas": "#7f8c8d", "gemlite": "#27ae60", "int4": "#8e44ad"}
NAMES = {"ours": "Planish", "humming": "Humming", "cublas": "cuBLAS, 16 bits", "gemlite": "gemlite", "int4": "int4"}


def limit_us(bits: float, rows: int) -> float:
    weights = SHAPE[0] * SHAPE[1]
    return 1e6 * max(weights * bits / 8 / BANDWIDTH, 2 * rows * weights / RATE)


def by_rows(axes: Any, cases: list[dict], bits: int, group: int) -> None:
    """Time against rows at the largest shape."""
    for peer, color in COLORS.items():
        scheme = (2, 64) if peer == "cublas" else (bits, group)  # its weights have 16 bits whatever the scheme
        points = sorted((c["rows"], c["us"]) for c in cases
                        if c["peer"] == peer and (c["out"], c["in"]) == SHAPE and (c["bits"], c["group"]) == scheme)
        if points:
            width = 2.2 if peer == "ours" else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, color=color, linewidth=width, label=NAMES[peer])
    every = [2**power for power in range(12)]
    stored = bits + (16 + bits) / group
    axes.plot(every, [limit_us(stored, rows) for rows in every], color="black", linestyle=":", label="limit")
    axes.set(xscale="log", yscale="log", xlabel="rows of x", title=f"w{bits}g{group}, 28672 x 8192")
    axes.set_xticks([1, 4, 16, 64, 256, 2048], ["1", "4", "16", "64", "256", "2048"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def main(source: str, out: str) -> None:
    cases = [case for case in json.loads(Path(source).read_text())["cases"] if "us" in case]
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for axes, (bits, group) in zip(panels, SCHEMES, strict=True):
        by_rows(axes, cases, bits, group)
    panels[0].set_ylabel("microseconds")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
