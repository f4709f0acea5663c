"""What a text says about its task instead of doing it: refusals, requests for data, talk of another domain's things.

Knowledge is written in the third person: a hero who cannot go on, or an app that asks users to share, speaks in quotes
or is reported. So the rules look for the first person and the asker, in the text without what it quotes; and they first
look at the set of its words, so that their expressions hardly ever run on a good text.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from owlrec.generation.words import QUOTED, utf8, words_of
from owlrec.scenario import SCENARIOS, Scenario


class WordingRules:
    """The rules of one scenario, compiled once."""

    def __init__(self, scenario: Scenario, min_foreign_mentions: int, min_foreign_ratio: float) -> None:
        """See QualityConfig."""
        self._asks, self._questions = _asks_for_input(scenario)
        self._domain = _DomainRule(scenario, min_foreign_mentions, min_foreign_ratio)

    def flags(self, text: str, words: Sequence[bytes]) -> dict[str, object]:
        """Flag -> whether it is true of a text whose words these are; flags that are absent are not."""
        vocabulary = set(words)
        refuses, asks = vocabulary & _REFUSAL_WORDS, vocabulary & _INPUT_WORDS
        foreign = self._domain.suspects(words, vocabulary)
        if not (refuses or asks or foreign or "?" in text):
            return {}
        said = QUOTED.sub('""', text).replace("’", "'").lower()
        sentences = _SENTENCE.findall(said)
        return {
            "refusal": any(map(_REFUSAL.search, _holding(sentences, refuses))),
            "asks_for_input": any(map(self._asks.search, _holding(sentences, asks)))
            or ("?" in said and self._questions.search(said)),
            "wrong_domain": foreign and self._domain.is_foreign(said, sentences, words, foreign),
        }


_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")


def _set_of(words: str) -> frozenset[bytes]:
    return frozenset(w.encode() for w in words.split())


def _any(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(re.escape(w) for w in sorted(words, key=len, reverse=True))})"


def _holding(sentences: Sequence[str], words: Iterable[bytes]) -> list[str]:
    """The sentences with one of `words`: the rules' expressions are slow, and most sentences hold none."""
    wanted = [w.decode("utf-8", "surrogatepass") for w in words]
    return [s.strip() for s in sentences if any(w in s for w in wanted)] if wanted else []


_REFUSAL_WORDS = _set_of("i i'm i've me my unable sorry apologies request task question")
# Whoever writes knowledge has no reason to say what "I" do not, cannot or will not do, whatever the verb; only that it
# sees no titles is a question for them.
_REFUSAL = re.compile(
    r"^(?:(?:i'm|i am) )?(?:(?:so|very|really) )?(?:sorry|apologies)\b"
    r"|\bi(?:'m| am| was|'d| would| must| have to| need to| do| will| could| have)?(?: (?:\w+ly|afraid i|also|just))?"
    r" (?:cannot|can ?not|can't|couldn't|won't|don't|not|never|unable|decline|refuse|lack|regret|apologi[sz]e|have no)"
    r"\b(?! (?:see|find|know wh)\w*)|^unable to \w+ (?:the|this|a|any|your)\b"
    r"|\b(?:request|task|question)\b.{0,20}? (?:cannot|can't|could not) be\b"
    r"|\bas an? (?:\w+ ){0,2}(?:ai|language model|assistant)\b.{0,60}\bi\b"
    r"|\bi(?: am|'m) (?:(?:just|only|merely) )?an? (?:ai|artificial|(?:\w+ )?language model)\b"
    r"|(?:not|n't|im)(?: be)? ?(?:possible|appropriate|ethical) for me to\b"
    r"|\b(?:against|beyond|within|outside|violates?) my (?:\w+ )?(?:guidelines|capabilities|programming|training)\b"
    r"|\bmy (?:training|knowledge cutoff|guidelines)\b"
)

_INPUT_WORDS = _set_of("please kindly free you you've you'll i i'd i'll me provided supplied list listed")
_GIVE = (
    r"(?:provid|shar|giv|(?:re)?send|sent|tell|told|list|specif|suppl|past|enter|upload|clarif|confirm|includ|add|nam|attach|"
    r"describ|mention|let me know)\w*"
)


