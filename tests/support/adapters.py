"""LoRA adapters with random weights on both sides, written by peft."""

from pathlib import Path
from typing import Any

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(model: Path, *, seed: int, rank: int = 8, alpha: float = 16.0, modules: list[str] | None = None) -> Any:
    """A peft model over float32 weights whose B matrices are not zero, so that the adapter changes every logit."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    wrapped = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules or ALL_LINEAR))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return wrapped.eval()


def write_adapter(
    model: Path, folder: Path, *, seed: int, rank: int = 8, alpha: float = 16.0, modules: list[str] | None = None
) -> Any:
    """Save such an adapter to `folder` and return the peft model for reference."""
    wrapped = peft_model(model, seed=seed, rank=rank, alpha=alpha, modules=modules)
    wrapped.save_pretrained(str(folder))
    return wrapped


def reference_logprobs(model: Any, ids: list[int], *, temperature: float = 1.0) -> list[float]:
    """Logprobs of ids[1:] by the model's own forward pass, in float32."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
