"""A model's tokenizer and chat template from its folder, without torch: tokenizer.json, the template, the end tokens."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from turnwise.orchestrator.types import Message

TOKENIZER_FILES = [
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
]
SEGMENT_CACHE = 16_384  # a group shares its prompt, and templates repeat the same few segments


class ChatError(ValueError):
    """The model's tokenizer or chat template cannot be used for rollouts."""


@dataclass(frozen=True)
class ModelText:
    """What a model folder says about text."""

    folder: Path
    tokenizer: Tokenizer
    template: str
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as templates name them
    eos_ids: tuple[int, ...]
    tool_template: str | None = None  # where a model has another template for conversations with tools


def load_model_text(name: str, *, chat_template: Path | None = None) -> ModelText:
    """Read tokenizer and template of a model folder or hub id.

    Raises:
        ChatError: there is no tokenizer.json, or no chat template.
    """
    folder = Path(name) if Path(name).is_dir() else _fetch(name)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ChatError(f"model.name = {name}: {file} is missing; save the fast tokenizer there (tokenizer.save_pretrained)")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = _read_json(folder / "tokenizer_config.json")
    special = {key: _content(settings[key]) for key in settings if key.endswith("_token") and settings[key]}
    template = _template(folder, settings, chat_template, name)
    tool_template = None if chat_template is not None else _tool_template(folder, settings)
    return ModelText(folder, tokenizer, template, special, _eos_ids(folder, tokenizer, special), tool_template)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download  # late: a local folder needs no hub

    return Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(token: object) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _template(folder: Path, settings: dict[str, Any], override: Path | None, name: str) -> str:
    if override is not None:
        return override.read_text(encoding="utf-8")
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    if not isinstance(found, str):
        raise ChatError(f"model.name = {name} has no chat template; take an instruct model or set model.chat_template")
    return found


def _tool_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "additional_chat_templates" / "tool_use.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    return next((entry["template"] for entry in found if entry["name"] == "tool_use"), None) if isinstance(found, list) else None


def _eos_ids(folder: Path, tokenizer: Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    ids: list[int] = []
    for settings in (_read_json(folder / "generation_config.json"), _read_json(folder / "config.json")):
        value = settings.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    named = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return tuple(dict.fromkeys([*ids, *([] if named is None else [named])]))


class SafeEncoder:
    """Encodes rendered chats so that nothing inside a message can become a special token.

    Observations are hostile: a game may print `<|im_end|>`. `guard` breaks up such text inside messages with a mark before the
    template sees it; in the rendered text only the template's own special tokens are whole, so `encode` splits there, takes the
    marks out again and encodes what lies between as plain text. With tokenizers whose pieces cannot be encoded apart
    (`exact` False; checked by the caller against the tokenizer itself) the mark stays, as a zero-width space.
    """

    MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))  # Unicode noncharacters, never in exchanged text
    VISIBLE_MARK = "\u200b"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.exact = True
        added = tokenizer.get_added_tokens_decoder()
        self.ids = {token.content: number for number, token in added.items() if token.content}
        special = [token.content for token in added.values() if token.special and token.content]
        self._all = _alternatives(list(self.ids))
        self._special = _alternatives(special)
        plain = Tokenizer(tokenizer.model)  # of the same vocabulary, without the added tokens
        if tokenizer.normalizer is not None:
            plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            plain.pre_tokenizer = tokenizer.pre_tokenizer
        self._encode_plain = lru_cache(SEGMENT_CACHE)(lambda text: tuple(plain.encode(text, add_special_tokens=False).ids))

    def mark_for(self, messages: Sequence[Message]) -> str:
        """A mark that occurs in none of the messages."""
        if not self.exact:
            return self.VISIBLE_MARK
        texts = [text for message in messages for text in _texts(message)]
        mark = next((m for m in self.MARKS if not any(m in text for text in texts)), None)
        if mark is None:
            raise ChatError("a conversation uses all 32 noncharacters U+FDD0 to U+FDEF; the environment must not send them")
        return mark

    def guard(self, message: Message, mark: str) -> Message:
        """The message with added tokens in it broken up; the policy's own replies keep tokens that are not special."""
        pattern = self._special if message["role"] == "assistant" else self._all
        if pattern is None or not any(pattern.search(text) for text in _texts(message)):
            return message
        return {"role": message["role"], **{k: _broken(v, pattern, mark) for k, v in message.items() if k != "role"}}

    def guard_value(self, value: Any, mark: str) -> Any:
        """A JSON value with added tokens in its texts broken up."""
        return value if self._all is None else _broken(value, self._all, mark)

    def encode(self, text: str, mark: str) -> list[int]:
        """Ids of rendered text."""
        if not self.exact:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        ids: list[int] = []
        position = 0
        for found in self._all.finditer(text) if self._all else ():
            if found.start() > position:
                ids += self._encode_plain(text[position : found.start()].replace(mark, ""))
            ids.append(self.ids[found.group()])
            position = found.end()
        if position < len(text):
            ids += self._encode_plain(text[position:].replace(mark, ""))
        return ids


def _texts(value: Any) -> Iterator[str]:
    """Every text inside a message or another JSON value, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _broken(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda found: "".join(character + mark for character in found.group()), value)
    if isinstance(value, dict):
        return {_broken(key, pattern, mark): _broken(inner, pattern, mark) for key, inner in value.items()}
    return [_broken(inner, pattern, mark) for inner in value] if isinstance(value, list | tuple) else value


def _alternatives(tokens: list[str]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
