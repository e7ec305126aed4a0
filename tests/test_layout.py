"""Imports go one way along the flow, and Ray and Lance stay in their rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import rayinterp

ROOT = Path(rayinterp.__file__).parent

ORDER = [
    "errors", "feature_id", "progress", "config", "pools", "tables", "explanation", "embedded", "prompts",
    "simulate.simulator", "usage", "share", "plan", "plan_table",
    "hook_points", "saes", "subject", "planted_language", "planted", "planted_subject",
    "documents", "corpus", "postings", "harvest", "nearest", "projection",
    "sources", "index", "sizes", "records", "retrieve", "holistic", "score", "complexity", "controls", "simulate",
    "explain", "rule_negatives", "grade_plan", "grade", "rating", "scorers",
    "report_data", "report_cards", "report", "experiments", "show", "preflight", "run", "tune", "submit", "cli",
]  # fmt: skip
"""Each module may import from those before it."""


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree, runtime_only=True):
    skipped = {
        inner
        for node in ast.walk(tree)
        if runtime_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(name):
    """The longest entry of ORDER that names the module or its package."""
    fitting = [entry for entry in ORDER if name == entry or name.startswith(entry + ".")]
    return ORDER.index(max(fitting, key=len)) if fitting else None


def test_imports_go_up_the_list():
    known = {name for name, _ in modules()}
    for name, tree in modules():
        if name == "__init__":
            continue
        assert place(name) is not None, f"{name} has no place in ORDER"
        for imported in imports(tree):
            target = imported.removeprefix("rayinterp.")
            if imported.startswith("rayinterp.") and target in known and target.split(".")[0] != name.split(".")[0]:
                assert place(target) < place(name), f"{name} imports {target}"


def test_lance_and_ray_stay_in_their_rooms():
    ray_rooms = {
        "progress", "pools", "tables", "corpus", "harvest", "index", "records", "holistic", "rule_negatives",
        "grade", "run", "tune", "simulate.serve", "simulate.client", "explain.runner", "explain.actor",
        "explain.local", "explain.served",
        "explain.status", "scorers.actor", "scorers.runner", "submit",
    }  # fmt: skip
    for name, tree in modules():
        top = {imported.split(".")[0] for imported in imports(tree)}
        assert name == "tables" or not top & {"lance", "lancedb", "lance_ray"}, name
        assert name in ray_rooms or "ray" not in top, name


def test_the_library_does_not_print_or_seed():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "breakpoint", "np.random.seed", "random.seed"}, name


def test_gpu_modules_import_with_torch_and_transformers_alone():
    heavy = ["ray", "lance", "lancedb", "pydantic", "jaxtyping", "sae_lens", "sentence_transformers"]
    names = ["rayinterp.subject", "rayinterp.simulate.prompt_tree", "rayinterp.simulate.transformers"]
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError("not on a bare GPU machine: " + name)
sys.meta_path.insert(0, Refuse())
for name in {names!r}:
    __import__(name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_workers_without_a_model_wait_for_none():
    heavy = {"torch", "transformers", "openai", "ray.data", "lancedb", "lance_ray", "sentence_transformers", "sae_lens"}
    rooms = ["corpus", "records", "explain.actor", "explain.rows", "grade", "rule_negatives", "scorers.actor"]
    names = [*(f"rayinterp.{room}" for room in rooms), "tests.explain.fakes", "tests.scorers.fakes"]
    code = f"""
import sys
for name in {names!r}:
    __import__(name)
    loaded = {heavy!r} & set(sys.modules)
    assert not loaded, f"{{name}} loads {{loaded}}"
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_public_surface_is_the_chosen_list():
    assert sorted(rayinterp.__all__) == rayinterp.__all__
    for name in rayinterp.__all__:
        assert getattr(rayinterp, name).__name__ == name
