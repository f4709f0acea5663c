"""LIBER's cascading prompts (arXiv 2411.14713): what the LLM wrote of a user before, and what the user did since.

From the paper: a long history is read one partition at a time, each beside the text of those before it, so that a
prompt stays short however long the history is. Ours: the wording and the budgets. A partition is as long as the history
of any other prompt; the earlier text is quoted as far as the engine's context allows, which is nearly always whole. It
stands in quotes, because the quality gate counts nothing quoted as an echo, and it opens the facts too, so that a
fallback forgets nothing. No profile is quoted: the earlier text speaks of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from owlrec.generation import EngineConfig, token_counter
from owlrec.prompting.framework import quoted_behaviour, scenario_words
from owlrec.prompting.rows import EARLIER
from owlrec.prompting.text import first_tokens, in_budget
from owlrec.scenario import Scenario
from owlrec.storage import fingerprint

_SYSTEM = "You keep a brief summary of a user's preferences on {items}, with reasons."
_NEXT = (
    'Summary so far: "{earlier}"\n'
    "Since then the user {consumed}, oldest first: {behaviors}.\n"
    "Write the summary anew: what still holds, what is new, and why."
)
_FIRST = (
    "The user {consumed} these {items}, oldest first: {behaviors}.\n"
    "Summarise the user's preferences on {items}, considering {factors}."
)
_CHAT_TOKENS = 64  # what a chat template adds, and more

Behaviors = Sequence[tuple[str, float | None]]  # (title, rating), oldest first, all with a title


@dataclass(frozen=True)
class RefreshPrompts:
    """How a refresh asks: the wording, and what of it fits the model."""

    scenario: Scenario
    engine: EngineConfig
    history_tokens: int  # of the behaviors that a prompt quotes: prompts.history_tokens
    answer_tokens: int  # sampling.max_tokens

    def __reduce__(self) -> tuple[type["RefreshPrompts"], tuple[Scenario, EngineConfig, int, int]]:
        return RefreshPrompts, (self.scenario, self.engine, self.history_tokens, self.answer_tokens)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that shapes a prompt besides its user."""
        budgets = (self.history_tokens, self.answer_tokens, self.engine.max_model_len)
        return fingerprint(*budgets, self.scenario, _SYSTEM, _NEXT, _FIRST)

    @cached_property
    def count_tokens(self) -> Callable[[str], int]:
        """As the engine would. Remembers, since most titles stand in many histories."""
        return lru_cache(maxsize=1 << 16)(token_counter(self.engine))

    @cached_property
    def system(self) -> str:
        """The system turn that all prompts of a scenario share."""
        return _SYSTEM.format(items=self.scenario.items)

    def ends(self, behaviors: Behaviors) -> list[int]:
        """Where to part behaviors so that each partition fits a prompt; a longer one is a partition of its own."""
        return in_budget(self._quoted(behaviors), self.history_tokens, self.count_tokens)

    def after_text(self, earlier: str, behaviors: Behaviors) -> tuple[str, str]:
        """The prompt about one partition, and the same facts as sentences of their own.

        earlier: what the LLM wrote of the user before, "" for nothing.
        """
        text, facts, room = self.after_answer(behaviors)
        if earlier := first_tokens(earlier, room, self.count_tokens):
            return text.replace(EARLIER, earlier), facts.replace(EARLIER, earlier)
        behaved = "; ".join(self._quoted(behaviors))
        words = scenario_words(self.scenario, self.scenario.user_factors)
        return _FIRST.format(**words, behaviors=behaved), f"The user {self._facts(behaved)}"

    def after_answer(self, behaviors: Behaviors) -> tuple[str, str, int]:
        """The same with EARLIER in the place of the earlier text, and how many tokens may take it."""
        behaved = "; ".join(self._quoted(behaviors))
        words = scenario_words(self.scenario, self.scenario.user_factors)
        text = _NEXT.format(**words, earlier=EARLIER, behaviors=behaved)
        taken = self.count_tokens(self.system) + self.count_tokens(text) + self.answer_tokens + _CHAT_TOKENS
        facts = f"{EARLIER} Since then the user {self._facts(behaved)}"
        return text, facts, max(1, self.engine.max_model_len - taken)  # too little is the engine's error to tell

    def _quoted(self, behaviors: Behaviors) -> list[str]:
        return [quoted_behaviour(self.scenario, title, rating) for title, rating in behaviors]

    def _facts(self, behaved: str) -> str:
        return f"{self.scenario.consumed} these {self.scenario.items}: {behaved}."
