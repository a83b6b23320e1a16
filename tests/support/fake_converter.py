"""Stands in for the conversion of a model: copies what the file holds, and counts how often it ran."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with Path(os.environ["CONVERSIONS"]).open("a") as count:
        count.write("x")
    if source.read_text() == "poison":
        sys.exit("cannot convert poison")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text(source.read_text())
