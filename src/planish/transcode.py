"""Export: a quantized folder in another format, without the model it was made of and without calibration.

    folder --decode--> QTensor, one layer at a time --encode--> folder or .gguf file

Every code, scale and zero is the same afterwards, or the export is refused by name before anything is written; or, if
that is asked for, what the new format can't hold is rounded once more, and how much that loses is measured.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planish.bitstream import Stream
from planish.card import papers
from planish.checkpoint import CheckpointWriter, Content
from planish.errors import PlanishError, UnsupportedScheme, nearest
from planish.eval import record
from planish.folder import QuantizedFolder, config_of, side_files, verify_folder, words_of
from planish.formats import FORMATS, verify
from planish.gguf_file import check as check_gguf
from planish.gguf_file import write_gguf
from planish.inexact import Rounding, mended
from planish.log import RunManifest
from planish.naming import disk_speller
from planish.request import Afterwards, ModelLike, Resolved, resolve
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
    if target is None and format not in (*FORMATS, GGUF):
        known = nearest(format, [*FORMATS, GGUF]) if format else f"give --format, one of {', '.join([*FORMATS, GGUF])}"
        raise PlanishError(f"no format {format!r}: {known}")
    every = {name: folder.schemes.get(name) for name in folder.shapes}
    again: dict[str, Scheme] = {}
    if inexact is not None:
        linears = {name: scheme for name, scheme in every.items() if name not in folder.tables}
        format, again = mended(linears, folder.shapes, format=format or "auto", target=target, tp=tp)
    elif target is not None:
        format = choose_for(target, every, folder.shapes, format=format or "auto", tp=tp)
    assert format is not None
    rounding = Rounding(schemes=again, tell=inexact)
    if format == GGUF:
        name = Path(folder.source.label).resolve().name
        return _gguf(folder, Path(out), name, rounding, embeddings, overwrite)
    return _convert(folder, out, format, embeddings, overwrite, rounding)


def _gguf(
    folder: QuantizedFolder,
    out: Path,
    name: str,
    rounding: Rounding,
    embeddings: int | None = None,
    overwrite: bool = False,
) -> Path:
    """The folder as a GGUF file; what GGUF can't hold is rounded in a folder of its own first."""
    if embeddings not in (None, *BITS):
        raise PlanishError(f"embeddings of {embeddings} bits; use one of {', '.join(map(str, BITS))}")
    packed = folder.schemes.get(folder.embedding)
    if packed is not None and embeddings not in (None, packed.bits):
        raise PlanishError(f"{folder.embedding} has {packed.bits} bits already; export without --embeddings")
    wide = "f16" if folder.source.dtype == torch.float16 else "bf16"
    how: dict[str, Any] = {
        "embeddings": {4: "q4_0", 16: wide}.get(embeddings or 8, "q8_0"), "overwrite": overwrite, "name": name
    }  # fmt: skip
    if not rounding.schemes:
        return write_gguf(folder, out, **how)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as scratch:
        held = _opened(_convert(folder, Path(scratch) / "held", "native", None, False, rounding))
        return write_gguf(held, out, errors=rounding.errors, **how)


def _opened(path: Path) -> QuantizedFolder:
    folder = QuantizedFolder.open(path)
    assert folder is not None
    return folder


def resolve_for_export(
    model: ModelLike, recipe: str, scheme: str, inexact: Callable[[str], None] | None, **request: Any
) -> Resolved:
    """A request resolved; one that its format or target refuses in native terms, and exported in the end, if that is
    asked for and helps.

    Args:
        inexact: called in the end with what that loses, line by line.
        others: as of `planish.request.resolve`.
    """
    try:
        return resolve(model, recipe, scheme, **request)
    except UnsupportedScheme as refusal:
        if inexact is None:
            raise
        return _natively(refusal, inexact, model, recipe, scheme, **request)


def _natively(
    refusal: UnsupportedScheme,
    tell: Callable[[str], None],
    model: ModelLike,
    recipe: str,
    scheme: str,
    *,
    format: str = "auto",
    target: str | None = None,
    tp: int = 1,
    embeddings: int | None = None,
    **request: Any,
) -> Resolved:
    """In native terms; refused again where rounding doesn't help, or bits are yet to be measured."""
    resolved = resolve(model, recipe, scheme, format="native", **request)
    if resolved.widths is not None or (target is None and format == "auto"):
        raise refusal
    every = {name: resolved.schemes.get(name) for name in resolved.shapes}
    name, again = mended(every, resolved.shapes, format=format, target=target, tp=tp)
    if not again:
        raise refusal
    if name == GGUF:
        check_gguf(resolved.source, resolved.schemes | again, resolved.shapes)
    bits = (8 if name == GGUF else 16) if embeddings is None else embeddings
    tables = table_schemes(bits, resolved.around, "native" if name == GGUF else name)
    layer, mend = next(iter(again.items()))
    note = f"{target or name} can't take {len(again)} linears so: rounded once more in the end, {layer} to {mend}"

    def exported(folder: Path, out: str) -> None:
        if name == GGUF:
            _gguf(_opened(folder), folder / "model.gguf", out, Rounding(schemes=again, tell=tell))
            return
        new = folder.with_name(f"{folder.name}.again")
        export(folder, new, format=name, target=target, tp=tp, inexact=tell, overwrite=True)
        shutil.rmtree(folder)
        new.rename(folder)

    return dataclasses.replace(resolved, tables=tables, then=Afterwards(note, exported))


def _convert(
    folder: QuantizedFolder,
    out: str | os.PathLike[str],
    name: str,
    embeddings: int | None,
    overwrite: bool,
    rounding: Rounding,
) -> Path:
    """The folder in another of our formats; read back before it gets its name."""
    format, source = FORMATS[name], folder.source
    widened, rounded = _tables(folder, name, embeddings)
    again = dict(rounding.schemes)
    schemes = {key: folder.schemes.get(key) for key in folder.shapes if key not in widened} | rounded | again
    verify(format, schemes, folder.shapes | folder.tables)
    skeleton, ordered = source.skeleton(), False
    digests: dict[str, str] = {}
    spell = disk_speller(skeleton)

    def written(key: str, stream: Stream) -> tuple[str | None, dict[str, Tensor], bool]:
        """Digest, tensors and whether columns have an order, of one layer in the new format."""
        if key in widened:
            return None, {f"{key}.weight": stream.qtensor().dequantize(source.dtype)}, False
        if key in again:
            stream = rounding.round(key, stream)
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
        rounding.say()
        files = side_files(source.folder, skeleton, None) | _papers(folder, name, schemes, rounding.errors)
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
