"""The retrieval decoder in a plain `vllm.LLM`: it drafts from your texts, vLLM verifies, and the answers stay the same.

    python examples/decoder_in_vllm.py
    python examples/decoder_in_vllm.py --model Qwen/Qwen3-4B-Instruct-2507 --texts earlier_answers.csv

The texts (a column `text`) are earlier answers from the same model or from people; without --texts the model writes
some, which then serve as drafts.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import owlrec
from owlrec.generation.engines import PACKAGED, resolve_model
from owlrec.generation.vllm_engine import VllmEngineConfig, prepare_environment
from owlrec_decoding import request_arguments
from owlrec_decoding.options import is_cpu_build

FILMS = ("Alien", "Casablanca", "Fargo", "Heat")
YESTERDAY = [f"Write a catalog entry for the film {film}." for film in FILMS]
TODAY = [f"{question} The cinema shows it tonight." for question in YESTERDAY]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED)
    parser.add_argument("--texts", type=Path)
    options = parser.parse_args()
    prepare_environment(VllmEngineConfig(type="vllm", model=options.model), is_cpu_build())
    from vllm import LLM, SamplingParams  # here, since it reads the environment on import

    modes = request_arguments(mode="off"), request_arguments()
    plain, drafted = (SamplingParams(max_tokens=100, temperature=0, extra_args=mode) for mode in modes)
    decoding = owlrec.drafting(options.texts)
    llm = LLM(resolve_model(options.model), max_model_len=512, max_num_seqs=4, enforce_eager=True, **decoding)
    if options.texts is None:
        answers(llm, YESTERDAY, drafted)
    times, written = [], []
    for sampling in (drafted, plain):  # drafted first: finished plain answers would become drafts
        start = time.perf_counter()
        written.append(answers(llm, TODAY, sampling))
        times.append(time.perf_counter() - start)
    same = sum(a == b for a, b in zip(*written, strict=True))
    print(f"{same} of {len(TODAY)} answers identical, {times[1] / times[0]:.2f} times as fast as without drafts")


def answers(llm: Any, questions: list[str], sampling: Any) -> list[str]:
    turns = [[{"role": "user", "content": question}] for question in questions]
    return [output.outputs[0].text for output in llm.chat(turns, sampling, use_tqdm=False)]


if __name__ == "__main__":
    main()
