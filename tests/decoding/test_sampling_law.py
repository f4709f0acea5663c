"""Sampled texts follow the model's distribution, whatever is drafted: chi-square tests against the exact one.

The model has 12 tokens and the texts three, so that transformers computes the probability of each of the 1,728 texts.
The pool drafts the likeliest token after half of the first tokens and the fourth likeliest after the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare  # type: ignore[import-untyped]
from tiny_engine import Decoder, tiny_model  # type: ignore[import-not-found]

from owlrec_decoding import DecodingConfig, DraftLimits

pytestmark = pytest.mark.vllm
TOKENS = 12
PROMPT = np.random.default_rng(1).integers(0, TOKENS, 34).tolist()
CACHED = PROMPT[:33]  # once its first block of 32 is cached, one token is missing: vLLM then pads with drafts of -1
GREEDY = 20  # requests without temperature among the others
LIKELY, UNLIKELY = 0, 3  # ranks of what is drafted


@dataclass(frozen=True)
class World:
    """An engine and the same model in transformers."""

    decoder: Decoder
    model: Any

    def laws(self, contexts: list[list[int]], params: dict[str, Any]) -> np.ndarray:
        """The exact distribution of the token after each context, float64 [contexts, TOKENS]."""
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor(contexts)).logits[:, -1].double().numpy()
        return np.array([sampling_law(row, **params) for row in logits])

    def text_law(self, prompt: list[int], params: dict[str, Any]) -> np.ndarray:
        """The exact distribution of texts of three tokens, float64 [TOKENS, TOKENS, TOKENS]."""
        first = self.laws([prompt], params)[0]
        second = self.laws([[*prompt, a] for a in range(TOKENS)], params)
        pairs = [[*prompt, a, b] for a in range(TOKENS) for b in range(TOKENS)]
        third = self.laws(pairs, params).reshape(TOKENS, TOKENS, TOKENS)
        return first[:, None, None] * second[:, :, None] * third


def sampling_law(logits: np.ndarray, temperature: float, top_k: int = TOKENS, top_p: float = 1.0) -> np.ndarray:
    """Probabilities at a temperature, of the k likeliest, and of the fewest of these that reach p together."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p)
    p[order[top_k:]] = 0.0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0.0
    return p / p.sum()


def p_value(texts: np.ndarray, law: np.ndarray) -> float:
    """Of the chi-square test; texts expected fewer than five times are counted together. texts: int [n, 3]."""
    expected = law.ravel() * len(texts)
    observed = np.bincount(np.ravel_multi_index(tuple(texts.T), law.shape), minlength=law.size)
    assert not observed[expected == 0].any()
    order = np.argsort(-expected)
    kept = int((expected >= 5).sum())
    if expected[order[kept:]].sum() < 5:
        kept -= 1
    cells = [np.append(counts[order[:kept]], counts[order[kept:]].sum()) for counts in (observed, expected)]
    assert len(cells[0]) > 30
    assert cells[1].min() >= 5
    return float(chisquare(*cells).pvalue)


def drafts_of_second_tokens(decoder: Decoder, ids: list[str]) -> np.ndarray:
    """int [n, 2]: the first token of each text and what was drafted after it."""
    first: dict[str, int] = {}
    for step in decoder.steps:
        for id_, drafts in step.drafts.items():
            if drafts[0] >= 0:
                first.setdefault(id_, drafts[0])
    return np.array([(decoder.done[id_].token_ids[0], first[id_]) for id_ in ids])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    import torch
    import transformers

    folder: Path = tmp_path_factory.mktemp("law")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    # Flatter than the other tests' model: many texts then have a chance of their own.
    path = tiny_model(folder / "model", "Llama", vocab_size=TOKENS, num_hidden_layers=1, initializer_range=0.3, **sizes)
    config = DecodingConfig(mode="strict")
    limits = DraftLimits(max_draft=3, live_tokens=0)
    decoder = Decoder(path, config, limits, max_model_len=64, max_num_seqs=128, max_num_batched_tokens=2048, seed=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    world = World(decoder, model)
    texts = []
    for first in range(TOKENS):
        rank = LIKELY if first % 2 == 0 else UNLIKELY
        second = int(np.argsort(-world.laws([[*PROMPT, first]], {"temperature": 1.0})[0])[rank])
        third = int(np.argmax(world.laws([[*PROMPT, first, second]], {"temperature": 1.0})[0]))
        texts.append([*PROMPT[-3:], first, second, third])
    decoder.open("texts", texts)
    yield world
    decoder.close()


@pytest.mark.parametrize(
    ("samples", "prompt", "mode", "params"),
    [
        (20_000, PROMPT, "strict", {"temperature": 1.0}),
        (6_000, PROMPT, "strict", {"temperature": 1.0, "top_k": 5}),
        (6_000, PROMPT, "strict", {"temperature": 1.5, "top_p": 0.8}),
        (6_000, PROMPT, "relaxed", {"temperature": 0.8, "top_k": 8}),
        (6_000, CACHED, "strict", {"temperature": 1.0}),
        (6_000, CACHED, "off", {"temperature": 1.0}),
    ],
    ids=["temperature", "top_k", "top_p", "relaxed", "padded", "padded_off"],
)
def test_texts_follow_the_law(world: World, samples: int, prompt: list[int], mode: str, params: dict[str, Any]) -> None:
    import torch

    decoder = world.decoder
    decoder.run([prompt], "off", max_tokens=1)
    decoder.steps.clear()
    torch.manual_seed(0)  # the generator that the engine draws from; requests of their own seed end vLLM on a CPU
    asked = {"max_tokens": 3, "ignore_eos": True, "extra": {"owlrec_k": TOKENS, "owlrec_min_prob": 0.0}}
    ids, greedy = [], []
    for _ in range(GREEDY):  # spread out: their steps are mixed, most others are not
        ids += decoder.ask([prompt] * (samples // GREEDY), mode, ["texts"], **asked, **params)
        greedy += decoder.ask([prompt], "strict", ["texts"], max_tokens=3, ignore_eos=True)
    while decoder.engine.has_unfinished_requests():
        decoder.step()
    texts = np.array([decoder.done[id_].token_ids for id_ in ids])
    assert p_value(texts, world.text_law(prompt, params)) > 0.001
    best = list(prompt)
    for _ in range(3):
        best.append(int(np.argmax(world.laws([best], {"temperature": 1.0})[0])))
    assert all(list(decoder.done[id_].token_ids) == best[-3:] for id_ in greedy)
    assert sum(len(s.padded) for s in decoder.steps) == (samples + GREEDY if prompt is CACHED else 0)
    if mode != "off":
        contexts, drafts = np.split(drafts_of_second_tokens(decoder, ids), 2, axis=1)
        law = world.laws([[*prompt, a] for a in range(TOKENS)], {"temperature": 1.0})
        chance = law[contexts, drafts]
        taken = texts[:, 1:2] == drafts
        for some in (chance > 0.3, chance < 0.15):
            assert some.sum() > 100
            assert 0 < taken[some].mean() < 1
