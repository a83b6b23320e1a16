"""TRL's side of `cpu_step.py`: a GRPOTrainer that takes one step for each line on its standard input.

Runs in the environment of TRL. Before each step, and after the last one, it writes a line of JSON to the file descriptor
given as its first argument: the seconds that the step before spent generating, and how many tokens came of it.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from _cpu_step_work import (
    ALPHA,
    COMPLETIONS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NEW_TOKENS,
    PROMPT_TOKENS,
    RANK,
    TARGETS,
    prompts,
    reward,
)


class TimedTrainer(GRPOTrainer):
    """Notes how long the newest generation took."""

    generate_s = 0.0
    new_tokens = 0

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if any(len(ids) != PROMPT_TOKENS for ids in prompt_ids):
            raise ValueError(f"prompts of {[len(ids) for ids in prompt_ids]} tokens, not {PROMPT_TOKENS}")
        began = time.perf_counter()
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.generate_s = time.perf_counter() - began
        self.new_tokens = sum(len(ids) for ids in completion_ids)
        return completion_ids, logprobs


class OneStepALine(TrainerCallback):
    """Waits before each step until the other end says so."""

    def __init__(self, report: int) -> None:
        self.report = os.fdopen(report, "w")
        self.trainer: TimedTrainer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tell()
        if not sys.stdin.readline():
            raise SystemExit(0)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.tell()

    def tell(self) -> None:
        assert self.trainer is not None
        line = {"generate_s": self.trainer.generate_s, "new_tokens": self.trainer.new_tokens}
        print(json.dumps(line), file=self.report, flush=True)


def rewards(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [reward(ids) for ids in completion_ids]


def make_trainer(model: str, output: str, steps: int) -> TimedTrainer:
    """GRPO without anything that the other side does not do: no reference model, no recomputation, no logs, no checkpoints."""
    arguments = GRPOConfig(
        output_dir=output,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        activation_checkpointing=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=COMPLETIONS,
        num_generations=COMPLETIONS,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        max_steps=steps,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    data = Dataset.from_dict({"prompt": prompts(steps)})
    trainer = TimedTrainer(model=model, reward_funcs=rewards, args=arguments, train_dataset=data, peft_config=lora)
    kinds = {str(parameter.dtype) for parameter in trainer.model.parameters()}
    if kinds != {"torch.float32"}:
        raise ValueError(f"the model of TRL has parameters of {kinds}, not float32 alone")
    return trainer


def main() -> None:
    report, model, output, steps, threads = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(threads)
    gate = OneStepALine(report)
    gate.trainer = make_trainer(model, output, steps)
    gate.trainer.add_callback(gate)
    gate.trainer.train()


if __name__ == "__main__":
    main()
