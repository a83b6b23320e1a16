"""From a configuration to a server: loads the model and picks the lean path where it computes the same."""

import logging
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from turnwise.config import RLConfig
from turnwise.inference.embedded.decoder import Decoder
from turnwise.inference.embedded.engine import Engine
from turnwise.inference.embedded.generic_decoder import GenericDecoder
from turnwise.inference.embedded.lean import LeanModel, why_not_lean
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.embedded.loading import DTYPES, eos_ids, load_served, max_length
from turnwise.inference.embedded.server import Server
from turnwise.kernels.quantized.tensors import Packed

NO_CODES: Mapping[str, Packed] = MappingProxyType({})
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
    model, codes = load_served(config.model.weights, DTYPES[config.model.dtype], trust_remote_code=config.model.trust_remote_code)
    decoder = build_decoder(
        model,
        codes=codes,
        max_length=max_length(config, model.config),
        cache_bytes=embedded.prefix_cache_mb * 2**20,
        deterministic=config.deterministic,
    )
    engine = Engine(decoder, max_batch_size=embedded.max_batch_size)
    engine.start()
    packed = f", {len(codes)} linear layers of it in MXFP4" if codes else ""
    log.info("%s loaded in %.1f s, %s%s", config.model.name, time.monotonic() - began, model.dtype, packed)
    return Server(
        engine,
        model=config.model.name,
        eos_ids=eos_ids(config.model.name, model.config),
        vocabulary=model.config.get_text_config().vocab_size,
    )


def build_decoder(
    model: Any, *, max_length: int, cache_bytes: int, deterministic: bool, codes: Mapping[str, Packed] = NO_CODES
) -> Decoder:
    """The lean decoder if the model is one of those that it computes exactly, else the generic one; `codes` as `load_served`."""
    reason = why_not_lean(model.config)
    if reason is None:
        return LeanDecoder(LeanModel(model, max_length, codes), cache_bytes=cache_bytes, deterministic=deterministic)
    log.warning("%s: this model is served by the slower generic path, one sequence at a time", reason)
    return GenericDecoder(model, max_length=max_length)
