"""Harness: a loaded model as lm-eval sees one (EleutherAI's lm-evaluation-harness, an optional package).

lm-eval makes the prompts, picks the shots and counts what is right; this file answers its requests by our batches,
after encoding all texts at once. Texts are encoded as lm-eval's own `hf` model does: with the special tokens that the
tokenizer adds, context and answer as one text. Only `tasks` imports this file, and only when tasks are asked for.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from planish.eval.answers import answers
from planish.eval.batches import longest_of
from planish.eval.likelihood import Request, likelihoods, rows_of

NEW_TOKENS = 256  # of an answer, where a task doesn't say


class Harness(TemplateLM):
    """Answers lm-eval's requests.

    Attributes:
        rows, tokens: what the model has read so far.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.rows = self.tokens = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not self._begun(string)
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._scored(self._encoded([request.args for request in requests]))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, longest_of(self.model), context_len=1)
            totals.append(sum(total for total, _ in self._scored(list(map(make_disjoint_window, windows)))))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for index, (_, how) in enumerate(request.args for request in requests):
            until = how.get("until") or []
            stop = tuple([until] if isinstance(until, str) else until)
            groups.setdefault((stop, int(how.get("max_gen_toks", NEW_TOKENS))), []).append(index)
        for (stop, most), members in groups.items():
            room = longest_of(self.model) - most
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in members]
            given = answers(
                self.model, prompts, new_tokens=most, batch_size=self.batch_size, stop=stop, tokenizer=self.tokenizer
            )
            for index, tokens in zip(members, given, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                found[index] = min((text.split(end)[0] for end in stop if end), key=len, default=text)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._scored([(context, answer) for _, context, answer in requests])

    def _scored(self, requests: list[Request]) -> list[tuple[float, bool]]:
        rows = rows_of(requests, longest_of(self.model))
        self.rows += len(rows)
        self.tokens += sum(map(len, rows))
        return likelihoods(self.model, requests, batch_size=self.batch_size)

    def _encoded(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Token ids of contexts and answers; spaces that end a context belong to the answer."""
        moved = [(context.rstrip(" "), context[len(context.rstrip(" ")) :] + answer) for context, answer in pairs]
        ids = self._ids({context for context, _ in moved} | {context + answer for context, answer in moved})
        found: list[Request] = []
        for context, answer in moved:
            whole = ids[context + answer] if context else self.tok_encode(answer, add_special_tokens=False)
            start = len(ids[context]) if context else 0
            if not start and whole[0] != self.prefix_token_id:
                whole = [self.prefix_token_id, *whole]
            found.append((whole[: start or 1], whole[start or 1 :]))
        return found

    def _ids(self, texts: set[str]) -> dict[str, list[int]]:
        """All texts at once, which the tokenizer spreads over the processor's cores."""
        found: dict[str, list[int]] = {}
        for begun in (False, True):
            if some := [text for text in texts if text and self._begun(text) == begun]:
                ids = self.tokenizer(some, add_special_tokens=not begun, verbose=False)["input_ids"]
                found |= dict(zip(some, ids, strict=True))
        return found

    def _begun(self, text: str) -> bool:
        """Whether a text has its first special token already, as a chat template writes it."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)
