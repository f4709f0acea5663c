"""The quality gate: which generated texts are rubbish, told by rules alone, and what is to be done with them.

The faults are those of public LLM knowledge for recommenders (REKI's released texts hold movie prompts that were sent
for books, so answers complain that the titles are books, and empty prompts, so answers ask for the titles) and those
of small models: loops, copied prompts, leaked chat tokens. `quality_form` tells the faults that a text's form betrays,
`quality_wording` those of what it says.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from pydantic import Field, field_validator

from owlrec.config import Config
from owlrec.generation.quality_form import copied_share, is_broken, is_cut_off, may_copy, repeats, script_share
from owlrec.generation.quality_wording import WordingRules
from owlrec.generation.words import utf8, words_of
from owlrec.prompting.text import TEMPLATE_TOKEN
from owlrec.scenario import Scenario

# fmt: off
Flag = Literal[
    "empty", "too_short", "cut_off", "repetition", "refusal", "asks_for_input", "wrong_domain", "prompt_echo",
    "template_tokens", "language",
]
# fmt: on
FLAGS: tuple[Flag, ...] = get_args(Flag)
# keep: the text with its flag; retry: ask again with the retry decoding settings; fall_back: use a fallback text;
# drop: send the row to the dead letters. In order of severity.
Policy = Literal["keep", "retry", "fall_back", "drop"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

# Other decoding settings free a model from a loop or a refusal. They do not give it more tokens (cut_off), a better
# prompt (wrong_domain) or more to say (too_short), and such a text still holds some knowledge; what an echo or a
# foreign language is worth depends on the encoder, so it is flagged for a look at the prompts and the model.
_RETRIED: tuple[Flag, ...] = ("empty", "repetition", "refusal", "asks_for_input", "template_tokens")
DEFAULT_POLICY: dict[Flag, Policy] = {flag: "retry" if flag in _RETRIED else "keep" for flag in FLAGS}


class QualityConfig(Config):
    """When a text is flagged, and what is done about it. Shares are of the text's words unless said otherwise."""

    enabled: bool = True
    # About ten English words, less than any reason takes; bytes, since a Chinese character (3) says what 3 letters do.
    min_bytes: int = Field(60, ge=0)
    # A run of words said this often is a loop; twice is what a summary at the end does.
    min_repeats: int = Field(3, ge=2)
    max_repeated_share: float = Field(1 / 3, gt=0, le=1)
    # Of a list's lines, those that an earlier line has said: small models return to two or three titles.
    max_duplicate_lines_share: float = Field(1 / 3, gt=0, le=1)
    # A restated question is short beside its answer; above this the answer has hardly begun.
    max_copied_share: float = Field(0.4, gt=0, le=1)
    # Of another domain's nouns, and to each of the scenario's own: a film's text names the book that it is based on
    # once or twice, and says "film" besides.
    min_foreign_mentions: int = Field(3, ge=1)
    min_foreign_ratio: float = Field(4.0, gt=0)
    min_script_share: float = Field(0.5, gt=0, le=1)  # of the letters, those in the script of the prompt
    policy: dict[Flag, Policy] = Field(default_factory=lambda: dict(DEFAULT_POLICY))  # what is set adds to the defaults
    max_retries: int = Field(2, ge=0)  # each costs a whole answer
    retry_temperature: float = Field(0.7, ge=0)  # greedy decoding would write the same text again
    retry_repetition_penalty: float = Field(1.1, gt=0)  # mild: names and titles have to return

    @field_validator("policy")
    @classmethod
    def _with_defaults(cls, policy: dict[Flag, Policy]) -> dict[Flag, Policy]:
        return {**DEFAULT_POLICY, **policy}


class QualityGate:
    """The rules of one scenario, compiled once; shared by all rows of a job."""

    def __init__(self, config: QualityConfig, scenario: Scenario) -> None:
        self.config = config
        self._wording = WordingRules(scenario, config.min_foreign_mentions, config.min_foreign_ratio)

    def flags(self, text: str, *, prompt: str, finish_reason: str) -> tuple[Flag, ...]:
        """The faults of `text`, in the order of FLAGS; () for a good text, and always where the gate is disabled.

        prompt: what the model was asked; put the system turn before it where its echo counts too.
        finish_reason: "stop" or "length" (see Completion).
        """
        config = self.config
        if not config.enabled:
            return ()
        text = text.strip()
        if not text:
            return ("empty",)
        words = words_of(text)
        found: dict[str, object] = {
            "too_short": len(text) < config.min_bytes and len(utf8(text)) < config.min_bytes,
            "cut_off": finish_reason == "length" and is_cut_off(text),
            "repetition": repeats(
                text,
                words,
                config.min_repeats,
                config.max_repeated_share,
                config.max_duplicate_lines_share,
            ),
            **self._wording.flags(text, words),
            "prompt_echo": may_copy(text, prompt) and copied_share(text, prompt) >= config.max_copied_share,
            "template_tokens": ("<" in text or "[" in text) and TEMPLATE_TOKEN.search(text),
            "language": not text.isascii()
            and (is_broken(text, prompt) or script_share(text, prompt) < config.min_script_share),
        }
        return tuple(flag for flag in FLAGS if found.get(flag))

    def action(self, flags: Iterable[Flag]) -> Policy:
        """The most severe policy among those of `flags`; "keep" where there are none."""
        return max((self.config.policy[f] for f in flags), key=POLICIES.index, default="keep")
