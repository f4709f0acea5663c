"""What `make bench` measures: the parts of a full round, and those that take longer and run when they are named."""

from typing import NamedTuple

FEAST = ".venv/feast/bin/python"  # `make bench-peers`
PEERS_AND_OURS = "'plain vLLM' 'suffix decoding' 'owlrec strict' 'owlrec relaxed'"


class Part(NamedTuple):
    """One command and what it answers; its figures stay in results/<name>.json."""

    name: str
    command: str
    """Behind `python -m benchmarks.`."""
    question: str


PARTS = (
    Part("demo", "demo", "What does `make demo` find, and how long does it take?"),
    Part("lookup", "lookup", "What does one lookup by id cost?"),
    Part("generation", "generation --quick", "What does a batch job cost beyond the engine itself?"),
    Part(
        "decoding",
        f"decoding --frameworks kar --workloads refresh --rounds 1 --methods {PEERS_AND_OURS} 'n-gram (2-4, 4)' "
        "'n-gram (1-3, 3)'",
        "How much faster is a refresh written that drafts from earlier texts?",
    ),
    Part(
        "decoding-new",
        f"decoding --frameworks kar --workloads 'new users' items --batches 4 --rounds 1 --methods {PEERS_AND_OURS}",
        "And texts of users and items that the pools know nothing of?",
    ),
    Part("lossless", "lossless --texts 16", "Does strict verification write what plain decoding would have written?"),
    Part("cohorts-real", "cohorts --only real", "Are cohorts real?"),
    Part("cohorts-speed", "cohorts --only speed", "How fast are users assigned to cohorts?"),
    Part("streaming", "streaming --only cost --days 20", "How many calls does a daily refresh ask for?"),
    Part("semantic-ids", "semantic_ids", "Are semantic ids unique, and what do they lose?"),
    Part("ctr-gauc", "ctr --only gauc", "How fast is gAUC taken?"),
    Part("ctr-export", "ctr --only export", "How fast is a request scored, and how far from the trainer?"),
    Part(
        "ctr-planted",
        "ctr --only planted --forms vectors --seeds 0",
        "Does every backbone find knowledge that is true, and ignore it shuffled?",
    ),
    Part("ctr-workers", "ctr --only workers", "Do two training workers find what one finds?"),
    Part("ctr-speed", "ctr_speed --rounds 1", "How fast are CTR models trained?"),
    Part(
        "ranking",
        "ranking --quick --only prefix parity tuning retrieval",
        "How fast and how exact is the LLM ranker? (Few rounds and prompts.)",
    ),
    Part("serving-store", "serving --only store", "How fast do the stores answer?"),
    Part(
        "serving",
        f"serving --only http overload memory --feast {FEAST}",
        "How fast is knowledge served, and what happens beyond capacity?",
    ),
    Part("serving-rank", "serving --only rank", "How fast are candidates ranked, by the CTR model and with the LLM?"),
)

LONG_PARTS = (
    Part(
        "ctr-features",
        "ctr_features",
        "Do features of all types give FuxiCTR's AUC, and how fast is a request (4 minutes)?",
    ),
    Part("serving-live", "serving --only live", "How soon does a refresh reach scores, and what do live vectors cost?"),
    Part(
        "decoding-all",
        "decoding --frameworks kar",
        "The whole table of decoding speeds, medians of three rounds (two hours).",
    ),
    Part(
        "decoding-batches",
        "decoding --frameworks kar --workloads 'new users' items --batches 1 16 64 --rounds 2",
        "Users and items that the pools know nothing of, at the other batch sizes (40 minutes).",
    ),
    Part("lossless-full", "lossless", "Strict against plain decoding on 200 texts (25 minutes)."),
    Part("generation-full", "generation --rounds 1", "1,000 prompts beside peers (20 minutes)."),
    Part("cohorts-texts", "cohorts --only texts", "What do cohorts' texts cost and what are they worth (20 minutes)?"),
    Part(
        "ctr-leaderboard",
        "ctr --only leaderboard --seeds 0 --recipe pipelines/recipes/movielens-100k-collective.yaml",
        "What is SmolLM2's knowledge worth to backbones (one seed, behind cohorts-texts; to train takes 15 minutes)?",
    ),
    Part(
        "ctr-planted-full",
        "ctr --only planted",
        "Planted knowledge, as vectors and as sentences, on three seeds (half an hour).",
    ),
    Part("streaming-worth", "streaming --only worth --users 200", "Are refreshed texts worth more (half an hour)?"),
    Part("decoder-host", "decoder_host", "What does the decoder cost the host?"),
    Part("planner", "planner", "How far off is the planner (40 minutes)?"),
    Part("serving-swaps", "serving --only swaps", "Is a request lost or mixed while releases change?"),
    Part("ranking-parity", "ranking --only parity", "Does an adapter score in vLLM as it does in peft (200 prompts)?"),
    Part(
        "ranking-shots",
        "ranking_quality --only shots --shots 1024",
        "What does tuning on 1,024 samples bring, beside CTR models on the same (two seeds, 80 minutes)?",
    ),
    Part(
        "ranking-few-shots",
        "ranking_quality --only shots --shots 64 256 --seeds 0",
        "And on 64 and 256 (one seed, 25 minutes)?",
    ),
    Part(
        "ranking-mixture",
        "ranking_quality --only mixture --seeds 0 --test-samples 600",
        "Tuned on recent or retrieved prompts alone, or on both (half an hour)?",
    ),
    Part(
        "ranking-longer",
        "ranking_quality --only longer --shots 1024 --behaviors 10 30",
        "Recent or retrieved behaviors, for the ranker of 1,024 shots (behind ranking-shots; 25 minutes)?",
    ),
    Part(
        "distillation",
        "distillation",
        "What does a teacher that knows a planted truth make up for where nine tenths of the labels are missing?",
    ),
    Part(
        "ranking-sets",
        "ranking_sets",
        "What does it cost to retrieve behaviors once for a request's candidates, and by which rule (five minutes)?",
    ),
    Part(
        "outcomes",
        "outcomes",
        "What does a CTR model lose where a log holds clicks and impressions in place of ratings (ten minutes)?",
    ),
    Part(
        "resume",
        "resume",
        "How soon does a job of 10^5 shards that are done but one start its engine on S3 (six minutes)?",
    ),
    Part(
        "scale",
        "scale --users 1e6 --items 1e5 --interactions 3e7 --growth",
        "How fast is the whole chain, in how much memory, and what do 1 % more users cost?",
    ),
    Part(
        "scale-10m",
        "scale --users 1e7 --items 1e6 --interactions 1e8",
        "And with ten times the users (an hour and 100 GB of disk)?",
    ),
)
