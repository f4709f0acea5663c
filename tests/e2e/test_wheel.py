"""Both wheels in empty virtual environments: what a plain installation brings and does, the decoder beside vLLM."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import uvicorn
from heads import free_port
from tiny_engine import tiny_model, write_tokenizer  # type: ignore[import-not-found]

from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import KNOWLEDGE, vectors_schema
from owlrec.serving.keys import KeyRing
from owlrec.serving.knowledge_api import KnowledgeConfig, build_knowledge_api
from owlrec.serving.served import ServedReleases, WorkspaceReleases
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

DRAFTING = """
import json, sys
from owlrec_decoding import drafting, request_arguments
from vllm import LLM, SamplingParams

llm = LLM("model", max_model_len=128, max_num_seqs=2, enforce_eager=True, **drafting("answers.csv"))
modes = request_arguments(), request_arguments(mode="off")
sampling = [SamplingParams(max_tokens=40, temperature=0, extra_args=mode) for mode in modes]
drafted, plain = [llm.generate("An owl sees ", s, use_tqdm=False)[0].outputs[0].text for s in sampling]
sealed = json.loads(llm.collective_rpc("owlrec_counters")[0])["counts"]["tokens_sealed"]
print(f"same={drafted == plain} sealed={sealed:g} loaded={[n for n in ('ray', 'owlrec') if n in sys.modules]}")
"""


def run(*command: object, cwd: Path, check: bool = True, **env: str) -> str:
    """What a command printed. Without this process's PYTHONPATH."""
    ran = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENV | env, capture_output=True, text=True, timeout=500, check=False
    )
    assert not check or ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def install(venv: Path, wheel: Path, *options: str) -> None:
    """A new environment with a wheel, by this environment's pip: a pip of its own would take seconds."""
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", *options, wheel, cwd=venv.parent)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, by name."""
    folder = tmp_path_factory.mktemp("dist")
    for project in (ROOT, ROOT / "platform/owlrec_decoding"):
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project, cwd=folder)
    return {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Path:
    """An environment with OwlRec alone."""
    venv = tmp_path_factory.mktemp("base") / "venv"
    install(venv, wheels["owlrec"])
    return venv


@pytest.fixture
def published(tmp_path: Path) -> Path:
    row = {f.name: "x" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    knowledge = pa.Table.from_pylist([row | {"kind": "user", "id": 7, "text": "likes owls"}], schema=KNOWLEDGE)
    vectors = pa.Table.from_pylist(
        [{"kind": "user", "id": 7, "vector": np.ones(4, np.float16), "codes": []}], schema=vectors_schema(4)
    )
    info = ReleaseInfo(fingerprint="ab" * 32, model="m", encoder="e")
    publish(Workspace(tmp_path / "ws"), knowledge=[knowledge], vectors=[vectors], info=info)
    return tmp_path / "ws"


@pytest.fixture
def url(published: Path) -> Iterator[str]:
    """A server of the release, in this process."""
    served = ServedReleases(WorkspaceReleases(Workspace(published)))
    app = build_knowledge_api(served, KeyRing(), KnowledgeConfig())
    server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_the_base_is_small_and_holds_one_package(base: Path) -> None:
    site = next((base / "lib").glob("python*/site-packages"))
    installed = [d for d in metadata.distributions(path=[str(site)]) if d.name not in ("pip", "setuptools")]
    files = {d.name: [f for f in d.files or () if f.suffix != ".pyc"] for d in installed}
    assert sum(Path(d.locate_file(f)).stat().st_size for d in installed for f in files[d.name]) < 100e6
    assert not {"ray", "pyarrow", "pandas", "torch"} & files.keys()
    tops = {f.parts[0] for f in files["owlrec"]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "owlrec",
        "..",
    }  # the command lies in ../../../bin
    assert [f.name for f in files["owlrec"] if f.parts[0] == ".."] == ["owlrec"]


def test_the_base_looks_up(base: Path, published: Path, tmp_path: Path) -> None:
    assert "likes owls" in run(base / "bin/owlrec", "lookup", published, "user", "7", cwd=tmp_path)
    report = run(base / "bin/owlrec", "doctor", published, cwd=tmp_path, check=False)
    assert "ray" in report
    assert "Traceback" not in report
    code = (
        "import owlrec, platform, sys\n"
        f"with owlrec.open({str(published)!r}) as release:\n"
        "    print(release['user', '7'].text, release.vectors('user', [7]))\n"
        "print(owlrec.__file__, platform.system(), 'pyarrow' in sys.modules)"
    )
    answer = run(base / "bin/python", "-c", code, cwd=tmp_path)
    assert "likes owls (array([[1., 1., 1., 1.]], dtype=float32), array([ True]))" in answer
    assert str(base) in answer
    assert "Linux False" in answer


def test_the_base_asks_a_server(base: Path, url: str, tmp_path: Path) -> None:
    code = (
        f"import owlrec\nwith owlrec.Client({url!r}) as owl:\n"
        "    print(owl.get('user', 7).text, owl.vectors('user', [7, 8]))"
    )
    answer = run(base / "bin/python", "-c", code, cwd=tmp_path)
    assert "likes owls" in answer
    assert "1., 1., 1., 1." in answer


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["run", "shop.yaml"], "ray"),
        (["release", "prune", "ws"], "ray"),
        (["lookup", "s3://bucket/ws", "user", "7"], "cloud"),
        (["release", "push", "ws", "redis://127.0.0.1:1"], "redis"),
    ],
)
def test_what_an_extra_brings_is_named_in_a_line(base: Path, tmp_path: Path, words: list[str], extra: str) -> None:
    ran = subprocess.run(
        [base / "bin/owlrec", *words], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1, ran.stderr
    (line,) = ran.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert f"owlrec[{extra}]" in line


@pytest.mark.parametrize(
    ("call", "extra"),
    [("run('x.yaml')", "ray"), ("open('x.yaml')", "ray"), ("open('s3://b/x')", "cloud"), ("Adaptor", "cpu")],
)
def test_python_names_the_extra_too(base: Path, tmp_path: Path, call: str, extra: str) -> None:
    code = (
        "import owlrec\nfrom owlrec.errors import MissingExtraError\n"
        f"try: owlrec.{call}\nexcept MissingExtraError as error: print(error)"
    )
    assert f"owlrec[{extra}]" in run(base / "bin/python", "-c", code, cwd=tmp_path)


def test_importing_the_package_takes_a_moment(base: Path, tmp_path: Path) -> None:
    code = "import time; start = time.perf_counter(); import owlrec; print(time.perf_counter() - start)"
    assert min(float(run(base / "bin/python", "-c", code, cwd=tmp_path)) for _ in range(5)) < 0.1


def test_both_wheels_have_one_version(wheels: dict[str, Path]) -> None:
    assert wheels["owlrec"].name.split("-")[1] == (version := wheels["owlrec_decoding"].name.split("-")[1])
    assert f'"owlrec-decoding=={version}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.vllm
def test_the_decoder_drafts_in_vllm_without_ray_and_owlrec(tmp_path: Path, wheels: dict[str, Path]) -> None:
    install(tmp_path / "venv", wheels["owlrec_decoding"], "--no-deps")
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (vllm,) = find_spec("vllm").submodule_search_locations  # type: ignore[union-attr, misc]
    (site / "beside.pth").write_text(str(Path(vllm).parent))  # which holds no OwlRec: the .pth files there are not read
    for name in ("ray", "owlrec"):  # vLLM imports Ray by itself wherever it finds it
        (site / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')")
    write_tokenizer(tiny_model(tmp_path / "model", "Llama"))
    config = tmp_path / "model/tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"chat_template": "{{ messages[0].content }}",', 1))
    (tmp_path / "answers.csv").write_text("id,text\n1,an owl in an elm\n2,a film of owls\n")
    (tmp_path / "draft.py").write_text(DRAFTING)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    printed = run(python, "draft.py", cwd=tmp_path, **environment)
    sealed = sum(map(len, ("an owl in an elm", "a film of owls"))) + 4  # an end and a border after each
    assert f"same=True sealed={sealed} loaded=[]" in printed
