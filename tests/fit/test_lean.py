"""LeanTrainer: the gradients of the whole model's backward, without its memory."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.fit.adam8 import Adam8
from planish.fit.lean import HostInputs, LeanTrainer
from planish.fit.objective import shifted
from planish.kernels.linear import PackedLinear
from planish.quant import Quantizer
from planish.scheme import Scheme

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    # layers 0 and 1 see a window of 4 tokens through rope of their own, layer 2 everything
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
}
IDS = torch.randint(1, 64, (5, 12), generator=torch.Generator().manual_seed(0))
SCHEME = Scheme.parse("w2g16asym")


def model_of(family: str = "llama", *, trainable: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose blocks hold packed layers, their scales trainable, everything else frozen."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], dtype=dtype).eval().requires_grad_(False)
    model.set_attn_implementation("sdpa")
    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                quantizer = Quantizer(layer.weight, SCHEME)
                packed = PackedLinear.from_qtensor(quantizer.quantize(layer.weight), None, dtype)
                if trainable:
                    packed.make_trainable({"scale", "zero"})
                block.set_submodule(name, packed)
    return model


def batch_of(ids: Tensor = IDS) -> dict[str, Tensor]:
    """Tokens with their labels; some don't count, and of sequence 3 none does."""
    labels = shifted(ids)
    labels[0, :5] = -100
    labels[3:4] = -100
    return {"input_ids": ids, "labels": labels}


class Keep:
    """An optimizer that keeps what it is given and changes nothing."""

    def __init__(self) -> None:
        self.gradients: dict[Tensor, Tensor] = {}

    def step_one(self, parameter: Tensor, factor: float = 1.0) -> None:
        assert parameter.grad is not None and parameter not in self.gradients, "once a step"
        self.gradients[parameter] = parameter.grad * factor
        parameter.grad = None


