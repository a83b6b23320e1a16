"""One pydantic model per TOML table."""

from turnwise.config.base import Config
from turnwise.config.files import ConfigError, load_config
from turnwise.config.inference import EmbeddedConfig, InferenceConfig, NoiseConfig
from turnwise.config.model import GpusConfig, ModelConfig
from turnwise.config.orchestrator import (
    AdvantageConfig,
    BufferConfig,
    EnvConfig,
    EvalConfig,
    FilterConfig,
    OrchestratorConfig,
    OverlongConfig,
    RewardConfig,
    SamplingConfig,
)
from turnwise.config.root import RLConfig
from turnwise.config.run import CkptConfig, MlflowConfig, MonitorConfig, StopConfig, WandbConfig
from turnwise.config.trainer import LoraConfig, LossConfig, OptimConfig, QuantConfig, TrainerConfig, TrainerModelConfig

__all__ = [
    "AdvantageConfig",
    "BufferConfig",
    "CkptConfig",
    "Config",
    "ConfigError",
    "EmbeddedConfig",
    "EnvConfig",
    "EvalConfig",
    "FilterConfig",
    "GpusConfig",
    "InferenceConfig",
    "LoraConfig",
    "LossConfig",
    "MlflowConfig",
    "ModelConfig",
    "MonitorConfig",
    "NoiseConfig",
    "OptimConfig",
    "OrchestratorConfig",
    "OverlongConfig",
    "QuantConfig",
    "RLConfig",
    "RewardConfig",
    "SamplingConfig",
    "StopConfig",
    "TrainerConfig",
    "TrainerModelConfig",
    "WandbConfig",
    "load_config",
]
