#!/usr/bin/env python3
"""Write a llama model of half a megabyte with random weights, which can load, chat, stream, embed and be cancelled.

    python tests/e2e/tiny_gguf.py tiny.gguf

The file is the same every time. The model's output is meaningless text: byte tokens and the end-of-text tokens are so
unlikely that a response goes on until max_tokens. Needs the packages gguf and numpy (requirements/e2e.txt).
"""

import argparse
from pathlib import Path

import gguf
import numpy as np

CONTEXT, WIDTH, LAYERS, HEADS, FEED_FORWARD = 32768, 64, 2, 4, 128
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "a and are cat dog every for from has in is it light moon not of on one over river some stone that the this to "
    "under water with"
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pieces() -> list[str]:
    """Return each word with a blank before it, and each of its prefixes, since the tokenizer joins piece by piece."""
    words = ["▁" + word for word in WORDS.split()]
    return list(
        dict.fromkeys(list("▁abcdefghijklmnopqrstuvwxyz.,") + [w[:end] for w in words for end in range(2, len(w) + 1)])
    )


def add_vocabulary(writer: gguf.GGUFWriter) -> tuple[int, int]:
    """Add the tokens; return the index of the first piece and the number of tokens."""
    kinds = gguf.TokenType
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokens = ["<unk>", *CONTROL, *byte_tokens, *pieces()]
    first_piece = 1 + len(CONTROL) + len(byte_tokens)
    types = [kinds.UNKNOWN] + [kinds.CONTROL] * len(CONTROL) + [kinds.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * first_piece + [float(len(piece)) for piece in tokens[first_piece:]])
    writer.add_token_types(types + [kinds.NORMAL] * (len(tokens) - first_piece))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(4)
    writer.add_chat_template(TEMPLATE)
    return first_piece, len(tokens)


def add_shape(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)


def add_weights(writer: gguf.GGUFWriter, first_piece: int, tokens: int) -> None:
    random = np.random.default_rng(20240607)

    def matrix(rows: int, columns: int, scale: float = 0.1) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
        return random.normal(0.0, scale, (rows, columns)).astype(np.float32)

    output = matrix(tokens, WIDTH, 0.4)
    output[:first_piece] = 0.0
    writer.add_tensor("token_embd.weight", matrix(tokens, WIDTH, 1.0))
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix(WIDTH, WIDTH))
        writer.add_tensor(f"blk.{layer}.ffn_gate.weight", matrix(FEED_FORWARD, WIDTH))
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", matrix(FEED_FORWARD, WIDTH))
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", matrix(WIDTH, FEED_FORWARD))


def write_model(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    add_shape(writer)
    add_weights(writer, *add_vocabulary(writer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    write_model(parser.parse_args().path)