def loss_of(model: Any) -> Any:
    def loss(hidden: Tensor, part: Mapping[str, Tensor]) -> Tensor:
        logits = model.lm_head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="sum")

    return loss


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_gradients(model: Any, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by one ordinary backward pass of the whole model."""
    model.zero_grad()
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    loss = loss_of(model)(hidden, batch) / (batch["labels"] != -100).sum()
    loss.backward()
    found = {name: parameter.grad for name, parameter in trained(model).items()}
    model.zero_grad(set_to_none=True)
    return loss.item(), {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_gradients_are_those_of_the_whole_model(family: str, micro_batch: int) -> None:
    model, keep = model_of(family), Keep()
    loss, expected = whole_gradients(model, batch_of())
    trainer = LeanTrainer(model, loss_of(model), keep, clip=None, micro_batch=micro_batch)
    for _ in range(2):
        keep.gradients.clear()
        result = trainer.step(batch_of())
        assert result.loss == pytest.approx(loss, rel=1e-6) and result.skipped == 0
        assert expected and len(expected) == len(keep.gradients)
        for name, parameter in trained(model).items():
            torch.testing.assert_close(keep.gradients[parameter], expected[name], rtol=2e-4, atol=1e-6, msg=name)
            assert parameter.grad is None
        norm = math.sqrt(sum(float(value.square().sum()) for value in expected.values()))
        assert result.norm == pytest.approx(norm, rel=1e-4)


def test_one_part_gives_the_very_bits() -> None:
    model, keep = model_of(), Keep()
    _, expected = whole_gradients(model, batch_of(IDS[:3]))
    LeanTrainer(model, loss_of(model), keep, clip=None, micro_batch=3).step(batch_of(IDS[:3]))
    assert all(torch.equal(keep.gradients[p], expected[name]) for name, p in trained(model).items())


def test_what_is_not_trained_needs_no_backward() -> None:
    model, keep = model_of(), Keep()
    for block in model.model.layers[:2]:
        block.requires_grad_(False)
    _, expected = whole_gradients(model, batch_of())
    trainer = LeanTrainer(model, loss_of(model), keep, clip=None)
    entered = []
    model.model.layers[1].register_forward_hook(lambda *_: entered.append(torch.is_grad_enabled()))
    trainer.step(batch_of())
    assert entered == [False] * 4, "once a part without a graph; a part without labels is left out"
    assert trainer.first == 2 and trainer.shares[:2] == [0.0, 0.0]
    assert len(expected) == len(keep.gradients) == 14
    for name, parameter in trained(model).items():
        torch.testing.assert_close(keep.gradients[parameter], expected[name], rtol=2e-4, atol=1e-6)


def test_any_parameter_of_the_blocks_trains() -> None:
    model, keep = model_of(trainable=False), Keep()
    model.model.layers[1].input_layernorm.requires_grad_(True)
    _, expected = whole_gradients(model, batch_of())
    LeanTrainer(model, loss_of(model), keep, clip=None, micro_batch=5).step(batch_of())
    (gradient,) = keep.gradients.values()
    torch.testing.assert_close(gradient, expected["model.layers.1.input_layernorm.weight"], rtol=1e-4, atol=1e-6)


def test_padding_on_the_right_needs_no_mask() -> None:
    model, keep, masked = model_of(), Keep(), Keep()
    batch = batch_of()
    batch["labels"][:, 8:] = -100
    LeanTrainer(model, loss_of(model), keep, clip=None).step(batch)
    mask = torch.ones_like(IDS)
    mask[:, 9:] = 0
    LeanTrainer(model, loss_of(model), masked, clip=None).step({**batch, "attention_mask": mask})
    for parameter, gradient in keep.gradients.items():
        torch.testing.assert_close(masked.gradients[parameter], gradient, rtol=1e-4, atol=1e-6)


def test_steps_with_adam8_lower_the_loss_as_adam_does() -> None:
    losses: dict[str, list[float]] = {}
    for way in ("lean", "whole"):
        model = model_of()
        found = losses[way] = []
        if way == "lean":
            optimizer = Adam8(trained(model).items(), lr=1e-2)
            trainer = LeanTrainer(model, loss_of(model), optimizer, clip=None, micro_batch=5)
            found += [trainer.step(batch_of()).loss for _ in range(20)]
            continue
        optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
        for _ in range(20):
            loss, gradients = whole_gradients(model, batch_of())
            for name, parameter in trained(model).items():
                parameter.grad = gradients[name]
            optimizer.step()
            found.append(loss)
    # the first two follow from unrounded moments
    assert losses["lean"][:2] == pytest.approx(losses["whole"][:2], rel=1e-4)
    assert losses["lean"][-1] == pytest.approx(losses["whole"][-1], rel=0.02)
    assert losses["lean"][-1] < 0.9 * losses["lean"][0]


def test_clipping_by_shares() -> None:
    model, keep = model_of(), Keep()
    trainer = LeanTrainer(model, loss_of(model), keep, clip=None)
    norm = trainer.step(batch_of()).norm
    free = dict(keep.gradients)
    # what one step has taught is all that the next one needs to know: customary clipping, exactly
    trainer.clip = norm / 4
    keep.gradients.clear()
    assert trainer.step(batch_of()).norm == pytest.approx(norm), "told before clipping"
    for parameter, gradient in keep.gradients.items():
        torch.testing.assert_close(gradient, free[parameter] / 4, rtol=1e-5, atol=1e-9)
    # with shares that are far off the bound still holds
    trainer.shares = [0.0, 0.9, 0.1]
    keep.gradients.clear()
    trainer.step(batch_of())
    applied = math.sqrt(sum(float(value.square().sum()) for value in keep.gradients.values()))
    assert applied <= norm / 4 * 1.0001
    assert trainer.shares[0] > 0 and sum(trainer.shares) == pytest.approx(1)


def test_resuming_is_exact() -> None:
    def train(model: Any, optimizer: Adam8, state: dict[str, Tensor] | None, steps: int) -> dict[str, Tensor]:
        trainer = LeanTrainer(model, loss_of(model), optimizer, clip=0.1, micro_batch=5)
        if state:
            trainer.load_state_dict(state)
        for _ in range(steps):
            trainer.step(batch_of())
        return trainer.state_dict()

    whole, parts = model_of(), model_of()
    train(whole, Adam8(trained(whole).items(), lr=1e-2), None, 5)
    first = Adam8(trained(parts).items(), lr=1e-2)
    state = train(parts, first, None, 2)
    second = Adam8(trained(parts).items(), lr=1e-2)
    second.load_state_dict(first.state_dict())
    train(parts, second, state, 3)
    assert all(torch.equal(value, trained(parts)[name]) for name, value in trained(whole).items())
    with pytest.raises(PlanishError, match="is of 1 blocks, the model has 3"):
        train(parts, second, {"shares": torch.ones(1), "steps": torch.tensor(1)}, 1)


def test_the_first_step_is_clipped_in_equal_shares() -> None:
    model, keep = model_of(), Keep()
    LeanTrainer(model, loss_of(model), keep, clip=1e-3).step(batch_of())
    for block in model.model.layers:
        square = sum(float(keep.gradients[p].square().sum()) for p in trained(block).values())
        assert math.sqrt(square) == pytest.approx(1e-3 / math.sqrt(3), rel=1e-4)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted() -> None:
    model, keep = model_of(), Keep()
    bad = model.model.layers[0].mlp.up_proj
    bad.scale.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), math.nan))
    result = LeanTrainer(model, loss_of(model), keep, clip=1.0).step(batch_of())
    assert result.skipped == 1 and math.isfinite(result.norm) and math.isfinite(result.loss)
    assert bad.scale not in keep.gradients and bad.scale.grad is None
    assert len(keep.gradients) == len(trained(model)) - 1
    assert all(bool(gradient.isfinite().all()) for gradient in keep.gradients.values())


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = model_of()
    blocks = list(model.model.layers)
    trainer = LeanTrainer(model, loss_of(model), Keep())
    trainer.step(batch_of())
    assert trainer.arguments == {} and trainer.inputs.host == {}
    with pytest.raises(IndexError):
        trainer.step(batch_of(torch.tensor([[1] * 9 + [999]])))
    assert all(now is then for now, then in zip(model.model.layers, blocks, strict=True))


def test_bad_input_is_said() -> None:
    model = model_of()
    with pytest.raises(PlanishError, match="no token of the batch has a label"):
        LeanTrainer(model, loss_of(model), Keep()).step({"input_ids": IDS, "labels": torch.full_like(IDS, -100)})
    with pytest.raises(PlanishError, match="micro_batch is 0"):
        LeanTrainer(model, loss_of(model), Keep(), micro_batch=0)
    model.model.norm.requires_grad_(True)
    with pytest.raises(PlanishError, match="^model.norm.weight lies outside the blocks"):
        LeanTrainer(model, loss_of(model), Keep())
    with pytest.raises(PlanishError, match="^nothing in the model's blocks is trainable"):
        LeanTrainer(model_of(trainable=False), loss_of(model), Keep())


def test_a_graph_of_one_block_at_a_time() -> None:
    # what autograd saves for the backward, alive at once: no more with 12 blocks than with 3
    def most(blocks: int) -> int:
        config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": blocks})
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).requires_grad_(False)
        for block in model.model.layers:
            block.mlp.requires_grad_(True)
        trainer = LeanTrainer(model, loss_of(model), Keep(), micro_batch=5)
        alive = {"now": 0, "most": 0}

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                alive["now"] += tensor.nbytes
                alive["most"] = max(alive["most"], alive["now"])

            def __del__(self) -> None:
                alive["now"] -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            trainer.step(batch_of())
        return alive["most"]

    assert most(12) == most(3) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_inputs_wait_in_host_memory() -> None:
    device = torch.device("cuda")
    inputs = HostInputs(device)
    values = [torch.randn(512, 1024, device=device) for _ in range(6)]
    expected = [value.cpu() for value in values]
    for _ in range(3):
        for index, value in enumerate(values):
            inputs.save(index, value.clone())
        order = [5, 3, 4, 0, 2, 1]
        for index, found in zip(order, inputs.replay(order), strict=True):
            assert found.is_cuda and torch.equal(found.cpu(), expected[index])
    assert all(held.is_pinned() for held in inputs.host.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_on_a_gpu_gradients_are_those_of_the_whole_model(micro_batch: int) -> None:
    model, keep = model_of().cuda(), Keep()
    batch = {key: value.cuda() for key, value in batch_of().items()}
    loss, expected = whole_gradients(model, batch)
    result = LeanTrainer(model, loss_of(model), keep, clip=None, micro_batch=micro_batch).step(batch)
    assert result.loss == pytest.approx(loss, rel=1e-4)
    for name, parameter in trained(model).items():
        torch.testing.assert_close(keep.gradients[parameter], expected[name], rtol=1e-2, atol=1e-4, msg=name)
