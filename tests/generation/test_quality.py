"""Each quality rule by hand, the gate's laws, and its precision and recall over texts labeled by reading."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from owlrec.generation.quality import DEFAULT_POLICY, FLAGS, QualityConfig, QualityGate
from owlrec.scenario import SCENARIOS

LABELED = Path(__file__).parent / "quality_texts.jsonl"
GATES = {name: QualityGate(QualityConfig(), scenario) for name, scenario in SCENARIOS.items()}
PROMPT = (
    'The user watched these movies, oldest first: "Heat (1995)" 5 stars; "Fargo (1996)" 4 stars.\nExplain the taste.'
)
GOOD = (
    'The user likes tense crime films with moral weight, such as "Heat (1995)" and "Fargo (1996)", and rates '
    "character above spectacle."
)


def flags(text: str, scenario: str = "movies", prompt: str = PROMPT, finish_reason: str = "stop") -> tuple[str, ...]:
    return GATES[scenario].flags(text, prompt=prompt, finish_reason=finish_reason)


def labeled() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LABELED.read_text().splitlines()]


def scores(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[int, float, float]]:
    """By flag, and in all (micro-averaged): labeled texts, precision, recall; 1 where none can go wrong."""
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for row in rows:
        raised = set(flags(row["text"], row["scenario"], row["prompt"], row["finish_reason"]))
        wanted = set(row["flags"])
        for counter, names in ((right, raised & wanted), (wrong, raised - wanted), (missed, wanted - raised)):
            counter.update([*names, *["all"] * len(names)])
    return {
        name: (
            right[name] + missed[name],
            right[name] / max(right[name] + wrong[name], 1) if right[name] + wrong[name] else 1.0,
            right[name] / (right[name] + missed[name]) if right[name] + missed[name] else 1.0,
        )
        for name in (*FLAGS, "all")
    }


def table(results: dict[str, tuple[int, float, float]]) -> str:
    lines = [f"{name:16} {n:6} {precision:9.3f} {recall:6.3f}" for name, (n, precision, recall) in results.items()]
    return "\n".join(["flag              texts precision recall", *lines])


def test_precision_and_recall_over_the_labeled_texts() -> None:
    rows = labeled()
    results = scores(rows)
    print("\n" + table(results))
    assert len(rows) >= 220
    assert min(n for n, _, _ in results.values()) >= 10
    assert sum(not row["flags"] for row in rows) >= 50
    _, precision, recall = results["all"]
    assert precision >= 0.95
    assert recall >= 0.90


def test_a_good_text_has_no_flag() -> None:
    assert flags(GOOD) == ()
    assert flags(GOOD, finish_reason="length") == ()


def test_flags_come_in_order_and_empty_comes_alone() -> None:
    assert flags(" \n", finish_reason="length") == ("empty",)
    assert flags("I'm sorry, I cannot help </s>", finish_reason="length") == (
        "too_short",
        "cut_off",
        "refusal",
        "template_tokens",
    )


def test_too_short_counts_utf8_bytes() -> None:
    assert flags("x" * 59 + ".") == ()
    assert flags("x" * 58 + ".") == ("too_short",)
    assert flags("本" * 20, "books", "读者喜欢什么书") == ()  # 60 bytes
    assert flags("本" * 19, "books", "读者喜欢什么书") == ("too_short",)


@pytest.mark.parametrize(
    ("end", "cut"),
    [
        (" The pace is slow", True),
        (" The pace is slow.", False),
        (' He says "no."', False),
        (' The last is "Fargo (1996)"', True),
        ("\n1. Crime\n2.", True),
        (' Also "L.A.', True),
        (" The pace is slow。", False),
    ],
)
def test_cut_off_is_a_sentence_that_max_tokens_ended(end: str, cut: bool) -> None:
    assert ("cut_off" in flags(GOOD + end, finish_reason="length")) is cut
    assert "cut_off" not in flags(GOOD + end)


def test_a_sentence_said_three_times_is_a_repetition_and_twice_is_not() -> None:
    opening = "Heat is a crime film by Michael Mann from 1995."
    sentence = " It is a dark tale of a thief and a detective."  # 10 words; the opening has 10 as well
    assert flags(opening + sentence * 2) == ()
    assert flags(opening + sentence * 3) == ("repetition",)  # 30 of 40 words


def test_an_enumeration_is_no_repetition_and_a_list_that_returns_to_its_titles_is() -> None:
    titles = ["Heat", "Fargo", "Alien", "Scream", "Titanic", "Babe", "Speed", "Casino", "Jumanji", "Sabrina"]
    liked = "".join(f'The user liked "{t}" for its {t.lower()}-like mood. ' for t in titles)
    assert "repetition" not in flags(liked)
    listed = [f'{i}. "The {t} (199{i})" - {i % 5} stars' for i, t in enumerate(titles)]
    assert "repetition" not in flags("\n".join(listed))
    assert "repetition" in flags("\n".join([*listed[:6], *listed[1:5]]))  # 4 of 10 lines


def test_a_loop_is_seen_without_spaces_and_behind_changing_numbers() -> None:
    assert "repetition" in flags("ha" * 48)
    assert "repetition" in flags("Years: " + " ".join(f"{year};" for year in range(1950, 2000)))


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm unable to analyze the preferences of a person whom I have never met in all my life.", True),
        ("As an AI language model, I have no taste of my own and so no view on the films of others.", True),
        ("I’m sorry, but this is something that had better be left to the persons who watched it all.", True),
        ("The hero cannot help his brother, who is unable to give an answer to the police in the end.", False),
        ('The computer says "I\'m sorry, I cannot do that", and the crew has to find a way to stop it.', False),
        ("As an AI that wants to be human, the boy is the heart of a film about what a mother is for.", False),
    ],
)
def test_refusal_is_about_the_task(text: str, refuses: bool) -> None:
    assert flags(text) == (("refusal",) if refuses else ())


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("Please provide the titles of the movies, and then the preferences will be explained to you.", True),
        ("Could you share the list of films first? The taste of the user is hard to tell without one.", True),
        ("It is hard to say much about the taste of this user, since no titles were provided at all.", True),
        ("The girl asks him to share his songs and to give her a list of names, which he never does.", False),
        ("The user likes quiet dramas; please note that the only thriller has a rating of one star.", False),
    ],
)
def test_asks_for_input_speaks_to_the_asker(text: str, asks: bool) -> None:
    assert flags(text) == (("asks_for_input",) if asks else ())


@pytest.mark.parametrize(
    ("scenario", "text", "wrong"),
    [
        ("movies", "The titles in this list are books, so what follows is only about crime in general.", True),
        ("books", "The film stars two great actors. The movie was a success, and viewers love the film.", True),
        ("movies", "The film follows the novel. Readers of the book and the novel will like this movie.", False),
        ("movies", 'The user gave "The Book Thief", "The Jungle Book" and "Comic Book Villains" low marks.', False),
        ("news", "The user follows film: the films of the year, festival films, the best film of Cannes.", False),
        ("news", "All of these are films rather than news articles; the user seems to like thrillers.", True),
    ],
)
def test_wrong_domain_is_the_things_being_other_things(scenario: str, text: str, wrong: bool) -> None:
    assert flags(text, scenario) == (("wrong_domain",) if wrong else ())


def test_prompt_echo_is_the_question_again_and_not_its_titles() -> None:
    question = "Analyze at length what this user likes and dislikes and explain each of the reasons."
    prompt = f'The user watched "Heat (1995)" 5 stars; "Fargo (1996)" 4 stars. {question}'
    assert flags(question, prompt=prompt) == ("prompt_echo",)
    assert flags(prompt, prompt=prompt) == ("prompt_echo",)
    listing = '"Heat (1995)" 5 stars; "Fargo (1996)" 4 stars. Both are crime films with a wry view of people.'
    assert flags(listing, prompt=prompt) == ()


def test_template_tokens_are_found_anywhere() -> None:
    assert flags(GOOD + "<|im_end|>") == ("template_tokens",)
    assert flags(GOOD + " [see below] <b>so</b>") == ()


def test_language_is_the_prompts_script_and_no_broken_bytes() -> None:
    russian = "Пользователь любит криминальные фильмы и высоко ставит характеры."
    assert flags(russian) == ("language",)
    assert flags(russian, prompt="Какие фильмы любит пользователь?") == ()
    assert flags(GOOD, prompt="Какие фильмы любит пользователь?") == ()
    assert flags(f'{GOOD} So it is with "{russian}"') == ()
    assert flags(GOOD + " CafÃ© scenes too.") == ("language",)
    assert flags(GOOD + "\ufffd") == ()  # a character that max_tokens cut in two


def test_a_gate_that_is_off_flags_nothing() -> None:
    gate = QualityGate(QualityConfig(policy="off"), SCENARIOS["movies"])
    assert gate.flags("", prompt="", finish_reason="length") == ()


def test_a_policy_adds_to_the_defaults_and_unknown_flags_are_refused() -> None:
    assert QualityConfig(policy={"cut_off": "drop"}).policy == {**DEFAULT_POLICY, "cut_off": "drop"}
    assert set(DEFAULT_POLICY) == set(FLAGS)
    with pytest.raises(ValidationError, match="boring"):
        QualityConfig.model_validate({"policy": {"boring": "drop"}})
    with pytest.raises(ValidationError, match="forget"):
        QualityConfig.model_validate({"policy": {"empty": "forget"}})


def test_the_most_severe_policy_wins() -> None:
    gate = QualityGate(QualityConfig(policy={"language": "drop", "refusal": "fall_back"}), SCENARIOS["movies"])
    assert gate.action(()) == "keep"
    assert gate.action(("cut_off",)) == "keep"
    assert gate.action(("cut_off", "repetition")) == "retry"
    assert gate.action(("repetition", "refusal", "cut_off")) == "fall_back"
    assert gate.action(("refusal", "language")) == "drop"


# Whole phrases beside single characters: the rules' expressions see nothing of themselves in random characters.
ANY_TEXT = st.one_of(
    st.text(st.characters()),  # lone surrogates too
    st.lists(
        st.sampled_from(["I cannot ", "please ", "provide ", "books", "not movies", ". ", "\n1. ", '"', "“", "é", "本"])
    ).map("".join),
)


@given(ANY_TEXT, ANY_TEXT, st.sampled_from(["stop", "length"]), st.sampled_from(sorted(GATES)))
def test_any_text_has_flags_in_order_and_is_empty_where_blank(
    text: str, prompt: str, finish_reason: str, scenario: str
) -> None:
    raised = flags(text, scenario, prompt, finish_reason)
    assert list(raised) == sorted(raised, key=FLAGS.index)
    assert len(set(raised)) == len(raised)
    assert ("empty" in raised) == (not text.strip())
    assert "empty" not in raised or len(raised) == 1
    assert "cut_off" not in raised or finish_reason == "length"


@given(ANY_TEXT, st.text(" \t\n\r\u3000"), st.text(" \t\n\r\u3000"), st.sampled_from(["stop", "length"]))
def test_whitespace_at_the_ends_changes_nothing(text: str, before: str, after: str, finish_reason: str) -> None:
    assert flags(before + text + after, finish_reason=finish_reason) == flags(text, finish_reason=finish_reason)
