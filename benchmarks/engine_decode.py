"""Decoding speed of the embedded engine beside transformers' `generate`, both with a LoRA adapter, in turn in one process.

    python benchmarks/engine_decode.py --model FOLDER [--dtype float32] [--threads 2] [--json FILE]

Prints a table and JSON. Wall time is what a user waits for; CPU time is what can be compared on a machine that is busy,
and the factor is that of tokens per CPU second.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the engine runs; before torch loads its OpenMP runtime

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.embedded.loading import load_model
from turnwise.inference.embedded.sampling import sample, uniform
from turnwise.inference.embedded.sequence import Sequence

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Result:
    """Generation of `tokens` tokens in all, prefill included."""

    name: str
    tokens: int
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    tokens_per_cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama-like model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter on all linear layers")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = compare(arguments)
    report = {"settings": {key: str(value) for key, value in vars(arguments).items()}, "results": [asdict(r) for r in results]}
    text = json.dumps(report, indent=2)
    if arguments.json is not None:
        arguments.json.write_text(text)
    _print_table(results)
    print(text)


def compare(arguments: argparse.Namespace) -> list[Result]:
    """transformers first, then the engine with different prompts, with equal ones, and in deterministic mode."""
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as name:
        peft_model = _with_adapter(load_model(arguments.model, dtype), arguments.rank)
        peft_model.save_pretrained(name)
        prompts = _prompts(peft_model.config.vocab_size, arguments)
        results = [_measure("transformers generate", arguments, partial(_transformers, peft_model, prompts, arguments.tokens))]
        del peft_model
        lean = LeanModel(load_model(arguments.model, dtype), arguments.prompt + arguments.tokens)
        for label, inputs, deterministic in (
            ("turnwise, different prompts", prompts, False),
            ("turnwise, one prompt", [prompts[0]] * arguments.batch, False),
            ("turnwise, deterministic", prompts, True),
        ):
            decoder = LeanDecoder(lean, cache_bytes=2**30, deterministic=deterministic)
            decoder.load_adapter("v0", Path(name))
            _engine(decoder, inputs[:1], 2)  # what is done once: stacking of the adapter, the check of row counts
            decoder.reset_prefix_cache()
            results.append(_measure(label, arguments, partial(_engine, decoder, inputs, arguments.tokens)))
    return results


def _with_adapter(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES)).eval()


def _prompts(vocabulary: int, arguments: argparse.Namespace) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (arguments.batch, arguments.prompt), generator=generator).tolist()


@torch.inference_mode()
def _transformers(model: Any, prompts: list[list[int]], tokens: int) -> None:
    ids = torch.tensor(prompts)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens, **options)


@torch.inference_mode()
def _engine(decoder: LeanDecoder, prompts: list[list[int]], tokens: int) -> None:
    for seed, prompt in enumerate(prompts):
        decoder.admit(Sequence(prompt, tokens, 1.0, seed, frozenset(), "v0", lambda _: None))
    while decoder.rows:
        rows, logits = decoder.step()
        ids, logprobs = sample(logits, [1.0] * len(rows), [uniform(row.seed, len(row.logprobs)) for row in rows])
        for row, token, logprob in zip(rows, ids, logprobs, strict=True):
            row.append(token, logprob)
        for row in rows:
            if row.finish_reason is not None:
                decoder.release(row)


def _measure(name: str, arguments: argparse.Namespace, work: Callable[[], None]) -> Result:
    tokens = arguments.batch * arguments.tokens
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Result(name, tokens, wall, cpu, tokens / wall, tokens / cpu)


def _print_table(results: list[Result]) -> None:
    table = Table("engine", "tokens", "wall s", "CPU s", "tokens/s", "tokens/CPU-s", "factor")
    for r in results:
        factor = r.tokens_per_cpu_s / results[0].tokens_per_cpu_s
        numbers = (r.tokens, r.wall_s, r.cpu_s, r.tokens_per_s, r.tokens_per_cpu_s, factor)
        table.add_row(r.name, *(f"{number:.1f}" if isinstance(number, float) else str(number) for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
