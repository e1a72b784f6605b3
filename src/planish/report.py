"""Report: what runs left in their folders, as one HTML file that needs nothing else.

    write_report([folder, ...], Path("report.html"))

One checkpoint: how it was made, loss of each block before and after, relative error and bits of each linear. Several:
a table and the Pareto picture of perplexity against bits and size besides. No script, no network; colours follow the
reader's light or dark. All text goes through `charts.element`, which escapes it. Nothing is measured here.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.charts import (
    LEVELS,
    Cell,
    Markup,
    Point,
    dumbbells,
    element,
    figure,
    frontier,
    heatmap,
    join,
    level,
    whole_ticks,
)
from planish.errors import PlanishError
from planish.plan import duration, gigabytes
from planish.results import Checkpoint, Measure, as_list, as_mapping, as_numbers, as_pairs, read_checkpoint
from planish.scheme import Scheme

UNKNOWN = "–"

_IN_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<block>[0-9]{1,6})\.(?P<kind>.+)")


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of some checkpoint folders to a file; returns where it is.

    Raises:
        PlanishError: if a folder is no model, its eval.json is damaged, or the file can't be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):  # so that a slip of the fingers replaces no checkpoint
        raise PlanishError(f"{out} is no name for a web page; write to a file that ends in .html")
    page = report(folders)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PlanishError(f"can't write {out}: {error.strerror}; write elsewhere") from error
    return out.resolve()


def report(folders: Sequence[Path]) -> str:
    """The report of some checkpoint folders as HTML; the same folders give the same text.

    Raises:
        PlanishError: if there is no folder, one is no model, or its eval.json is damaged.
    """
    if not folders:
        raise PlanishError("nothing to report; give the folder of a checkpoint")
    names = [Path(folder).resolve().name for folder in folders]
    twice = len(set(names)) < len(names)
    return page(
        [
            read_checkpoint(Path(folder), number, str(folder) if twice else name)
            for number, (folder, name) in enumerate(zip(folders, names, strict=True), start=1)
        ]
    )


def page(checkpoints: Sequence[Checkpoint]) -> Markup:
    """The whole HTML document."""
    single = len(checkpoints) == 1
    title = checkpoints[0].name if single else f"{len(checkpoints)} checkpoints compared"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} – Planish report"),
        element("style", Markup(STYLE)),
    )
    runs, quality = [_run(checkpoint, single) for checkpoint in checkpoints], _quality(checkpoints)
    parts = [*runs, quality] if single else [_overview(checkpoints), quality, *runs]
    header = element("header", element("p", "Planish report", class_="kicker"), element("h1", title))
    body = element("body", element("main", header, *parts))
    return join(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), "\n")


def _badge(checkpoint: Checkpoint) -> Markup:
    return element("span", checkpoint.number, class_="badge")


def _table(head: Sequence[object], rows: Sequence[Sequence[object]], words: int = 1) -> Markup:
    """A table in a box that scrolls by itself; the first column names the row, the first `words` are text."""
    top = element(
        "tr", *(element("th", cell, scope="col", class_="w" if i < words else None) for i, cell in enumerate(head))
    )
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_="w" if i < words else None) for i, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    table = element("table", element("thead", top), element("tbody", *lines))
    return element("div", table, class_="scroll", tabindex="0")


def _figure(caption: object, *parts: object) -> Markup:
    return element("figure", element("figcaption", caption), *parts)


def _overview(checkpoints: Sequence[Checkpoint]) -> Markup:
    """A row for each checkpoint."""
    text = next((text for checkpoint in checkpoints for text in checkpoint.perplexity), None)
    head = ["", "Recipe", "Scheme", "Bits a weight", "Size", *(["Perplexity"] if text else []), "Time", "Peak memory"]
    rows = []
    for checkpoint in checkpoints:
        run, facts = checkpoint.manifest, dict(_headline(checkpoint))
        shown = ["Bits a weight", "Size on disk", *([f"Perplexity on {text}"] if text else []), "Time", "Peak memory"]
        name = join(_badge(checkpoint), " ", checkpoint.name)
        rows.append(
            [name, run.recipe if run else UNKNOWN, _scheme(checkpoint), *(facts.get(k, UNKNOWN) for k in shown)]
        )
    return element("section", _table(head, rows, words=3))


def _scheme(checkpoint: Checkpoint) -> str:
    if checkpoint.manifest and checkpoint.manifest.scheme:
        return str(checkpoint.manifest.scheme)
    counts = Counter(str(scheme) for scheme in checkpoint.schemes.values() if scheme)
    return ", ".join(scheme for scheme, _ in counts.most_common()) or checkpoint.format or UNKNOWN


def _headline(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The figures of a checkpoint that are known, with their names."""
    figures = as_numbers(checkpoint.manifest.figures) if checkpoint.manifest else {}
    known = [("Bits a weight", f"{checkpoint.bits:.2f}")] if checkpoint.bits else []
    known += [("Size on disk", gigabytes(checkpoint.size))] if checkpoint.size else []
    known += [(f"Perplexity on {text}", str(measure)) for text, measure in checkpoint.perplexity.items()]
    known += [("Time", duration(figures["seconds"]))] if "seconds" in figures else []
    return known + ([("Peak memory", gigabytes(figures["peak_bytes"]))] if "peak_bytes" in figures else [])


