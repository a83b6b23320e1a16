"""TensorBoard event files, with the values of the configuration by which its HParams page compares runs."""

import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from turnwise.config import RLConfig
from turnwise.monitor.facts import REWARD
from turnwise.monitor.held_out import END, START
from turnwise.monitor.secrets import Redactor

HPARAMS = (
    *("model.name", "max_steps", "seed", "seq_len", "orchestrator.batch_size", "orchestrator.rollouts_per_example"),
    *("orchestrator.max_staleness", "orchestrator.advantage.kind", "orchestrator.sampling.temperature"),
    *("orchestrator.sampling.max_tokens", "trainer.model.lora.rank", "trainer.model.lora.alpha", "trainer.optim.lr"),
    *("trainer.optim.schedule", "trainer.loss.kind", "trainer.loss.kl_beta", "trainer.loss.clip_low", "trainer.loss.clip_high"),
)
"""Keys that runs are compared by; all runs name the same, unset ones as "unset"."""


class TensorBoardSink:
    """Event files under `tensorboard/<run name>`, by tensorboard's own writer: torch is not loaded for it.

    Args:
        folder: of this run.
        config: its configuration; `HPARAMS` of it are one record of the HParams page, beside the final rewards.
        resume_step: first step that is written anew; None for a fresh run.
    """

    def __init__(self, folder: Path, config: RLConfig, *, resume_step: int | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = import_module("tensorboard.compat.proto.event_pb2")  # generated code, without types
        self._summary: Any = import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._hparams = HParams(config)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        self._compared: set[str] = set()  # metrics of the HParams page, once they are written
        self._last, self._max_steps = 0, config.max_steps
        if resume_step is not None:  # TensorBoard hides what an abandoned lineage wrote at or after this step
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._add(resume_step, session_log=start)
        self._add(0, summary=self._hparams.start(folder.name))
        self._writer.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=self._summary(value=values))
        if held_out := {name for name in metrics if name.startswith(START) and name.endswith(END)}:
            self._compare(held_out)
        self._last = max(self._last, step)
        self._writer.flush()

    def close(self) -> None:
        self._compare(set())
        if self._last == self._max_steps:  # otherwise nobody knows yet: a run that was interrupted may go on
            self._add(self._last, summary=self._hparams.end())
        self._writer.close()

    def _compare(self, held_out: set[str]) -> None:
        """Say by which metrics runs are compared; TensorBoard takes the first word on it."""
        if not self._compared:
            self._compared = {REWARD} | held_out
            self._add(self._last, summary=self._hparams.experiment(self._compared))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))


class HParams:
    """Records of the HParams plugin, as summaries."""

    def __init__(self, config: RLConfig) -> None:
        self._api: Any = import_module("tensorboard.plugins.hparams.api_pb2")
        self._plugin: Any = import_module("tensorboard.plugins.hparams.plugin_data_pb2")
        self._metadata: Any = import_module("tensorboard.plugins.hparams.metadata")
        self._summary: Any = import_module("tensorboard.compat.proto.summary_pb2")
        tables: dict[str, Any] = config.model_dump(mode="json")
        environments = ", ".join(env.id for env in config.orchestrator.env)
        values = {key: _at(tables, key) for key in HPARAMS} | {"environments": environments}
        self.values: dict[str, Any] = Redactor(tables).tables(values)

    def start(self, name: str) -> Any:
        """This run's values."""
        session = self._plugin.SessionStartInfo(group_name=name, start_time_secs=time.time())
        for key, value in self.values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                session.hparams[key].number_value = value
            else:
                session.hparams[key].string_value = "unset" if value is None else str(value)
        return self._record(
            self._metadata.SESSION_START_INFO_TAG, self._plugin.HParamsPluginData(session_start_info=session, version=0)
        )

    def experiment(self, metrics: set[str]) -> Any:
        """Names of the values and metrics that runs are compared by."""
        experiment = self._api.Experiment(
            hparam_infos=[self._api.HParamInfo(name=key) for key in self.values],
            metric_infos=[self._api.MetricInfo(name=self._api.MetricName(tag=name)) for name in sorted(metrics)],
        )
        return self._record(self._metadata.EXPERIMENT_TAG, self._plugin.HParamsPluginData(experiment=experiment, version=0))

    def end(self) -> Any:
        """The run has done all its steps."""
        session = self._plugin.SessionEndInfo(status=self._api.STATUS_SUCCESS, end_time_secs=time.time())
        return self._record(
            self._metadata.SESSION_END_INFO_TAG, self._plugin.HParamsPluginData(session_end_info=session, version=0)
        )

    def _record(self, tag: str, content: Any) -> Any:
        plugin = self._summary.SummaryMetadata.PluginData(
            plugin_name=self._metadata.PLUGIN_NAME, content=content.SerializeToString()
        )
        value = self._summary.Summary.Value(tag=tag, metadata=self._summary.SummaryMetadata(plugin_data=plugin))
        value.tensor.CopyFrom(self._metadata.NULL_TENSOR)
        return self._summary.Summary(value=[value])


def _at(tables: Mapping[str, Any], key: str) -> Any:
    value: Any = tables
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
