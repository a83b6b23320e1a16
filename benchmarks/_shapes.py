"""Model folders without weights: the shapes that the benchmarks measure, with a tokenizer that covers the vocabulary."""

import json
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "max_position_embeddings": 40_960,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,  # random weights must not end a reply early
}


def _shape(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool
) -> dict[str, Any]:
    return BASE | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "qwen3-4b": _shape(36, 2560, 9728, 32, 8, 128, 151_936, True),
    "qwen3-8b": _shape(36, 4096, 12288, 32, 8, 128, 151_936, False),
    "135m": _shape(30, 576, 1536, 9, 3, 64, 49_152, True),
    "tiny": _shape(2, 128, 256, 4, 2, 32, 512, True),
}


def linear_sizes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer of a decoder layer."""
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    modules = {f"self_attn.{name}_proj": (hidden, rows) for name, rows in (("q", queries), ("k", keys), ("v", keys))}
    modules |= {"self_attn.o_proj": (queries, hidden), "mlp.down_proj": (inner, hidden)}
    return modules | {f"mlp.{name}_proj": (hidden, inner) for name in ("gate", "up")}


def write_model_folder(folder: Path, shape: str) -> Path:
    """config.json and a byte-level tokenizer whose ids reach to the end of the vocabulary; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), config["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def write_adapter_folder(folder: Path, shape: str, rank: int) -> Path:
    """A small random adapter on all linear layers, in PEFT form and bfloat16."""
    import torch
    from safetensors.torch import save_file

    config = SHAPES[shape]
    modules = linear_sizes(config)
    tensors: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (inputs, outputs) in modules.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, dtype=torch.bfloat16) / inputs**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, dtype=torch.bfloat16) * 1e-3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [module.rsplit(".", 1)[1] for module in modules]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none"}))
    return folder
