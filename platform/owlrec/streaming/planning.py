"""What a refresh will do, decided and written down before anything is asked.

Once the news is known the plan has its fingerprint: over the base, the parent release, the new events in canonical
order, the config and the wording, so that the same events in another order are the same plan, to the byte. Then two
passes over the shards that have news or in which somebody is due: users are moved on, and, when the budget has chosen
among all who are due, the questions about them are written.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from owlrec.prompting.rows import Prompt, prompts_table
from owlrec.prompting.streaming import streaming_fingerprint
from owlrec.releases.release import open_release
from owlrec.scenario import Scenario
from owlrec.sources.catalog import ItemCatalog
from owlrec.storage import fingerprint
from owlrec.streaming.advancing import Due, Sources, advance, assess, freeze_partitions, write_prompts
from owlrec.streaming.config import StreamingConfig
from owlrec.streaming.drift import choose
from owlrec.streaming.events import Events
from owlrec.streaming.journal import Plan, begin, read_position, read_state
from owlrec.streaming.lineage import parent_release
from owlrec.streaming.news import News, find_news
from owlrec.streaming.state import State, StateShard, read_users, to_table
from owlrec.streaming.tables import PreparedTables
from owlrec.workspace import Workspace, shard_file


def make_plan(
    workspace: Workspace,
    config: StreamingConfig,
    scenario: Scenario,
    *,
    encoder: str,
    shard_rows: int,
    now: int,
    count_tokens: Callable[[], Callable[[str], int]],
) -> Plan | None:
    """Writes down the plan of the next refresh and gives it; None where there is no news.

    encoder: the recipe's, as the parent release names it. shard_rows: prompts a file. now: ms since 1970, UTC.
    count_tokens: called only where prompts are written, since a tokenizer takes seconds to load.
    Raises SourceError as news.find_news does, ReleaseError where there is no release to build on.
    """
    position = read_position(workspace)
    parent = parent_release(workspace, position.release if position else None, encoder)
    tables = PreparedTables(workspace)
    state = read_state(workspace, position) if position else State(n_shards=tables.n_shards)
    watermark = position.watermark if position else None
    news = find_news(workspace, config, tables, state, watermark, now)
    if not news:
        return None
    newest = max((moment for moment in (watermark, news.newest) if moment is not None), default=None)
    plan = Plan(
        fingerprint=fingerprint(
            position.state if position else None,
            parent.fingerprint,
            watermark,
            [(shard, events.digest()) for shard, events in news.admitted.items()],
            news.dead["message"].to_pylist(),
            config.model_dump(mode="json", exclude={"events", "compact_after", "keep_releases"}),
            streaming_fingerprint(config, scenario),
        ),
        base=position,
        parent=parent.name,
        encoder=encoder,
        watermark=newest,
        horizon=None if newest is None else newest - config.max_lateness_ms,
        state=state,
        counts=news.counts,
    )
    workspace.delete_dir(plan.folder)  # what an earlier attempt left
    plan = _write_refusals(workspace, plan, news)
    if news.admitted:
        with open_release(workspace, parent.name, verify=False) as release:
            sources = Sources(config, scenario, tables, ItemCatalog.load(workspace), release.store)
            plan, due = _move_users_on(workspace, sources, plan, news.admitted)
            plan = _write_questions(workspace, sources, plan, due, count_tokens, shard_rows)
    begin(workspace, plan)
    return plan


def _write_refusals(workspace: Workspace, plan: Plan, news: News) -> Plan:
    refused = None
    if news.refused.num_rows:
        refused = f"{plan.states}/refused.parquet"
        workspace.write_parquet(refused, news.refused)
    if news.dead.num_rows:
        workspace.write_parquet(plan.dead, news.dead)
    return plan.model_copy(update={"state": plan.state.model_copy(update={"refused": refused, "log": news.files})})


def _move_users_on(
    workspace: Workspace, sources: Sources, plan: Plan, admitted: dict[int, Events]
) -> tuple[Plan, dict[int, list[Due]]]:
    """Writes the shards that have news; the plan with them, and who is due in each shard."""
    clock = plan.watermark or 0
    shards, due = dict(plan.state.shards), {}
    for shard in sorted(admitted.keys() | plan.state.due_shards(clock)):
        users = read_users(workspace, plan.state, shard, plan.encoder)
        if shard in admitted:
            users = advance(sources, users, admitted[shard], plan.horizon)
            file = f"{plan.states}/{shard_file(shard)}"
            workspace.write_parquet(file, to_table(users))
            shards[shard] = StateShard(file=file, users=len(users), encoder=plan.encoder)
        due[shard], next_due = assess(sources, users, clock)
        shards[shard] = shards[shard].model_copy(update={"waiting": len(due[shard]), "due_at": next_due})
    return plan.model_copy(update={"state": plan.state.model_copy(update={"shards": shards})}), due


def _write_questions(
    workspace: Workspace,
    sources: Sources,
    plan: Plan,
    due: dict[int, list[Due]],
    count_tokens: Callable[[], Callable[[str], int]],
    shard_rows: int,
) -> Plan:
    """Chooses whom to ask about and writes their partitions and prompts; the plan with them."""
    everyone = [d for found in due.values() for d in found]
    ids, worth = np.array([d.user_id for d in everyone], dtype=np.int64), np.array([d.priority for d in everyone])
    chosen = set(choose(ids, worth, sources.config).tolist())
    asked = {shard: [d for d in found if d.user_id in chosen] for shard, found in due.items()}
    asked = {shard: found for shard, found in asked.items() if found}

    def prompts() -> Iterator[Prompt]:
        counter = count_tokens()
        for shard, found in asked.items():
            users = {u.user_id: u for u in read_users(workspace, plan.state, shard, plan.encoder)}
            frozen = [users[d.user_id] for d in found]
            workspace.write_parquet(plan.partition_file(shard), freeze_partitions(sources, frozen, found))
            yield from write_prompts(sources, frozen, counter)

    if asked:
        stream, part = prompts(), 0
        while batch := list(islice(stream, shard_rows)):
            workspace.write_parquet(f"{plan.prompts}/{shard_file(part)}", prompts_table(batch))
            part += 1
    shards = dict(plan.state.shards)
    for shard, found in asked.items():
        shards[shard] = shards[shard].model_copy(update={"waiting": shards[shard].waiting - len(found)})
    counts = {"due": len(everyone), "calls": len(chosen), "left_waiting": len(everyone) - len(chosen)}
    for reason in ("length", "age", "drift"):
        counts[f"frozen_by_{reason}"] = sum(d.reason == reason for found in asked.values() for d in found)
    return plan.model_copy(
        update={
            "state": plan.state.model_copy(update={"shards": shards}),
            "asked": list(asked),
            "calls": len(chosen),
            "counts": plan.counts | counts,
        }
    )
