"""What others wrote (texts, answers, models, SAEs, shared runs) is data; keys stay where they are; doors are closed."""

import ast
import inspect
import io
import json
import logging
import pickle
import re
import traceback
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from ray import serve
from rich.console import Console

from rayinterp.cli import _printable
from rayinterp.config import load_config
from rayinterp.errors import UserError
from rayinterp.preflight import model_config
from rayinterp.report import write_report
from rayinterp.report_cards import visible
from rayinterp.run import connected, is_open, open_run, run_stage
from rayinterp.saes import SaeSource, load_sae
from rayinterp.show import show_feature
from rayinterp.tables import SCHEMAS, Tables
from tests import test_report
from tests.conftest import CONFIGS, copy_upstream, planted_config
from tests.explain.faulty_endpoint import faulty_endpoint
from tests.small_models import save_model

ROOT = CONFIGS.parent
CODE = [path for folder in ("rayinterp", "jobs", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]

# what would run code that somebody else wrote

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
ARGUMENTS = {("allow_pickle", True), ("shell", True), ("weights_only", False), ("use_safetensors", False)}
REMOTE_CODE = {"trust_remote_code", "_trust_remote_code"}
ASKS = re.compile(r"(transformers\.)?Auto\w+\.from_pretrained")


def unsafe(tree):
    """Names what in a module's code can execute data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            names = {f"{home}.{alias.name}" for alias in node.names}
            yield from (name for name in sorted(names) if home.split(".")[0] in PICKLES or name in CALLS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield called
            if ASKS.fullmatch(called) and REMOTE_CODE.isdisjoint(keyword.arg or "" for keyword in node.keywords):
                yield f"{called} without trust_remote_code=False"  # which asks, at a terminal, whether to run it
            for keyword in node.keywords:
                refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in REMOTE_CODE and not refused:  # there is no field that could ask for it
                    yield keyword.arg
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in ARGUMENTS:
                    yield f"{keyword.arg}={keyword.value.value}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                off = isinstance(value, ast.Constant) and value.value is False
                if isinstance(key, ast.Constant) and key.value in REMOTE_CODE and not off:
                    yield str(key.value)


@pytest.mark.parametrize("path", CODE, ids=lambda path: "/".join(path.relative_to(ROOT).parts))
def test_nothing_executes_data(path):
    assert not list(unsafe(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "import os, dill", "from cloudpickle import loads", "from torch import load"),
        *("torch.load(f)", "yaml.load(f, Loader=L)", "yaml.unsafe_load(f)", "eval(x)", "exec(x)", "os.system(x)"),
        *("np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)", "f(weights_only=False)"),
        *("M.from_pretrained(n, trust_remote_code=True)", "M.from_pretrained(n, trust_remote_code=flag)"),
        *("f(**{'trust_remote_code': True})", "AutoModel.from_pretrained(n, dtype=d)", "import joblib.memory"),
    ],
)
def test_the_scan_finds_what_it_is_for(code):
    assert len(list(unsafe(ast.parse(code)))) == 1


def test_the_scan_sees_the_code():
    assert len(CODE) > 70
    assert not list(unsafe(ast.parse("yaml.safe_load(f); np.load(f); subprocess.run(['ls']); import json")))


class Trap:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "caught")))
    assert (tmp_path / "caught").exists()


def test_a_models_pickled_weights_run_no_code(tmp_path):
    """An old checkpoint without safetensors is read by torch, which loads tensors alone."""
    from transformers import AutoModel

    folder, caught = tmp_path / "model", tmp_path / "caught"
    save_model("llama-3.1-8b", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap(caught)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights"):
        AutoModel.from_pretrained(folder)
    assert not caught.exists()


def test_a_models_own_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # nor is anybody at a terminal asked
    folder, caught = tmp_path / "model", tmp_path / "caught"
    folder.mkdir()
    code = f"from pathlib import Path\nPath({str(caught)!r}).touch()\nfrom transformers import LlamaConfig as C\n"
    (folder / "own.py").write_text(code)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"subject\.model"):
        model_config("subject.model", str(folder), None)
    assert not caught.exists()


def test_an_sae_folder_is_read_as_safetensors_alone(tmp_path):
    card = {"architecture": "standard", "d_in": 4, "d_sae": 8, "metadata": {"hook_name": "model.layers.0"}}
    (tmp_path / "cfg.json").write_text(json.dumps({**card, "dtype": "float32", "device": "cpu"}))
    for name in ("sae_weights.safetensors", "sae_weights.pt", "sae_weights.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "caught")))
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        load_sae(SaeSource("a", None, str(tmp_path)))
    assert not (tmp_path / "caught").exists()


# doors


def test_the_dashboard_answers_on_its_own_machine_alone():
    assert inspect.signature(ray.init).parameters["dashboard_host"].default == "127.0.0.1"
    # In compose.yaml the container's port is bound to 127.0.0.1, in Kubernetes it asks for a token: tested with these.
    files = [ROOT / "cluster" / name for name in ("aws.yaml", "gcp.yaml", "slurm.sh")]
    heads = [line for path in files for line in path.read_text().splitlines() if "--head" in line]
    assert len(heads) == len(files)
    assert all("--dashboard-host=127.0.0.1" in line for line in heads)


def test_no_code_opens_a_door():
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                names = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert not names.keys() & {"dashboard_host", "http_options", "grpc_options"}, path
                if ast.unparse(node.func) == "serve.start":
                    assert names["proxy_location"] == "'Disabled'"
                if ast.unparse(node.func) == "serve.run":
                    assert names["route_prefix"] == "None", path


def test_an_open_dashboard_is_warned_of():
    assert [is_open(url) for url in ("0.0.0.0:8265", "10.0.0.4:8265", "[::]:8265")] == [True] * 3
    assert [is_open(url) for url in ("127.0.0.1:8265", "localhost:8265", "[::1]:8265", "", None)] == [False] * 5


@pytest.mark.parametrize(
    ("url", "mode", "warned"),
    [("10.0.0.4:8265", "", True), ("10.0.0.4:8265", "token", False), ("127.0.0.1:8265", "", 0)],
)
def test_a_run_that_joins_an_open_dashboard_says_so(url, mode, warned, tmp_path, monkeypatch, recwarn):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: SimpleNamespace(dashboard_url=url))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for name in ("started_here", "stop_services"):
        monkeypatch.setattr(f"rayinterp.run.{name}", lambda *config: False)
    with connected(planted_config(tmp_path)):
        pass
    assert [url in str(one.message) for one in recwarn] == [True] * bool(warned)


# keys

CANARY = "sk-canary-7b2e9d40c1"


def everything_in(folder):
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.is_socket():
            yield path, path.read_bytes()


def test_a_key_is_nowhere_but_in_the_request(planted_run, tmp_path, monkeypatch, caplog):
    """Searches against an endpoint that fails now and then, then one that refuses all: what is left behind is read."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("RAYINTERP_TEST_KEY", CANARY)
    folder = copy_upstream(planted_run, tmp_path / "run")
    answer = '[{"activates_on": "words about ships and the sea", "strength": 5}]'
    seen = []

    def config(url, name):
        llm = f"{{provider: openai, model: {name}, base_url: '{url}', api_key_env: RAYINTERP_TEST_KEY, max_retries: 1}}"
        arm = f"{{{name}: {{method: one_shot, llm: asked, simulator: oracle, max_parse_retries: 0}}}}"
        return planted_config(folder, f"llms={{asked: {llm}}}", f"explainers={arm}")

    with faulty_endpoint(3, 0.3, answer, ("rate_limit", "malformed"), seen=seen) as url:
        run = open_run(config(url, "works"))
        for stage in ("explain", "score", "report"):
            run_stage(run, stage)
        assert not serve.status().proxies, "services have no port"
    with pytest.raises(UserError, match="APIConnectionError") as error:  # of a model that never answered
        run_stage(open_run(config(url, "fails")), "explain")
    assert seen and run.tables.count("llm_calls") > 0
    said = ["".join(traceback.format_exception(error.value)), *(record.getMessage() for record in caplog.records)]
    said += [json.dumps(run.tables.read(name).to_pylist(), default=str) for name in SCHEMAS if run.tables.exists(name)]
    assert not [text for text in said if CANARY in text]
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    files = [*everything_in(folder), *everything_in(logs)]
    names = {path.name for path, _ in files}
    assert {"run.yaml", "manifest.json", "report.html"} <= names and any(name.startswith("worker-") for name in names)
    assert not [path for path, content in files if CANARY.encode() in content]
    assert b"RAYINTERP_TEST_KEY" in (folder / "run.yaml").read_bytes()


@pytest.mark.parametrize(
    "override",
    [
        f"llms.knows.base_url=https://user:{CANARY}@host/v1",
        f"llms.knows.base_url=https://host/v1?key={CANARY}",
        f"run_dir=s3://id:{CANARY}@bucket/run",
        f"run_dir=s3://id:half/{CANARY}@bucket/run",
        f"job.env={{HTTPS_PROXY: 'http://user:{CANARY}@proxy'}}",
        f"run_dir=https://host/run?sig={CANARY}",
        f"corpus.dataset=s3://id:{CANARY}@bucket/texts",
        f"corpus.dataset=zip://a.jsonl::https://{CANARY}@host/a.zip",
        f"llms.knows.api_key={CANARY}",
    ],
)
def test_a_key_in_a_config_is_refused_and_not_repeated(override):
    field = override.partition("=")[0]
    with pytest.raises(UserError, match=re.escape(field)) as error:
        load_config(CONFIGS / "planted.yaml", [override])
    assert CANARY not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    "run_dir",
    ["/data/a?b@c:d", "s3://bucket/run", "abfs://container@account.dfs.core.windows.net/run", "memory://run", "runs/x"],
)
def test_addresses_without_a_secret_are_taken(run_dir):
    assert load_config(CONFIGS / "planted.yaml", [f"run_dir={run_dir}"]).run_dir == run_dir


