"""The README's picture: perplexity of each method at each width, out of the figures in benchmarks/results.

pip install matplotlib
python benchmarks/plot.py docs/perplexity.svg
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SCHEMES = ("w4g128", "w3g128", "w2g128", "w2g64")


def ours() -> dict[str, float]:
    """Perplexity of `signround` with its defaults, by scheme."""
    found = {}
    for file in sorted(RESULTS.glob("smollm2-*.json")):
        for row in json.loads(file.read_text())["rows"]:
            recipe, _, scheme = row["setting"].partition(":")
            if recipe == "signround" and scheme in SCHEMES:
                found[scheme] = row["test_perplexity"]
    return found


def default() -> dict[str, float]:
    """Mean over seeds of the default recipe, by scheme, as the last file that has it gives it."""
    found = {}
    for file in sorted(RESULTS.glob("planish-2*.json")):
        rows = [row for row in json.loads(file.read_text())["rows"] if row["recipe"] == "planish" and not row["keys"]]
        for scheme in {row["scheme"] for row in rows if "test" in row}:
            found[scheme] = statistics.mean(row["test"] for row in rows if row["scheme"] == scheme and "test" in row)
    return found


def main(out: str) -> None:
    peers = json.loads((RESULTS / "peers-2026-11-21.json").read_text())
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    lines = {**peers["perplexity"], "Planish signround, symmetric": ours(), "Planish, the default": default()}
    for name, values in lines.items():
        style = {"linewidth": 1.2}
        if name.startswith("Planish"):
            style = {"color": "#c0392b", "linewidth": 2.2, "linestyle": "--" if "signround" in name else "-"}
        axes.plot(SCHEMES, [values[scheme] for scheme in SCHEMES], marker="o", label=name, **style)
    axes.axhline(peers["16-bit"], color="gray", linestyle=":", label="16 bits")
    axes.set(
        yscale="log", ylim=(19, 300), ylabel="WikiText-2 perplexity", title="SmolLM2-135M-Instruct"
    )
    ticks = (20, 25, 30, 40, 60, 100, 200)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
