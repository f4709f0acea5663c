"""ONCE's prompts for a closed-source LLM (WSDM 2024, the part called GENRE): a content summariser for items, a user
profiler.

From the paper: an item's title is rewritten into a clearer and fuller text, objective and neutral; a user is told by
the topics of interest, strongest first, and by further traits (the paper's is the region), read off the titles
alone, hence no profile fields and no factors. Ours: the wording, traits beyond the region, and sentences where the
paper wants a fixed list, which a small model seldom keeps to. The paper's third use, inventing content for users
with short histories, is left out: it makes rows, not knowledge about rows.
"""

from owlrec.prompting.framework import Framework

ONCE = Framework(
    user_system=(
        "You profile users by the {items} in their {history}. You name the topics that interest the user, the "
        "strongest first, and then the traits that this choice suggests, such as background, taste or region. "
        "You leave out what cannot be told, and write a few short sentences."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "Name the topics that interest this user, then the user's traits."
    ),
    item_system=(
        "You describe {items} to readers who know nothing but a title and a few notes. Your descriptions are clearer "
        "and fuller than the title, complete, objective and neutral, in a few short sentences."
    ),
    item_template="Describe what the {item} {description} is about.",
)
