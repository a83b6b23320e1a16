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

    quantized: Path | None = None
    """Folder of the model with its linear layers in MXFP4, which trainer and engines load; `rl` makes it and fills this in."""

    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's own chat template."""

    tool_format: Literal["auto", "described"] = "auto"
    """How tools are shown and called: `auto` as the chat template has it, `described` in the system prompt (docs/tools.md)."""

    dtype: Dtype = "auto"
    """Type of the frozen or loaded weights; `auto` is the checkpoint's own."""

    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy` draws random weights for the shape in config.json, in the trainer and in vLLM: to measure speed and memory only."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave off unless you have read it."""

    @property
    def weights(self) -> str:
        """Folder or hub id from which trainer and engines of a resolved configuration load the policy's initial weights."""
        return str(self.quantized or self.name)


class GpusConfig(Config):
    """Which GPUs each part may use. Empty lists mean CPU; no GPU is in two lists, but `share` lets engines and trainer meet."""

    inference: list[int] = Field(default_factory=list)
    """GPUs of the inference engines: one engine a GPU, unless `inference.tp` is larger. Only vLLM uses them."""

    trainer: list[int] = Field(default_factory=list)
    """GPUs of the trainer: one torchrun over all of them."""

    containers: list[int] = Field(default_factory=list)
    """GPUs that task containers may lease; never shared."""

    share: bool = False
    """Let engines and trainer have GPUs in common, each with a fixed part of their memory."""

    inference_memory: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of each inference GPU's memory that its engine takes; on shared GPUs what the trainer is estimated to leave when
    unset, elsewhere vLLM's own default. `inference.vllm.gpu_memory_utilization` wins over it."""

    @property
    def shared(self) -> list[int]:
        """GPUs on which both an engine and the trainer run."""
        return [gpu for gpu in self.trainer if gpu in self.inference] if self.share else []
