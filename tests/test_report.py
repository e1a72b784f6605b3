"""The report: it says what the folders say, never more; it is one safe file, and readable in a real browser."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

import planish
from planish.errors import PlanishError
from planish.report import Grid, report, write_report
from planish.results import Measure, read_checkpoint

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def run(tmp_path):
    """run(name, blocks=4, evaluation=None, **changes) -> folder with a run.json as a run leaves it."""

    def write(name="w2", blocks=4, evaluation=None, **changes):
        layers = {f"model.layers.{block}.{kind}": "w2g64" for block in range(blocks) for kind in KINDS}
        layers |= {f"model.layers.{block}.mlp.down_proj": "w4g64" for block in range(blocks)}
        figures = {
            "seconds": 4321.0,
            "peak_bytes": 17_300_000_000,
            "losses": [[1e-4 * 1.1**block, 0.7e-4 * 1.1**block] for block in range(blocks)],
            "errors": {layer: 0.3 + index / 1e4 for index, layer in enumerate(layers)},
            "notes": ["model.layers.1: the rate was halved"],
        }
        facts = {
            "model": "org/some-model", "recipe": "signround", "keys": {"steps": 200}, "scheme": "w2g64, down=w4g64",
            "layers": layers, "format": "auto_round", "data": "wiki.train.raw", "data_sha256": "", "samples": 128,
            "seqlen": 2048, "seed": 7, "versions": {"planish": "0.1.0"},
            "figures": figures | changes.pop("figures", {}),
        }  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(facts | changes))
        if evaluation is not None:
            (folder / "eval.json").write_text(json.dumps(evaluation))
        return folder

    return write


def evaluation(perplexity=22.84, accuracy=0.68):
    return {
        "perplexity": [{"data": "wiki.test.raw", "value": perplexity, "tokens": 290000, "seqlen": 2048}],
        "tasks": {"piqa": {"acc": accuracy, "stderr": 0.03}, "boolq": {"acc": accuracy / 2, "stderr": 0.04}},
    }


def parse(page):
    """The page as a tree: it is well-formed XML but for its first line."""
    first, _, rest = page.partition("\n")
    assert first == "<!doctype html>"
    return ElementTree.fromstring(rest)


def text_of(page):
    return " ".join(text for part in parse(page).find("body").iter() for text in (part.text, part.tail) if text)


def test_says_what_the_run_says(run):
    text = text_of(report([run(evaluation=evaluation())]))
    for said in ("org/some-model", "signround steps=200", "w2g64, down=w4g64", "(28 linears)", "auto_round", "72 min",
                 "wiki.train.raw, 128 × 2048 tokens, seed 7", "planish 0.1.0", "17.3 GB", "the rate was halved",
                 "Perplexity on wiki.test.raw, windows of 2048", "22.84", "0.680 ± 0.030", "median −30%",
                 "w2g64 × 24", "w4g64 × 4"):  # fmt: skip
        assert said in text, said
    assert "0.510 ± 0.025" in text  # the mean of 0.68 and 0.34, and hypot(0.03, 0.04) / 2


def test_every_cell_has_a_tooltip_and_a_row(run):
    tree = parse(report([run(blocks=5)]))
    maps = [svg for svg in tree.iter("svg") if svg.get("class") == "heat"]
    assert [len(svg) for svg in maps] == [35, 35]
    assert maps[0][0].findtext("title") == "block 0 q_proj: 0.3"
    assert [maps[0][index].get("class") for index in (0, 34)] == ["l0", "l8"]
    tables = [details.find(".//table") for details in tree.iter("details")]
    assert [len(table.findall("tbody/tr")) for table in tables] == [5, 5]
    row = ["".join(cell.itertext()) for cell in tables[1].findall("tbody/tr")[2]]
    assert row == ["2", *["w2g64"] * 6, "w4g64"]


def test_several_are_compared(run):
    folders = [run(name, evaluation=evaluation(*figures)) for name, figures in
               {"a": (22.84, 0.6), "b": (30.5, 0.5), "c": (math.nan, 0.5)}.items()]  # fmt: skip
    page = report(folders)
    assert "3 checkpoints compared" in text_of(page) and page == report(folders)
    header = parse(page).findall(".//thead")[1]
    assert ["".join(cell.itertext()).strip() for cell in header.iter("th")] == ["", "1 a", "2 b", "3 c"]


def test_folders_of_one_name_are_told_apart(run, tmp_path):
    first, second = run("one"), run("two")
    (tmp_path / "x").mkdir()
    second.rename(tmp_path / "x" / "one")
    assert str(tmp_path / "x" / "one") in text_of(report([first, tmp_path / "x" / "one"]))


def test_real_checkpoints(tiny_llama, tmp_path):
    model = tiny_llama()
    folders = [model]
    for scheme in ("w4g32", "w2g32"):
        folders.append(tmp_path / scheme)
        planish.quantize_to(model, folders[-1], recipe="rtn", scheme=scheme, ignore=["1.mlp.up_proj"], device="cpu")
    for folder, perplexity in zip(folders, (20.0, 21.0, 60.0), strict=True):
        (folder / "eval.json").write_text(json.dumps(evaluation(perplexity)))
    float_model, four, two = (read_checkpoint(folder, 1, folder.name) for folder in folders)
    assert (float_model.bits, float_model.format) == (pytest.approx(16, abs=0.3), "bfloat16")
    # the bits of `planish info`
    said = [planish.info(folder).summary()[2] for folder in folders[1:]]
    assert said == [f"{checkpoint.bits:.2f} bits a weight with embeddings" for checkpoint in (four, two)]
    assert four.size == (folders[1] / "model.safetensors").stat().st_size
    assert four.schemes["model.layers.1.mlp.up_proj"] is None and len(four.schemes) == 14

    tree = parse(write_report(folders, tmp_path / "new" / "report.html").read_text(encoding="utf-8"))
    pictures = [svg for svg in tree.iter("svg") if len(svg.findall("g"))]
    assert [svg.get("aria-label") for svg in pictures] == ["perplexity against bits a weight",
                                                           "perplexity against MB on disk"]  # fmt: skip
    assert [group.get("class") for svg in pictures for group in svg.iter("g")] == ["best"] * 6
    assert "16-bit × 1" in "".join(tree.itertext())


def test_what_others_wrote_is_shown_as_far_as_known(tiny_llama, run):
    model = tiny_llama()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "somebody's own", "bits": 3}
    (model / "config.json").write_text(json.dumps(config))
    (model / "run.json").write_text('{"another": "tool"}')
    text = text_of(report([model, run()]))
    assert "somebody's own" in text and "unknown, there is no run.json" in text


def test_gguf_alone_is_a_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(1_999_996))
    checkpoint = read_checkpoint(tmp_path, 1, "x")
    assert (checkpoint.size, checkpoint.bits, checkpoint.schemes) == (2_000_000, None, {})
    assert "2.0 MB" in text_of(report([tmp_path]))


@pytest.mark.parametrize(
    "changes",
    [{"figures": {"losses": [[0, 0], ["x", None], [1], 7], "errors": {"a": "b", "model.layers.0.q": math.inf}}},
     {"figures": {"losses": {"a": 1}, "errors": [1, 2], "seconds": "soon", "notes": "x", "end_to_end": [1.5]}},
     {"layers": ["a"], "versions": None, "samples": "many"},
     {"layers": {"model.layers.0.q": "w9000", "lm_head": "w8g64", "model.layers.99999999999.q": "w2g64"}},
     {"layers": {f"model.layers.3.experts.{n}.up": "w2g64" for n in range(3)}, "scheme": ""}],
)  # fmt: skip
def test_odd_values_never_fail(run, changes):
    parse(report([run(**changes, evaluation={"perplexity": [{"value": "low"}, 3], "tasks": {"a": 1, "b": {}}})]))


def test_experts_share_a_cell():
    names = [f"model.layers.{block}.mlp.experts.{n}.up_proj" for block in (3, 7) for n in range(3)]
    grid = Grid.of([*names, "model.layers.7.mlp.shared.up_proj", "lm_head"])
    assert (grid.kinds, grid.blocks) == (["mlp.experts.*.up_proj", "mlp.shared.up_proj"], [3, 7])
    assert grid.cells == {(0, 0): names[:3], (0, 1): names[3:], (1, 1): ["model.layers.7.mlp.shared.up_proj"]}
    assert grid.short_kinds() == grid.kinds


def test_whole_model_stage(run):
    text = text_of(report([run(figures={"end_to_end": [2.5, 2.25], "end_to_end_notes": ["stopped early"]})]))
    assert "2.5 → 2.25" in text and "stopped early" in text


def test_text_from_files_stays_text(run):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>\x00</title></style>'
    folder = run(
        model=evil, recipe=evil, keys={evil: evil}, scheme=evil, format=evil, data=evil, versions={evil: evil},
        layers={f"model.layers.0.{evil}": "w2g64"},
        figures={"notes": [evil], "errors": {f"model.layers.0.{evil}": 0.1}, "losses": [[evil, evil]]},
        evaluation={"perplexity": [{"data": evil, "value": 3, "seqlen": evil}], "tasks": {evil: {evil: 0.5}}},
    )  # fmt: skip
    page = report([folder])
    tags = [part.tag for part in parse(page).iter()]
    assert not {"script", "img", "iframe", "object", "link", "a"} & set(tags) and tags.count("title") == 3
    assert not [name for part in parse(page).iter() for name in part.attrib if name.startswith("on")]
    assert text_of(page).count("<script>alert(1)</script>") > 10


def test_needs_nothing_else(run):
    page = report([run(), run("other")])
    assert not re.search(r"https?:|url\(|@import|<script|<link|src=|data:", page)
    assert "default-src &#x27;none&#x27;" in page


def test_70b_stays_small(run, tmp_path):
    folders = [run(f"seventy-{index}", blocks=80, evaluation=evaluation()) for index in range(5)]
    assert write_report(folders, tmp_path / "report.html").stat().st_size < 2_000_000


def test_refusals(run, tmp_path):
    folder, empty = run(), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(PlanishError, match="nothing to report"):
        report([])
    for none in (empty, tmp_path / "absent", folder / "run.json"):
        with pytest.raises(PlanishError, match="is no model: it has neither run.json nor weights"):
            report([folder, none])
    with pytest.raises(PlanishError, match="ends in .html"):
        write_report([folder], folder / "run.json")
    with pytest.raises(PlanishError, match="can't write"):
        write_report([folder], folder / "run.json" / "report.html")
    (folder / "eval.json").write_text("{")
    with pytest.raises(PlanishError, match="eval.json is damaged"):
        report([folder])


def test_measure_with_and_without_standard_error():
    assert str(Measure(22.843)) == "22.84" and str(Measure(0.5, 0.0123)) == "0.500 ± 0.012"


# --- in a browser ---------------------------------------------------------------------------------------------------

# measures each frame from outside: the page itself has no script, and its policy allows none
PROBE = """
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const sizes = [], cut = [];
    for (const part of page.querySelectorAll("body *")) {
      const words = [...part.childNodes].some(node => node.nodeType == 3 && node.data.trim());
      if (!words || part.tagName == "title" || !part.checkVisibility()) continue;
      const scale = part.tagName == "text" ? part.getScreenCTM().a : 1;
      sizes.push(parseFloat(getComputedStyle(part).fontSize) * scale);
      const box = part.getBoundingClientRect();
      if (!part.closest(".scroll") && (box.left < 0 || box.right > root.clientWidth)) cut.push(part.textContent);
    }
    const drawn = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
    return {width: root.clientWidth, scroll: root.scrollWidth, smallest: Math.min(...sizes), cut, texts: sizes.length,
            drawn: drawn.filter(box => box.width > 200 && box.height > 20).length, svgs: drawn.length,
            paper: getComputedStyle(page.body).backgroundColor};
  });
  document.body.replaceChildren(JSON.stringify(seen));
});
"""


def browse(folder, *pages):
    """Console lines and measurements of HTML texts, each at 400 and 1400 px, light and dark."""
    frames = [
        f'<iframe width="{width}" height="800" style="color-scheme:{theme}" srcdoc="{html.escape(page)}"></iframe>'
        for page in pages
        for width in (400, 1400)
        for theme in ("light", "dark")
    ]
    outer = folder / "probe.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><body>{''.join(frames)}<script>{PROBE}</script>")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--dump-dom", outer.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"LANG": "C.UTF-8"})
    measured = re.search(r"<body>(\[.*\])</body>", done.stdout, re.DOTALL)
    assert measured, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], json.loads(html.unescape(measured[1]))


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome")
def test_in_a_browser(run, tmp_path):
    names = ["a", "b-with-a-rather-long-name-that-nobody-should-give-to-a-folder-but-somebody-will-some-day"]
    folders = [run(name, blocks=80, evaluation=evaluation(3.2 + len(name))) for name in names]
    for folder in folders:
        (folder / "model.gguf").write_bytes(bytes(len(folder.name) * 100_000))
    console, measured = browse(tmp_path, report(folders), report(folders[:1]))
    assert console == []
    assert len(measured) == 8
    for seen in measured:
        assert seen["scroll"] <= seen["width"], seen
        assert seen["smallest"] >= 12 and seen["cut"] == [] and seen["texts"] > 50, seen
        assert seen["drawn"] == seen["svgs"] >= 3, seen
    light, dark = measured[0]["paper"], measured[1]["paper"]
    assert light != dark, "the page follows the reader's theme"


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome")
def test_the_probe_sees_faults(tmp_path):
    bad = '<body style="font-size:9px"><p style="width:3000px">wide<svg class="none"></svg><script>nope()</script>'
    console, measured = browse(tmp_path, bad)
    assert len(console) == 4 and "nope is not defined" in console[0]
    assert all(seen["scroll"] > seen["width"] and seen["smallest"] == 9 and seen["cut"] for seen in measured)