def _asks_for_input(scenario: Scenario) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What asks the asker for data: in a sentence with one of _INPUT_WORDS, and as a question."""
    thing = rf"(?:{_any(_nouns(scenario))}|titles?|items?|names?|lists?|history|details?|information|data|context)"
    requests = (
        rf"(?:^|[:;,]\s*|\b(?:and|so|then|but) )(?:just )?(?:please|kindly) {_GIVE}|\bjust (?:send|give|tell|paste)\b",
        rf"\b(?:could|can|would|will|may) (?:you|i)(?: please| kindly)? (?:{_GIVE}|have|get)\b",
        rf"\byou (?:have not|haven't|did not|didn't|forgot to) {_GIVE}|\bfeel free to {_GIVE}",
        rf"^(?=.*\b(?:i|me)\b).*\b(?:once|if|when|after|as soon as) you(?:'ll| can| could| would)?(?: please)? {_GIVE}",
        r"\b(?:would|did|do) you (?:mind|mean|have)\b|\blet me know\b|^(?:send|give|tell|show) me\b",
        rf"\bi(?:'d| would| will|'ll)?(?: also| still| first)? (?:need|require) (?:[\w']+ ){{0,4}}?(?:know|{thing})\b",
        rf"(?:^|\b(?:but|that|as|since|because) )no (?:\w+ ){{0,3}}?{thing} (?:were|was|ha(?:ve|s) been|are) {_GIVE}",
        rf"\bthere (?:are|were|is|was) no {thing} (?:[\w']+ ){{0,4}}?(?:prompt|message|question|{_GIVE})",
        rf"\b{thing} (?:does not|doesn't|do not|don't) (?:contain|include|name|mention|list) any {thing}\b",
        rf"\b{thing} (?:\w+ ){{0,5}}?(?:is|are|was|seems|appears)(?: to be)? (?:empty|missing|blank)\b",
    )
    question = rf"(?:^|[.!?\n]\s*)(?:which|what) (?:are |were )?(?:the )?{thing}\b[^.?!\n]{{0,60}}\?"
    return re.compile("|".join(requests)), re.compile(question)


# --- wrong_domain
_NOUNS: dict[str, str] = {  # beside the scenario's own words for its items
    "movies": "movie movies film films viewer viewers",
    "books": "book books novel novels reader readers author authors",
    "music": "song songs album albums listener listeners",
    "apps": "app apps",
    "ads": "ad ads advert adverts advertisement advertisements",
    "news": "article articles headline headlines",
}
# Ads, apps and news are about anything, films and books included, so there only a plain statement counts.
_WORKS = ("movies", "books", "music")
_STATEMENT_WORDS = _set_of(
    "not rather instead isn't aren't titles fact actually all items entries works things these those"
)


def _nouns(scenario: Scenario) -> set[str]:
    return {*_NOUNS.get(scenario.name, "").split(), scenario.item.lower(), scenario.items.lower()}


def _word_forms(nouns: Iterable[str]) -> frozenset[bytes]:
    """Single words, possessives too; "article" for "news article"."""
    return frozenset(utf8(n.split()[-1] + s) for n in nouns if n.strip() for s in ("", "'s"))


class _DomainRule:
    def __init__(self, scenario: Scenario, min_mentions: int, min_ratio: float) -> None:
        self._min_mentions, self._min_ratio = min_mentions, min_ratio
        own = _nouns(scenario)
        others = {name: _nouns(other) for name, other in SCENARIOS.items() if own.isdisjoint(_nouns(other))}
        foreign, mine = _any(set().union(*others.values())), _any(own)
        within, no = r".{0,40}?", r"(?:not|rather than|instead of|aren't|isn't)(?: really| actually)?(?: an?| the)?"
        self._statement = re.compile(
            rf"\b(?:are|is|be|were|was)\b{within}\b{foreign}\b{within}\b{no} {mine}\b"
            rf"|\b{mine} are (?:all|actually|really|in fact) {foreign}(?<=s)\b"
            rf"|\b{no} {mine} (?:but|they are|it is){within}\b{foreign}\b"
            rf"|\b(?:titles|items|entries|works|things|all of (?:them|these|those)|these|those)\b{within}"
            rf"\b(?:are|be)(?: all| actually| mostly| only)* {foreign}\b"
        )
        self._own = _word_forms(own)
        self._words = _word_forms(set().union(*others.values()))
        counted = (*_WORKS, "apps") if scenario.name in _WORKS else ()
        self._counted = [_word_forms(nouns) for name, nouns in others.items() if name in counted]

    def suspects(self, words: Sequence[bytes], vocabulary: set[bytes]) -> set[bytes]:
        """The other domains' nouns in a text that may be about them, quotations included; mostly none."""
        found = vocabulary & self._words
        if found and (self._often(words, found) or not _STATEMENT_WORDS.isdisjoint(vocabulary)):
            return found
        return set()

    def is_foreign(self, said: str, sentences: Sequence[str], words: Sequence[bytes], suspects: set[bytes]) -> bool:
        """Whether a text (`said`: in lower case, without quotations) treats the things as another domain's."""
        if any(map(self._statement.search, _holding(_holding(sentences, suspects), _STATEMENT_WORDS))):
            return True
        if not self._often(words, suspects):
            return False
        counts = Counter(words_of(said))
        most = max(sum(counts[w] for w in nouns) for nouns in self._counted)
        own = sum(counts[w] for w in self._own)
        return most >= max(self._min_mentions, self._min_ratio * own)

    def _often(self, words: Sequence[bytes], suspects: set[bytes]) -> bool:
        return bool(self._counted) and sum(map(words.count, suspects)) >= self._min_mentions
