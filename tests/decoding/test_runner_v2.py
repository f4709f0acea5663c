"""Kernels of runner V2 beside an oracle in numpy, by Triton's interpreter.

The interpreter is chosen when Triton is imported, for the whole process, so this file runs itself in a process of its
own: there the tests below the line are defined.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    pytest.importorskip("triton", reason="the kernels of runner V2 are written in Triton")

    @pytest.mark.parametrize(
        "kernel", ["scan_kernel", "draft_kernel", "learn_kernel", "relax_kernel", "restore_kernel"]
    )
    def test_kernels_compile_for_an_h100(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from owlrec_decoding import runner_v2

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # it warns where this is unset
        sizes = {"K": 16, "K_PO2": 32, "N_BLOCKS": 32, "N_BLOCKS_PO2": 32, "ROWS": 8}
        long = ("idx_mapping_ptr", "slots_ptr", "last_sampled_ptr", "scan_ptr", "drafts_ptr")
        real = re.compile(
            "(.*chance|factors|edges|followed|confidence|expected|tried|accepted|hoped|prior|rules|.*ture|saved)_ptr"
        )
        types = {"logits_ptr": "*bf16", **dict.fromkeys(long, "*i64"), **dict.fromkeys(sizes, "constexpr")}

        def type_of(name: str) -> str:
            return types.get(name) or ("*fp32" if real.fullmatch(name) else "*i32" if name.endswith("_ptr") else "i32")

        function = getattr(runner_v2, kernel)
        signature = {name: type_of(name) for name in function.arg_names}
        source = ASTSource(function, signature, constexprs={n: sizes[n] for n in signature if n in sizes})
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    @pytest.mark.process
    @pytest.mark.timeout(1800)
    def test_kernels_in_the_interpreter() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------- in the interpreter

if INTERPRETED:
    import triton.backends

    # vLLM 0.32 uses Triton on a CPU if there is a backend of that name; the interpreter needs none.
    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]
    import torch
    from hypothesis import Phase, given, settings
    from hypothesis import strategies as st
    from tiny_engine import VOCAB, prompts, tiny_model
    from vllm.v1.worker.cpu_worker import CPUWorker

    from owlrec_decoding import (
        DecodingConfig,
        DecodingError,
        DraftLimits,
        Relaxation,
        engine_arguments,
        options,
        request_arguments,
    )
    from owlrec_decoding.index import SealedPool, build_pool
    from owlrec_decoding.pools import AGREE, CELLS, LONGEST, OTHERS, SHORTER, SILENT, WRITTEN, AcceptanceRates
    from owlrec_decoding.runner_v2 import FLOOR, RelaxedSampler, RetrievalRunnerV2, RetrievalSpeculator

    EDGES = np.array([0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97], np.float32)
    FOLLOWED = np.array([0.2, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7], np.float32)
    SLOTS, LENGTH, EOS = 6, 96, 9
    one = np.float32(1)

    @dataclass
    class Row:
        """A row of a batch: its context, the first tokens of which are its prompt, and what its request names."""

        context: list[int]
        prompt: int
        pools: list[str] = field(default_factory=list)
        document: int | None = None
        relaxed: bool = False
        max_tokens: int = 50
        sampled: int = 1
        drafting: bool = True

    # The oracle. It knows no search: it compares the context's end with the text before every position.

    def shared(text: Sequence[int], position: int, context: Sequence[int]) -> int:
        n = 0
        while n < min(32, position, len(context)) and text[position - 1 - n] == context[-1 - n]:
            n += 1
        return n

    def longest(text: Sequence[int], context: Sequence[int]) -> tuple[int, int]:
        """Position after the latest of the longest matches, and its length."""
        lengths = [shared(text, p, context) for p in range(1, len(text))]
        best = max(lengths, default=0)
        return (len(lengths) - lengths[::-1].index(best), best) if best else (-1, 0)

    def tree_says(pool: SealedPool, context: Sequence[int]) -> tuple[int, float, int] | None:
        """What most often follows the longest context that the pool knows, its chance, and that context's length."""
        lengths = np.array([shared(pool.tokens, int(p), context) for p in pool.order])
        best = int(lengths.max(initial=0))
        if best == 0:
            return None
        leaf = int(np.flatnonzero(lengths == best)[0])
        node = int(pool.leaf[leaf])
        if best > pool.nodes[node, 0]:
            return int(pool.tokens[pool.order[leaf]]), pool.chance[leaf], best
        path = [node]
        while path[-1]:
            path.append(int(pool.nodes[path[-1], 1]))
        node = [n for n in path if pool.nodes[n, 0] >= best][-1]
        return int(pool.tokens[pool.nodes[node, 2]]), pool.chance[len(pool.order) + node], best

    def expected_draft(
        row: Row, pools: dict[str, SealedPool], factors: np.ndarray, steps: int
    ) -> tuple[list[int], list[np.float32], list[int], list[np.float32]]:
        """Tokens, confidences, cells and the index's chances."""
        known = [p for p in row.pools if p in pools]
        names = known + (["default"] if "default" in pools and "default" not in known else [])
        groups = [0, *[1 if n in known else 2 for n in names], 3]
        own: list[int] = []
        for name in known:
            if not own and row.document is not None:
                own = pools[name].document(row.document).tolist()
        context, draft = row.context, []
        own_at, own_length = longest(own, context)
        self_at, self_length = longest(context, context)
        if self_length < 2:
            self_at = -1
        confidences: list[np.float32] = []
        cells: list[int] = []
        chances: list[np.float32] = []
        chance = one
        limit = min(steps, LENGTH - len(context) - 1, row.prompt + row.max_tokens - len(context) - 1)
        while row.sampled and row.drafting and len(draft) < limit:
            everything = context + draft
            said: list[tuple[int, np.float32, int] | None] = [None] * len(groups)
            if own_at >= 0:
                said[0] = own[own_at], FOLLOWED[min(own_length, 8) - 1], own_length
            for lane, name in enumerate(names, start=1):
                said[lane] = tree_says(pools[name], everything)
            if self_at >= 0:
                said[-1] = everything[self_at], FOLLOWED[min(self_length, 8) - 1], self_length
            options_ = []
            for lane, mine in enumerate(said):
                if mine is None:
                    continue
                missed, leads, others = one, True, SILENT
                for other, theirs in enumerate(said):
                    if theirs is None:
                        continue
                    if theirs[0] == mine[0]:
                        missed = missed * (one - theirs[1])
                        if other != lane:
                            others = AGREE
                            leads &= mine[1] > theirs[1] or (mine[1] == theirs[1] and lane < other)
                    elif others != AGREE:
                        others = SHORTER if others == SHORTER or theirs[2] > mine[2] else LONGEST
                expected = one - missed
                written = (context[row.prompt :] + draft).count(mine[0])
                cell = (int((expected >= EDGES).sum()) * OTHERS + others) * WRITTEN + min(written, WRITTEN - 1)
                cell += (groups[lane] + 4 * row.relaxed) * CELLS
                if leads:
                    options_.append((min(np.float32(0.999), expected * factors[cell]), -lane, mine[0], cell, expected))
            if not options_:
                break
            hope, _, token, cell, expected = max(options_)
            if hope == 0 or chance * hope < np.float32(FLOOR.value):
                break
            chance = chance * hope
            draft.append(token)
            confidences.append(hope)
            cells.append(cell)
            chances.append(expected)
            own_at = own_at + 1 if said[0] and said[0][0] == token and own_at + 1 < len(own) else -1
            self_at = self_at + 1 if said[-1] and said[-1][0] == token else -1
            own_length, self_length = min(own_length + 1, 32), min(self_length + 1, 32)
            if token == EOS:
                break
        return draft, confidences, cells, chances

    # The batch.

    def speculator(steps: int = 5) -> RetrievalSpeculator:
        def gpu(*shape: int) -> Any:
            return SimpleNamespace(gpu=torch.zeros(shape, dtype=torch.int32))

        config = SimpleNamespace(
            additional_config={
                options.SETTINGS_KEY: {
                    "config": DecodingConfig(mode="strict").model_dump(),
                    "limits": {"max_draft": steps},
                    "texts": None,
                }
            },
            speculative_config=SimpleNamespace(num_speculative_tokens=steps, enable_adaptive_verification=True),
            model_config=SimpleNamespace(
                max_model_len=LENGTH, hf_text_config=SimpleNamespace(eos_token_id=EOS), get_vocab_size=lambda: 100
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=SLOTS),
        )
        states = SimpleNamespace(all_token_ids=gpu(SLOTS, LENGTH), total_len=gpu(SLOTS), prompt_len=gpu(SLOTS))
        return RetrievalSpeculator(config, torch.device("cpu"), states)

    def propose(made: RetrievalSpeculator, rows: Sequence[Row], rejected: Sequence[int] | None = None) -> list[int]:
        """Asks for drafts of `rows`, each in a slot of its own; returns the slots."""
        slots = [(2 * i + 1) % SLOTS if i < 3 else 2 * (i - 3) for i in range(len(rows))]
        states = made.req_states
        states.all_token_ids.gpu.fill_(7)  # what stands beyond a context is stale and must not be read
        for slot, row in zip(slots, rows, strict=True):
            states.all_token_ids.gpu[slot, : len(row.context)] = torch.tensor(row.context, dtype=torch.int32)
            states.total_len.gpu[slot] = len(row.context)
            states.prompt_len.gpu[slot] = row.prompt
        last = torch.zeros(SLOTS, 1, dtype=torch.int64)
        for slot, row in zip(slots, rows, strict=True):
            last[slot] = row.context[-1]
        made.propose(
            SimpleNamespace(num_reqs=len(rows), idx_mapping=torch.tensor(slots)),
            None,
            None,
            torch.zeros(0),
            None,
            torch.tensor([r.sampled for r in rows], dtype=torch.int32),
            torch.tensor(rejected or [0] * len(rows), dtype=torch.int32),
            last,
            torch.zeros(0),
            torch.zeros(0),
            torch.zeros(0),
        )
        return slots

    def admit(made: RetrievalSpeculator, rows: Sequence[Row]) -> None:
        for i, row in enumerate(rows):
            mode: Any = "off" if not row.drafting else "relaxed" if row.relaxed else "strict"
            extra = request_arguments(row.pools, row.document, mode=mode)
            params = SimpleNamespace(extra_args=extra, max_tokens=row.max_tokens, stop_token_ids=[])
            made.add_request((2 * i + 1) % SLOTS if i < 3 else 2 * (i - 3), row.prompt, params)
        made.apply_staged_writes()

    token = st.integers(0, 5) | st.just(EOS)
    text = st.lists(token, min_size=1, max_size=14)

    @st.composite
    def batches(draw: Any) -> tuple[dict[str, SealedPool], list[Row]]:
        pools = {}
        for name in draw(st.lists(st.sampled_from(["a", "b", "default"]), unique=True, max_size=3)):
            texts = draw(st.lists(text, min_size=1, max_size=5))
            searchable = draw(st.sampled_from([True, True, False]))
            pools[name] = build_pool(texts, list(range(10, 10 + len(texts))), searchable=searchable)
        rows = []
        for _ in range(draw(st.integers(1, 4))):
            context = draw(st.lists(token, min_size=1, max_size=20))
            if draw(st.booleans()) and pools:
                context = (context + draw(st.sampled_from(list(pools.values()))).tokens[:4].clip(0).tolist())[-30:]
            rows.append(
                Row(
                    context,
                    draw(st.integers(0, len(context))),
                    draw(st.lists(st.sampled_from(["a", "b", "missing"]), unique=True, max_size=3)),
                    draw(st.none() | st.integers(9, 14)),
                    draw(st.booleans()),
                    draw(st.sampled_from([1, 3, 50])),
                    draw(st.sampled_from([1, 1, 1, 3, 0])),
                    draw(st.sampled_from([True, True, True, False])),
                )
            )
        return pools, rows

    @given(batches(), st.integers(0, 2**32 - 1))
    @settings(max_examples=60, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
    def test_drafts_equal_the_oracle(batch: tuple[dict[str, SealedPool], list[Row]], seed: int) -> None:
        pools, rows = batch
        made = speculator()
        made.load(pools)
        factors = np.random.default_rng(seed).choice([0.3, 0.7, 1.0, 1.2], len(made.factors)).astype(np.float32)
        # Without observations the kernel keeps to the prior.
        made.prior.copy_(torch.from_numpy(factors))
        admit(made, rows)
        slots = propose(made, rows)
        assert made.factors.numpy() == pytest.approx(factors)
        for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            draft, confidences, cells, chances = expected_draft(row, pools, made.factors.numpy(), made.steps)
            n = int(made.count[slot])
            assert made.drafts[i, :n].tolist() == draft
            assert made.drafts[i, n:].tolist() == [row.context[-1]] * (made.steps - n)
            assert made.draft_token_confidence_probs[i, :n].tolist() == [float(c) for c in confidences]
            assert not made.draft_token_confidence_probs[i, n:].any()
            assert made.cells[slot, :n].tolist() == cells
            assert made.expected[slot, :n].tolist() == [float(c) for c in chances]

    def test_the_commonest_continuation_of_the_longest_match_wins() -> None:
        made = speculator()
        made.load({"mine": build_pool([[1, 2, 3, 7], [1, 2, 3, 8], [1, 2, 3, 8], [4, 3, 5], [4, 3, 5], [4, 3, 5]])})
        rows = [Row([1, 2, 3], 3, ["mine"]), Row([6, 3], 2, ["mine"]), Row([6, 3], 2, ["other"])]
        admit(made, rows)
        slots = propose(made, rows)
        # "1 2 3" was followed by 8 twice and 7 once; 5 followed "3" alone, three times of six. Texts end there.
        assert made.count[slots].tolist() == [1, 1, 0]
        assert made.drafts[:, 0].tolist()[:3] == [8, 5, 3]
        assert made.unknown_pools == 1
        # As in test_retrieval.py: each count leaves .8 to what is shorter.
        three = (2 - 0.8 + 0.8 * 3 * (2 - 0.8 + 0.8 * 5 / 5) / 15) / 6
        assert made.draft_token_confidence_probs[0, 0].item() == pytest.approx((2 - 0.8 + 0.8 * 2 * three) / 3)

    def test_a_row_follows_its_own_earlier_text_and_stops_at_an_end_token() -> None:
        made = speculator()
        made.load({"mine": build_pool([[1, 2, 3, 4], [5, 6, EOS, 7, 8]], [20, 30])})
        rows = [Row([2, 5], 2, ["mine"], document=30), Row([2], 1, ["mine"], document=20, max_tokens=2)]
        admit(made, rows)
        slots = propose(made, rows)
        drafts = [made.drafts[i, : made.count[slot]].tolist() for i, slot in enumerate(slots)]
        assert drafts == [[6, EOS], [3]]  # the second may write two tokens, one of which vLLM samples itself

    def test_of_sources_that_hope_as_much_the_earlier_speaks() -> None:
        made = speculator()
        made.load({"mine": build_pool([[1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17]], [20])})
        rows = [Row([1, 2, 3, 1, 2], 5, ["mine"], document=20)]
        admit(made, rows)
        slots = propose(made, rows)
        # Own text and context match two tokens, .4; the pool hopes less, since 3 is one of ten followers.
        assert made.drafts[0, 0] == 3
        assert made.cells[slots[0], 0] // CELLS == 0

    def test_texts_without_a_tree_leave_the_trees_behind_them_whole() -> None:
        made = speculator()
        made.load({"own": build_pool([[8, 8, 8, 8]], [20], searchable=False), "mine": build_pool([[1, 2, 3, 4, 5]])})
        rows = [Row([1, 2], 2, ["mine"])]
        admit(made, rows)
        (slot,) = propose(made, rows)
        assert made.drafts[0, : made.count[slot]].tolist() == [3, 4, 5]

    def test_a_pool_with_tokens_that_the_model_lacks_is_refused() -> None:
        made = speculator()
        with pytest.raises(DecodingError, match="pool mine: token 100 "):
            made.load({"mine": build_pool([[1, 100]])})

    def test_adaptive_verification_takes_the_likeliest_drafts() -> None:
        from vllm.v1.worker.gpu.spec_decode.adaptive_verification import _assign_draft_token_budget

        made = speculator()
        made.load({"mine": build_pool([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0, 2, 7], [0, 2, 8], [0, 2, 1]])})
        rows = [Row([1, 2, 3], 3, ["mine"]), Row([0, 2], 2, ["mine"]), Row([0], 1)]
        admit(made, rows)
        slots = torch.tensor(propose(made, rows))
        by_slot = torch.ones(SLOTS, made.steps)
        by_slot[slots] = made.draft_token_confidence_probs[:3]  # as AdaptiveVerificationManager.record_confidences
        admitted = torch.full((3,), made.steps, dtype=torch.int32)
        _assign_draft_token_budget(by_slot, slots, admitted, 3, made.steps)
        # 4, 5 and 6 are all but certain after "1 2 3"; after "0 2" there are three choices, and the last row has none.
        assert admitted.tolist() == [3, 0, 0]

    def test_a_new_index_leaves_rows_under_way_their_own_context() -> None:
        made = speculator()
        made.load({"mine": build_pool([[1, 2, 3, 4]], [20])})
        rows = [Row([1, 2], 2, ["mine"], document=20), Row([8, 1, 2, 5, 8, 1], 2, ["mine"])]
        admit(made, rows)
        made.load({"other": build_pool([[1, 2, 0]], [20])})
        slots = propose(made, rows)
        assert made.count[slots].tolist() == [0, 5]
        assert made.drafts[1].tolist() == [2, 5, 8, 1, 2]

    def test_chances_are_learned_as_on_the_host() -> None:
        rng = np.random.default_rng(5)
        made, rates, slots = speculator(), AcceptanceRates(8), [1, 3, 5, 0]
        halved = False
        for _ in range(80):  # enough for what is old to fade
            cells = rng.choice([5, 700], (4, made.steps)).astype(np.int32)
            chances = rng.choice([0.1, 0.5, 0.9], cells.shape).astype(np.float32)
            count = np.where(rng.random(4) < 0.8, made.steps, rng.integers(0, made.steps + 1, 4))
            passed = np.where(rng.random(4) < 0.6, made.steps, rng.integers(0, made.steps + 1, 4))
            rejected = np.where(rng.random(4) < 0.1, 0, made.steps - passed)  # 0: adaptive verification cut the rest
            seen = np.minimum(np.minimum(passed + 1, passed + rejected), count)
            rates.observe(cells.astype(np.int64), chances.astype(np.float64), seen, passed)
            made.cells[slots], made.expected[slots] = torch.from_numpy(cells), torch.from_numpy(chances)
            made.count[slots] = torch.from_numpy(count.astype(np.int32))
            before = made.tried.clone()
            made.learn(torch.tensor(slots), *(torch.from_numpy(a.astype(np.int32)) for a in (passed + 1, rejected)))
            halved |= bool((made.tried < before).any())
        assert halved
        assert made.factors.numpy() == pytest.approx(rates.factors, rel=1e-4)

    def test_verdicts_are_counted() -> None:
        made = speculator()
        rows = [Row([1], 1, sampled=4), Row([1], 1, sampled=6), Row([1], 1, sampled=0)]
        admit(made, rows)
        slots = [1, 3, 5]
        made.count[slots] = torch.tensor([5, 2, 0], dtype=torch.int32)
        propose(made, rows, [2, 0, 0])
        # The second row's last three were filling that the model happened to write.
        assert made.totals[slots].tolist() == [[5, 3, 0], [2, 2, 0], [0, 0, 0]]

    @given(st.data())
    @settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
    def test_relaxed_verification_equals_the_rule(data: Any) -> None:
        from owlrec_decoding.verification import relaxed_accept

        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        made, vocab = speculator(), int(rng.choice([40, 4200]))
        rule = Relaxation(
            k=data.draw(st.integers(1, 4)),
            min_prob=data.draw(st.sampled_from([0.0, 0.05, 0.2])),
            margin=data.draw(st.sampled_from([None, 0.1, 0.5])),
        )
        lengths = rng.integers(0, made.steps + 1, 3)  # drafts per row
        strict, warm = data.draw(st.booleans()), data.draw(st.booleans())
        for slot in range(3):
            mode: Any = "strict" if slot == 0 and strict else "relaxed"
            extra = request_arguments(mode=mode, relaxation=rule)
            made.add_request(slot, 1, SimpleNamespace(extra_args=extra, max_tokens=50, stop_token_ids=[]))
        made.apply_staged_writes()
        found = rng.integers(0, lengths + 1)  # what follows in a row is filling
        made.count[:3] = torch.from_numpy(found.astype(np.int32))
        cu = np.concatenate([[0], np.cumsum(lengths + 1)]).astype(np.int32)
        slots = np.repeat(np.arange(3), lengths + 1)
        local = np.concatenate([np.arange(n + 1) for n in lengths]).astype(np.int32)
        logits = torch.from_numpy(rng.choice([0.0, 1.0, 2.5, 6.0, 6.5], (len(slots), vocab)).astype(np.float32))
        logits += torch.from_numpy(12 * (rng.random(logits.shape) < 2 / vocab).astype(np.float32))
        likely = logits.topk(3, dim=1).indices.numpy()
        token = likely[np.arange(len(slots)), rng.integers(0, 3, len(slots))]
        token = np.where(rng.random(len(slots)) < 0.1, EOS, np.where(rng.random(len(slots)) < 0.1, -1, token))
        inputs = np.roll(token, 1).astype(np.int32)  # a draft is the input of the row after the one that judges it
        temperature = torch.tensor([0.0, 0.7 if warm else 0.0, 0.0])
        spec = SimpleNamespace(
            num_speculative_tokens=made.steps, enable_adaptive_verification=False, rejection_sample_method="standard"
        )
        sampler = RelaxedSampler(SimpleNamespace(), spec, torch.device("cpu"), made)
        raised, drafts = logits.clone(), torch.from_numpy(inputs)
        sampler.prefer_relaxed(raised, drafts, torch.from_numpy(slots), torch.from_numpy(local), temperature)

        judged = (local < lengths[slots]) & (local < found[slots]) & (token != EOS)
        judged &= ~((slots == 0) & strict) & ~((slots == 1) & warm)
        passes = relaxed_accept(
            logits,
            torch.from_numpy(token.astype(np.int64)),
            k=torch.full((len(slots),), rule.k),
            min_prob=torch.full((len(slots),), rule.min_prob),
            margin=torch.full((len(slots),), 2.0 if rule.margin is None else rule.margin),
        ).numpy()
        wanted = judged & passes & (logits.argmax(dim=1).numpy() != token)
        assert (sampler._raised[: len(slots)].numpy() > 0).tolist() == wanted.tolist()
        assert (raised.argmax(dim=1).numpy() == token)[wanted].all()
        assert torch.equal(raised[~wanted], logits[~wanted])
        emitted = rng.integers(1, lengths + 2).astype(np.int32)
        sampler.restore(raised, drafts, torch.from_numpy(cu), torch.arange(3), torch.from_numpy(emitted))
        assert torch.equal(raised, logits)
        counted = wanted & (local < emitted[slots] - 1)
        assert made.totals[:3, 2].tolist() == [int(counted[slots == s].sum()) for s in range(3)]

    # The engine: vLLM's own runner V2, all of whose kernels the interpreter runs.

    class CpuV2Worker(RetrievalRunnerV2, CPUWorker):
        """On a CPU, for these tests."""

    def test_runner_v2_writes_the_same_texts_with_drafts_and_fewer_steps(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {
            "VLLM_USE_V2_MODEL_RUNNER": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        from vllm import EngineArgs, SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = engine_arguments(
            DecodingConfig(mode="strict"),
            limits=DraftLimits(max_draft=4),
            cpu=False,
            runner="v2",
            adaptive=False,
        )
        (tmp_path / "model").mkdir()
        engine = LLMEngine.from_engine_args(
            EngineArgs(
                **{
                    **arguments,
                    "model": tiny_model(tmp_path / "model", "Llama"),
                    "worker_cls": f"{__name__}.CpuV2Worker",
                    "dtype": "float32",
                    "max_model_len": 64,
                    "max_num_seqs": 2,
                    "enforce_eager": True,
                    "block_size": 32,
                    "disable_log_stats": True,
                    "skip_tokenizer_init": True,
                }
            )
        )

        def write(extra: dict[str, Any]) -> tuple[list[list[int]], int, list[tuple[int, int, int]]]:
            """Texts, steps, and counts of each request."""
            texts, steps = {}, 0
            for id_, prompt in enumerate(prompts(2, 8)):
                params = SamplingParams(max_tokens=10, temperature=0.0, detokenize=False, extra_args=extra)
                engine.add_request(str(id_), {"prompt_token_ids": prompt}, params)
            while engine.has_unfinished_requests():
                steps += 1
                texts.update({o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished})
            counts = engine.collective_rpc("owlrec_request_counts", args=(["0", "1"],))[0]
            return [texts["0"], texts["1"]], steps, [counts["0"], counts["1"]]

        plain, steps, counts = write(request_arguments(mode="off"))
        assert steps >= 10
        assert counts == [(0, 0, 0)] * 2
        wrong = [[*text[:6], (text[6] + 1) % VOCAB, *text[7:]] for text in plain]
        earlier = [[*prompt[-2:], *text] for prompt, text in zip(prompts(2, 8), wrong, strict=True)]
        engine.collective_rpc("owlrec_open_pools", args=({"mine": build_pool(earlier, [7, 8]).to_bytes()},))
        strict, fewer, counts = write(request_arguments(["mine"]))
        assert strict == plain
        assert fewer < steps - 3
        assert [relaxed for _, _, relaxed in counts] == [0, 0]
        assert min(accepted for _, accepted, _ in counts) >= 4
        assert all(drafted > accepted for drafted, accepted, _ in counts)
        loose = Relaxation(k=VOCAB, min_prob=0.0)
        relaxed, _, counts = write(request_arguments(["mine"], mode="relaxed", relaxation=loose))
        # Any draft passes now, so the mistakes are written again.
        assert [text[:7] for text in relaxed] == [text[:7] for text in wrong]
        assert min(relaxed for _, _, relaxed in counts) >= 1
        engine.engine_core.shutdown()
