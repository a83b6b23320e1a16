"""The embedded engine: a transformers model, continuous batching, and vLLM's HTTP routes in one process."""
