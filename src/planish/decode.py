"""Decoding: tokens one after another, a step of the model as one CUDA graph.

    ids = generate(model, ids, new_tokens=64)        any causal language model of transformers, packed or not

    decoder = Decoder(model, batch=1, length=256)    for prompts of a batch: cache, buffers and graph are kept
    decoder.start(ids)                               the prompt, and the first token
    decoder.advance(127)                             so many more, without a word to the host

A step takes the last token through the model, whose static cache counts on by itself, picks the next one and writes it
down, all on the GPU; replaying the graph is the loop. The host only looks now and then whether all has ended. Blocks
may be compiled, which fuses what lies between products; one is, and serves for all that are like it. On a CPU the same
steps run one by one. Models whose cache isn't plain (sliding windows, states) go through their own `generate`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from planish import attend
from planish.arch import discover
from planish.errors import first_line
from planish.experts import has_experts
from planish.kernels.linear import PackedLinear
from planish.kernels.siblings import Merge, merging

CHUNK = 32  # tokens between two looks at whether all has ended
ROUND = 64  # a cache's length is a multiple of it, as attention likes
WARM_UP = 2  # steps before one is captured
MOST_KINDS = 64  # of blocks, batches and lengths that are compiled in a process


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    new_tokens: int = 64,
    temperature: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """Continue prompts of one length.

    Args:
        ids: int64 [batch, tokens], on the model's device, without padding.
        new_tokens: at most so many; fewer where every row has ended.
        temperature: of sampling; 0 takes the likeliest.
        compiled: compile the blocks first, which takes seconds and pays for long answers.

    Returns:
        int64 [batch, tokens + new], what follows a row's end filled with padding.
    """
    ends, padding = _ends(model)
    if not decodes(model, compiled):
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        mask, most = torch.ones_like(ids), max(new_tokens, 1)
        answer: Any = model.generate(ids, attention_mask=mask, max_new_tokens=most, **sampling)  # type: ignore[operator]
        return answer
    decoder = Decoder(model, len(ids), ids.shape[1] + new_tokens, temperature=temperature, compiled=compiled)
    decoder.start(ids)
    done = 1
    while done < new_tokens and not _ended(decoder.tokens[:, :done], ends):
        decoder.advance(min(CHUNK, new_tokens - done))
        done += min(CHUNK, new_tokens - done)
    return torch.cat([ids, _trimmed(decoder.tokens[:, :done], ends, padding)], dim=1)


def decodes(model: PreTrainedModel, compiled: bool = False) -> bool:
    """Whether a Decoder can: the model is one of tokens with a plain cache of keys and values, and each step is like
    the last, which with experts it isn't."""
    if has_experts(model):
        return False
    if "past_key_values" not in inspect.signature(model.forward).parameters or model.config.is_encoder_decoder:
        return False
    kind, plain = (StaticLayer, "static") if _static(model, compiled) else (DynamicLayer, "dynamic")
    return all(type(layer) is kind for layer in _cache(model, plain, ROUND).layers)


class Decoder:
    """Decodes for prompts of one batch.

    Args:
        model: `decodes` says whether it can be.
        batch: prompts at a time.
        length: most tokens of a prompt and its answer.
        temperature, compiled: as of `generate`.
        overlap: whether kernels of compiled blocks start before those ahead of them have ended, where a GPU can.
        one_query: whether compiled blocks have an attention made for one query a row (attend.py), where they can.

    Attributes:
        tokens: int64 [batch, length], the answer so far in its first columns.
        captured: whether steps are replayed; known once there was one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        length: int,
        *,
        temperature: float = 0.0,
        compiled: bool = False,
        overlap: bool = True,
        one_query: bool = True,
    ) -> None:
        self.model, self.temperature = model, temperature
        self.kind = "static" if _static(model, compiled) else "dynamic"
        self.length = -(-length // ROUND) * ROUND
        self.cache: Any = _cache(model, self.kind, self.length)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.tokens = torch.zeros(batch, self.length, dtype=torch.int64, device=model.device)
        self.count = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._compiled = _Compiled(model, self.cache, overlap, one_query) if compiled else None
        self.captured = False
        self._replay: Callable[[], None] | None = None

    @torch.no_grad()
    def start(self, ids: Tensor) -> None:
        """Take prompts [batch, tokens] in, and pick the first token of each answer."""
        if self.kind == "dynamic":
            self.cache = _cache(self.model, self.kind, self.length)
        else:
            self.cache.reset()
        self.count.zero_()
        self._take(ids)

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Pick so many more tokens."""
        if self._replay is None:
            self._replay = self._prepared()
        for _ in range(steps):
            self._replay()

    def _step(self) -> None:
        if self._compiled is None:
            self._take(self.token)
        else:
            with self._compiled.standing():
                self._take(self.token)

    def _take(self, ids: Tensor) -> None:
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **last)
        self.token.copy_(self._picked(out.logits[:, -1]))
        self.tokens.index_copy_(1, self.count, self.token)
        self.count.add_(1)

    def _picked(self, logits: Tensor) -> Tensor:
        """[batch, 1] of logits [batch, vocabulary]."""
        if not self.temperature:
            return logits.argmax(-1, keepdim=True)
        chances = torch.softmax(logits.float() / self.temperature, dim=-1)
        # the least of exponential waits falls on a token with its chance
        return (chances / torch.empty_like(chances).exponential_()).argmax(-1, keepdim=True)

    def _prepared(self) -> Callable[[], None]:
        """A step: on a GPU a graph's replay; what warming up wrote down is taken back."""
        if self.model.device.type != "cuda":
            return self._step
        kept = [self.token, self.tokens, self.count, *(layer.cumulative_length for layer in self.cache.layers)]
        before = [tensor.clone() for tensor in kept]
        step = self._captured()
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        return step

    def _captured(self) -> Callable[[], None]:
        """Replays a step; where capturing it fails, runs it."""
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            warnings.warn(f"a step can't be a CUDA graph ({first_line(error)}); decoding goes on without", stacklevel=2)
            return self._step
        self.captured = True
        return graph.replay


