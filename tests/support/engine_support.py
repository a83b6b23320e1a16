"""Small models of several families, and a decoder driven without a server."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from turnwise.inference.embedded.decoder import Decoder
from turnwise.inference.embedded.sampling import sample, uniform
from turnwise.inference.embedded.sequence import Sequence

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama with biases and scaled rope": LlamaConfig(
        **SHAPE,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
GPT2 = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300, n_positions=256, bos_token_id=0, eos_token_id=1)


def build(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose normalisation weights and biases are not trivial."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def sequence(
    prompt: list[int], *, max_tokens: int = 8, seed: int = 0, adapter: str | None = None, temperature: float = 1.0
) -> Sequence:
    return Sequence(prompt, max_tokens, temperature, seed, frozenset(), adapter, lambda _: None)


@torch.inference_mode()
def advance(decoder: Decoder) -> None:
    """One step of all rows, as the engine does it."""
    rows, logits = decoder.step()
    tokens, logprobs = sample(logits, [row.temperature for row in rows], [uniform(row.seed, len(row.logprobs)) for row in rows])
    for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
        row.append(token, logprob)
    for row in rows:
        if row.finish_reason is not None:
            decoder.release(row)


@torch.inference_mode()
def run(decoder: Decoder, sequences: list[Sequence]) -> None:
    """Admit all at once and decode until all are done."""
    for item in sequences:
        decoder.admit(item)
    while decoder.rows:
        advance(decoder)


def random_prompts(count: int, *, longest: int = 40, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths]


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
