"""`[model]`: which language model, shared by the engine, the orchestrator's tokenizer and the trainer."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from turnwise.config.base import Config

Dtype = Literal["auto", "bfloat16", "float32"]


class ModelConfig(Config):
    """The policy that is trained."""

    name: str = "smollm2-135m"
    """Hub id, folder in Hugging Face format, or a name that `turnwise model` prepares (`smollm2-135m`)."""

    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's own chat template."""

    dtype: Dtype = "auto"
    """Type of the frozen or loaded weights; `auto` is the checkpoint's own."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave off unless you have read it."""


class GpusConfig(Config):
    """Which GPUs each part may use. Empty lists mean CPU; the lists must not overlap."""

    inference: list[int] = Field(default_factory=list)
    """GPUs of the inference engines: one engine a GPU, unless `inference.tp` is larger."""

    trainer: list[int] = Field(default_factory=list)
    """GPUs of the trainer: one torchrun over all of them."""

    containers: list[int] = Field(default_factory=list)
    """GPUs that task containers may lease."""
