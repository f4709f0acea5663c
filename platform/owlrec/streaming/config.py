"""The recipe's section `streaming`: the Configs of the refresh's components, in one."""

from owlrec.prompting.streaming import StreamingPromptConfig
from owlrec.streaming.drift import SelectionConfig
from owlrec.streaming.events import EventsConfig
from owlrec.streaming.partitions import FreezeConfig
from owlrec.streaming.tidying import TidyConfig


class StreamingConfig(EventsConfig, FreezeConfig, SelectionConfig, StreamingPromptConfig, TidyConfig):
    """Where new interactions come from, when a user's text is renewed and how, and how long chains may grow."""
