"""Does it fit, and how long will it take? From what the engines and the trainer's processes took of memory and of time."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import psutil

from turnwise.config import RLConfig, StopConfig
from turnwise.diagnose.core import Check, Finding, Verdict
from turnwise.diagnose.footprint import Footprint
from turnwise.diagnose.notes import Notes
from turnwise.diagnose.pace import Pace, Played, pace_of
from turnwise.diagnose.probe_report import Memory, ProbeReport
from turnwise.launch.live import duration
from turnwise.launch.memory import GIB, GPU_CONTEXT_BYTES, HELPERS_BYTES
from turnwise.monitor.expressions import Expression
from turnwise.monitor.history import History

if TYPE_CHECKING:
    from turnwise.diagnose.context import Context

TIGHT = 0.95  # share of the memory from which fragments of it may be what is missing
MEASURED_HERE = ("cost", "rehearsal")  # stages of the probe that no other check judges
HELPS = "What helps: "  # before the remedies of the rehearsal's own message
STEP_TIME = "timing/step_s"
LONG_S = 7 * 24 * 3600.0
LONGEST_WINDOW = 1000  # steps over which a condition of [stop] may average

TRAINER_REMEDY = (
    "a smaller trainer.micro_batch_tokens or seq_len, trainer.model.gradient_checkpointing = true, more processes to shard over"
)
FASTER = {
    "rollouts": "more GPUs in gpus.inference, a larger orchestrator.max_inflight where engines have room, or a smaller "
    "orchestrator.sampling.max_tokens, max_turns or batch_size",
    "training": "more GPUs in gpus.trainer, a larger trainer.micro_batch_tokens, trainer.model.compile = true on GPUs, or no "
    "gradient_checkpointing where memory allows",
    "publication": "an adapter (trainer.model.lora), or a faster disk under output_dir",
    "weight swap": "an adapter (trainer.model.lora), or GPUs of their own for engines and trainer, so that weights are broadcast",
}


# --- memory -----------------------------------------------------------------------------------------------------------


def judge_memory(
    report: ProbeReport, engines: Footprint, config: RLConfig, *, rollout_tokens: float, ram: int, estimate_gib: float = 0.0
) -> Finding:
    """Whether the longest batch fits beside everything else.

    Args:
        report: of the trainer's processes.
        engines: measured while they ran.
        config: resolved.
        rollout_tokens: of one rollout at its end, prompt and all, on average.
        ram: bytes of this machine.
        estimate_gib: of a trainer process, where the longest batch could not be tried.
    """
    rehearsal, cost = report.rehearsal, report.cost
    if report.failure or rehearsal is None or cost is None:
        return _unmeasured(report)
    notes, tried = Notes(), bool(rehearsal.memory)
    ranks = rehearsal.memory or [Memory(max(rank.peak, estimate_gib), rank.total) for rank in cost.memory]
    what = f"a micro-batch of {rehearsal.budget:,} tokens takes"
    if not tried:
        what = f"{cost.tokens:,} tokens took, or {what} by estimate (it was not tried: {rehearsal.skipped}),"
    taken = _gpu_memory(ranks, config, notes) if config.gpus.trainer else _ram(ranks, engines, ram, notes)
    lines = _engine_lines(engines, config, rollout_tokens, notes)
    data: dict[str, Any] = {
        "trainer_gib": [rank.peak for rank in ranks],
        "total_gib": [rank.total for rank in ranks],
        "tried": tried,
        "engine_ram_gib": engines.ram / GIB,
        "engine_gpus_gib": {str(gpu): used / GIB for gpu, used in engines.gpus.items()},
        "cache_tokens": engines.cache_tokens,
    }
    return notes.finding(f"{what} {taken}", data, lines)


def _unmeasured(report: ProbeReport) -> Finding:
    """The trainer's processes ended before: for want of memory, or for what another check judges."""
    if report.failure and report.stage in MEASURED_HERE:
        evidence, _, remedy = report.failure.partition(HELPS)
        return Finding(Verdict.FAIL, evidence.strip(), remedy.strip() or TRAINER_REMEDY, lines=tuple(report.tail))
    why = f"failed while {report.stage} was measured" if report.failure else "did not come so far"
    return Finding(Verdict.SKIPPED, f"not reached: the trainer's processes {why}")


def _gpu_memory(ranks: Sequence[Memory], config: RLConfig, notes: Notes) -> str:
    """The rank with the least room, and its share of what it may take."""
    shares: list[tuple[float, Memory, float]] = []
    for gpu, rank in zip(config.gpus.trainer, ranks, strict=False):
        part = config.trainer_memory(gpu, int(rank.total * GIB))
        may = rank.total - GPU_CONTEXT_BYTES / GIB if part is None else part / GIB
        shares.append((rank.peak / may, rank, may))
    share, rank, may = max(shares, key=lambda one: one[0])
    told = f"{rank.peak:.1f} GiB of the {may:.1f} that a trainer process may have"
    if share > TIGHT:
        notes.warn(f"that is {share:.0%}, and fragmentation takes some", TRAINER_REMEDY)
    return told


