"""A recommendation domain: its nouns, the factors for the LLM's reasoning, its label rule and the text fields of its
items.

The factors are KAR's "scenario-specific factors" (RecSys 2024, sec. 3.1): movies and books as published with the
paper, music, apps, ads and news as reported from its deployments. A prompt with a domain's own factors gets far
more relevant knowledge from an LLM than a bare "describe this user". The quality gate reads the nouns, too: an
answer about books in a movie scenario is flagged.
"""

from owlrec.config import Config
from owlrec.errors import RecipeError, did_you_mean


class Scenario(Config):
    """One domain, built in or defined in a recipe. `user_factors` guide preference reasoning about users,
    `item_factors` factual knowledge about items.
    """

    name: str
    item: str  # singular noun
    items: str  # plural noun
    consumed: str  # past tense of what a user does with an item
    history: str  # name of the user's list of behaviors
    rating_unit: str  # noun after a rating, singular; "" if ratings are not quoted
    passed_over: str = "was shown but left alone"  # past tense, for an item that was shown and not taken
    rating_best: float = 5  # the highest rating; quoted with each rating if it is not 5
    user_factors: tuple[str, ...]
    item_factors: tuple[str, ...]
    positive_above: float  # for rated data: the label is 1 if the rating exceeds this
    text_fields: tuple[str, ...]  # item columns quoted in prompts after the title, if present
    profile_fields: tuple[str, ...] = ("gender", "age", "occupation")


_OF_BOOKS = (
    "genre",
    "author",
    "writing style",
    "theme",
    "setting",
    "length and complexity",
    "time period",
    "literary quality",
    "critical acclaim",
)
_OF_ADS = (
    "target audience",
    "product features",
    "competitive advantages",
    "brand positioning and image",
)
SCENARIOS: dict[str, Scenario] = {
    s.name: s
    for s in (
        Scenario(
            name="movies",
            item="movie",
            items="movies",
            consumed="watched",
            passed_over="was shown but did not watch",
            history="viewing history",
            rating_unit="star",
            user_factors=(
                "genre",
                "director and actors",
                "time period and country",
                "character",
                "plot and theme",
                "mood and tone",
                "critical acclaim and awards",
                "production quality",
                "soundtrack",
            ),
            item_factors=(
                "genre",
                "director and cast",
                "country",
                "character",
                "plot and theme",
                "mood and tone",
                "critical acclaim and awards",
                "production quality",
                "soundtrack",
            ),
            positive_above=3,
            text_fields=("genres", "year"),
        ),
        Scenario(
            name="books",
            item="book",
            items="books",
            consumed="read",
            passed_over="was shown but did not read",
            history="reading history",
            rating_unit="star",
            user_factors=_OF_BOOKS,
            item_factors=_OF_BOOKS,
            positive_above=4,
            text_fields=("brand", "author", "category", "categories"),
        ),
        Scenario(
            name="music",
            item="song",
            items="songs",
            consumed="played",
            passed_over="was offered but did not play",
            history="listening history",
            rating_unit="star",
            user_factors=("style", "mood", "rhythm", "listening preference"),
            item_factors=("style", "mood", "rhythm", "the listeners it appeals to"),
            positive_above=3,
            text_fields=("artist", "album", "genre", "language"),
        ),
        Scenario(
            name="apps",
            item="app",
            items="apps",
            consumed="installed",
            passed_over="was shown but did not install",
            history="installation history",
            rating_unit="star",
            user_factors=("open-domain tags", "usage patterns", "preferences"),
            item_factors=("open-domain tags", "usage patterns", "the preferences it serves"),
            positive_above=3,
            text_fields=("category", "developer", "description"),
        ),
        Scenario(
            name="ads",
            item="ad",
            items="ads",
            consumed="clicked",
            passed_over="was shown but did not click",
            history="click history",
            rating_unit="",
            user_factors=_OF_ADS,
            item_factors=_OF_ADS,
            positive_above=0,
            text_fields=("brand", "category", "description"),
        ),
        Scenario(
            name="news",
            item="news article",
            items="news articles",
            consumed="read",
            passed_over="was shown but did not open",
            history="reading history",
            rating_unit="",
            user_factors=("topic", "region", "people and organisations", "depth", "tone", "timeliness"),
            item_factors=("topic", "region", "people and organisations", "depth", "tone", "timeliness"),
            positive_above=0,
            text_fields=("category", "subcategory", "abstract"),
        ),
    )
}


def get_scenario(name: str) -> Scenario:
    """The scenario called `name`. Raises RecipeError with the nearest valid name if there is none."""
    if name not in SCENARIOS:
        raise RecipeError(f"there is no scenario '{name}'.{did_you_mean(name, SCENARIOS)}")
    return SCENARIOS[name]
