"""Export: a quantized folder in another format, without the model it was made of and without calibration.

    folder --decode--> QTensor, one layer at a time --encode--> folder or .gguf file

Every code, scale and zero is the same afterwards, or the export is refused by name before anything is written; or, if
that is asked for, what the new format can't hold is rounded once more, and how much that loses is measured.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from planish.bitstream import Stream
from planish.card import papers
from planish.checkpoint import CheckpointWriter, Content
from planish.errors import PlanishError, UnsupportedScheme, nearest
from planish.eval import record
from planish.folder import QuantizedFolder, config_of, side_files, verify_folder, words_of
from planish.formats import FORMATS, verify
from planish.formats.gguf import candidates
from planish.log import RunManifest
from planish.naming import disk_speller
from planish.quant import Quantizer
from planish.scheme import Scheme, bits_per_weight
from planish.source import Source
from planish.tables import BITS, quantize_table, table_schemes
from planish.targets import GGUF, choose_for


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    target: str | None = None,
    tp: int = 1,
    embeddings: int | None = None,
    overwrite: bool = False,
    inexact: Callable[[str], None] | None = None,
) -> Path:
    """Write a quantized folder in another format.

    Args:
        path: folder or hub id of a quantized model.
        out: new or empty folder, or one to replace if `overwrite`; of 'gguf' the file.
        format: one of `planish.formats.FORMATS`, or 'gguf'.
        target: who shall load it, one of `planish.targets.TARGETS`; takes the format from there.
        tp: GPUs that the target will cut each layer for.
        embeddings: bits of the embedding and the head: 16, 8 or 4; as they are if not given (8 in a GGUF).
        inexact: if given, layers that the format can't hold are rounded to nearest once more, on a grid that it
            holds, and this is called with what that loses, line by line; the folder's run.json keeps it too.

    Returns:
        What was written.

    Raises:
        PlanishError: if the model isn't quantized, or the format or target can't take a layer: names it and the mend.
    """
    folder = QuantizedFolder.open(path)
    if folder is None:
        raise PlanishError(f"{path} isn't quantized; use planish quantize")
    every = {name: folder.schemes.get(name) for name in folder.shapes}
    if target is not None:
        format = choose_for(target, every, folder.shapes, format=format or "auto", tp=tp)
    if format not in (*FORMATS, GGUF):
        known = nearest(format, [*FORMATS, GGUF]) if format else f"give --format, one of {', '.join([*FORMATS, GGUF])}"
        raise PlanishError(f"no format {format!r}: {known}")
    again = {} if inexact is None else _again(folder, format)
    if format == GGUF:
        from planish.gguf_file import write_gguf

        if again:
            assert inexact is not None
            with tempfile.TemporaryDirectory(dir=Path(out).absolute().parent) as scratch:
                held = _convert(folder, Path(scratch) / "held", "native", None, False, again, inexact)
                return export(held, out, format=GGUF, embeddings=embeddings, overwrite=overwrite)

        if embeddings not in (None, *BITS):
            raise PlanishError(f"embeddings of {embeddings} bits; use one of {', '.join(map(str, BITS))}")
        packed = folder.schemes.get(folder.embedding)
        if packed is not None and embeddings not in (None, packed.bits):
            raise PlanishError(f"{folder.embedding} has {packed.bits} bits already; export without --embeddings")
        wide = "f16" if folder.source.dtype == torch.float16 else "bf16"
        kind = {4: "q4_0", 16: wide}.get(embeddings or 8, "q8_0")
        return write_gguf(folder, Path(out), embeddings=kind, overwrite=overwrite)
    return _convert(folder, out, format, embeddings, overwrite, again, inexact)


def _again(folder: QuantizedFolder, format: str) -> dict[str, Scheme]:
    """What the layers that a format can't hold are to be rounded to: as many bits or more, a group of 32 at least."""
    found = {}
    for layer, scheme in folder.schemes.items():
        shape = folder.shapes[layer]
        if layer in folder.tables or _holds(format, layer, scheme, shape):
            continue
        # in a GGUF 2 and 3 bits that no type of theirs holds take as much room as 4
        least = max(scheme.bits, 4) if format == GGUF else scheme.bits
        choices = (
            Scheme(bits=bits, group_size=group, symmetric=symmetric)
            for bits in (2, 3, 4, 8)
            for group in (scheme.group_size, 128, 64, 32)
            for symmetric in (scheme.symmetric, not scheme.symmetric)
            if bits >= least and group is not None and group <= min(scheme.group_in(shape[1]), shape[1]) | 32
        )
        if mend := next((choice for choice in choices if _holds(format, layer, choice, shape)), None):
            found[layer] = mend
    return found


def _holds(format: str, layer: str, scheme: Scheme, shape: tuple[int, int]) -> bool:
    try:
        if format == GGUF:
            candidates(layer, scheme, shape)
        else:
            FORMATS[format].check(layer, scheme, shape)
    except UnsupportedScheme:
        return False
    return True


def _rounded(stream: Stream, scheme: Scheme) -> tuple[Stream, float]:
    """A weight rounded to nearest once more, and the squared error of that over the weight's square."""
    weight = stream.qtensor().dequantize()
    q = Quantizer(weight, scheme).quantize(weight)
    lost = (q.dequantize().double() - weight).square().sum() / weight.double().square().sum().clamp(min=1e-30)
    return Stream.of(q), float(lost)


