"""What the batcher asks of a model: rows of sequences that advance together, and adapters by name."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Protocol

from torch import Tensor

from turnwise.inference.embedded.sequence import Sequence
from turnwise.inference.norms import Norm


class Decoder(Protocol):
    """A model with the key-value state of its running sequences. Used by one thread."""

    max_length: int  # most tokens of a sequence, prompt and reply together

    @property
    def rows(self) -> Seq[Sequence]:
        """Running sequences."""
        ...

    @property
    def adapters(self) -> Seq[str]:
        """Names of the loaded adapters."""
        ...

    def admit(self, sequence: Sequence) -> int:
        """Start a sequence; returns how many of its prompt tokens remain to be computed."""
        ...

    def step(self) -> tuple[list[Sequence], Tensor]:
        """Compute what is not computed of every running sequence: the sequences, and float32 logits [rows, vocabulary]."""
        ...

    def release(self, sequence: Sequence) -> None:
        """End a running sequence."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Raises AdapterError with the state as before when the folder cannot be served."""
        ...

    def unload_adapter(self, name: str) -> None: ...

    def digest(self, name: str | None) -> str:
        """`tensor_digest` of the resident tensors of an adapter, or of the base model for None."""
        ...

    def reload(self, folder: Path) -> None:
        """Replace the base weights; nothing may be running. Raises ValueError or OSError with the state as before."""
        ...

    def replace(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        """`reload` from tensors under their checkpoint names, which are copied."""
        ...

    def norms(self) -> Seq[Norm]:
        """The norms that noise may be added to; nothing may be running while it is."""
        ...

    def reset_prefix_cache(self) -> None: ...

    def prompt_logprobs(self, ids: Seq[int], adapter: str | None) -> list[float]:
        """Logprobs of ids[1:] at temperature 1."""
        ...
