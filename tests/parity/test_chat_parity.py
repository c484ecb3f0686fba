"""Chat templates against transformers: equal text, equal tokens, equal masks."""

import json

import pytest

from entrenar_gpu.data.load import load_samples
from entrenar_gpu.data.samples import IGNORE
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from tests.data.test_chat import CALL, TURNS, assistant, model_folder, tool, user
from tests.helpers import chat_templates

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = [
    [SYSTEM, user("a"), assistant("b"), user("c é"), assistant(" d \n")],
    [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")],
    [user("a"), assistant("", tool_calls=[CALL]), tool("1"), assistant("b", reasoning_content="hm")],
]
TEMPLATES = {
    name: getattr(chat_templates, name) for name in ("QWEN3", "QWEN3_THINKING", "QWEN25", "LLAMA3", "GENERATION_TAGS")
}


def both(tmp_path, template: str):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    folder = model_folder(tmp_path / "model", config, bos=True)
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_same_text_and_tokens(tmp_path, name, prompt, messages):
    ours, theirs = both(tmp_path, TEMPLATES[name])
    text = ours.render(messages, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == expected


@pytest.mark.parametrize("messages", [messages for _, messages, spoken in TURNS.values() if spoken])
def test_same_mask_where_the_template_has_generation_tags(tmp_path, messages):
    ours, theirs = both(tmp_path, chat_templates.GENERATION_TAGS)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    if any(message.get("tool_calls") for message in messages):  # this template would train an empty answer
        with pytest.raises(UserError, match="the chat template writes no tool calls"):
            load_samples(path, ours, vocab_size=ours.vocab_size, seq=4096)
        return
    tokens, targets = load_samples(path, ours, vocab_size=ours.vocab_size, seq=4096)[0]
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert tokens.tolist() == expected["input_ids"]
    assert (targets != IGNORE).tolist() == [bool(bit) for bit in [*expected["assistant_masks"][1:], 0]]
