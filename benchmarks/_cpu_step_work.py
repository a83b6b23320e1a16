"""The work of `cpu_step.py`, the same on both sides: the model, the prompts, the reward. Runs in either environment.

python benchmarks/_cpu_step_work.py FOLDER        # write the model there
"""

import random
import string
import sys
from collections.abc import Sequence
from pathlib import Path

COMPLETIONS = 8  # of one prompt: one group
PROMPT_TOKENS = 64
NEW_TOKENS = 64
RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

VOCABULARY = 49_152
SHAPE = {  # of SmolLM2-135M: 134.5M parameters
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
END, END_ID = "<end>", VOCABULARY  # an end token that the model has no logit for: every reply runs to its last token


def prompts(count: int) -> list[str]:
    """Different texts of `PROMPT_TOKENS` letters; the tokenizer makes each letter one token."""
    return ["".join(random.Random(index).choices(string.ascii_letters, k=PROMPT_TOKENS)) for index in range(count)]


def reward(token_ids: Sequence[int]) -> float:
    """Share of even token ids: costs nothing, and differs between the replies of a group."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


def build_model(folder: Path) -> None:
    """Write a Llama of that shape with random weights in float32, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {f"<{index}>": index for index in range(len(letters), VOCABULARY)} | {END: END_ID}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=f"<{VOCABULARY - 1}>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, dtype="float32")
    LlamaForCausalLM(shape).save_pretrained(folder)


if __name__ == "__main__":
    build_model(Path(sys.argv[1]))
