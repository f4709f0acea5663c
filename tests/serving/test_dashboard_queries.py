"""Every metric that a dashboard or an alert reads stands on the page that Prometheus reads, while the applications
that export it run: a generation job with the echo engine, the decoder's counters, the knowledge application, and the
cascade whose LLM is gone.
"""

import re
import threading
import time
import urllib.request

import httpx
import pytest
from dashboards import expressions, parse
from processes import free_port
from served_world import publish_world

from owlrec.generation import EchoEngineConfig
from owlrec.generation.engines import SamplingConfig
from owlrec.generation.job import GenerateStage, build_job, table_inputs
from owlrec.prompting.prompts import PromptConfig
from owlrec.releases import roll_back
from owlrec.runner import Pool, run_stage
from owlrec.scenario import get_scenario
from owlrec.workspace import Workspace
from owlrec_decoding.controller import DecoderCounters

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
WITHIN_S = 30.0


def labels_of(page):
    """The metrics on a page, and the labels of each."""
    by_metric = {}
    for metric, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", page, re.MULTILINE):
        by_metric.setdefault(metric, set()).update(re.findall(r'(\w+)="', labels))
    return by_metric


class Pages(threading.Thread):
    """Reads the node's page again and again and remembers what stood there, while requests come and releases swap."""

    def __init__(self, url, workspace):
        super().__init__(daemon=True)
        import ray

        node = ray.nodes()[0]
        self._page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self._url, self._workspace = url, workspace
        self._ended = threading.Event()
        self.seen = {}

    def run(self):
        names = sorted(n for n in self._workspace.names("releases") if n != "CURRENT")
        while not self._ended.wait(0.5):
            names.reverse()
            roll_back(self._workspace, to=names[0])
            for user in (1, 9):
                httpx.get(f"{self._url}/v1/knowledge/user/{user}")
            page = urllib.request.urlopen(self._page, timeout=5).read().decode()
            for metric, labels in labels_of(page).items():
                self.seen.setdefault(metric, set()).update(labels)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self.join()


def run_job(workspace):
    """An engine that needs its time; prompts about users are too long, and no text is as long as it should be."""
    engine = EchoEngineConfig(type="echo", latency_s=2.0, max_model_len=200)
    job = build_job(get_scenario("movies"), PromptConfig(), SamplingConfig(max_tokens=1), engine)
    run_stage(workspace, GenerateStage(job, engine), table_inputs(workspace), Pool(here=False, price_per_hour=3600.0))


@pytest.fixture
def knowledge(ray_local, tmp_path_factory):
    """The knowledge application's address and its workspace, with two releases."""
    from ray import serve

    from owlrec.apps.knowledge import KnowledgeArgs, app

    workspace, port = Workspace(tmp_path_factory.mktemp("served") / "ws"), free_port()
    for label in ("first", "second"):
        publish_world(workspace, label)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    serve.run(app(KnowledgeArgs(workspace=workspace.path(), num_cpus=0.1, refresh_s=0.1)), route_prefix="/k")
    yield f"http://127.0.0.1:{port}/k", workspace
    serve.shutdown()


def count_elsewhere():
    """Actors that count what no application here does: the decoder's, whose engine needs a model, and a cascade's."""
    import ray

    @ray.remote(num_cpus=0)
    class Engine:
        def count(self):
            from owlrec.generation.job import _COUNTS, DecoderMetrics

            counters = DecoderCounters(counts={**dict.fromkeys(_COUNTS, 1.0), "hits_own": 1.0})
            DecoderMetrics("engine").update(counters)

    @ray.remote(num_cpus=0)
    class Ranker:
        async def rank(self):
            from owlrec.apps.knowledge import RayTelemetry
            from owlrec.serving.rank_api import Cascade
            from owlrec.serving.schemas import Rank

            class Ctr:
                async def score(self, asked, candidates):
                    return [0.0 for _ in candidates]

            class Gone:
                async def score(self, asked, candidates):
                    raise RuntimeError("gone")

            cascade = Cascade(Ctr(), Gone(), RayTelemetry("rank"))
            answer = await cascade.rank(Rank(history=[], candidates=[1, 2], mode="cascade"))
            return answer.degraded

    engine, ranker = Engine.remote(), Ranker.remote()
    ray.get(engine.count.remote())
    assert ray.get(ranker.rank.remote())
    return engine, ranker  # their metrics end with them


def test_every_metric_that_is_read_is_exported(small_world, knowledge):
    kept = count_elsewhere()
    wanted = {metric: e.where for e in expressions() for metric in parse(e.text).metrics}
    assert len(wanted) > 35
    with Pages(*knowledge) as pages:
        run_job(small_world)
        end = time.monotonic() + WITHIN_S
        while wanted.keys() - pages.seen.keys() and time.monotonic() < end:
            time.sleep(0.5)
    del kept
    assert not {metric: wanted[metric] for metric in wanted.keys() - pages.seen.keys()}
    for expression in expressions():
        names = parse(expression.text)
        for metric, labels in names.metrics.items():
            assert labels <= pages.seen[metric], (expression, metric)
        known = set().union(*(pages.seen[metric] for metric in names.metrics))
        assert names.grouped | expression.shown <= known, expression
