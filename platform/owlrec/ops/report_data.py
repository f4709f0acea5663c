"""What a report is made of: plain numbers and texts, so that any stage can fill them in."""

from pydantic import BaseModel

from owlrec.ctr.experiment import PairedDifference
from owlrec.ctr.slices import SliceMetrics
from owlrec.decoding.counters import DecoderCounters
from owlrec.encoding.code_quality import QuantisationReport
from owlrec.ops.throughput import Throughput
from owlrec.ranking.results import RankerResult


class ArmFigures(BaseModel):
    """One backbone with one arm: metrics on the test split, one value a seed."""

    backbone: str
    arm: str
    auc: list[float]
    gauc: list[float] = []
    log_loss: list[float] = []
    valid_auc: list[float] = []
    calibration_error: list[float] = []
    differences: dict[str, PairedDifference] = {}  # arm that this one is compared with -> over the seeds of both
    slices: dict[str, SliceMetrics] = {}  # parts of the test split, means over seeds


class StageFigures(BaseModel):
    """What a stage took. Tokens are of the LLM only."""

    stage: str
    seconds: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    rows: int = 0
    skipped: bool = False  # already there from an earlier run


class KnowledgeSample(BaseModel):
    """What the LLM read of a user or an item, and what it wrote."""

    kind: str
    title: str  # "user 12", or the item's title
    inputs: list[str]  # one line each: behaviours, attributes
    text: str


class ReportData(BaseModel):
    """All that a report may show."""

    run: str
    finished: str  # date and time, as it should read
    hardware: str
    facts: dict[str, str] = {}  # the line of key figures under the title
    protocol: str = ""  # split, label, negatives, seeds
    arms: list[ArmFigures] = []
    stages: list[StageFigures] = []
    knowledge_tokens: dict[str, list[int]] = {}  # by kind; of a large run a sample is enough
    samples: list[KnowledgeSample] = []
    release: dict[str, str] = {}
    lookup: dict[str, str] = {}
    throughput: Throughput = Throughput()  # of the generation job
    decoder: DecoderCounters | None = None  # of the speculative decoder, where one ran
    semantic_ids: dict[str, QuantisationReport] = {}  # by the name of their vectors: knowledge-user, metadata-item, ...
    ranker: list[RankerResult] = []  # of all runs of the LLM ranker, and of CTR models on the same samples
    notes: list[str] = []  # what a reader must know in order not to misread the figures
    versions: dict[str, str] = {}
