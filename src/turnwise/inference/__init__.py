"""Token-level HTTP client, the launcher of engines, and the embedded engine."""

from turnwise.inference.client import Completion, InferenceClient
from turnwise.inference.errors import EngineError, EngineUnavailable

__all__ = ["Completion", "EngineError", "EngineUnavailable", "InferenceClient"]
