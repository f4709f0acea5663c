"""The prompt frameworks: KAR, RLMRec, TRAWL and ONCE. The structure follows each paper, the wording is ours."""

from owlrec.prompting.framework import Framework

# ------------------------------------------------------------------------------------------------------------------ kar
# KAR's factorization prompts (RecSys 2024, sec. 3.1): preference reasoning about a user, facts about an item.
#
# A bare "describe this user" makes an LLM ramble; naming the domain's factors splits the question into parts it can
# answer. The structure and the factors follow the paper, the wording is ours.


KAR = Framework(
    user_system=(
        "You explain what kinds of {items} a user likes and dislikes, and why. You consider {factors}. "
        "You give a reason from the {history} for each point, in a few clear and brief sentences."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "Analyze the user's preferences on {items} and explain them."
    ),
    item_system=(
        "You introduce {items} and describe their {factors}. You state facts, in a few clear and brief sentences."
    ),
    item_template="Introduce the {item} {description} and describe its attributes.",
)


# --------------------------------------------------------------------------------------------------------------- rlmrec
# RLMRec's profile prompts (WWW 2024): the kinds of users an item appeals to, and the kinds of items a user likes,
# each with a reason.
#
# From the paper: both profiles refer to the other side, so they can be aligned with collaborative
# signals; a summary comes first and a brief reasoning after it; no profile fields, since a user is defined by
# their interactions. Ours: the wording, prose instead of the paper's JSON, and ratings where the paper quotes reviews.
# The paper also quotes the interacted items' finished profiles in a user's prompt; we write users and items at the same
# time, so prompts quote only titles.


RLMREC = Framework(
    user_system=(
        "You tell what kinds of {items} appeal to a user, judging by those that the user {consumed}. First you sum "
        "up the kinds in one or two sentences, then you explain briefly how the {history} shows it."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "What kinds of {items} would appeal to this user, and why?"
    ),
    item_system=(
        "You tell what kinds of users a given {item} appeals to. First you sum up in one or two sentences who they "
        "are and what they look for in {items}, then you explain briefly which features of the {item} show it."
    ),
    item_template="What kinds of users would the {item} {description} appeal to, and why?",
)


# ---------------------------------------------------------------------------------------------------------------- trawl
# TRAWL's prompts (arXiv 2403.06642, CIKM 2025): from all external knowledge, the LLM keeps the parts that help a
# recommendation.
#
# From the paper, judging by its abstract and reviews of it: raw external knowledge is noisy, so the LLM extracts
# the parts relevant to recommending, guided by the domain's key factors, and adds implications by common sense;
# one such text per item and one per user. Ours: the wording, and the sources. The paper uses external documents; here
# they are the item's own text columns and the world knowledge of the LLM, which also informs how a user's
# behaviors are read.


TRAWL = Framework(
    user_system=(
        "You use what you know of {items} to find out a user's preferences: {factors}. You keep only what bears on "
        "the user's next choice, add what common sense implies, and leave out the rest. "
        "You answer with a short summary."
    ),
    user_template=(
        "{profile}The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "From what you know of these {items}, summarize what the user prefers."
    ),
    item_system=(
        "You know much about {items}, and keep only what helps to decide whom to recommend the {item} to: {factors}. "
        "You add what common sense implies and leave out the rest. You answer with a short summary."
    ),
    item_template="Recall what you know of the {item} {description} and summarize what matters for recommending it.",
)


# ----------------------------------------------------------------------------------------------------------------- once
# ONCE's prompts for a closed-source LLM (WSDM 2024, the part called GENRE): a content summarizer for items, a user
# profiler.
#
# From the paper: an item's title is rewritten into a clearer and fuller text, objective and neutral; a user is
# described by topics of interest, strongest first, and by other traits (the paper's is the region), derived from the
# titles alone, so without profile fields and factors. Ours: the wording, traits beyond the region, and sentences
# instead of the paper's fixed list, which a small model seldom keeps to. The paper's third use, inventing content for
# users with short histories, is left out: it makes rows, not knowledge about rows.


ONCE = Framework(
    user_system=(
        "You profile users by the {items} in their {history}. You name the topics that interest the user, the "
        "strongest first, and then the traits that this choice suggests, such as background, taste or region. "
        "You leave out what cannot be told, and write a few short sentences."
    ),
    user_template=(
        "The user {consumed} these {items}, oldest first: {behaviors}.{passed}\n"
        "Name the topics that interest this user, then the user's traits."
    ),
    item_system=(
        "You describe {items} to readers who know nothing but a title and a few notes. Your descriptions are clearer "
        "and fuller than the title, complete, objective and neutral, in a few short sentences."
    ),
    item_template="Describe what the {item} {description} is about.",
)
