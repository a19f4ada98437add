"""Chat templates that fail, change the message, ask for the date or ignore a switch, and the token
with which they end a turn."""

import datetime

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.prompts.chat import encode_chat
from paint_engine.prompts.template import (
    after_question,
    check_date,
    check_template,
    end_of_turn,
    render,
    shows_date,
)

MESSAGES = [{"role": "user", "content": "How much is 1 + 1?"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def use(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase, template: str
) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('a system message is needed') }}", "a system message is needed"),
        ("{% if %}", "does not parse: Expected an expression, got 'end of statement block' (line"),
        ("{{ messages[0].content + 1 }}", "refuses a conversation of user: "),
        ("{{ messages[7].content.nothing }}", "has no element 7"),
        ("{{ unknown() }}", "'unknown' is undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("Hello!", "drops or changes the text of a user message: 'How much is 23519 + 1?'"),
        ("{{ messages[0].content[:9] }}", "drops or changes the text"),
        ("{{ messages[0].content[0].text }}", "drops or changes the text"),
        ("{{ messages[0].content | upper }}", "drops or changes the text"),
        (PLAIN + "{{ range(99999) | random }}" * 3, "writes another text each time"),
    ],
)
def test_a_template_that_fails_is_refused_in_its_own_words(
    template: str,
    said: str,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError) as caught:
        check_template(use(monkeypatch, tokenizer, template), {}, None)
    assert said in str(caught.value)
    assert "chat_template.jinja" in str(caught.value)


def test_a_template_that_drops_one_row_s_text_is_refused_at_that_row(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ messages[0].content.split('</think>')[-1] }}"
    use(monkeypatch, tokenizer, template)
    assert check_template(tokenizer, {}, None) == []
    with pytest.raises(
        ValueError, match="drops or changes the text of a user message: 'a</think>b"
    ):
        encode_chat(tokenizer, "a</think>b", thinking=False)


def test_space_at_a_message_s_ends_may_go(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tokenizer, "{{ messages[0].content | trim }}")
    assert render(tokenizer, [{"role": "user", "content": " a \n"}], thinking=False) == "a"


# ---- the thinking switch -------------------------------------------------------------------------


def test_a_template_that_ignores_the_switch_is_told_where_it_was_asked_for(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompts.student_thinking": True}
    assert check_template(tokenizer, asked, None) == []
    use(monkeypatch, tokenizer, PLAIN + "{% if add_generation_prompt %}[A]<think>{% endif %}")
    assert check_template(tokenizer, {}, None) == []
    (note,) = check_template(tokenizer, {"prompts.teacher_thinking": False}, None)
    assert note.startswith("prompts.teacher_thinking false: the chat template of ")
    (note,) = check_template(tokenizer, asked, None)
    assert note.startswith("prompts.student_thinking true: the chat template of ")
    assert note.endswith("ignores enable_thinking and always ends a prompt with '[A]<think>'")
    assert after_question(tokenizer, thinking=False, date=None) == "[A]<think>"
    # A template without thoughts does what "false" asks for.
    use(monkeypatch, tokenizer, PLAIN)
    assert check_template(tokenizer, {"prompts.teacher_thinking": False}, None) == []
    assert len(check_template(tokenizer, asked, None)) == 1


# ---- the date ------------------------------------------------------------------------------------

DATED = "{%- set d = strftime_now('%-d %B %Y, %d.%m.%y, %H:%M, 100%%') %}\n  {{ d }}|" + PLAIN


def test_the_date_is_the_one_that_is_given(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not shows_date(tokenizer)
    plain = render(tokenizer, MESSAGES, thinking=False)
    assert render(tokenizer, MESSAGES, thinking=False, date="2024-02-09") == plain
    use(monkeypatch, tokenizer, DATED)
    assert shows_date(tokenizer)
    text = render(tokenizer, MESSAGES, thinking=False, date="2024-02-09")
    now = render(tokenizer, MESSAGES, thinking=False)
    expected = "9 February 2024, 09.02.24, 00:00, 100%"
    assert (
        text == f"\n  {expected}|How much is 1 + 1?" or text == f"  {expected}|How much is 1 + 1?"
    )
    # White space around the date is as in the template without our date.
    assert text.partition(expected)[0] == now[: now.index(str(datetime.date.today().day))]
    assert str(datetime.date.today().year) in now


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  ", "  {% if true %}a{% endif %}", "\n {#- -#} b"]
)
def test_a_given_date_changes_nothing_else(
    start: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even white space at the template's beginning."""
    use(monkeypatch, tokenizer, start + "{{ strftime_now('%Y-%m-%d') }}" + PLAIN)
    today = datetime.date.today().isoformat()
    given = render(tokenizer, MESSAGES, thinking=False, date=today)
    assert given == render(tokenizer, MESSAGES, thinking=False)


def test_a_template_with_a_date_of_its_own_uses_ours(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama's: a fixed date unless the clock is there."""
    template = (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
        "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ date_string }} "
    )
    use(monkeypatch, tokenizer, template + PLAIN)
    text = render(tokenizer, MESSAGES, thinking=False, date="2025-12-31")
    assert text.startswith("31 Dec 2025 ")


def test_a_date_that_nothing_shows_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    check_date(tokenizer, None, "--prompts.date")
    with pytest.raises(ValueError, match=r"--prompts.date: got 2024-02-09 with a chat template"):
        check_date(tokenizer, "2024-02-09", "--prompts.date")


# ---- the end of a turn ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "end"),
    [
        ("[{{ m.role }}]{{ m.content }}<|im_end|>\n", "<|im_end|>"),
        ("[{{ m.role }}]{{ m.content }} <|endoftext|>", "<|endoftext|>"),
        ("<|im_start|>{{ m.content }}<|im_end|>\n<|endoftext|>", "<|im_end|>"),
        ("<|im_start|>{{ m.role }}\n{{ m.content }}\n", None),
        ("{{ m.role }}: {{ m.content }}\n### End <|im_end|>", None),
        ("{% if loop.last and m.role == 'assistant' %}{{ raise_exception('x') }}{% endif %}", None),
    ],
)
def test_the_end_of_an_assistant_s_turn(
    turn: str,
    end: str | None,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, tokenizer, f"{{% for m in messages %}}{turn}{{% endfor %}}")
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert end_of_turn(tokenizer) == expected


def test_the_tiny_template_s_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
