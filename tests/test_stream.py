"""BlockStream: what it holds before a block is what the whole model computes there, wherever it is stored."""

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.stream import BlockStream, record

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
FAMILIES: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    # layers 0 and 1 see a window of 4 tokens through rope of their own, layer 2 everything
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
}
IDS = torch.randint(1, 64, (5, 12), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    # as a Source does: torch's own attention, so that a causal mask is implicit
    model.set_attn_implementation("sdpa")
    return model


def stream_of(model: Any, **how: Any) -> BlockStream:
    return BlockStream(model.model, model.model.layers, IDS, device=CPU, **{"micro_batch": 2, **how})


def inputs_of_blocks(model: Any) -> list[Tensor]:
    """What enters each block when the model itself runs, and what leaves the last."""
    seen: list[Tensor] = []

    def entering(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in model.model.layers]
    last = model.model.layers[-1].register_forward_hook(
        lambda block, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in [*handles, last]:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("storage", ["device", "host", "disk"])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_float_stream_is_the_models_own(family: str, storage: str, micro_batch: int) -> None:
    model = model_of(family)
    expected = inputs_of_blocks(model)
    stream = stream_of(model, storage=storage, micro_batch=micro_batch)
    assert len(stream) == 5 and torch.equal(stream.fp, stream.quant)
    for index, block in enumerate(model.model.layers):
        torch.testing.assert_close(stream.fp, expected[index], rtol=1e-5, atol=1e-5)
        stream.advance(stream.fp, block, index)
    torch.testing.assert_close(stream.fp, expected[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stream.quant, expected[0], rtol=1e-5, atol=1e-5)


def test_each_block_has_its_own_arguments() -> None:
    model = model_of("gemma3")
    stream = stream_of(model)
    local, _, everywhere = (arguments["position_embeddings"] for arguments in stream.arguments)
    assert not torch.equal(local[0], everywhere[0])
    masks = [arguments["attention_mask"] for arguments in stream.arguments]
    assert masks[0] is not None and (masks[2] is None or not torch.equal(masks[0], masks[2]))
    # block 0's arguments would be wrong for block 2
    hidden, block = stream.fp[:2], model.model.layers[2]
    with torch.no_grad():
        assert not torch.allclose(stream.run(block, 2, hidden), stream.run(block, 0, hidden), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_storages_give_the_same_bits(family: str) -> None:
    model, found = model_of(family), {}
    for storage in ("host", "disk", "device"):
        stream = stream_of(model, storage=storage)
        for index, block in enumerate(model.model.layers):
            stream.advance(stream.quant, block, index)
        found[storage] = stream.quant.clone()
    assert torch.equal(found["host"], found["disk"]) and torch.equal(found["host"], found["device"])


def test_streams_are_apart() -> None:
    model = model_of("llama")
    stream = stream_of(model)
    before = stream.quant.clone()
    stream.advance(stream.fp, model.model.layers[0], 0)
    assert torch.equal(stream.quant, before) and not torch.equal(stream.fp, before)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("gemma3")
    blocks, expected = list(model.model.layers), inputs_of_blocks(model)
    stream_of(model)
    assert all(now is then for now, then in zip(model.model.layers, blocks, strict=True))
    assert all(map(torch.equal, inputs_of_blocks(model), expected))


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = model_of("llama")
    blocks = list(model.model.layers)
    with pytest.raises(IndexError):
        record(model.model, model.model.layers, torch.tensor([[1, 999]]), every_block=True)
    assert all(now is then for now, then in zip(model.model.layers, blocks, strict=True))


def test_blocks_themselves_are_never_run_for_the_capture() -> None:
    model = model_of("llama")
    for block in model.model.layers:
        block.to("meta")
    stream = stream_of(model)
    assert not stream.fp.is_meta and torch.equal(stream.fp, model.model.embed_tokens(IDS))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_files_are_gone_with_the_stream_and_before(tmp_path: Path) -> None:
    stream = stream_of(model_of("llama"), storage="disk", directory=str(tmp_path))
    assert list(tmp_path.iterdir()) == [], "unlinked as soon as they are mapped: a killed run leaves nothing"
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 2, "two streams of a file each"
    del stream
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_mapped_streams_are_not_the_process_own_memory(tmp_path: Path) -> None:
    model, ids = model_of("llama"), IDS.repeat(400, 20)  # two streams of 61 MB
    model.config.max_position_embeddings = 240
    before = anonymous_bytes()
    stream = BlockStream(
        model.model, model.model.layers, ids, device=CPU, storage="disk", directory=tmp_path, micro_batch=8
    )
    stream.advance(stream.fp, model.model.layers[0], 0)
    assert stream.fp.nbytes > 60e6 and anonymous_bytes() - before < stream.fp.nbytes


def test_what_stood_before_a_span_survives_it(tmp_path: Path) -> None:
    model = model_of("gemma3")
    expected, blocks, generation = inputs_of_blocks(model), model.model.layers, 0
    how: dict[str, Any] = {"storage": "disk", "directory": tmp_path, "keep": True}
    stream = stream_of(model, **how)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fp.0", "fp.1", "quant.0", "quant.1"]
    for span in ((0, 1), (2,)):
        before = stream.fp.clone()
        for index in span:
            stream.advance(stream.fp, blocks[index], index)
            stream.advance(stream.quant, blocks[index], index)
            seen = stream_of(model, **how, generation=generation)  # by a process that goes on from here
            assert torch.equal(seen.fp, before) and torch.equal(seen.quant, before)
            torch.testing.assert_close(stream.fp, expected[index + 1], rtol=1e-5, atol=1e-5)
        generation = stream.settle()
        seen = stream_of(model, **how, generation=generation)
        assert torch.equal(seen.fp, stream.fp) and torch.equal(seen.quant, stream.quant)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*where: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        PlanishError, match="no room for 0.00 GB of activations in .* name a folder on a larger disk with --stream-dir"
    ):
        stream_of(model_of("llama"), storage="disk", directory=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_storage() -> None:
    with pytest.raises(PlanishError, match="no storage 'ram'; use one of device, host, disk"):
        stream_of(model_of("llama"), storage="ram")


def test_positional_arguments_of_a_block_are_refused() -> None:
    class Block(nn.Linear):
        pass

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(4, 4)])

        def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
            return self.layers[0](input_ids.float(), None)

    model = Positional()
    with pytest.raises(PlanishError, match="^Block takes positional arguments besides its hidden states"):
        BlockStream(model, model.layers, torch.ones(2, 4, dtype=torch.int64), device=CPU)
