"""The process that renders chat templates: the same text as the tokenizer's own, and limits."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from transformers import PreTrainedTokenizerBase

from paint_engine.prompts import renderer
from paint_engine.prompts.template import check_template, render, render_each

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LIMITS = "needs one that takes at most 1 s and 2 GB for it; correct chat_template.jinja"


def hello(content: str = "Hello, \u2603 \ud83d!") -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.fixture
def hostile(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> PreTrainedTokenizerBase:
    """A tokenizer for a test to give its template."""
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    monkeypatch.setattr(tokenizer, "name_or_path", "models/hostile")
    return tokenizer


@pytest.mark.parametrize("thinking", [False, True])
def test_the_text_is_the_tokenizer_s_own(
    thinking: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [{"role": "system", "content": "Be brief.\n"}, *hello()]
    own = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert render(tokenizer, messages, thinking=thinking) == own


def test_many_conversations_are_rendered_in_their_order(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    conversations = [hello(f"Question {i}") for i in range(600)]
    texts = render_each(tokenizer, conversations, thinking=True)
    assert texts[::97] == [render(tokenizer, c, thinking=True) for c in conversations[::97]]
    assert ["Question 599" in text for text in texts] == [False] * 599 + [True]
    assert render_each(tokenizer, [], thinking=True) == []


def test_slow_conversations_are_rendered_in_parts(
    hostile: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 12 times 0.2 s exceed this limit on an exchange.
    monkeypatch.setattr(renderer, "_KILL_LIMIT_S", 2.0)
    monkeypatch.setattr(renderer, "_renderer", cache(renderer._renderer.__wrapped__))
    hostile.chat_template = (
        "{% for i in range(120) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + PLAIN
    )
    conversations = [hello(f"{i}") for i in range(12)]
    assert render_each(hostile, conversations, thinking=False) == [f"{i}" for i in range(12)]
    renderer._renderer().close()


def test_the_template_sees_the_special_tokens(hostile: PreTrainedTokenizerBase) -> None:
    hostile.chat_template = "{{ eos_token }}{{ bos_token }}|" + PLAIN
    own = hostile.apply_chat_template(hello(), tokenize=False)
    assert render(hostile, hello(), thinking=False) == own
    assert own.startswith(str(hostile.eos_token))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LONG, f"takes too long for a conversation of user; {LIMITS}"),
        (
            "{% set n = namespace(t='x') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}"
            "{% endfor %}",
            f"; {LIMITS}",
        ),
        ("{{ 'x' * 10**10 }}", f"takes too much memory for a conversation of user; {LIMITS}"),
        ("{{ [messages] * 10**9 }}", f"takes too much memory for a conversation of user; {LIMITS}"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "(RecursionError)"),
        ("{{ 'x' * 2 * 10**6 }}", "writes 2000000 characters for a conversation of 22; needs one"),
    ],
)
def test_an_endless_template_is_refused_with_its_model_and_the_limit(
    template: str, said: str, hostile: PreTrainedTokenizerBase
) -> None:
    hostile.chat_template = template
    with pytest.raises(ValueError) as caught:
        check_template(hostile, {}, None)
    assert str(caught.value).startswith("the chat template of models/hostile ")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_template_that_is_endless_on_one_row_is_refused_at_that_row_in_any_thread(
    hostile: PreTrainedTokenizerBase,
) -> None:
    hostile.chat_template = "{% if 'slow' in messages[0].content %}" + LONG + "{% endif %}" + PLAIN
    assert check_template(hostile, {}, None) == []
    with pytest.raises(ValueError, match=r"models/hostile takes too long for a conversation"):
        render_each(hostile, [hello("a"), hello("slow"), hello("b")], thinking=False)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(render, hostile, hello("slow"), thinking=False)
        quick = pool.submit(render, hostile, hello("quick"), thinking=False)
        assert quick.result() == "quick"
        with pytest.raises(ValueError, match=r"models/hostile takes too long for a conversation"):
            slow.result()
    assert render(hostile, hello("after"), thinking=False) == "after"


def test_an_operation_that_cannot_be_interrupted_is_killed(
    hostile: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "_KILL_LIMIT_S", 3.0)
    monkeypatch.setattr(renderer, "_renderer", cache(renderer._renderer.__wrapped__))
    hostile.chat_template = "{{ 7 ** (10 ** 9) }}"
    with pytest.raises(ValueError, match=r"is endless or too large: the rendering of a conv.* 3 s"):
        render(hostile, hello(), thinking=False)
    renderer._renderer().close()


def test_a_template_s_own_words_are_cut(hostile: PreTrainedTokenizerBase) -> None:
    hostile.chat_template = "{{ raise_exception('word ' * 100000) }}"
    with pytest.raises(ValueError, match=r"refuses a conversation of user: word word") as caught:
        render(hostile, hello(), thinking=False)
    assert len(str(caught.value)) < 1000


def test_a_tokenizer_s_own_code_renders_in_its_own_way(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(type(tokenizer)):
        def apply_chat_template(self, messages: list[dict[str, str]], **settings: object) -> str:
            if messages[0]["content"] == "":
                raise KeyError("empty")
            return f"own: {messages[0]['content']}"

    monkeypatch.setattr(tokenizer, "__class__", Own)
    assert render(tokenizer, hello("x"), thinking=False) == "own: x"
    with pytest.raises(ValueError, match=r"failed in the tokenizer's own code: KeyError\('empty'"):
        render(tokenizer, hello(""), thinking=False)
