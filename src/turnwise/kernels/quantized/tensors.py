"""The tensors of a model folder by name, whatever file each of them is in."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from turnwise.kernels.mxfp4.format import BLOCK, check_packed
from turnwise.kernels.quantized.layout import BLOCKS, LayoutError, packed_layers, weight_files

Packed = tuple[Tensor, Tensor]  # codes uint8 [N, K/2] and scale bytes uint8 [N, K/32]


class FolderTensors:
    """See `open_tensors`."""

    def __init__(self, folder: Path, contents: dict[str, Any]) -> None:
        self.folder = folder
        self.files = {file: list(content.keys()) for file, content in contents.items()}
        self._content_of = {name: content for content in contents.values() for name in content.keys()}  # noqa: SIM118
        self.layers = packed_layers(self._content_of)
        in_layers = {name for pair in self.layers.values() for name in pair}
        self.others = [name for name in self._content_of if name not in in_layers]

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._content_of[name].get_tensor(name)

    def packed(self, layer: str) -> Packed:
        """Codes and scale bytes of one of `layers`.

        Raises:
            LayoutError: they are not those of a linear layer.
        """
        codes, scales = (self.get(name) for name in self.layers[layer])
        if scales.ndim != 2:
            raise LayoutError(
                f"{self.folder}: {layer}{BLOCKS} has shape {list(codes.shape)}: the experts of a mixture are no linear layers; "
                "leave [trainer.model.quant] out, and transformers decodes them"
            )
        if codes.numel() == scales.numel() * BLOCK // 2:
            codes = codes.reshape(scales.shape[0], -1)  # gpt-oss: [N, K/32, 16]
        try:
            check_packed(codes, scales)
        except ValueError as error:
            raise LayoutError(f"{self.folder}: {layer}: {error}") from error
        return codes, scales


@contextmanager
def open_tensors(folder: Path) -> Generator[FolderTensors]:
    """The tensors of a model folder, each read when it is asked for.

    Raises:
        LayoutError: there are no safetensors files, one is damaged, or MXFP4 codes are without their scales.
    """
    with ExitStack() as stack:
        try:
            contents = {path.name: stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)}
        except SafetensorError as error:
            raise LayoutError(f"{folder}: a file of weights is damaged ({error}); download the model again") from error
        yield FolderTensors(folder, contents)
