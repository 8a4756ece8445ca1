import json

import pytest

from stages.rows import BadRow, any_scored_row, conversation_row, preference_row, text_row


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def refusal(normalise, row) -> str:
    with pytest.raises(BadRow) as caught:
        normalise(row)
    return str(caught.value)


def test_a_document_keeps_its_text_and_nothing_else():
    assert text_row({"text": " two\nlines ", "id": 7}) == {"text": " two\nlines "}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "a", "id": 1}, "no column 'text'; columns: body, id"),
        ({}, "no column 'text'; columns: none"),
        ({"text": None}, "column 'text' holds nothing (null); expected text"),
        ({"text": 5}, "column 'text' holds int 5; expected text"),
        ({"text": True}, "column 'text' holds bool True; expected text"),
        ({"text": ["a"]}, "column 'text' holds list ['a']; expected text"),
        ({"text": ""}, "column 'text' is empty"),
        ({"text": " \n\t "}, "column 'text' is empty"),
        ({"text": "a\0b"}, "column 'text' holds a NUL character"),
    ],
)
def test_a_bad_document_says_what_is_wrong(row, message):
    assert refusal(text_row, row) == message


def test_a_long_wrong_value_is_cut_in_the_message():
    assert len(refusal(text_row, {"text": ["x" * 10_000]})) < 120


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("q"), assistant("a")]}, [user("q"), assistant("a")]),
        ({"messages": (user("q"), assistant("a"))}, [user("q"), assistant("a")]),
        (
            {"messages": [system("s"), user("q"), assistant("a"), user("r"), assistant("b")], "id": 1},
            [system("s"), user("q"), assistant("a"), user("r"), assistant("b")],
        ),
        (
            {"messages": [user("q"), {"role": "tool", "content": "4"}, assistant("a")]},
            [user("q"), {"role": "tool", "content": "4"}, assistant("a")],
        ),
        ({"prompt": "q", "completion": "a"}, [user("q"), assistant("a")]),
        ({"prompt": [system("s"), user("q")], "completion": "a"}, [system("s"), user("q"), assistant("a")]),
        ({"prompt": "q", "completion": [assistant("a")]}, [user("q"), assistant("a")]),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, [user("q"), assistant("a")]),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [user("add\n\n1 2"), assistant("3")]),
        ({"instruction": "add", "input": "", "output": "3"}, [user("add"), assistant("3")]),
        ({"instruction": "add", "input": None, "output": "3"}, [user("add"), assistant("3")]),
        ({"instruction": "add", "output": "3"}, [user("add"), assistant("3")]),
    ],
)
def test_every_form_of_a_conversation_becomes_messages(row, expected):
    assert conversation_row(row) == {"messages": expected}


def test_a_conversation_is_not_the_row_it_came_from():
    row = {"messages": [user("q"), assistant("a") | {"weight": 1}]}
    found = conversation_row(row)["messages"]
    assert found == [user("q"), assistant("a")]
    assert row["messages"][1] == assistant("a") | {"weight": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "id": 1},
            "columns text, id; expected messages, or prompt and completion, or instruction and output",
        ),
        ({}, "columns none; expected messages, or prompt and completion, or instruction and output"),
        ({"messages": []}, "column 'messages' holds list []; expected a list of messages"),
        ({"messages": None}, "column 'messages' holds nothing (null); expected a list of messages"),
        ({"messages": "hi"}, "column 'messages' holds str 'hi'; expected a list of messages"),
        ({"messages": {"role": "user"}}, "column 'messages' holds dict {'role': 'user'}; expected a list of messages"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "messages[0] has role 'bot'; allowed: system, user, assistant, tool",
        ),
        (
            {"messages": [user("q"), {"content": "a"}]},
            "messages[1] has role None; allowed: system, user, assistant, tool",
        ),
        ({"messages": ["hi"]}, "messages[0] has role 'hi'; allowed: system, user, assistant, tool"),
        (
            {"messages": [{"role": ["user"], "content": "a"}]},
            "messages[0] has role ['user']; allowed: system, user, assistant, tool",
        ),
        ({"messages": [user("q"), {"role": "assistant"}]}, "messages[1]: no column 'content'; columns: role"),
        (
            {"messages": [user("q"), {"role": "assistant", "content": None}]},
            "messages[1]: column 'content' holds nothing (null); expected text",
        ),
        ({"messages": [user(" "), assistant("a")]}, "messages[0]: column 'content' is empty"),
        ({"messages": [user("a\0"), assistant("a")]}, "messages[0]: column 'content' holds a NUL character"),
        (
            {"messages": [user("q"), assistant("a"), user("r")]},
            "the last message is the user's; expected the assistant's",
        ),
        ({"messages": [system("s")]}, "the last message is the system's; expected the assistant's"),
        ({"completion": "a"}, "no column 'prompt'; columns: completion"),
        ({"prompt": "", "completion": "a"}, "column 'prompt' is empty"),
        ({"prompt": "q", "completion": None}, "column 'completion' holds nothing (null); expected text"),
        ({"prompt": [], "completion": "a"}, "column 'prompt' holds list []; expected a list of messages"),
        ({"prompt": "q", "completion": [user("a")]}, "the last message is the user's; expected the assistant's"),
        ({"output": "3"}, "no column 'instruction'; columns: output"),
        ({"instruction": "add", "output": ""}, "column 'output' is empty"),
        ({"instruction": "add", "input": ["1"], "output": "3"}, "column 'input' holds list ['1']; expected text"),
        ({"instruction": "add", "input": 4, "output": "3"}, "column 'input' holds int 4; expected text"),
    ],
)
def test_a_bad_conversation_says_what_is_wrong(row, message):
    assert refusal(conversation_row, row) == message


