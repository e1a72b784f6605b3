"""Tokenizers in a GGUF: the rule for words by its definition, scores from merges, types of tokens."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from planish.errors import PlanishError
from planish.gguf_tokenizer import add_tokenizer, word_rule

gguf = pytest.importorskip("gguf")

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
# as the models' own tokenizer.json spells them
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCEPIECE: dict[str, Any] = {
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": None,
    "post_processor": {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
    "added_tokens": [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True},
                     {"id": 7, "content": "▁▁", "special": False}],
    "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>",
              "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "abc": 3, "ab": 4, "a": 5, "b": 6},
              "merges": [["a", "b"], ["ab", "c"], ["a", "bc"]]},
}  # fmt: skip


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def definition(*steps: dict[str, Any], ignore_merges: bool = False) -> dict[str, Any]:
    sequence = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence, "model": {"ignore_merges": ignore_merges}}


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (definition(GPT2), "gpt-2"),
        (definition(DIGITS, GPT2), "smollm"),
        (definition(split(LLAMA3), BYTES, ignore_merges=True), "llama-bpe"),
        (definition(split(LLAMA3), BYTES), "smaug-bpe"),
        (definition(split(QWEN2), BYTES), "qwen2"),
        (definition(split(TEKKEN), BYTES, ignore_merges=True), "tekken"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rule_is_known_by_its_definition(found: dict[str, Any], name: str) -> None:
    assert word_rule(found, Path("tokenizer.json")) == name


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (definition(split(r"\w+"), BYTES), r"the pre-tokenizer \\w\+ then bytes; use"),
        (definition(split(QWEN2), BYTES, ignore_merges=True), r"then bytes \(ignoring merges\)"),
        (definition(GPT2 | {"add_prefix_space": True}), "add_prefix_space"),
        (definition(GPT2) | {"normalizer": {"type": "Lowercase"}}, "no normalizer .*Lowercase"),
    ],
    ids=["regex", "merges", "space", "normalizer"],
)
def test_an_unknown_rule_is_refused_by_what_was_found(found: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanishError, match=f"^tokenizer.json: .*{said}"):
        word_rule(found, Path("tokenizer.json"))


def written(folder: Path, tokenizer: dict[str, Any], size: int = 9) -> dict[str, Any]:
    """What a GGUF says of a tokenizer, by the key's last part."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    add_tokenizer(gguf, writer, folder, size)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in writer.kv_data[0].items()}


def test_sentencepiece_has_scores_types_and_spaces(tmp_path: Path) -> None:
    found = written(tmp_path, SENTENCEPIECE)
    assert (found["model"], found["pre"], "merges" in found) == ("llama", "default", False)
    assert found["tokens"] == ["<unk>", "<s>", "<0x0A>", "abc", "ab", "a", "b", "  ", "[PAD8]"]
    assert found["token_type"] == [2, 3, 6, 1, 1, 1, 1, 4, 5]
    assert found["scores"][3:7] == [-1.0, 0.0, -3.0, -3.0]  # abc is made by the second merge, a and b by none
    assert found["add_space_prefix"] is True and found["add_bos_token"] is True and found["add_eos_token"] is False
    assert found["bos_token_id"] == 1


def test_no_space_is_put_before_text_unless_the_definition_says_so(tmp_path: Path) -> None:
    gemma = copy.deepcopy(SENTENCEPIECE) | {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    }
    assert written(tmp_path, gemma)["add_space_prefix"] is False
    metaspace = gemma | {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}}
    assert written(tmp_path, metaspace)["add_space_prefix"] is True


def test_byte_level_has_merges_and_never_llama_cpps_default_bos(tmp_path: Path) -> None:
    tokenizer = definition(split(QWEN2), BYTES) | {"added_tokens": [{"id": 4, "content": "<s>", "special": True}]}
    tokenizer["model"] = {"type": "BPE", "vocab": {"Ġ": 0, "a": 1, "b": 2, "Ġa": 3}, "merges": ["Ġ a"]}
    found = written(tmp_path, tokenizer, 6)
    assert (found["model"], found["pre"], found["merges"]) == ("gpt2", "qwen2", ["Ġ a"])
    assert found["tokens"] == ["Ġ", "a", "b", "Ġa", "<s>", "[PAD5]"] and found["token_type"] == [1, 1, 1, 1, 3, 5]
    assert found["add_bos_token"] is False and "scores" not in found


def test_what_cannot_be_taken_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="no tokenizer.json"):
        add_tokenizer(gguf, None, tmp_path, 9)
    with pytest.raises(PlanishError, match="token 7, but the model's vocabulary is 7"):
        written(tmp_path, SENTENCEPIECE, 7)
    with pytest.raises(PlanishError, match="BPE, this one is Unigram"):
        written(tmp_path, SENTENCEPIECE | {"model": {"type": "Unigram", "vocab": []}})
