"""The native format's names and its compact configuration."""

import pytest
import torch

from planish.errors import PlanishError
from planish.formats import native
from planish.scheme import Scheme

SHAPES = {f"model.layers.{i}.mlp.{part}": (64, 64) for i in range(3) for part in ("up_proj", "down_proj")}
SHAPES["lm_head"] = (256, 64)


def test_tensors_are_named_as_in_qtensor_and_zeros_only_if_asymmetric(random_qtensor) -> None:
    shape = (5, 100)
    symmetric = native.encode("x", random_qtensor(Scheme.parse("w3g32"), shape))
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in symmetric.items()} == {
        "x.codes": (torch.int32, (5, 10)),
        "x.scale": (torch.float16, (5, 4)),
    }
    asymmetric = native.encode("x", random_qtensor(Scheme.parse("w3g32asym"), shape, offset=True))
    assert asymmetric["x.zero"].shape == (5, 1) and asymmetric["x.offset"].dtype == torch.float32


def test_an_order_that_names_a_column_twice_is_refused(random_qtensor) -> None:
    scheme, shape = Scheme.parse("w4g32"), (32, 64)
    tensors = native.encode("x", random_qtensor(scheme, shape)) | {"x.order": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(PlanishError, match="^x.order doesn't name each column once"):
        native.decode("x", tensors, scheme, shape)


def test_configuration_writes_only_what_differs() -> None:
    default = Scheme.parse("w2g32")
    schemes = {layer: None if layer == "lm_head" else default for layer in SHAPES}
    schemes["model.layers.1.mlp.down_proj"] = Scheme.parse("w4pc")
    assert native.config(schemes) == {
        "quant_method": "planish",
        "format_version": 1,
        "scheme": "w2g32",
        "layers": {"model.layers.1.mlp.down_proj": "w4pc"},
    }


def test_linears_outside_blocks_are_in_16_bits_unless_named() -> None:
    config = {"quant_method": "planish", "format_version": 1, "scheme": "w2g32", "layers": {}}
    assert set(native.schemes(config, SHAPES)) == set(SHAPES) - {"lm_head"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format_version 2 .*upgrade Planish"),
        ({"layers": {"model.layers.9.mlp.up_proj": "w4"}}, "names 'model.layers.9.mlp.up_proj'"),
        ({"scheme": "w5g7x"}, "no scheme 'w5g7x'"),
    ],
)
def test_bad_configuration_is_refused(change: dict[str, object], said: str) -> None:
    config = {"quant_method": "planish", "format_version": 1, "scheme": "w2g32", "layers": {}} | change
    with pytest.raises(PlanishError, match=said):
        native.schemes(config, SHAPES)
