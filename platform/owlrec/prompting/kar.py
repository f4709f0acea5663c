"""KAR's factorisation prompts (RecSys 2024, sec. 3.1): preference reasoning about a user, facts about an item.

A bare "describe this user" makes an LLM ramble; naming the domain's factors splits the question into parts it can
answer. The structure and the factors follow the paper, the wording is ours.
"""

from owlrec.prompting.framework import Framework

KAR = Framework(
    user_system=(
        "You explain what kinds of {items} a user likes and dislikes, and why. You consider {factors}. "
        "You give a reason from the {history} for each point, in a few clear and brief sentences."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviours}.{passed}\n"
        "Analyse the user's preferences on {items} and explain them."
    ),
    item_system=(
        "You introduce {items} and describe their {factors}. You state facts, in a few clear and brief sentences."
    ),
    item_template="Introduce the {item} {description} and describe its attributes.",
)
