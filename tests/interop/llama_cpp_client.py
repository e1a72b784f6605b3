"""Runs inside of an environment with llama-cpp-python: logits, tokens and text of one GGUF, by its low-level API.

    python -I llama_cpp_client.py MODEL.gguf ASKED.json OUT.npy

(-I: llama_cpp.py beside this file isn't the package.) ASKED.json has "ids" to run, "texts" to tokenize, how many "new"
tokens to generate greedily after the ids, and "blocks" to decode: [type, offset, bytes, weights]. Logits [tokens,
vocabulary] go to OUT.npy, decoded blocks to OUT.npy.0.npy and so on, the rest to the standard output as JSON. Keys
and values stay in float32, attention is plain, and weights are multiplied from where they lie (no repacking, which
on some machines means AMX), so that what is compared is the file.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp as lib
import numpy as np

GGML_TYPE_F32 = 0


def opened(path: str, tokens: int):
    """Model and context."""
    lib.llama_backend_init()
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    how = lib.llama_model_default_params()
    how.use_extra_bufts = False
    model = lib.llama_model_load_from_file(path.encode(), how)
    if not model:
        raise SystemExit("llama.cpp can't load the file")
    run = lib.llama_context_default_params()
    run.n_ctx = run.n_batch = run.n_ubatch = tokens
    run.n_threads = run.n_threads_batch = 1
    run.type_k = run.type_v = GGML_TYPE_F32
    run.flash_attn_type = 0
    return model, lib.llama_init_from_model(model, run), quiet


def logits_of(context, ids: list[int], start: int, width: int) -> np.ndarray:
    """Logits [tokens, vocabulary] of tokens that follow `start` others."""
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, start + i, 1, 0, 1
    if lib.llama_decode(context, batch):
        raise SystemExit("llama.cpp can't run the model")
    rows = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (width,)).copy() for i in range(len(ids))]
    lib.llama_batch_free(batch)
    return np.stack(rows)


def tokens_of(vocab, text: str) -> list[int]:
    """Tokens as the file says, special ones in the text taken as text."""
    data = text.encode()
    room = (lib.llama_token * (len(data) + 8))()
    return list(room[: lib.llama_tokenize(vocab, data, len(data), room, len(room), True, False)])


def text_of(vocab, ids: list[int]) -> str:
    piece, text = ctypes.create_string_buffer(256), b""
    for token in ids:
        length = lib.llama_token_to_piece(vocab, token, piece, 256, 0, True)
        text += piece.raw[:length]
    return text.decode(errors="replace")


def decoded(path: str, kind: str, offset: int, size: int, weights: int) -> np.ndarray:
    """What ggml's own C code makes of some blocks."""
    library = ctypes.CDLL(str(next((Path(lib.__file__).parent / "lib").glob("libggml-base.*"))))
    raw, values = np.fromfile(path, np.uint8, size, offset=offset), np.empty(weights, np.float32)
    dequantize = getattr(library, f"dequantize_row_{kind}")
    dequantize(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(weights))
    return values


def main(path: str, asked_path: str, out: str) -> None:
    asked = json.loads(Path(asked_path).read_text())
    ids = list(asked["ids"])
    model, context, _quiet = opened(path, len(ids) + asked["new"] + 8)
    vocab = lib.llama_model_get_vocab(model)
    width = lib.llama_vocab_n_tokens(vocab)
    logits = logits_of(context, ids, 0, width)
    np.save(out, logits)
    for index, block in enumerate(asked["blocks"]):
        np.save(f"{out}.{index}", decoded(path, *block))
    new = [int(logits[-1].argmax())]
    while len(new) < asked["new"]:
        new.append(int(logits_of(context, new[-1:], len(ids) + len(new) - 1, width)[0].argmax()))
    said = {"tokens": [tokens_of(vocab, text) for text in asked["texts"]], "text": text_of(vocab, new)}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
