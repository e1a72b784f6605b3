"""The README's picture: perplexity of each method at each width, out of the figures in benchmarks/results.

pip install matplotlib
python benchmarks/plot.py docs/perplexity.svg
"""

import json
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


def main(out: str) -> None:
    peers = json.loads((RESULTS / "peers-2026-11-21.json").read_text())
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    for name, values in {**peers["perplexity"], "Planish signround, symmetric": ours()}.items():
        style = {"color": "#c0392b", "linewidth": 2.2} if name.startswith("Planish") else {"linewidth": 1.2}
        axes.plot(SCHEMES, [values[scheme] for scheme in SCHEMES], marker="o", label=name, **style)
    axes.axhline(peers["16-bit"], color="gray", linestyle=":", label="16 bits")
    axes.set(
        yscale="log", ylim=(19, 300), ylabel="WikiText-2 perplexity", title="SmolLM2-135M-Instruct, 128 x 2048 tokens"
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
