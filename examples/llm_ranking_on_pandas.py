"""LLM ranking on a pandas frame: retrieves behaviors for the candidates and gets P(Yes) from one prompt per candidate.

    python examples/llm_ranking_on_pandas.py
    python examples/llm_ranking_on_pandas.py --model Qwen/Qwen3-4B-Instruct-2507

A model as small as the default one ranks badly; `owlrec ranker tune` tunes it (README, "An LLM that ranks").
"""

import argparse
import asyncio

import pandas as pd

from owlrec.encoding.vectors import Encoder, EncoderConfig
from owlrec.generation import VllmEngineConfig, token_counter
from owlrec.generation.engines import PACKAGED
from owlrec.prompting.frameworks import RankPromptConfig, rank_prompt
from owlrec.ranking.behavior_retrieval import BehaviorRetriever
from owlrec.ranking.scorer import LlmScorer
from owlrec.scenario import get_scenario

FILMS = {
    "space and the future": ("Alien", "Blade Runner", "The Terminator", "Star Wars"),
    "love": ("Casablanca", "Gone with the Wind", "Roman Holiday"),
    "war": ("Das Boot", "Apocalypse Now", "Platoon", "Full Metal Jacket"),
}


def main() -> None:
    """Prints the behaviors shown, and the candidates by decreasing probability."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    engine = VllmEngineConfig(type="vllm", model=parser.parse_args().model, max_model_len=512, max_num_seqs=8)
    items = pd.DataFrame([(title, about) for about, titles in FILMS.items() for title in titles])
    items.columns, items.index.name = pd.Index(["title", "about"]), "item_id"
    history = pd.DataFrame({"item_id": [0, 1, 2, 4, 5, 6, 7, 8, 9], "rating": [5, 4, 5, 2, 1, 2, 4, 5, 4]})
    candidates = pd.DataFrame({"item_id": [3, 10]})  # Star Wars and Full Metal Jacket

    history, candidates = history.join(items, on="item_id"), candidates.join(items.title, on="item_id")
    vectors = Encoder(EncoderConfig()).encode((items.title + ", a film about " + items.about).tolist())
    retriever = BehaviorRetriever(items.index.to_numpy(), vectors)
    shown = history.iloc[retriever.retrieve(history.item_id.to_numpy(), candidates.item_id.to_numpy(), k=3)]
    print(f"shown: {', '.join(shown.title)}")

    movies, prompt, count = get_scenario("movies"), RankPromptConfig(), token_counter(engine)
    quoted = list(zip(shown.title, shown.rating.astype(float), strict=True))
    questions = [rank_prompt(movies, {"age": "35"}, t, prompt, count, retrieved=quoted) for t in candidates.title]
    scorer = LlmScorer(engine)
    candidates["p_yes"] = asyncio.run(scorer.score(questions)).probabilities
    scorer.close()
    print(candidates.sort_values("p_yes", ascending=False).to_string(index=False))


if __name__ == "__main__":
    main()