def _quality(checkpoints: Sequence[Checkpoint]) -> Markup:
    """Pareto pictures, where there is something to compare, and all measures as a table."""
    texts = list(dict.fromkeys(text for checkpoint in checkpoints for text in checkpoint.perplexity))
    tasks = list(dict.fromkeys(task for checkpoint in checkpoints for task in checkpoint.tasks))
    agreements = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.agreement))
    if not texts and not tasks and not agreements:
        return Markup("")
    rows: list[list[object]] = [
        [f"Perplexity on {text}", *(c.perplexity.get(text, UNKNOWN) for c in checkpoints)] for text in texts
    ]
    rows += [[task, *(c.tasks.get(task, UNKNOWN) for c in checkpoints)] for task in tasks]
    if len(tasks) > 1:
        rows.append(["Mean of the tasks", *(_mean(c.tasks, tasks) or UNKNOWN for c in checkpoints)])
    rows += [[name, *(c.agreement.get(name, UNKNOWN) for c in checkpoints)] for name in agreements]
    pictures = [picture for text in texts for picture in _pareto(checkpoints, text)]
    grid = element("div", *pictures, class_="grid") if pictures else ""
    head = ["", *(join(_badge(c), " ", c.name) if len(checkpoints) > 1 else "" for c in checkpoints)]
    note = "Lower perplexity and KL are better; of the rest, higher. ± is one standard error."
    return element("section", element("h2", "Quality"), grid, _table(head, rows), element("p", note, class_="note"))


def _mean(measures: Mapping[str, Measure], names: Sequence[str]) -> Measure | None:
    """Mean over tasks, and its standard error as of independent ones; None if one is missing."""
    found = [measures[name] for name in names if name in measures]
    if len(found) < len(names):
        return None
    errors = [measure.stderr for measure in found if measure.stderr is not None]
    stderr = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
    return Measure(sum(measure.value for measure in found) / len(found), stderr)


def _pareto(checkpoints: Sequence[Checkpoint], text: str) -> list[Markup]:
    """Perplexity on a text against bits a weight and against size."""
    largest = max((checkpoint.size or 0 for checkpoint in checkpoints), default=0)
    unit, name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    costs: list[tuple[str, Callable[[Checkpoint], float | None]]] = [
        ("bits a weight", lambda checkpoint: checkpoint.bits),
        (f"{name} on disk", lambda checkpoint: checkpoint.size and checkpoint.size / unit),
    ]
    pictures = []
    for label, cost in costs:
        points = [
            Point(x=x, y=c.perplexity[text].value, number=c.number,
                  title=f"{c.name}: {figure(x)} {label}, perplexity {c.perplexity[text]}")
            for c in checkpoints
            if text in c.perplexity and (x := cost(c)) is not None
        ]  # fmt: skip
        if len(points) > 1:
            caption = join(element("b", "Perplexity"), f" on {text}, against {label}")
            pictures.append(_figure(caption, frontier(points, label, "perplexity")))
    return pictures


def _run(checkpoint: Checkpoint, single: bool) -> Markup:
    """Section of one checkpoint: its figures, where it comes from, its charts."""
    heading = [] if single else [element("h2", _badge(checkpoint), " ", checkpoint.name)]
    tiles = [element("div", element("dt", name), element("dd", value)) for name, value in _headline(checkpoint)]
    facts = [element("div", element("dt", name), element("dd", value)) for name, value in _facts(checkpoint)]
    figures = as_mapping(checkpoint.manifest.figures if checkpoint.manifest else None)
    widths = [figures["widths"]] if isinstance(figures.get("widths"), str) else []
    notes = [*widths, *as_list(figures.get("notes")), *as_list(figures.get("end_to_end_notes"))]
    charts = _charts(checkpoint)
    return element(
        "section",
        *heading,
        element("dl", *tiles, class_="tiles"),
        element("dl", *facts, class_="facts"),
        element("ul", *(element("li", note) for note in notes), class_="notes") if notes else "",
        element("div", *charts, class_="grid") if charts else "",
    )


