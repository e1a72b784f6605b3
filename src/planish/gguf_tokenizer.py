"""A tokenizer as llama.cpp keeps it in a GGUF: tokens, their types, merges or scores, and how text is cut before.

From tokenizer.json alone. llama.cpp knows two kinds of BPE: over bytes ("gpt2": merges, and the name of a rule that
cuts text into words) and SentencePiece's ("llama": each token has a score, the best pair is joined first). Scores are
ranks of merges there, negated. Rules for words go by name in llama.cpp; a definition whose name isn't in WORDS is
refused, since another rule would give other tokens. It knows nothing of tensors.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planish.errors import PlanishError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (what cuts text before bytes are merged, does a word that is a token skip merging?) -> llama.cpp's name
WORDS = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}", "bytes"), True): "llama-bpe",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}", "bytes"), False): "smaug-bpe",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}", "bytes"), False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHES}", "bytes"), True): "tekken",
}


def add_tokenizer(gguf: Any, writer: Any, folder: Path | None, size: int) -> None:
    """Write a folder's tokenizer into a GGUF's metadata.

    Args:
        gguf, writer: the package and its GGUFWriter.
        folder: where tokenizer.json lies.
        size: rows of the embedding; ids without a token get a placeholder.

    Raises:
        PlanishError: if there is no tokenizer.json, or llama.cpp would tokenize otherwise.
    """
    path = None if folder is None else folder / "tokenizer.json"
    if path is None or not path.is_file():
        raise PlanishError(f"{folder} has no tokenizer.json; load its tokenizer with transformers and save it there")
    definition = json.loads(path.read_text(encoding="utf-8"))
    model = definition["model"]
    if model.get("type") != "BPE":
        raise PlanishError(f"{path}: llama.cpp's tokenizers are BPE, this one is {model.get('type')}")
    last = max([*model["vocab"].values(), *(token["id"] for token in definition["added_tokens"])])
    if last >= size:
        raise PlanishError(
            f"{path} has a token {last}, but the model's vocabulary is {size}; they don't belong together"
        )
    sentencepiece = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else word_rule(definition, path))
    tokens, types = _tokens(gguf, definition, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_prepends(definition))
    with _quiet("gguf.vocab"):  # it warns of templates for pairs of texts, which nobody uses here
        special = gguf.SpecialVocab(path.parent, load_merges=not sentencepiece, n_vocab=size)
        for which in ("bos", "eos"):  # llama.cpp has defaults of its own
            special.add_special_token.setdefault(which, False)
        special.add_to_gguf(writer, quiet=True)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def word_rule(definition: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer cuts text into words.

    Raises:
        PlanishError: if it has none, or the tokenizer changes its text in other ways.
    """
    normalizer = definition.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise PlanishError(f"{path}: llama.cpp knows no normalizer {normalizer}; use another format")
    steps = definition.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    key = tuple(_step(step) for step in steps), bool(definition["model"].get("ignore_merges"))
    if key not in WORDS:
        raise PlanishError(
            f"{path}: Planish knows no name of llama.cpp's for the pre-tokenizer {' then '.join(key[0])}"
            f"{' (ignoring merges)' * key[1]}; use another format"
        )
    return WORDS[key]


def _step(step: dict[str, Any]) -> str:
    """One step of a pre-tokenizer, as WORDS spells it."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "gpt2" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _tokens(gguf: Any, definition: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    model, kinds = definition["model"], gguf.TokenType
    tokens, types = [f"[PAD{index}]" for index in range(size)], [int(kinds.UNUSED)] * size
    for text, index in model["vocab"].items():
        tokens[index], types[index] = text, int(kinds.NORMAL)
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[index] = int(kinds.BYTE)
    for added in definition["added_tokens"]:
        text, index = added["content"], added["id"]
        tokens[index], types[index] = text, int(kinds.CONTROL)
        if not added["special"]:  # met in the text itself, where a space is a space
            tokens[index], types[index] = text.replace("▁", " "), int(kinds.USER_DEFINED)
    if model.get("byte_fallback") and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = int(kinds.UNKNOWN)
    return tokens, types


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; those that no merge makes come last."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(left + right, index)
    return [-float(rank.get(text, len(model["merges"]))) for text in tokens]


def _prepends(definition: dict[str, Any]) -> bool:
    """Does text get a space before its first word?"""
    normalizer, steps = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
    parts = [*normalizer.get("normalizers", [normalizer]), *steps.get("pretokenizers", [steps])]
    return any(
        part.get("type") == "Prepend"
        or part.get("prepend_scheme") in ("first", "always")
        or part.get("add_prefix_space")
        for part in parts
    )
