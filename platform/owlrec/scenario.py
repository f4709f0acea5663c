"""A recommendation domain: its nouns, the factors for the LLM's reasoning, its label rule and the text fields of its
items.

The factors are KAR's "scenario-specific factors" (RecSys 2024, sec. 3.1): movies and books as published with the
paper, music, apps, ads and news as reported from its deployments. A prompt with a domain's own factors gets far
more relevant knowledge from an LLM than a bare "describe this user". The quality gate reads the nouns, too: an
answer about books in a movie scenario is flagged.
"""

import re

from owlrec.config import Config
from owlrec.errors import RecipeError, did_you_mean

USUAL_BEST = 5  # of ratings
_BEST = re.compile(r" of (\d+(?:\.\d+)?)$")
_PASSED_OVER = {  # by items: the verb in its plain form, which `consumed` does not tell
    "movies": "was shown but did not watch",
    "books": "was shown but did not read",
    "songs": "was offered but did not play",
    "apps": "was shown but did not install",
    "ads": "was shown but did not click",
    "news articles": "was shown but did not open",
}


class Scenario(Config):
    """One domain, built in or defined in a recipe. `user_factors` guide preference reasoning about users,
    `item_factors` factual knowledge about items.
    """

    nouns: tuple[str, str]  # of an item: singular and plural
    consumed: str  # past tense of what a user does with an item
    history: str  # name of the user's list of behaviors
    # The noun after a rating, singular ("star"), and the highest rating if it is not 5 ("point of 10", quoted
    # as 7 of 10 points); "" if ratings are not quoted.
    rating_unit: str
    user_factors: tuple[str, ...]
    item_factors: tuple[str, ...]
    positive_above: float  # for rated data: the label is 1 if the rating exceeds this
    text_fields: tuple[str, ...]  # item columns quoted in prompts after the title, if present
    profile_fields: tuple[str, ...] = ("gender", "age", "occupation")

    @property
    def item(self) -> str:
        """The singular noun."""
        return self.nouns[0]

    @property
    def items(self) -> str:
        """The plural noun."""
        return self.nouns[1]

    @property
    def unit(self) -> str:
        """The noun of `rating_unit`."""
        return _BEST.sub("", self.rating_unit)

    @property
    def best_rating(self) -> float:
        """The highest rating."""
        best = _BEST.search(self.rating_unit)
        return float(best[1]) if best else USUAL_BEST

    @property
    def passed_over(self) -> str:
        """What a user did with an item that was there and was not taken: past tense."""
        return _PASSED_OVER.get(self.items, "was shown but left alone")


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
_OF_NEWS = ("topic", "region", "people and organizations", "depth", "tone", "timeliness")
_OF_ADS = (
    "target audience",
    "product features",
    "competitive advantages",
    "brand positioning and image",
)
SCENARIOS: dict[str, Scenario] = {
    "movies": Scenario(
        nouns=("movie", "movies"),
        consumed="watched",
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
    "books": Scenario(
        nouns=("book", "books"),
        consumed="read",
        history="reading history",
        rating_unit="star",
        user_factors=_OF_BOOKS,
        item_factors=_OF_BOOKS,
        positive_above=4,
        text_fields=("brand", "author", "category", "categories"),
    ),
    "music": Scenario(
        nouns=("song", "songs"),
        consumed="played",
        history="listening history",
        rating_unit="star",
        user_factors=("style", "mood", "rhythm", "listening preference"),
        item_factors=("style", "mood", "rhythm", "the listeners it appeals to"),
        positive_above=3,
        text_fields=("artist", "album", "genre", "language"),
    ),
    "apps": Scenario(
        nouns=("app", "apps"),
        consumed="installed",
        history="installation history",
        rating_unit="star",
        user_factors=("open-domain tags", "usage patterns", "preferences"),
        item_factors=("open-domain tags", "usage patterns", "the preferences it serves"),
        positive_above=3,
        text_fields=("category", "developer", "description"),
    ),
    "ads": Scenario(
        nouns=("ad", "ads"),
        consumed="clicked",
        history="click history",
        rating_unit="",
        user_factors=_OF_ADS,
        item_factors=_OF_ADS,
        positive_above=0,
        text_fields=("brand", "category", "description"),
    ),
    "news": Scenario(
        nouns=("news article", "news articles"),
        consumed="read",
        history="reading history",
        rating_unit="",
        user_factors=_OF_NEWS,
        item_factors=_OF_NEWS,
        positive_above=0,
        text_fields=("category", "subcategory", "abstract"),
    ),
}


def get_scenario(name: str) -> Scenario:
    """The scenario called `name`. Raises RecipeError with the nearest valid name if there is none."""
    if name not in SCENARIOS:
        raise RecipeError(f"there is no scenario '{name}'.{did_you_mean(name, SCENARIOS)}")
    return SCENARIOS[name]