def _facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """How a checkpoint was made, as far as run.json says."""
    run = checkpoint.manifest
    if run is None:
        facts = [("Format", checkpoint.format or UNKNOWN), ("Made by", "unknown, there is no run.json")]
        return [("Scheme", _scheme(checkpoint)), *facts] if checkpoint.schemes else facts
    keys = " ".join(f"{key}={value}" for key, value in as_mapping(run.keys).items())
    data = f"{run.data}, {run.samples} × {run.seqlen} tokens, seed {run.seed}" if run.samples else str(run.data)
    count = sum(scheme is not None for scheme in checkpoint.schemes.values())
    whole = as_pairs([as_mapping(run.figures).get("end_to_end")])
    return [
        ("Model", str(run.model)),
        ("Recipe", f"{run.recipe} {keys}".strip()),
        ("Scheme", f"{run.scheme or _scheme(checkpoint)} ({count} linears)"),
        ("Format", checkpoint.format),
        ("Data", data),
        *([("Loss of the whole model", f"{figure(whole[0][0])} → {figure(whole[0][1])}")] if whole else []),
        ("Software", ", ".join(f"{name} {version}" for name, version in as_mapping(run.versions).items()) or UNKNOWN),
    ]


def _charts(checkpoint: Checkpoint) -> list[Markup]:
    grid = Grid.of([*checkpoint.schemes, *(name for name in checkpoint.errors if name not in checkpoint.schemes)])
    maps = []
    if grid.blocks and any(name in checkpoint.errors for names in grid.cells.values() for name in names):
        maps.append(_error_map(grid, checkpoint.errors))
    if grid.blocks and checkpoint.schemes:
        maps.append(_scheme_map(grid, checkpoint.schemes))
    if checkpoint.losses:
        unit = "block" if len(checkpoint.losses) == len(grid.blocks) else "span"
        key = [element("i", class_="ring"), " before and ", element("i", class_="dot"), " after the fit"]
        caption = join(element("b", f"Held-out loss of each {unit}"), ", ", *key, _median(checkpoint.losses))
        # the maps one above the other, so that their blocks are
        return [_figure(caption, dumbbells(checkpoint.losses, unit)), element("div", *maps, class_="stack")]
    return maps


def _median(losses: Sequence[tuple[float, float]]) -> str:
    """What the fit did to the middle one of the spans."""
    changes = [after / before - 1 for before, after in losses if before > 0 and after >= 0]
    return f"; median {statistics.median(changes):+.0%}".replace("-", "−") if changes else ""


@dataclass(frozen=True)
class Grid:
    """Layers by (kind, block): `cells[row, column]` are the names that fall together, such as experts."""

    kinds: list[str]
    blocks: list[int]
    cells: dict[tuple[int, int], list[str]]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Grid":
        """From names such as model.layers.3.mlp.down_proj; others, outside of blocks, are left out."""
        found = [(name, match) for name in names if (match := _IN_BLOCK.fullmatch(name))]
        several = len({match["stack"] for _, match in found}) > 1
        places = []
        for name, match in found:
            kind = re.sub(r"\.[0-9]+(?=\.|$)", ".*", match["kind"])
            places.append((name, f"{match['stack']}.{kind}" if several else kind, int(match["block"])))
        kinds = list(dict.fromkeys(kind for _, kind, _ in places))
        blocks = sorted({block for _, _, block in places})
        row, column = {k: i for i, k in enumerate(kinds)}, {b: i for i, b in enumerate(blocks)}
        cells: dict[tuple[int, int], list[str]] = {}
        for name, kind, block in places:
            cells.setdefault((row[kind], column[block]), []).append(name)
        return cls(kinds, blocks, cells)

    def short_kinds(self) -> list[str]:
        """down_proj for mlp.down_proj, where that is clear."""
        last = [kind.rpartition(".")[2] for kind in self.kinds]
        return last if len(set(last)) == len(last) else self.kinds


