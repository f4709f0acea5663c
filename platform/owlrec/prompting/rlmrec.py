"""RLMRec's profile prompts (WWW 2024): what kinds of users an item appeals to, what kinds of items appeal to a user,
each with its reason.

From the paper: both profiles look across to the other side, which is what lets them be aligned with collaborative
signals; a summary comes first and a brief reasoning after it; no profile fields, since a user is the sum of what they
interacted with. Ours: the wording, prose for the paper's JSON, and ratings where the paper quotes reviews. The paper
also quotes the interacted items' finished profiles in a user's prompt; we ask about users and items at once, so there
titles speak for themselves.
"""

from owlrec.prompting.framework import Framework

RLMREC = Framework(
    user_system=(
        "You tell what kinds of {items} appeal to a user, judging by those that the user {consumed}. First you sum "
        "up the kinds in one or two sentences, then you explain briefly how the {history} shows it."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "What kinds of {items} would appeal to this user, and why?"
    ),
    item_system=(
        "You tell what kinds of users a given {item} appeals to. First you sum up in one or two sentences who they "
        "are and what they look for in {items}, then you explain briefly which features of the {item} show it."
    ),
    item_template="What kinds of users would the {item} {description} appeal to, and why?",
)
