"""Turn the GGUF of SmolLM2-135M-Instruct into a Hugging Face folder. Run in a process of its own: it loads torch.

python -m turnwise.launch.smollm2 GGUF_FILE FOLDER
"""

import sys
from pathlib import Path

BOS, EOS = 1, 2


def convert(gguf: Path, folder: Path) -> None:
    """Write model (bfloat16) and tokenizer of `gguf` to `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")  # the weights are plain now
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, EOS
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names the pre-tokenizer but does not describe it: digits are split one by one, as the original does
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