class _Compiled:
    """A model's blocks, compiled: one function, called with each block and its own layer of the cache, so that what
    is compiled for the first serves for all that are like it."""

    def __init__(self, model: PreTrainedModel, cache: Any, overlap: bool, one_query: bool) -> None:
        blocks = model.get_submodule(discover(model, PackedLinear).blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.model, self.blocks, self.layers, self.one_query = model, blocks, cache.layers, one_query
        self._own: bool | None = None  # whether the attention is ours; known once the cache was filled
        rooms, call = map(attend.Room, cache.layers), _compiled_call(overlap)
        self.places = [_Place(block, call, room) for block, room in zip(blocks, rooms, strict=False)]

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Calls go to what is compiled for as long as it lasts, which is a step."""
        original = list(self.blocks)
        if self._own is None:
            self._own = self.one_query and attend.takes(self.model, self.blocks, self.layers[0])
        own = self._own
        attention = attend.one_query(self.model) if own else nullcontext()
        with merging(self.model), attention, torch._dynamo.config.patch(recompile_limit=MOST_KINDS):
            try:
                for index, place in enumerate(self.places):
                    self.blocks[index], place.room.waits = place, own
                yield
                if own:
                    torch._foreach_add_([layer.cumulative_length for layer in self.layers], 1)
            finally:
                for index, block in enumerate(original):
                    self.blocks[index] = block


class _Place(nn.Module):
    """Stands where a block was, and calls it compiled."""

    def __init__(self, block: nn.Module, call: Callable[..., Any], room: attend.Room) -> None:
        super().__init__()
        self.__dict__ |= {"block": block, "call": call, "room": room}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # models read attributes of their blocks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = self.room
            if self.room.waits:
                kwargs["room"] = self.room
        return self.call(self.block, *args, **kwargs)


@functools.cache
def _compiled_call(overlap: bool) -> Callable[..., Any]:
    """Blocks are called through it; with `overlap` what the compiler emits starts before the kernel ahead has ended
    (programmatic dependent launch, which it has for sm_90 and later only).

    That is safe if every kernel of the chain waits for the one ahead, first before it lets the next one start and
    before it writes: then all kernels but the one right ahead have ended when a kernel starts, whatever memory they
    share. Ours do (`wait_for_inputs`); before it they read weights only. The compiler's read before it only
    what the kernel right ahead, if it is one of theirs, doesn't write, and nothing right after one of ours; after
    their first read at the latest they wait. One that reads nothing wouldn't; a block has none. Others' kernels wait
    for all that is ahead of them, and end before what is behind them starts.
    """
    options: dict[str, Any] = {"post_grad_custom_pre_pass": Merge()}
    if hasattr(inductor.triton, "enable_pdl"):
        options["triton.enable_pdl"] = overlap
    return torch.compile(_call, dynamic=False, options=options)


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


def _static(model: PreTrainedModel, compiled: bool) -> bool:
    return compiled or model.device.type == "cuda"


def _cache(model: PreTrainedModel, kind: str, length: int) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


def _ends(model: PreTrainedModel) -> tuple[Tensor, int]:
    """Tokens that end an answer, and the one that fills up what follows."""
    config: Any = model.generation_config
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, Sequence) else [ends]
    padding = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else 0
    return torch.tensor(ends, dtype=torch.int64, device=model.device), padding


def _ended(tokens: Tensor, ends: Tensor) -> bool:
    return bool(torch.isin(tokens, ends).any(1).all())


def _trimmed(tokens: Tensor, ends: Tensor, padding: int) -> Tensor:
    """Without what follows an end; as wide as the longest row."""
    ended = torch.isin(tokens, ends).int()
    after = ended.cumsum(1) - ended > 0
    width = int((~after).sum(1).max())
    return tokens.masked_fill(after, padding)[:, :width]
