"""Steps that the trainer finished when the orchestrator had ended, as after Ctrl-C: recorded from what they left on the disk."""

from turnwise.config import RLConfig
from turnwise.monitor import Monitor, read_metrics
from turnwise.monitor.facts import is_of_training
from turnwise.transport import BatchLog, RunDir, WeightsStore


def record_last_steps(config: RLConfig) -> list[int]:
    """Add them to the run's metrics; returns which. Nothing of the run may be running.

    A batch holds its metrics, and a published version those of the step that made it.

    Raises:
        OSError: the run folder cannot be read or written.
        ValueError: metrics.jsonl or a batch is damaged.
    """
    run_dir = RunDir(config.output_dir)
    batches, store = BatchLog(run_dir.batches), WeightsStore(run_dir.weights)
    trained = (line["step"] for line in read_metrics(run_dir.metrics) if is_of_training(line))
    recorded, written = max(trained, default=0), set(batches.steps())
    left = [ready for version in store.versions() if version > recorded and (ready := store.poll(version)) and ready.metrics]
    left = [ready for ready in left if ready.version in written]
    if not left:
        return []
    monitor = Monitor(config, run_dir.root)
    try:
        for ready in left:
            monitor.log(ready.version, {**batches.read(ready.version).metrics, **ready.metrics})
    finally:
        monitor.close()
    return [ready.version for ready in left]
