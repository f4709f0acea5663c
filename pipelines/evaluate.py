"""What the run found: samples of knowledge, a timed lookup, the table of arms, and a self-contained HTML report."""

from owlrec.ctr.experiment import finished_trials, read_grid_scores, trials
from owlrec.ops.console import note, table
from owlrec.ops.report import arm_rows, collect, comparison_rows, render_report
from owlrec.recipe import Recipe
from owlrec.releases.release import open_release
from owlrec.shards import Card, needed_stage
from owlrec.sources.outcomes import Labels
from owlrec.workspace import Workspace
from pipelines.stage import Counts, Outputs, execute, main


def run(recipe: Recipe, workspace: Workspace) -> Card:
    """Writes the report and prints its main figures; always anew, since it is cheap and its readers are here."""
    prepared = needed_stage(workspace, "prepare", "the tables are not prepared")
    trained = needed_stage(workspace, "train_ctr", "nothing trained yet")

    def body() -> tuple[Counts, Outputs]:
        grid, grid_print = trials(recipe.ctr), trained.outputs["grid"]
        results = finished_trials(workspace, grid_print, grid)
        with open_release(workspace, verify=False) as release:
            data = collect(
                workspace,
                release,
                results,
                scores=read_grid_scores(workspace, grid_print, grid),
                run=recipe.name,
                protocol=_protocol(recipe, Labels.of_card(prepared).about),
                facts={k: f"{prepared.counts[k]:,}" for k in ("users", "items", "samples")},
            )
        report = f"reports/{recipe.name}.html"
        workspace.write_bytes(report, render_report(data).encode())
        for kind in ("user", "item"):
            for sample in [s for s in data.samples if s.kind == kind][:1]:
                table(
                    f"{kind} knowledge: {sample.title}",
                    ["read", "written"],
                    [("\n".join(sample.inputs[:8]), sample.text)],
                )
        table("lookup", ["what", "latency"], list(data.lookup.items()))
        table(
            "test split, mean over seeds",
            ["backbone", "arm", "seeds", "AUC", "to none", "95 % interval", "gAUC", "log-loss"],
            [
                (r.backbone, r.arm, r.seeds, r.auc, r.difference, r.interval, r.gauc, r.log_loss)
                for r in arm_rows(data.arms)
            ],
        )
        if compared := comparison_rows(data.arms):
            table(
                "difference in AUC, paired by seed and row; intervals over draws of users",
                ["backbone", "arm", "compared with", "difference", "95 % interval", "RelaImp"],
                [(r.backbone, r.arm, r.base, r.difference, r.interval, r.rela_imp) for r in compared],
            )
        for line in data.notes:
            note(line)
        note(f"report: {workspace.path(report)}")
        return {"arms": len(data.arms)}, {"report": report}

    return execute(workspace, "evaluate", trained.fingerprint, "figures and report", body, always=True)


def _protocol(recipe: Recipe, labels: str) -> str:
    """How the figures were made, in a line: an AUC without its split and label rule means nothing."""
    split = recipe.split
    cuts = ", ".join(cut if isinstance(cut, str) else f"every {cut.every}" for cut in split.cuts)
    samples = "what is later than that half" if split.kar_protocol else "every behavior"
    return (
        f"{recipe.source.type}, split by {split.method} {':'.join(map(str, split.ratios))} (split seed {split.seed}), "
        f"{labels}, history {split.history_length}; texts about users: {cuts}, of at most {split.llm_history} "
        f"behaviors; samples: {samples}, each reads the newest text that is earlier; "
        f"seeds {', '.join(map(str, recipe.ctr.seeds))}; early stopping on valid"
    )


if __name__ == "__main__":
    main(run, __doc__ or "")
