"""A captured training step: the bits of an ordinary one; and an ordinary one where it can't be captured."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, masking_utils

import planish
from planish.fit import finetune as finetune_module
from planish.fit.finetune import drops
from planish.fit.graphed import Graphed, _one_text_a_row
from planish.fit.watch import Setting
from planish.fit.whole import EndToEnd
from planish.kernels.linear import packed_layers
from planish.tune import tune

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IDS = torch.randint(0, 64, (24, 64), generator=torch.Generator().manual_seed(0))
STAGE = EndToEnd(name="e2e", rates={"scale": 5e-3, "norm": 5e-3}, epochs=2.0, batch_size=4)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, initializer_range=0.2)).eval()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_a_captured_step_changes_nothing(
    tmp_path: Path, micro_batch: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = planish.quantize(tiny(), "rtn", "w2g32", device="cuda")
    device = torch.device("cuda")
    setting = Setting(folder=tmp_path, device=device, seed=0, micro_batch=micro_batch, checkpointing=checkpointing)
    seen: list[Graphed] = []

    class Seen(Graphed):
        def __init__(self, objective: nn.Module) -> None:
            super().__init__(objective)
            seen.append(self)

    def trained() -> tuple[list[Tensor], Any]:
        model = copy.deepcopy(start)
        outcome = tune(model, STAGE, IDS, IDS, None, setting)
        return [layer.scale for layer in packed_layers(model).values()], outcome

    monkeypatch.setattr(finetune_module, "Graphed", Seen)
    scales, outcome = trained()
    assert seen[0].graph is not None and outcome.after < outcome.before
    monkeypatch.setattr(Graphed, "_capture", lambda self, batch: None)
    launched = trained()
    assert seen[1].graph is None
    monkeypatch.setattr(finetune_module, "Graphed", lambda objective: None)
    for ordinary, alike in (launched, trained()):  # the second one by the Trainer alone
        assert (alike.before, alike.after) == (outcome.before, outcome.after)
        assert all(map(torch.equal, scales, ordinary))


@pytest.mark.gpu
@needs_gpu
def test_what_looks_at_values_goes_on_without() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, device="cuda"))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": (x * self.weight).sum() * (2.0 if x.sum().item() > 0 else 1.0)}

    step = Graphed(objective := Looks())
    for call in range(4):
        x = torch.full((8,), float(call) - 1.5, device="cuda")
        objective.weight.grad = None
        if call == 1:
            with pytest.warns(UserWarning, match="can't be a CUDA graph .* goes on without"):
                loss = step({"x": x})
        else:
            loss = step({"x": x})
        assert step.graph is None and objective.weight.grad is not None
        expected = x * (2 if call > 1 else 1)
        assert torch.equal(objective.weight.grad, expected) and torch.equal(loss, expected.sum())
    torch.rand(3, device="cuda")  # random numbers come as before


def test_rows_are_looked_at_again_afterwards() -> None:
    look, positions = masking_utils.find_packed_sequence_indices, torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(RuntimeError), _one_text_a_row():
        assert masking_utils.find_packed_sequence_indices(positions) is None
        raise RuntimeError
    assert masking_utils.find_packed_sequence_indices is look
    assert torch.equal(look(positions), torch.tensor([[0, 0, 1, 1]]))


def test_who_leaves_out_values_at_random() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    still, moving = (OPTForCausalLM(OPTConfig(**shape, dropout=share, word_embed_proj_dim=32)) for share in (0.0, 0.1))
    assert not drops(still) and drops(moving) and not drops(tiny())
    assert drops(nn.Sequential(nn.Dropout(0.5))) and not drops(nn.Sequential(nn.Dropout(0.0)))
