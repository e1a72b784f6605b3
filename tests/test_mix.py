"""Mixes: shares of the tokens, what is watched apart from what is trained on, and every refusal before any work."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import planish
from planish.errors import PlanishError
from planish.fit.reconstruct import Samples
from planish.mix import Part, blend, name_of, parts, shares
from planish.run import Run
from planish.tuning import finetune

Tiny = Callable[..., Path]
SEQLEN = 4
# what each source's windows are made of
MARKS = {"a.txt": 1, "b.jsonl": 2, "c": 3, "embedded": 4, "self": 5}


def cut(source: Any, count: int) -> tuple[tuple[Tensor], str]:
    """Windows that say which source they are of and which of its windows they are; `c` has three."""
    had = min(count, 3) if source == "c" else count
    ids = torch.full((had, SEQLEN), MARKS[source])
    ids[:, 1] = torch.arange(had)
    return (ids,), f"c holds {had}" if had < count else ""


def counts(ids: Tensor) -> dict[int, int]:
    return dict(Counter(ids[:, 0].tolist()))


def test_shares_are_equal_or_as_the_weights_are() -> None:
    assert shares(9, [1, 1, 1]) == [3, 3, 3] and shares(8, [1, 1, 1]) == [3, 3, 2] and shares(7, [1, 2]) == [2, 5]
    equal = blend("a.txt,b.jsonl", cut, 12, seed=0)
    assert counts(equal.tensors[0]) == {1: 6, 2: 6} and equal.watched == "" and equal.notes == ()
    assert counts(blend("a.txt, b.jsonl:2", cut, 12, seed=0).tensors[0]) == {1: 4, 2: 8}
    assert counts(blend([Path("a.txt"), "b.jsonl:0.5"], cut, 12, seed=0).tensors[0]) == {1: 8, 2: 4}
    short = blend("a.txt,c", cut, 12, seed=0)
    assert counts(short.tensors[0]) == {1: 6, 3: 3} and short.notes == ("c holds 3",)


def test_the_seed_shuffles_and_nothing_is_twice() -> None:
    first, again, other = (blend("a.txt,b.jsonl", cut, 40, seed=seed).tensors[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 40
    assert len(set(first[:20, 0].tolist())) == 2, "not one source after the other"


def test_one_source_is_as_it_was() -> None:
    for data in ("a.txt", Path("a.txt"), ["a.txt"]):
        asked: list[Any] = []
        found = blend(data, lambda source, count, asked=asked: (asked.append(count), cut(str(source), count))[1], 5,
                      seed=3, holdout=8)  # fmt: skip
        assert asked == [5] and found.tensors[0][:, 1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("samples", range(3, 60))
@pytest.mark.parametrize("data", ["a.txt,b.jsonl", "a.txt,c"])
def test_nothing_that_is_watched_is_trained_on(data: str, samples: int) -> None:
    """Whatever a short source leaves: a fit holds out windows of what is watched, and trains on none of them."""
    found = blend(data, cut, samples, seed=0, holdout=8)
    ids, (one, other) = found.tensors[0], MARKS.keys() & set(data.split(","))
    fitted = Samples(len(ids), 8, 4, seed=0)
    assert found.watched == "embedded" and len(ids) <= samples
    assert set(ids[fitted.held_out, 0].tolist()) == {4}
    assert set(ids[fitted.rest, 0].tolist()) == {MARKS[one], MARKS[other]}


def test_what_is_watched() -> None:
    def watched(data: Any, **how: Any) -> str:
        return blend(data, cut, 16, seed=0, **{"holdout": 4, **how}).watched

    assert watched("a.txt") == "" and watched("a.txt,c") == "embedded" and watched("a.txt,c", holdout=0) == ""
    assert watched("a.txt,embedded") == "", "it is trained on"
    assert watched("a.txt", watch="b.jsonl") == "b.jsonl" and watched("a.txt,c", watch="b.jsonl") == "b.jsonl"
    found = blend("a.txt", cut, 16, seed=0, watch="b.jsonl", holdout=4)
    assert counts(found.tensors[0]) == {2: 4, 1: 12} and found.tensors[0][:4, 0].tolist() == [2] * 4


def test_the_models_own_text_comes_last() -> None:
    order: list[str] = []
    found = blend("self,a.txt", lambda source, count: (order.append(source), cut(source, count))[1], 16, seed=0,
                  holdout=4)  # fmt: skip
    assert order == ["a.txt", "embedded", "self"] and counts(found.tensors[0]) == {4: 4, 5: 6, 1: 6}


def test_names_and_files(tmp_path: Path) -> None:
    (tmp_path / "a,b.txt").write_text("x")
    (tmp_path / "c:2").write_text("x")
    assert parts(str(tmp_path / "a,b.txt")) == (Part(str(tmp_path / "a,b.txt")),), "a file of that name"
    field = f"{tmp_path / 'c:2'}#text"
    assert parts(f"{field},self") == (Part(field), Part("self")), "its first is a file"
    assert parts(f"{tmp_path / 'c:2'},x.txt")[0] == Part(str(tmp_path / "c:2"))
    assert parts("org/name:config@train#text:3,self") == (Part("org/name:config@train#text", 3.0), Part("self"))
    assert parts("name:2022") == (Part("name:2022"),), "alone it has no weight, but a configuration"
    assert name_of([Path("a.txt"), "b:2"]) == "a.txt,b:2" and name_of(torch.zeros(1, 2)) == "token ids"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"data": "a.txt,"}, "'a.txt,' has a source without a name; write a mix as one.txt,two.jsonl:2"),
        ({"data": []}, "[] has a source without a name; write a mix as one.txt,two.jsonl:2"),
        ({"data": "a.txt,a.txt:2"}, "a.txt is in the mix twice; give it a weight instead, as a.txt:2"),
        ({"data": "a.txt,c:0"}, "c:0: a weight must be above 0; leave the source out"),
        ({"data": "a.txt,c", "watch": "c"}, "c is trained on, and can't be watched too; name another source"),
        ({"data": "a.txt", "watch": "b.jsonl,c"}, "what is watched is one source, not b.jsonl,c"),
        ({"data": "a.txt", "watch": "c", "holdout": 0}, "nothing is fitted, so that nothing is watched; drop watch=c"),
        ({"data": "a.txt,c:9", "samples": 5}, "5 samples are too few for the shares of a.txt,c:9; give more --samples"),
    ],
)
def test_refusals(how: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanishError) as error:
        blend(**{"samples": 16, "seed": 0, "holdout": 4, "cut": cut, **how})
    assert str(error.value) == said


# ---- whole runs


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "one.txt").write_text("A smith planishes the sheet. " * 40)
    (tmp_path / "two.txt").write_text("0123456789 " * 90)
    return f"{tmp_path / 'one.txt'},{tmp_path / 'two.txt'}"


QUICK: dict[str, Any] = {"scheme": "w2g32", "samples": 16, "seqlen": 32, "device": "cpu"}


def test_a_run_says_what_it_watched(tiny_llama: Tiny, tmp_path: Path, texts: str) -> None:
    model = tiny_llama()
    manifest = planish.quantize_to(model, tmp_path / "out", data=texts, epochs=1, e2e_epochs=1, **QUICK)
    said = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (said["data"], said["watched"], said["samples"]) == (texts, "embedded", 16)
    before, after = manifest.figures["end_to_end"]
    assert after <= before
    named = planish.quantize_to(
        model, tmp_path / "named", data=texts.partition(",")[0], watch=tmp_path / "two.txt", epochs=1, e2e_epochs=1,
        **QUICK,
    )  # fmt: skip
    assert named.watched == str(tmp_path / "two.txt") and named.data_sha256 != manifest.data_sha256
    plain = planish.quantize_to(model, tmp_path / "plain", "rtn", data=texts, **QUICK, search=True)
    assert plain.watched == "" and plain.samples == 16, "nothing is fitted"
    with pytest.raises(PlanishError, match="^recipe 'rtn' fits nothing to watch; drop watch$"):
        planish.quantize_to(model, tmp_path / "no", "rtn", watch="embedded", **QUICK)


def test_finetune_takes_a_mix_of_text_and_conversations(tiny_llama: Tiny, tmp_path: Path, texts: str) -> None:
    model = tiny_llama()
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    planish.quantize_to(model, tmp_path / "q2", "rtn", "w2g32", device="cpu")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "Four."}) + "\n" * 1)
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows * 9)
    mix = f"{texts.partition(',')[0]},{tmp_path / 'rows.jsonl'}:0.5"
    about: dict[str, Any] = {"samples": 12, "seqlen": 32, "device": "cpu", "epochs": 1, "teacher": model}
    manifest = finetune(tmp_path / "q2", tmp_path / "out", data=mix, **about)
    assert (manifest.data, manifest.watched, manifest.samples) == (mix, "embedded", 12)
    own = finetune(tmp_path / "q2", tmp_path / "own", data="self", watch="embedded", **about, distill=1.0)
    assert (own.data, own.watched, own.samples) == ("self", "embedded", 12)
    with pytest.raises(PlanishError, match=r"data=self is text of the float model: distil from it \(distill=1\), or"):
        finetune(tmp_path / "q2", tmp_path / "no", data="self", **about)


def test_one_bad_source_is_said_before_any_work(
    tiny_llama: Tiny, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "own_text", lambda *_: pytest.fail("the model wrote before all sources were read"))
    monkeypatch.setattr(Run, "execute", lambda *_: pytest.fail("work began"))
    with pytest.raises(PlanishError, match="^no such file: nowhere.txt$"):
        planish.quantize_to(tiny_llama(), tmp_path / "out", data=f"self,{texts},nowhere.txt", **QUICK)
    assert not (tmp_path / "out").exists()
