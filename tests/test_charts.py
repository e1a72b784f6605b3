"""Charts: well-formed, escaped, with round numbers on their axes and the right points on the front."""

import xml.etree.ElementTree as ElementTree

import pytest

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
    level,
    linear_ticks,
    log_ticks,
    undominated,
    whole_ticks,
)


def point(x, y, number=1):
    return Point(x=x, y=y, number=number, title="<b>&")


def test_element_escapes_what_isnt_markup():
    made = element("td", "<script>", Markup("<b>kept</b>"), 3, class_='"x', text_anchor=None)
    assert made == '<td class="&quot;x">&lt;script&gt;<b>kept</b>3</td>'
    assert element("p", "a\x00b\ud800") == "<p>a\ufffdb\ufffd</p>"


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.09124, "0.0912"), (22.84, "22.8"), (1234.4, "1234"), (3.1e-5, "3.1·10⁻⁵"), (1e-4, "10⁻⁴"),
     (-2e7, "-2·10⁷")],
)  # fmt: skip
def test_figure(value, text):
    assert figure(value) == text


@pytest.mark.parametrize("low, high", [(1e-7, 1e5), (0.8, 1.3), (21.6, 22.9), (2, 17), (5e-324, 1e300), (3, 3.0001)])
def test_log_ticks_are_few_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert 1 < len(ticks) <= 6 and all(low <= tick <= high for tick in ticks) and ticks == sorted(set(ticks))


def test_ticks_are_round():
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(0.05, 200) == [0.1, 1, 10, 100]
    assert log_ticks(18, 70) == [20, 30, 40, 50, 70]
    assert whole_ticks(30) == [0, 5, 10, 15, 20, 25] and whole_ticks(1) == [0]
    assert all(len(whole_ticks(count)) <= 8 for count in range(1, 700))


def test_undominated_is_the_pareto_front():
    points = [point(4, 25), point(2, 60), point(3, 61), point(4, 24), point(16, 21), point(17, 21), point(2, 70)]
    assert [(p.x, p.y) for p in undominated(points)] == [(2, 60), (4, 24), (16, 21)]


def test_frontier_marks_best_and_beaten():
    tree = ElementTree.fromstring(frontier([point(2, 60), point(3, 61, 2), point(4, 24, 3)], "bits", "perplexity"))
    marked = [(group.get("class"), group.findtext("text")) for group in tree.iter("g")]
    assert sorted(marked) == [("beaten", "2"), ("best", "1"), ("best", "3")]
    assert tree.find("g/title").text == "<b>&"
    # one of a kind, or all alike, draws too
    ElementTree.fromstring(frontier([point(2, 5), point(2, 5)], "bits", "perplexity"))


def test_dumbbells_draw_what_can_be_drawn():
    tree = ElementTree.fromstring(dumbbells([(1e-3, 5e-4), (float("nan"), 2e-3), (0.0, -1.0)], "block"))
    assert len(tree.findall("line[@class='stem']")) == 1
    assert [len(tree.findall(f"circle[@class='{kind}']")) for kind in ("before", "after")] == [1, 2]
    before, after = (float(tree.find(f"circle[@class='{kind}']").get("cy")) for kind in ("before", "after"))
    assert before < after  # less loss is lower on the page
    assert tree.find("circle/title").text == "block 0: 0.001 → 5·10⁻⁴"


def test_levels_and_heatmap():
    assert [level(value, 0, 1) for value in (0, 0.5, 1)] == [0, LEVELS // 2, LEVELS - 1]
    assert level(3, 3, 3) == LEVELS // 2
    cells = {(0, 0): Cell(level=0, title="a<b"), (1, 2): Cell(level=None, title="16-bit")}
    tree = ElementTree.fromstring(heatmap(cells, 2, 3, "errors"))
    assert [(r.get("class"), r.get("x"), r.findtext("title")) for r in tree] == [("l0", "0", "a<b"),
                                                                                 ("none", "2", "16-bit")]  # fmt: skip