# pages and terminals

HOSTILE = (
    "<script>alert(1)</script></style></pre></template><style>*{display:none}</style>"
    "\"><img src=x onerror=alert(2)> javascript:alert(3) ' onmouseover=alert(4) x=' <!-- <![CDATA[ &lt;b&gt; "
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\ \x1b[31mred\x1b[2J \x07 \x9b31m \u202etxt.exe\u2066 [red]markup[/red]"
)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]")


class Structure(HTMLParser):
    """Tags and names of attributes of a page, and where its links lead."""

    def __init__(self, html):
        super().__init__()
        self.seen, self.links, self.text = Counter(), [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen[tag, tuple(name for name, _ in attrs)] += 1
        self.links += [value for name, value in attrs if name in ("href", "src", "action", "srcset", "xlink:href")]

    def handle_comment(self, data):
        self.seen["comment", ()] += 1

    def handle_data(self, data):
        self.text += data


def written(folder, text, monkeypatch):
    """A run whose tokens, explanations, LLM answers and thoughts all hold a text."""
    monkeypatch.setattr(test_report, "HOSTILE", text)
    config = test_report.small_config(str(folder))
    tables = Tables(config.run_dir)
    test_report.write_run(tables, config)
    return tables, config


def test_a_report_has_the_same_structure_whatever_texts_and_answers_hold(tmp_path, monkeypatch):
    pages = [
        Path(write_report(*written(tmp_path / name, text, monkeypatch))).read_text()
        for name, text in (("hostile", HOSTILE), ("harmless", "harmless"))
    ]
    hostile, harmless = map(Structure, pages)
    assert hostile.seen == harmless.seen
    assert all(link.startswith("#") for link in hostile.links)
    assert hostile.text.count("onerror=alert(2)") > 5, "shown, as text"
    assert not [name for _, names in hostile.seen for name in names if name.startswith("on")]


def test_a_terminal_is_sent_no_control_characters(tmp_path, monkeypatch):
    tables, config = written(tmp_path, HOSTILE, monkeypatch)
    said = io.StringIO()
    show_feature(tables, config, "layer_9/1", Console(file=said, width=1000))
    assert "alert(1)" in said.getvalue() and "[red]markup[/red]" in said.getvalue()
    assert not CONTROLS.findall(said.getvalue())


def test_what_is_shown_holds_no_control_characters():
    everything = "".join(map(chr, range(0x3000)))
    assert not CONTROLS.findall(visible(everything))
    assert not CONTROLS.findall(_printable(HOSTILE)) and "alert(1)" in _printable(HOSTILE)
    assert visible("plain text – ünïcode") == "plain text – ünïcode"