def test_a_nul_character_is_refused_in_every_alpaca_column():
    good = {"instruction": "add", "input": "1", "output": "3"}
    for column in good:
        assert refusal(conversation_row, good | {column: "a\0b"}) == f"column {column!r} holds a NUL character"


@pytest.mark.parametrize("value", [0, False, [], {}])
def test_an_alpaca_input_of_another_type_is_refused_though_it_is_falsy(value):
    assert "column 'input' holds" in refusal(conversation_row, {"instruction": "add", "input": value, "output": "3"})


def test_a_wrong_message_is_cut_in_the_complaint():
    assert len(refusal(conversation_row, {"messages": ["x" * 10_000]})) < 200


PAIR = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, PAIR),
        ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, PAIR),
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": "b", "score": 3}, PAIR),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, PAIR),
        (
            {
                "chosen": [system("s"), user("q"), assistant("x"), user("r"), assistant("a")],
                "rejected": [system("s"), user("q"), assistant("x"), user("r"), assistant("b")],
            },
            {
                "prompt": [system("s"), user("q"), assistant("x"), user("r")],
                "chosen": [assistant("a")],
                "rejected": [assistant("b")],
            },
        ),
    ],
)
def test_every_form_of_a_pair_becomes_prompt_chosen_rejected(row, expected):
    assert preference_row(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "rejected": "b"}, "no column 'chosen'; columns: prompt, rejected"),
        ({"prompt": "q", "chosen": "a"}, "no column 'rejected'; columns: prompt, chosen"),
        ({"prompt": "q"}, "no column 'chosen'; columns: prompt"),
        ({"chosen": "a", "rejected": "b"}, "no column 'prompt'; plain text answers need one"),
        (
            {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "chosen and rejected share no first message, and there is no column 'prompt'",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": [assistant("a")]}, "chosen and rejected are the same"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
            "chosen and rejected are the same",
        ),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "column 'prompt' holds nothing (null); expected text"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "column 'prompt' is empty"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "column 'chosen' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "column 'rejected' holds nothing (null); expected text"),
        (
            {"prompt": "q", "chosen": [user("a")], "rejected": "b"},
            "chosen is not one assistant message after the prompt",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": [assistant("b"), assistant("c")]},
            "rejected is not one assistant message after the prompt",
        ),
        (
            {
                "chosen": [user("q"), assistant("a"), user("r"), assistant("c")],
                "rejected": [user("q"), assistant("b"), user("r"), assistant("d")],
            },
            "chosen is not one assistant message after the prompt",
        ),
    ],
)
def test_a_bad_pair_says_what_is_wrong(row, message):
    assert refusal(preference_row, row) == message


def test_an_answer_that_ends_where_the_other_goes_on_is_not_called_the_same():
    longer = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert "the same" not in refusal(preference_row, {"chosen": longer[:2], "rejected": longer})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "t", "messages": [user("q"), assistant("a")]}, {"text": "t"}),
        ({"prompt": "q", "completion": "a"}, {"messages": [user("q"), assistant("a")]}),
    ],
)
def test_perplexity_scores_documents_before_conversations(row, expected):
    assert any_scored_row(row) == expected


def test_perplexity_refuses_what_is_neither():
    assert refusal(any_scored_row, {"body": "t"}).startswith("columns body; expected messages")


@pytest.mark.parametrize(
    ("normalise", "template"),
    [
        (text_row, '{"text": "%s"}'),
        (conversation_row, '{"prompt": "q", "completion": "%s"}'),
        (preference_row, '{"prompt": "q", "chosen": "%s", "rejected": "b"}'),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_because_no_tokenizer_takes_it(normalise, template):
    whole = json.loads(template % r"\ud83d\ude00")
    assert "\N{GRINNING FACE}" in json.dumps(normalise(whole), ensure_ascii=False)
    assert "surrogate" in refusal(normalise, json.loads(template % r"\ud83d"))
