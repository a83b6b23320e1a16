"""What was quantised, and with what error: beside the weights as JSON, and in sentences."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise.kernels.quantized.layout import OUTPUT_LAYER

if TYPE_CHECKING:
    from turnwise.kernels.mxfp4.errors import ErrorReport


@dataclass(frozen=True)
class Report:
    """The linear layers of a model: quantised here, found quantised, and left in their type."""

    scale_mode: str
    errors: "Mapping[str, ErrorReport]"  # by layer
    reused: Sequence[str] = ()
    plain: Sequence[str] = ()

    def lines(self) -> list[str]:
        """For people: which modules, the error of all together, and the layer with the largest."""
        lines: list[str] = []
        if self.errors:
            total = sum(list(self.errors.values())[1:], start=next(iter(self.errors.values())))
            worst = max(self.errors, key=lambda layer: self.errors[layer].frobenius)
            lines.append(f"MXFP4, scales by {self.scale_mode}: {_counted(self.errors)}; {total.weights:,} weights, {total}")
            lines.append(f"worst layer: {worst}, {self.errors[worst]}")
        if self.reused:
            lines.append(f"MXFP4 as the model came: {_counted(self.reused)}")
        plain = [layer for layer in self.plain if layer != OUTPUT_LAYER]
        kept = f"; so do {_counted(plain)}" if plain else ""
        lines.append(f"embeddings, norms and the output layer keep their type{kept}")
        return lines


def write_report(report: Report, path: Path) -> None:
    """Write a report as JSON."""
    layers = {
        layer: {**asdict(error), "frobenius": error.frobenius, "sqnr_db": error.sqnr_db, "mean_relative": error.mean_relative}
        for layer, error in report.errors.items()
    }
    content = {
        "lines": report.lines(),
        "scale_mode": report.scale_mode,
        "layers": layers,
        "reused": list(report.reused),
        "plain": list(report.plain),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """The lines of the report at `path`, without loading torch; none without such a file."""
    return json.loads(path.read_text(encoding="utf-8"))["lines"] if path.is_file() else []


def no_layers(names: Sequence[str], model: str, known: Sequence[str]) -> str:
    """Why names cannot be those of layers to quantise."""
    return (
        f"trainer.model.quant.target_modules names {', '.join(names)}, of which {model} has no linear layer with an input "
        f"dimension that is a multiple of 32; it has {', '.join(known)}"
    )


def _counted(layers: "Mapping[str, ErrorReport] | Sequence[str]") -> str:
    """`56 linear layers (28 q_proj, 28 k_proj)`."""
    kinds = Counter(layer.rpartition(".")[2] for layer in layers)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"{len(layers)} linear layers ({listed})"
