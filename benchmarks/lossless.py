"""Is strict verification lossless? Texts of plain vLLM and of the retrieval decoder, token by token, float32 and bf16.

A step of another batch shape adds numbers in another order, so that two tokens of nearly equal logits may change places
without any drafts. A difference is therefore excused only where the plain engine itself, asked again at the first
token that differs, leads by less than TIE. Few rows run at a time: with many, drafts pay for nobody and little would be
tested.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.decoding import LEAD_TOKENS, NEW_TOKENS, PLAIN, in_process, prepare
from benchmarks.table import Figure, options_parser, show

ROWS = 4
TIE = 1e-3  # of logits, in float32


def main() -> None:
    """Writes the refresh workload's texts both ways, compares them and looks at each difference."""
    parser = options_parser(__doc__)
    parser.add_argument("--texts", type=int, default=200)
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens, texts = (NEW_TOKENS // 2, 16) if options.quick else (NEW_TOKENS, options.texts)
        job = prepare(folder, ["kar"], new_tokens=tokens, refreshed=texts)
        requests = job["requests"]["kar"]["refresh"]
        for dtype in ("float32",) if options.quick else ("float32", "bfloat16"):
            figures += _compare(folder, {**job, "dtype": dtype, "rows": ROWS}, requests)
    show(f"strict decoding against plain, {len(requests)} texts", figures, options)


def _compare(folder: Path, job: dict[str, Any], requests: list[Any]) -> list[Figure]:
    write = {"write": {"kar-users": requests}}
    plain, strict = (
        [answer["tokens"][LEAD_TOKENS:] for answer in in_process(folder, {**job, **write, "method": method})]
        for method in (PLAIN, "owlrec strict")
    )
    same = sum(a == b for a, b in zip(plain, strict, strict=True))
    differing = [
        (request, a[: next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)])
        for request, a, b in zip(requests, plain, strict, strict=True)
        if a != b
    ]
    gaps = [f["gap"] for f in in_process(folder, {**job, "method": PLAIN, "continue": differing})] if differing else []
    measure = f"{job['dtype']}, refresh"
    figures = [Figure(measure=measure, method="owlrec strict", value=same, unit=f"of {len(requests)} identical")]
    if job["dtype"] == "float32":
        ties = sum(gap < TIE for gap in gaps)
        figures.append(Figure(measure=measure, method="owlrec strict", value=ties, unit=f"of {len(gaps)} others a tie"))
    if gaps:
        figures.append(Figure(measure=measure, method="owlrec strict", value=max(gaps), unit="largest logit gap there"))
    return figures


if __name__ == "__main__":
    main()
