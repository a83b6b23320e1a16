"""Models that the library `renderers` knows: its renderer behind our protocol, with our guard."""

import pytest

from turnwise.orchestrator.chat import load_chat
from turnwise.orchestrator.renderers_chat import RenderersChat

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> RenderersChat:
    """A byte-level tokenizer with Qwen3's special tokens, in a folder of the hub's cache that bears Qwen3's name."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    folder = tmp_path_factory.mktemp("hub") / "models--Qwen--Qwen3-0.6B" / "snapshots" / "0"
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    loaded = load_chat(str(folder))
    assert isinstance(loaded, RenderersChat)
    return loaded


def _spell(chat: RenderersChat, text: str) -> list[int]:
    return list(chat._guard.tokenizer.encode(text, add_special_tokens=False).ids)


def _decode(chat: RenderersChat, ids: list[int]) -> str:
    return chat._guard.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_library_renders_the_opening_and_the_bridge(chat: RenderersChat):
    opening = [{"role": "system", "content": "Play."}, {"role": "user", "content": "Guess."}]
    prompt = chat.first_prompt(opening)
    expected = "<|im_start|>system\nPlay.<|im_end|>\n<|im_start|>user\nGuess.<|im_end|>\n<|im_start|>assistant\n"
    assert _decode(chat, prompt) == expected
    end = chat._guard.ids["<|im_end|>"]
    sampled = [*_spell(chat, "crane"), end]
    history = [*opening, {"role": "assistant", "content": "crane"}]
    grown = chat.next_prompt(prompt, sampled, history, [{"role": "user", "content": "No."}])
    assert grown[: len(prompt) + len(sampled)] == [*prompt, *sampled]
    assert _decode(chat, grown).endswith("crane<|im_end|>\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n")
    assert end in chat.stop_ids


def test_a_cut_reply_gets_its_end_token(chat: RenderersChat):
    prompt = chat.first_prompt([{"role": "user", "content": "Guess."}])
    sampled = _spell(chat, "cra")
    history = [{"role": "user", "content": "Guess."}, {"role": "assistant", "content": "cra"}]
    grown = chat.next_prompt(prompt, sampled, history, [{"role": "user", "content": "No."}])
    assert grown[: len(prompt) + 3] == [*prompt, *sampled]
    assert grown[len(prompt) + 3] == chat._guard.ids["<|im_end|>"]


def test_the_reply_is_read_without_its_thoughts(chat: RenderersChat):
    ids = [*_spell(chat, "<think>hm</think>crane"), chat._guard.ids["<|im_end|>"]]
    assert chat.text(ids).strip() == "crane"


@pytest.mark.parametrize("hostile", [*SPECIAL, *ADDED])
def test_text_that_looks_like_a_special_token_becomes_none(chat: RenderersChat, hostile: str):
    calm = chat.first_prompt([{"role": "user", "content": "x"}])
    ids = chat.first_prompt([{"role": "user", "content": f"a{hostile}b"}])
    token = chat._guard.ids[hostile]
    assert ids.count(token) == calm.count(token)
    assert hostile in _decode(chat, ids).replace("\u200b", "").split("user\n", 1)[1]
