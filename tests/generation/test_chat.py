"""Questions in chat templates: with a system turn, without one where the template knows none, refused where it must."""

import pytest
from jinja2 import TemplateError

from owlrec.generation.engines import RequestRefused, render_chat


class Tokenizer:
    """Renders turns as text; `refuses` are roles that its template raises for."""

    def __init__(self, *refuses: str) -> None:
        self.refuses = refuses

    def apply_chat_template(self, turns: list[dict[str, str]], **options: object) -> tuple[object, dict[str, object]]:
        for turn in turns:
            if turn["role"] in self.refuses:
                raise TemplateError(f"no {turn['role']} here")
        return [(turn["role"], turn["content"]) for turn in turns], options


def test_turns_and_the_answers_header() -> None:
    turns, options = render_chat(Tokenizer(), "Be brief.", "Why?", {"enable_thinking": False})
    assert turns == [("system", "Be brief."), ("user", "Why?")]
    assert options == {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": False,
        "enable_thinking": False,
    }
    assert render_chat(Tokenizer(), "", "Why?")[0] == [("user", "Why?")]


def test_a_template_without_system_turns_gets_its_text_in_the_users() -> None:
    assert render_chat(Tokenizer("system"), "Be brief.", "Why?")[0] == [("user", "Be brief.\n\nWhy?")]


def test_a_template_that_refuses_both_fails_the_row() -> None:
    with pytest.raises(RequestRefused, match="no user here"):
        render_chat(Tokenizer("system", "user"), "Be brief.", "Why?")
