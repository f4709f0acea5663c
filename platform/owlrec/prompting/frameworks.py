"""The prompt frameworks: KAR, RLMRec, TRAWL and ONCE. The structure follows each paper, the wording is ours."""

from owlrec.prompting.framework import Framework

# ------------------------------------------------------------------------------------------------------------------ kar
# KAR's factorisation prompts (RecSys 2024, sec. 3.1): preference reasoning about a user, facts about an item.
#
# A bare "describe this user" makes an LLM ramble; naming the domain's factors splits the question into parts it can
# answer. The structure and the factors follow the paper, the wording is ours.


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


# --------------------------------------------------------------------------------------------------------------- rlmrec
# RLMRec's profile prompts (WWW 2024): what kinds of users an item appeals to, what kinds of items appeal to a user,
# each with its reason.
#
# From the paper: both profiles look across to the other side, which is what lets them be aligned with collaborative
# signals; a summary comes first and a brief reasoning after it; no profile fields, since a user is the sum of what
# they interacted with. Ours: the wording, prose for the paper's JSON, and ratings where the paper quotes reviews. The
# paper also quotes the interacted items' finished profiles in a user's prompt; we ask about users and items at once,
# so there titles speak for themselves.


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


# ---------------------------------------------------------------------------------------------------------------- trawl
# TRAWL's prompts (arXiv 2403.06642, CIKM 2025): from all that is known outside the data, the LLM keeps what helps a
# recommendation.
#
# From the paper, as far as its abstract and reviews of it tell: raw external knowledge is noisy, so the LLM extracts
# what bears on recommending, guided by the domain's key factors, and adds by common sense what the text only implies;
# one such text an item, one a user. Ours: the wording, and the sources. The paper feeds in external documents; here
# they are the item's own text columns and the world knowledge of the LLM, which is also the light in which a user's
# behaviours are read.


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


# ----------------------------------------------------------------------------------------------------------------- once
# ONCE's prompts for a closed-source LLM (WSDM 2024, the part called GENRE): a content summariser for items, a user
# profiler.
#
# From the paper: an item's title is rewritten into a clearer and fuller text, objective and neutral; a user is told by
# the topics of interest, strongest first, and by further traits (the paper's is the region), read off the titles
# alone, hence no profile fields and no factors. Ours: the wording, traits beyond the region, and sentences where the
# paper wants a fixed list, which a small model seldom keeps to. The paper's third use, inventing content for users
# with short histories, is left out: it makes rows, not knowledge about rows.


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