def _error_map(grid: Grid, errors: Mapping[str, float]) -> Markup:
    means = {}
    for place, names in grid.cells.items():
        if known := [errors[name] for name in names if name in errors]:
            means[place] = sum(known) / len(known)
    low, high = min(means.values()), max(means.values())
    levels = {place: level(mean, low, high) for place, mean in means.items()}
    swatches = [element("i", class_=f"l{step}") for step in range(LEVELS)]
    legend = element(
        "p", figure(low), " ", element("span", *swatches, class_="ramp"), " ", figure(high), class_="legend"
    )
    caption = join(element("b", "Relative error of the weights"), ", ‖W − Ŵ‖ ∕ ‖W‖")
    return _map(caption, legend, grid, levels, {place: figure(mean) for place, mean in means.items()})


def _scheme_map(grid: Grid, schemes: Mapping[str, Scheme | None]) -> Markup:
    chosen = {}
    for place, names in grid.cells.items():
        known = [schemes[name] for name in names if name in schemes]
        if known:
            chosen[place] = Counter(known).most_common(1)[0][0]
    counts = Counter(scheme for scheme in schemes.values())
    order = sorted((s for s in counts if s), key=lambda s: (s.bits, -(s.group_size or 1 << 30), not s.symmetric))
    # from step 2 on: lighter ones are hard to tell from 16 bits
    steps = {s: 2 + round(i * (LEVELS - 4) / max(1, len(order) - 1)) for i, s in enumerate(order)}
    entries = [element("span", element("i", class_=f"l{steps[s]}"), f" {s} × {counts[s]}") for s in order]
    if None in counts:
        entries.append(element("span", element("i", class_="none"), f" 16-bit × {counts[None]}"))
    caption = join(element("b", "Bits of the linears"), ", by scheme")
    levels = {place: steps[scheme] if scheme else None for place, scheme in chosen.items()}
    texts = {place: str(scheme or "16-bit") for place, scheme in chosen.items()}
    return _map(caption, element("p", *entries, class_="legend"), grid, levels, texts)


def _map(
    caption: Markup,
    legend: Markup,
    grid: Grid,
    levels: Mapping[tuple[int, int], int | None],
    texts: Mapping[tuple[int, int], str],
) -> Markup:
    """A heat map with its names beside it, and the same as a table to unfold."""
    kinds, columns = grid.short_kinds(), len(grid.blocks)
    cells = {
        (row, column): Cell(level=levels[row, column], title=f"block {grid.blocks[column]} {kinds[row]}: {text}")
        for (row, column), text in texts.items()
    }
    names = element(
        "div", *(element("span", kind, title=grid.kinds[i]) for i, kind in enumerate(kinds)), class_="kinds"
    )
    numbers = [element("span", grid.blocks[i], style=f"left:{(i + 0.5) / columns:.2%}") for i in whole_ticks(columns)]
    chart = heatmap(cells, len(kinds), columns, "heat map of layer kind by block")
    picture = element(
        "div", names, chart, element("div", *numbers, class_="blocks"), class_="map", style=f"--rows:{len(kinds)}"
    )
    rows = [
        [block, *(texts.get((row, column), "") for row in range(len(kinds)))]
        for column, block in enumerate(grid.blocks)
    ]
    folded = element("details", element("summary", "Values as a table"), _table(["block", *kinds], rows))
    return _figure(caption, picture, legend, folded)


STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfc;--ink:#1d2327;--soft:#5a656c;--rule:#dfe3e4;--wash:#f3f5f5;
--accent:#17688f;--on-accent:#fff;
--l0:#dcebee;--l1:#bcdce4;--l2:#97c9d8;--l3:#6db2cb;--l4:#439abc;--l5:#2280a9;--l6:#1b6491;--l7:#1e4a73;--l8:#1d3152}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14181b;--ink:#e3e7e8;--soft:#98a4ab;--rule:#2d353a;
--wash:#1c2226;--accent:#6fbfdd;--on-accent:#10171b;
--l0:#22334f;--l1:#24496c;--l2:#22608b;--l3:#2179a6;--l4:#3693bb;--l5:#5badc9;--l6:#84c5d6;--l7:#afdbe3;--l8:#dcf0f2}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:40px 20px 72px}
h1,h2{line-height:1.2;font-weight:620;letter-spacing:-.012em;margin:0;overflow-wrap:anywhere}
h1{font-size:30px}h2{font-size:20px}
.kicker,.note,.legend,figcaption,dt,summary{color:var(--soft);font-size:13px;margin:0}
.note{margin-top:8px}
section{margin-top:32px}section+section{border-top:1px solid var(--rule);padding-top:28px}
.badge{display:inline-block;min-width:1.55em;padding:0 .4em;border-radius:1em;background:var(--accent);
color:var(--on-accent);font-size:max(12px,.8em);line-height:1.55;font-weight:600;text-align:center;margin-right:.3em}
.scroll{overflow-x:auto;margin-top:16px}
table{border-collapse:collapse;font-size:14px;line-height:1.4}
th,td{padding:6px 0 6px 24px;text-align:right;font-weight:400;white-space:nowrap;border-bottom:1px solid var(--rule)}
thead th{color:var(--soft);font-size:13px;vertical-align:bottom}
tbody th,th.w,td.w{text-align:left}
tbody th,td.w{white-space:normal;overflow-wrap:anywhere;max-width:min(24em,45vw);min-width:10em}
tr>:first-child{padding-left:0;position:sticky;left:0;background:var(--paper)}
dl{margin:16px 0 0}dd{margin:0;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:12px 40px;align-items:end}
.tiles div{max-width:230px}.tiles dd{font-size:22px;line-height:1.25}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:10px 32px;font-size:14px}
.notes{margin:16px 0 0;padding-left:18px;font-size:14px;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:32px 48px;margin-top:24px}
.stack{display:grid;gap:24px;align-content:start;min-width:0}
figure{margin:0;min-width:0;max-width:560px;break-inside:avoid}
figcaption{margin-bottom:8px;overflow-wrap:anywhere}figcaption b{color:var(--ink);font-weight:600}
svg{display:block;width:100%;overflow:visible}
.chart{height:auto}.chart text{font-size:12.5px;fill:var(--soft)}
.rule{stroke:var(--rule)}.stem{stroke:var(--accent);opacity:.45}
.before{fill:var(--paper);stroke:var(--soft)}.after{fill:var(--accent)}
.front{fill:none;stroke:var(--accent);stroke-width:1.5;opacity:.55}
.best circle{fill:var(--accent)}.beaten circle{fill:var(--paper);stroke:var(--soft)}
.chart .best text{fill:var(--on-accent);font-weight:600}.chart .beaten text{fill:var(--soft)}
.map{display:grid;grid-template-columns:max-content 1fr;column-gap:10px;font-size:12.5px;color:var(--soft)}
.kinds{display:grid;grid-template-rows:repeat(var(--rows),20px);max-width:130px;line-height:20px}
.kinds span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.heat{height:calc(20px*var(--rows))}.heat rect{stroke:var(--paper);stroke-width:1px;vector-effect:non-scaling-stroke}
.blocks{grid-column:2;position:relative;height:20px;margin-top:3px}
.blocks span{position:absolute;transform:translateX(-50%)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;align-items:center;margin-top:6px;font-size:12.5px}
.legend i{display:inline-block;width:14px;height:12px;vertical-align:-1px}.ramp{margin:0 -8px;line-height:0}
figcaption i{display:inline-block;width:9px;height:9px;border-radius:9px;border:1px solid var(--soft)}
figcaption .dot{background:var(--accent);border-color:var(--accent)}
.l0{fill:var(--l0);background:var(--l0)}.l1{fill:var(--l1);background:var(--l1)}.l2{fill:var(--l2);background:var(--l2)}
.l3{fill:var(--l3);background:var(--l3)}.l4{fill:var(--l4);background:var(--l4)}.l5{fill:var(--l5);background:var(--l5)}
.l6{fill:var(--l6);background:var(--l6)}.l7{fill:var(--l7);background:var(--l7)}.l8{fill:var(--l8);background:var(--l8)}
.none{fill:var(--wash);background:var(--wash);outline:1px solid var(--rule)}
summary{cursor:pointer;margin-top:8px}details .scroll{max-height:420px;overflow-y:auto;margin-top:4px}
@media (max-width:560px){main{padding-top:24px}h1{font-size:24px}.chart text{font-size:17px}.tiles{gap:12px 28px}}
@media print{:root{color-scheme:light;--paper:#fff}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}main{max-width:none;padding:0}
body{font-size:10.5pt}h2{break-after:avoid}details:not([open]){display:none}
.scroll,details .scroll{overflow:visible;max-height:none}
.grid{grid-template-columns:1fr 1fr;gap:20px 32px}.facts{grid-template-columns:repeat(3,1fr)}
section{break-inside:avoid}.chart text{font-size:17px}tr>:first-child{position:static}}
"""
