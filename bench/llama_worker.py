"""llama.cpp's tokens, in a process of its own; needs only `llama-cpp-python`, not headstart.

    python llama_worker.py

Prints {"ready": true, "version": ...}, then answers one JSON line per line on stdin:
    {"model": "x.gguf", "texts": [...], "special": true}    -> {"tokens": [[...], ...]}
and ends when stdin closes. `special`: whether special tokens written in a text become those tokens.
Of a model only the vocabulary is loaded. BOS and EOS are added where the file says so.
"""

import ctypes
import json
import sys

import llama_cpp

QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


def tokenize(vocabulary: object, text: str, special: bool) -> list[int]:
    """Token ids of ``text``."""
    raw = text.encode()
    room = len(raw) + 8
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), ids, room, True, special)
    if count < 0:
        raise RuntimeError(f"llama_tokenize gave {count} for {text!r}")
    return list(ids[:count])


def answer(path: str, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of each text under the model in the file."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    tokens = [tokenize(vocabulary, text, special) for text in texts]
    llama_cpp.llama_model_free(model)
    return tokens


def main() -> None:
    """Answer lines of stdin until it closes."""
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    print(json.dumps({"ready": True, "version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        tokens = answer(request["model"], request["texts"], request["special"])
        print(json.dumps({"tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
