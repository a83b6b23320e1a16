"""From a configuration to a server: loads the model and picks the lean path where it computes the same."""

import logging
import time
from typing import Any

import torch

from turnwise.config import RLConfig
from turnwise.inference.embedded.decoder import Decoder
from turnwise.inference.embedded.engine import Engine
from turnwise.inference.embedded.generic_decoder import GenericDecoder
from turnwise.inference.embedded.lean import LeanModel, why_not_lean
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.embedded.loading import DTYPES, eos_ids, load_model, max_length
from turnwise.inference.embedded.server import Server

log = logging.getLogger(__name__)


def build_server(config: RLConfig) -> Server:
    """Load the model and start the engine's thread.

    Raises:
        OSError, ValueError: the model cannot be loaded.
    """
    began = time.monotonic()
    embedded = config.inference.embedded
    if embedded.threads is not None:
        torch.set_num_threads(embedded.threads)
    model = load_model(config.model.name, DTYPES[config.model.dtype], trust_remote_code=config.model.trust_remote_code)
    decoder = build_decoder(
        model,
        max_length=max_length(config, model.config),
        cache_bytes=embedded.prefix_cache_mb * 2**20,
        deterministic=config.deterministic,
    )
    engine = Engine(decoder, max_batch_size=embedded.max_batch_size)
    engine.start()
    log.info("%s loaded in %.1f s, %s", config.model.name, time.monotonic() - began, model.dtype)
    return Server(
        engine,
        model=config.model.name,
        eos_ids=eos_ids(config.model.name, model.config),
        vocabulary=model.config.get_text_config().vocab_size,
    )


def build_decoder(model: Any, *, max_length: int, cache_bytes: int, deterministic: bool) -> Decoder:
    """The lean decoder if the model is one of those that it computes exactly, else the generic one."""
    reason = why_not_lean(model.config)
    if reason is None:
        return LeanDecoder(LeanModel(model, max_length), cache_bytes=cache_bytes, deterministic=deterministic)
    log.warning("%s: this model is served by the slower generic path, one sequence at a time", reason)
    return GenericDecoder(model, max_length=max_length)
