"""GPTQ's layout against known constants and a reader written from the format's own words."""

import numpy as np
import pytest
import torch

from planish.errors import PlanishError
from planish.formats import FORMATS
from planish.qtensor import QTensor
from planish.scheme import Scheme

LAYER = "model.layers.0.mlp.up_proj"
SYMMETRIC_ZEROS = {  # words of z - 1 in GPTQ v1, as every symmetric GPTQ checkpoint has them
    2: [0x55555555],
    3: [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D],
    4: [0x77777777],
    8: [0x7F7F7F7F],
}


def stream(words: np.ndarray, bits: int, length: int) -> list[int]:
    """Fields of one little-endian bit stream, from one big integer."""
    whole = int.from_bytes(words.astype("<i4").tobytes(), "little")
    return [(whole >> (bits * index)) % 2**bits for index in range(length)]


def read_gptq(tensors: dict[str, torch.Tensor], bits: int, group: int, added: int) -> np.ndarray:
    """W [out, in] as the format says: scale[g, o] * (code[i, o] - (zero[g, o] + added))."""
    qweight, qzeros, scales = (tensors[f"{LAYER}.{key}"].numpy() for key in ("qweight", "qzeros", "scales"))
    out_features, in_features = qweight.shape[1], qweight.shape[0] * 32 // bits
    codes = np.array([stream(qweight[:, o], bits, in_features) for o in range(out_features)])
    zeros = np.array([stream(qzeros[g], bits, out_features) for g in range(qzeros.shape[0])]) + added
    return scales.T.astype(np.float32).repeat(group, 1) * (codes - zeros.T.repeat(group, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_words_of_v1(random_qtensor, bits: int) -> None:
    q = random_qtensor(Scheme(bits=bits, group_size=32), (32 * 3, 64))
    pattern = SYMMETRIC_ZEROS[bits]
    expected = np.array(pattern * (96 * bits // 32 // len(pattern)), dtype=np.uint32)
    for name in ("gptq", "auto_round"):
        qzeros = FORMATS[name].encode(LAYER, q)[f"{LAYER}.qzeros"].numpy()
        assert qzeros.shape == (2, 96 * bits // 32)
        assert (qzeros == expected.view(np.int32)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("name", "symmetric", "added"),
    [
        ("gptq", True, 1),
        ("gptq_v2", True, 0),
        ("gptq_v2", False, 0),
        ("auto_round", True, 1),
        ("auto_round", False, 0),
    ],
)
def test_a_plain_reader_gets_the_same_weights(random_qtensor, bits, name, symmetric, added) -> None:
    q = random_qtensor(Scheme(bits=bits, group_size=32, symmetric=symmetric), (64, 96))
    tensors = FORMATS[name].encode(LAYER, q)
    assert np.array_equal(read_gptq(tensors, bits, 32, added), q.dequantize().numpy())


def test_group_index_counts_groups(random_qtensor) -> None:
    tensors = FORMATS["gptq"].encode(LAYER, random_qtensor(Scheme(bits=4, group_size=32), (32, 96)))
    assert tensors[f"{LAYER}.g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32
    assert tensors[f"{LAYER}.g_idx"].dtype == torch.int32


def test_act_order_is_read_as_the_format_says(random_qtensor) -> None:
    scheme, shape = Scheme(bits=4, group_size=32, symmetric=False), (32, 96)
    q = random_qtensor(scheme, shape)
    tensors = FORMATS["gptq_v2"].encode(LAYER, q)
    g_idx = torch.randperm(96, generator=torch.Generator().manual_seed(0)).int() // 32
    tensors[f"{LAYER}.g_idx"] = g_idx
    assert q.zero is not None
    group = g_idx.long()
    expected = q.scale.float()[:, group] * (q.codes.float() - q.zero.float()[:, group])
    back = FORMATS["gptq_v2"].decode(LAYER, tensors, scheme, shape)
    assert torch.equal(back.dequantize(), expected) and back.order is not None
    again = FORMATS["gptq_v2"].encode(LAYER, back)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_groups_of_unequal_size_are_refused(random_qtensor) -> None:
    scheme = Scheme(bits=4, group_size=32)
    tensors = FORMATS["gptq"].encode(LAYER, random_qtensor(scheme, (32, 96)))
    for wrong in (torch.zeros(96, dtype=torch.int32), torch.full((96,), -1, dtype=torch.int32)):
        with pytest.raises(PlanishError, match=f"^{LAYER}.g_idx has groups that aren't of 32 columns"):
            FORMATS["gptq"].decode(LAYER, tensors | {f"{LAYER}.g_idx": wrong}, scheme, (32, 96))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_v1_reads_every_zero_point_that_was_subtracted_from_in_whole_words(random_qtensor, bits: int) -> None:
    scheme = Scheme(bits=bits, group_size=32, symmetric=False)
    q = random_qtensor(scheme, (32, 64))
    assert q.zero is not None and bool((q.zero == 0).any()) and bool((q.zero == 2**bits - 1).any())
    tensors = FORMATS["gptq_v2"].encode(LAYER, q)
    tensors[f"{LAYER}.qzeros"] -= {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]  # as GPTQModel does
    assert FORMATS["gptq"].decode(LAYER, tensors, scheme, (32, 64)).equal(q)


def test_v1_of_3_bits_reads_asymmetric_layers_unless_a_zero_point_is_beyond_the_codes() -> None:
    scheme = Scheme(bits=3, group_size=32, symmetric=False)
    zero = torch.arange(32, dtype=torch.uint8).view(32, 1) % 7 + 1
    codes, scale = torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 1, dtype=torch.float16)
    q = QTensor(codes=codes, scale=scale, zero=zero - 1, bits=3, group_size=32)
    tensors = FORMATS["gptq_v2"].encode(LAYER, q)
    back = FORMATS["gptq"].decode(LAYER, tensors, scheme, (32, 32))
    assert back.zero is not None and torch.equal(back.zero, zero)
    tensors[f"{LAYER}.qzeros"].fill_(-1)
    with pytest.raises(PlanishError, match="zero points that w3g32asym can't have"):
        FORMATS["gptq"].decode(LAYER, tensors, scheme, (32, 32))


@pytest.mark.parametrize("name", ["gptq", "compressed_tensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_another_dtype_are_read_where_fp16_holds_them(random_qtensor, name: str, dtype: torch.dtype) -> None:
    scheme, shape, known = Scheme(bits=4, group_size=32), (32, 64), FORMATS[name]
    tensors = known.encode(LAYER, random_qtensor(scheme, shape))
    key = next(key for key in tensors if "scale" in key)
    tensors[key] = tensors[key].bfloat16().to(dtype)
    back = known.decode(LAYER, tensors, scheme, shape).scale
    assert torch.equal(back.float(), (tensors[key] if name != "gptq" else tensors[key].T).float())
    tensors[key][0, 0] = 1e-7 if dtype == torch.float32 else 1e-9
    with pytest.raises(PlanishError, match=f"^{key} has {dtype} values that fp16 can't hold"):
        known.decode(LAYER, tensors, scheme, shape)


def test_symmetric_configuration_with_asymmetric_zeros_is_refused(random_qtensor) -> None:
    q = random_qtensor(Scheme(bits=4, group_size=32, symmetric=False), (32, 32))
    tensors = FORMATS["gptq_v2"].encode(LAYER, q)
    with pytest.raises(PlanishError, match="qzeros holds zero points"):
        FORMATS["gptq_v2"].decode(LAYER, tensors, Scheme(bits=4, group_size=32), (32, 32))


def test_configuration_says_what_loaders_ask_for() -> None:
    config = FORMATS["gptq"].config({LAYER: Scheme.parse("w4g64"), "model.layers.0.mlp.down_proj": None})
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "modules_in_block_to_quantize": [["mlp.up_proj"]],
        "dynamic": {r"-:.*\.mlp\.down_proj$": {}},
    }
    assert FORMATS["gptq_v2"].config({LAYER: Scheme.parse("w4pc")})["group_size"] == -1


def test_overrides_and_quantized_heads_of_others_are_read() -> None:
    shapes = {LAYER: (64, 64), "model.layers.1.mlp.up_proj": (64, 64), "lm_head": (64, 64)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "lm_head": True}
    config["dynamic"] = {r"+:.*\.1\..*": {"bits": 8}, r"-:.*\.0\..*": {}}
    found = FORMATS["gptq"].schemes(config, shapes)
    assert {layer: str(scheme) for layer, scheme in found.items()} == {
        "model.layers.1.mlp.up_proj": "w8g32",
        "lm_head": "w4g32",
    }


def test_configuration_without_a_key_is_named() -> None:
    with pytest.raises(PlanishError, match="no 'group_size'"):
        FORMATS["gptq"].schemes({"quant_method": "gptq", "bits": 4, "sym": True}, {LAYER: (64, 64)})