def _ram(ranks: Sequence[Memory], engines: Footprint, ram: int, notes: Notes) -> str:
    """All processes of a run together."""
    trainers = sum(rank.peak for rank in ranks)
    total = trainers + (engines.ram + HELPERS_BYTES) / GIB
    told = f"{trainers:.1f} GiB; with {engines.ram / GIB:.1f} of the engine and {HELPERS_BYTES / GIB:.1f} of the helpers "
    told += f"{total:.1f} of {ram / GIB:.1f} GiB of RAM"
    remedy = f"{TRAINER_REMEDY}, or a smaller inference.embedded.prefix_cache_mb"
    if total * GIB > ram:
        notes.fail(f"the processes of a run need {told}", remedy)
    elif total * GIB > TIGHT * ram:
        notes.warn("that leaves hardly any", remedy)
    return told


def _engine_lines(engines: Footprint, config: RLConfig, rollout_tokens: float, notes: Notes) -> list[str]:
    """GPUs of the engines, and whether the rollouts in flight fit into their caches."""
    lines = [f"GPU {gpu}: {used / GIB:.1f} GiB taken while the engine ran" for gpu, used in sorted(engines.gpus.items())]
    if engines.cache_tokens is None:
        return lines
    wanted = rollout_tokens * config.orchestrator.inflight_limit / config.replicas
    lines.append(f"KV cache of an engine: {engines.cache_tokens:,} tokens; its share of the rollouts in flight: {wanted:,.0f}")
    if wanted > engines.cache_tokens:
        notes.warn(
            f"an engine's share of the rollouts in flight, about {rollout_tokens:,.0f} tokens each, needs {wanted:,.0f} tokens "
            f"of its KV cache, which holds {engines.cache_tokens:,}: some will wait",
            "a larger gpus.inference_memory or inference.vllm.gpu_memory_utilization, or a smaller orchestrator.max_inflight",
        )
    return lines


def _run_memory(context: "Context") -> Finding:
    valid = [rollout for judged in context.groups for rollout in judged.group.valid]
    ends = [len(rollout.turns[-1].prompt_ids) + len(rollout.turns[-1].sampled_ids) for rollout in valid if rollout.turns]
    trainer = [one.total / GIB for one in context.foreseen.estimates if one.process.startswith("trainer")]
    return judge_memory(
        context.probe,
        context.footprint,
        context.config,
        rollout_tokens=fmean(ends),
        ram=psutil.virtual_memory().total,
        estimate_gib=max(trainer, default=0.0),
    )


# --- speed ------------------------------------------------------------------------------------------------------------


def judge_speed(pace: Pace, played: Played, stop: StopConfig) -> Finding:
    """How long a step and the whole run take, and what takes most of it."""
    notes = Notes()
    shares = pace.shares
    slowest = next(iter(shares))
    parts = ", ".join(f"{name} {pace.step_s * share:.2g} s" for name, share in shares.items())
    how = "side by side" if pace.beside else "one after the other"
    told = (
        f"about {pace.step_s:.2g} s a step ({parts}, {how}; {played.tokens / played.seconds:,.0f} sampled tokens/s), and "
        f"{duration(pace.total_s)} for {pace.steps:,} steps and {pace.evaluations} evaluations of {duration(pace.evaluation_s)}"
    )
    if pace.total_s > LONG_S:
        notes.warn(f"that is {pace.total_s / 86400:.0f} days, mostly {slowest}", FASTER[slowest])
    if stop.abort_when and would_hold(stop.abort_when, pace.step_s, stop.window):
        notes.warn(
            f"stop.abort_when ({stop.abort_when}) would end the run for its speed",
            f"{FASTER[slowest]}; or another stop.abort_when",
        )
    data = {**vars(pace), "step_s": pace.step_s, "total_s": pace.total_s, "slowest": slowest}
    return notes.finding(told, data)


def would_hold(condition: str, step_s: float, window: int) -> bool:
    """Whether a condition of [stop] over the duration of steps alone holds at this pace."""
    expression, history = Expression(condition), History(window)
    if expression.names != {STEP_TIME}:
        return False
    for step in range(1, LONGEST_WINDOW + 1):
        history.step = step
        history.record(step, STEP_TIME, step_s)
    return expression.holds(history)


def _run_speed(context: "Context") -> Finding:
    report = context.probe
    if report.gradient is None or report.cost is None or report.published is None:
        return _unmeasured(report)
    pace = pace_of(
        context.config,
        context.groups,
        context.batch,
        report,
        swap_s=context.swapped.swap_s,
        held_out=_held_out(context.config),
    )
    return judge_speed(pace, Played.of(context.groups), context.config.stop)


def _held_out(config: RLConfig) -> int:
    """Rollouts of one evaluation."""
    from turnwise.orchestrator.environments import load_setups

    settings = config.orchestrator.eval
    setups = load_setups(config.orchestrator.eval_env or config.orchestrator.env, settings.split)
    return settings.rollouts_per_example * sum(min(len(env.tasks), settings.num_examples or len(env.tasks)) for env in setups)


MEMORY = Check("memory", "Does the longest batch fit beside everything else?", needs=("rollouts",), run=_run_memory)
SPEED = Check("speed", "How long do a step and the whole run take?", needs=("rollouts", "served"), run=_run_speed)
