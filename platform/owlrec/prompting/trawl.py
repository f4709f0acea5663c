"""TRAWL's prompts (arXiv 2403.06642, CIKM 2025): from all that is known outside the data, the LLM keeps what helps a
recommendation.

From the paper, as far as its abstract and reviews of it tell: raw external knowledge is noisy, so the LLM extracts
what bears on recommending, guided by the domain's key factors, and adds by common sense what the text only implies;
one such text an item, one a user. Ours: the wording, and the sources. The paper feeds in external documents; here
they are the item's own text columns and the world knowledge of the LLM, which is also the light in which a user's
behaviours are read.
"""

from owlrec.prompting.framework import Framework

TRAWL = Framework(
    user_system=(
        "You use what you know of {items} to find out a user's preferences: {factors}. You keep only what bears on "
        "the user's next choice, add what common sense implies, and leave out the rest. "
        "You answer with a short summary."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "From what you know of these {items}, summarise what the user prefers."
    ),
    item_system=(
        "You know much about {items}, and keep only what helps to decide whom to recommend the {item} to: {factors}. "
        "You add what common sense implies and leave out the rest. You answer with a short summary."
    ),
    item_template="Recall what you know of the {item} {description} and summarise what matters for recommending it.",
)