def _told(errors: Mapping[str, float], again: Mapping[str, Scheme], tell: Callable[[str], None] | None) -> None:
    """Say what rounding lost, layer by layer."""
    if tell is None or not errors:
        return
    for layer, error in errors.items():
        tell(f"{layer}: rounded once more, to {again[layer]}; relative squared error {error:.3g}")
    mean = sum(errors.values()) / len(errors)
    tell(f"{len(errors)} layers were rounded once more: {mean:.3g} in the mean, {max(errors.values()):.3g} at most")


def _convert(
    folder: QuantizedFolder,
    out: str | os.PathLike[str],
    name: str,
    embeddings: int | None,
    overwrite: bool,
    again: Mapping[str, Scheme],
    tell: Callable[[str], None] | None,
) -> Path:
    """The folder in another of our formats; read back before it gets its name."""
    format, source = FORMATS[name], folder.source
    widened, rounded = _tables(folder, name, embeddings)
    schemes = {key: folder.schemes.get(key) for key in folder.shapes if key not in widened} | rounded | dict(again)
    verify(format, schemes, folder.shapes | folder.tables)
    skeleton, ordered = source.skeleton(), False
    digests: dict[str, str] = {}
    errors: dict[str, float] = {}
    spell = disk_speller(skeleton)

    def written(key: str, stream: Stream) -> tuple[str | None, dict[str, Tensor], bool]:
        """Digest, tensors and whether columns have an order, of one layer in the new format."""
        if key in widened:
            return None, {f"{key}.weight": stream.qtensor().dequantize(source.dtype)}, False
        if key in again:
            stream, errors[key] = _rounded(stream, again[key])
        # what was rounded just now can't be read again
        digest = stream.digest() if key in rounded or key in again else ""
        return digest, format.write(key, stream), stream.order is not None

    tables = ((key, Stream.of(quantize_table(source.get(f"{key}.weight"), rounded[key]))) for key in rounded)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        for key, (digest, tensors, moved) in chain(
            folder.each(written), ((key, written(key, stream)) for key, stream in tables)
        ):
            digests |= {} if digest is None else {key: digest}
            ordered |= moved
            for tensor_name, tensor in tensors.items():
                writer.add(spell(tensor_name), tensor)
        for tensor_name in plain_names(source, {*digests, *widened}):
            writer.add(spell(tensor_name), source.get(tensor_name))
        words = words_of(format, schemes, folder.source.skeleton(), ordered)
        config = config_of(source.config, skeleton, source.dtype, words)
        errors = {key: errors[key] for key in folder.schemes if key in errors}
        _told(errors, again, tell)
        files = side_files(source.folder, skeleton, None) | _papers(folder, name, schemes, errors)
        return writer.finish(config, files, verify=lambda made: verify_folder(made, digests, folder))


def _tables(folder: QuantizedFolder, format: str, embeddings: int | None) -> tuple[set[str], dict[str, Scheme]]:
    """Which quantized tables become float again, and the schemes of float ones that are to be quantized.

    Raises:
        PlanishError: if the format holds no quantized embedding, or one is to be rounded twice.
    """
    packed = {name for name in folder.tables if name in folder.schemes}
    if embeddings == 16:
        return packed, {}
    for name in sorted(packed):
        if embeddings is not None and folder.schemes[name].bits != embeddings:
            raise PlanishError(f"{name} has {folder.schemes[name].bits} bits already; export without --embeddings")
        if format != "native" and name == folder.embedding:
            raise UnsupportedScheme(
                f"{name}: {format} holds embeddings in 16 bits only; --embeddings 16 writes it so, rounded once more"
            )
    bare = {name: shape for name, shape in folder.tables.items() if name not in packed}
    return set(), table_schemes(embeddings, bare, format) if embeddings and bare else {}


def plain_names(source: Source, quantized: Collection[str]) -> list[str]:
    """Tensors of a quantized checkpoint that belong to no quantized layer, and the biases of those that do."""
    return [name for name in source.names() if name.rpartition(".")[0] not in quantized or name.endswith(".bias")]


def _papers(
    folder: QuantizedFolder, format: str, schemes: Mapping[str, Scheme | None], errors: Mapping[str, float]
) -> dict[str, Content]:
    """run.json and the card for the new format, and what was measured, which stays true."""
    source = folder.source
    assert source.folder is not None
    layers = {key: str(scheme) for key, scheme in schemes.items() if scheme}
    run = RunManifest.read(source.folder) or RunManifest.of_unknown(source.label, layers, format)
    parameters = sum(p.numel() for p in source.skeleton().parameters())
    chosen = {key: scheme for key, scheme in schemes.items() if scheme}
    bits = round(bits_per_weight(chosen, folder.shapes | folder.tables, parameters), 4)
    figures = {**run.figures, "bits_per_weight": bits} | ({"rounded_again": dict(errors)} if errors else {})
    run = dataclasses.replace(run, format=format, layers=layers, figures=figures)
    # what was measured of an embedding in 16 bits isn't true of one in 8
    return papers(run, record.read(source.folder) if chosen == folder.schemes else None)
