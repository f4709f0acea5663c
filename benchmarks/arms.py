"""How benchmarks tell what an arm of CTR models is worth."""

from benchmarks.table import Figure
from owlrec.ctr.experiment import ArmSummary


def arm_figure(row: ArmSummary, measure: str | None = None, method: str | None = None) -> Figure:
    """Its test AUC, measured as its backbone's and named by its arm where nothing else is given."""
    none = row.differences.get("none")
    gain = f", {none.auc:+.4f} to none" if none else ""
    others = f"gAUC {row.gauc or float('nan'):.4f}, log-loss {row.log_loss:.4f}"
    unit = f"test AUC (±{row.auc_std or 0:.4f}, {row.seeds} seeds{gain}; {others})"
    return Figure(measure=measure or row.backbone, method=method or row.arm, value=round(row.auc, 4), unit=unit)
