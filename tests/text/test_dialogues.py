"""Where a prompt ends, and how turns are written out."""

import pytest

from palm_rlhf_pytorch.text.dialogues import FieldError, open_prompt, read_parts


def turns(*said, roles=("user", "assistant")):
    return [{"role": roles[place % len(roles)], "content": text} for place, text in enumerate(said)]


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 1 + 1?\n\nAssistant:"


def test_chat_and_hh_text_look_alike():
    from_text = read_parts(None, HH + " 2", field="chosen")
    assert from_text[:2] == (HH, " 2")
    for value in (turns("Hi", "Hello", "1 + 1?", "2"), turns("Hi", "Hello", "1 + 1?", "2", roles=("Human", "GPT"))):
        assert read_parts(None, value, field="chosen") == from_text
    shared = [{"from": turn["role"], "value": turn["content"]} for turn in turns("Hi", "Hello", "1 + 1?", "2")]
    assert read_parts(None, shared, field="chosen") == from_text


@pytest.mark.parametrize(
    ("prompt", "value", "parts"),
    [
        ("1 + 1 =", " 2", ("1 + 1 =", " 2")),
        ("", "no dialogue", ("", "no dialogue")),
        (None, "Text with \n\nAssistant: in it", ("", "Text with \n\nAssistant: in it")),
        (turns("Hi", "Hello", "1 + 1?"), "2", (HH, " 2")),
        (turns("Hi", "Hello", "1 + 1?"), turns("2", roles=("assistant",)), (HH, " 2")),
        (turns("Hi", "Hello", "1 + 1?"), turns("Hi", "Hello", "1 + 1?", "2"), (HH, " 2")),
        ("1 + 1?", turns("Hi", "Hello", "1 + 1?", "2"), (HH, " 2")),
        ("1 + 1?", turns("2", roles=("assistant",)), ("\n\nHuman: 1 + 1?\n\nAssistant:", " 2")),
        (HH, turns("2", roles=("assistant",)), (HH, " 2")),
        (None, turns("alone", roles=("assistant",)), ("", "alone")),
        (
            turns("Be brief", "Hi", roles=("system", "user")),
            turns("Yes", roles=("assistant",)),
            ("\n\nSystem: Be brief\n\nHuman: Hi\n\nAssistant:", " Yes"),
        ),
    ],
)
def test_prompt_and_response_are_found(prompt, value, parts):
    assert read_parts(prompt, value, field="chosen")[:2] == parts


@pytest.mark.parametrize(
    ("prompt", "value", "field", "reason"),
    [
        (None, turns("Hi", "Hello", "Bye"), "chosen[2].role", "is user"),
        (None, "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Bye", "chosen", "turn of Human"),
        (None, [{"role": "tool", "content": "x"}], "chosen[0].role", "'tool'"),
        (None, [{"role": "user", "content": "x"}, {"role": "assistant", "content": 5}], "chosen[1].content", "int"),
        (None, [{"role": "user"}], "chosen[0].content", "missing"),
        (None, [{"text": "x"}], "chosen[0]", "fields text"),
        (None, ["x"], "chosen[0]", "str"),
        (None, [], "chosen", "no turn"),
        (None, 5, "chosen", "int"),
        (None, HH + " \n", "chosen", "empty"),
        ("q", "", "chosen", "empty"),
        ("q", "\ud800", "chosen", "surrogate"),
        ("other", turns("Hi", "Hello"), "chosen", "is the prompt"),
        (turns("Hi", "Hello"), turns("Yes", roles=("assistant",)), "prompt[1].role", "is assistant"),
        (turns("Hi", "Hello"), "Yes", "prompt[1].role", "is assistant"),
        ("q", "[{'role': 'assistant', 'content': 'Yes'}]", "chosen", "written as text"),
    ],
)
def test_what_cannot_be_read_names_its_place(prompt, value, field, reason):
    with pytest.raises(FieldError) as error:
        read_parts(prompt, value, field=field.split("[")[0].replace("prompt", "chosen"))
    assert error.value.field == field and reason in error.value.reason


def test_open_prompt_ends_where_the_assistant_begins():
    assert open_prompt(HH + " ", field="prompt") == HH
    assert open_prompt(HH.removesuffix("\n\nAssistant:"), field="prompt") == HH
    with pytest.raises(FieldError, match="turn of Assistant"):
        open_prompt(HH + " 2", field="prompt")
