"""vLLM's own offline engine in `engine_client.py`; argument: the work, as JSON. Runs in vLLM's environment, without ours."""

import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    work: dict[str, Any] = json.loads(sys.argv[1])
    llm = make_engine(work["flags"])
    rows = [measure(llm, work, concurrency) for concurrency in work["concurrency"]]
    import torch
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    Path(work["output"]).write_text(json.dumps({"vllm": vllm.__version__, "device": device, "rows": rows}))


def make_engine(flags: list[str]) -> Any:
    """`LLM` with the settings of the server's command line; what only a server knows is left out."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(allow_abbrev=False))
    arguments = EngineArgs.from_cli_args(parser.parse_known_args(flags)[0])
    given = {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags if flag.startswith("--")}
    names = given & {field.name for field in dataclasses.fields(EngineArgs)}
    return LLM(**{name: getattr(arguments, name) for name in names})


def measure(llm: Any, work: dict[str, Any], concurrency: int) -> dict[str, Any]:
    run = stream if work["admission"] == "stream" else waves
    run(llm, work, concurrency, 1, first_seed=1)
    begun = time.perf_counter()
    run(llm, work, concurrency, work["waves"], first_seed=10**6)
    seconds = time.perf_counter() - begun
    requests = concurrency * work["waves"]
    return {
        "concurrency": concurrency,
        "requests": requests,
        "seconds": seconds,
        "tokens_per_s": requests * work["tokens"] / seconds,
    }


def waves(llm: Any, work: dict[str, Any], concurrency: int, number: int, *, first_seed: int) -> None:
    """All requests of a wave at once, the next wave when all of it are done."""
    all_requests = requests(work, concurrency * number, first_seed)
    for _ in range(number):
        prompts, parameters = zip(*(next(all_requests) for _ in range(concurrency)), strict=True)
        for output in llm.generate(list(prompts), list(parameters), use_tqdm=False, lora_request=adapter(work)):
            check(output, work)


def stream(llm: Any, work: dict[str, Any], concurrency: int, number: int, *, first_seed: int) -> None:
    """As many requests at a time all along: the loop of `LLM.generate`, which adds one whenever one is done."""
    engine, running, number_added = llm.llm_engine, 0, 0
    waiting = requests(work, concurrency * number, first_seed)
    for _ in range(concurrency * number):
        while running < concurrency and (request := next(waiting, None)) is not None:
            engine.add_request(str(first_seed + number_added), *request, lora_request=adapter(work))
            running, number_added = running + 1, number_added + 1
        done: list[Any] = []
        while not done:
            done = [output for output in engine.step() if output.finished]
        for output in done:
            check(output, work)
        running -= len(done)
        if not running and number_added == concurrency * number:
            return


def requests(work: dict[str, Any], number: int, first_seed: int) -> Iterator[tuple[Any, Any]]:
    """Prompts that have no beginning in common, and their sampling parameters."""
    from vllm import SamplingParams

    words = random.Random(first_seed)
    for index in range(number):
        parameters = SamplingParams(
            temperature=1.0,
            max_tokens=work["tokens"],
            seed=first_seed + index if work["seeds"] else None,
            logprobs=0,
            detokenize=work["detokenize"],
        )
        yield {"prompt_token_ids": [words.randrange(3, work["vocabulary"]) for _ in range(work["prompt"])]}, parameters


def adapter(work: dict[str, Any]) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("v0", 1, work["adapter"]) if work["adapter"] else None


def check(output: Any, work: dict[str, Any]) -> None:
    reply = output.outputs[0]
    if len(reply.token_ids) != work["tokens"] or len(reply.logprobs) != work["tokens"]:
        raise RuntimeError(f"a reply of {len(reply.token_ids)} tokens with {len(reply.logprobs)} logprobs")
    if not math.isfinite(reply.cumulative_logprob):
        raise RuntimeError("the logits of the offline engine are not finite")


if __name__ == "__main__":
    main()
