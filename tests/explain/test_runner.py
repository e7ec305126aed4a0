import asyncio
import json
from collections import Counter

import pytest
import ray

from rayinterp.config import calls_per_feature
from rayinterp.errors import UserError
from rayinterp.explain import outage
from rayinterp.explain.client import LLMReply
from rayinterp.explain.outage import Outage
from rayinterp.explain.rows import NodeCommitter, arm_ids, explanation_row, why_not
from rayinterp.explain.runner import arms_left, features_with_llm, live_features, reopen, run_explain
from rayinterp.explain.search import Node, SearchSettings, TreeSearch
from rayinterp.explain.status import Account, Spent, Status
from rayinterp.explanation import Rule
from rayinterp.feature_id import FeatureId
from rayinterp.planted import FEATURES
from rayinterp.prompts import PLAIN_QUESTION
from rayinterp.tables import Committer, Tables
from tests.conftest import copy_upstream, planted_config
from tests.explain.fakes import Fakes, RealEndpoints
from tests.explain.faulty_endpoint import faulty_endpoint
from tests.explain.records import few_records

FEATURE = FeatureId("planted", 0)


def test_an_arm_is_not_run_where_it_cannot_succeed():
    records = few_records()
    assert why_not(records, over_budget=False) is None
    assert why_not(records, over_budget=True) == "no_budget"
    assert why_not({**records, "valid": []}, over_budget=False) == "no_records"
    assert why_not({**records, "valid": records["valid"][1:]}, over_budget=False) == "no_positives"


def test_an_explainer_is_named_by_its_simulator_and_llm_too(tmp_path):
    def name(*overrides):
        return arm_ids(planted_config(tmp_path, *overrides), "right")[0]

    late = "simulators.oracle={engine: late_interaction, embedder: embedded/minilm-l6}"
    assert name() != name(late)
    assert name() != name("llms.knows.model=other")
    assert name() == name("simulators.oracle.num_features=3", "llms.knows.max_calls=7")


def test_a_call_budget_reaches_the_first_features_only(tmp_path):
    features = [FeatureId("a", i) for i in range(10)]
    config = planted_config(tmp_path)
    assert features_with_llm(config, features) == set(features)
    # right and wrong: one call and a retry each; tree: two roots and 2 rounds of 3 kept nodes by 2.
    assert calls_per_feature(config) == (1 + 1 + 2 + 2 * 3 * 2) * 2
    limited = planted_config(tmp_path, "llms.knows.max_calls=100")
    assert features_with_llm(limited, features) == set(features[:3])


async def test_nodes_are_handed_over_once_and_as_they_end():
    written = []

    async def write(rows):
        written.append([row["node"] for row in rows])

    search = TreeSearch(SearchSettings(3, False, 1, 1, 0, 1.0))
    commit = NodeCommitter(FEATURE, ("e@1", "s@1"), write)
    search.ask()
    search.explained(0, None, "parse_error", thought="hm")
    await commit(search)
    search.explained(1, (Rule("b", 5),))
    search.explained(2, (Rule("a", 5),))
    await commit(search)
    search.ask()
    search.scored(2, 0.5, 0.4, "worse")
    await commit(search)
    await commit(search)
    assert written == [[0], [2]]
    assert explanation_row(FEATURE, ("e@1", "s@1"), search)["status"] == "ok"
    search.nodes[1].status = "llm_error"  # answered the next time, it would lead elsewhere: nothing more is final
    search.nodes.append(Node(3, "revision", 2, 1, (Rule("c", 5),), "ok"))
    await commit(search)
    assert written == [[0], [2]]
    assert [(row["node"], row["status"]) for row in commit.rest(search)] == [(1, "llm_error"), (3, "ok")]
    row = explanation_row(FEATURE, ("e@1", "s@1"), search)
    assert row["num_candidates"] == 4 and row["explanation"] is not None
    assert row["status"] == "llm_error", "a winner among the few that there are does not settle the feature"


def test_the_account_survives_an_actor_that_was_started_anew(ray_session):
    @ray.remote(num_cpus=0)
    class Spender:
        def __init__(self):
            self.now = Spent()

        def set(self, calls, usd):
            self.now = Spent(calls=calls, usd=usd, pairs=10 * calls)

        def spent(self):
            return self.now

    spender = Spender.remote()
    account = Account([spender])
    totals = []
    for calls in (3, 5, 1):
        ray.get(spender.set.remote(calls, calls / 10))
        totals.append(account.read(at_once=True))
    assert [spent.calls for spent in totals] == [3, 5, 6]
    assert totals[-1].usd == pytest.approx(0.6) and totals[-1].pairs == 60


def test_the_status_says_how_far_it_is_and_how_well_it_does():
    status = Status(total=10, done=4)
    status.take([0.2], finished=True)
    status.take([0.9, 0.4], finished=True)
    status.take([], finished=False)
    status.spent = Spent(calls=1200, usd=1.5)
    figures = status.figures(pending=3, running=1, stopped_by=None)
    assert figures["features"] == "3 pending, 1 running, 6 done"
    assert figures["valid score"] == "median 0.40, best 0.90"
    assert figures["LLM calls"] == "1,200" and figures["cost"] == "$1.50" and figures["tried again"] == "1"
    assert "stopping" not in figures and "simulated" not in figures


# The stage itself, on the planted run's records, with services of its own.


TREE = "explainers={t: {method: tree, llm: knows, simulator: oracle, num_llm_roots: 2, depth: 1, width: 1}}"
PRICES = ("llms.knows.usd_per_million_prompt_tokens=1e5", "llms.knows.usd_per_million_completion_tokens=0")
"""A dollar a call."""


@pytest.fixture
def copied(planted_run, tmp_path):
    return copy_upstream(planted_run, tmp_path / "run")


def explain(folder, services, *overrides, over_budget=lambda usd: None):
    config = planted_config(folder, TREE, *overrides)
    tables = Tables(str(folder))
    committer = ray.remote(Committer).options(num_cpus=0).remote(tables)
    reopen(config, tables, over_budget)
    figures = []
    try:
        counts = run_explain(
            config, tables, committer, lambda d, t, note="": figures.append(note), over_budget, services
        )
    finally:
        ray.kill(committer)
    return counts, tables, figures


def test_a_feature_on_which_calls_fail_is_tried_again_at_no_cost(copied):
    bill = copied.parent / "bill"
    # Of one root, then of another node.
    services = Fakes({"planted/1": 1, "planted/2": 1}, bill=bill)
    counts, tables, figures = explain(copied, services, "resources.searches_per_actor=1")
    assert counts == {"ok": 3}
    billed = bill.read_text().split()
    assert sorted(billed) == sorted(tables.read("llm_calls")["request_hash"].to_pylist())
    assert not tables.count("candidates", "status = 'llm_error'")
    assert figures[-2]["tried again"] == "2"


def test_a_feature_that_keeps_failing_has_a_row_while_others_go_on(copied):
    poisoned = Fakes({"planted/1": 10**6}, poisoned=10**6)
    counts, tables, _ = explain(copied, poisoned, "resources.searches_per_actor=1")
    assert counts == {"llm_error": 1, "ok": 2}
    nodes = tables.read("candidates", where="feature_key = 'planted/1'").to_pylist()
    assert {(node["kind"], node["status"]) for node in nodes} == {("lexical", "undefined"), ("llm", "llm_error")}


@pytest.mark.parametrize("transient", [True, False])
def test_features_that_the_llm_never_answers_hold_nobody_up_and_are_tried_by_the_next_run(
    copied, monkeypatch, transient
):
    monkeypatch.setattr(outage, "MAX_FAILURES", 2)  # as many features as fail one after the other
    one_at_a_time = ("resources.search.num_actors=1", "resources.searches_per_actor=1")
    poisoned = Fakes({"planted/1": 10**6, "planted/2": 10**6}, transient=transient, poisoned=10**6)
    for _ in range(2):  # the second begins with these two
        counts, tables, _ = explain(copied, poisoned, *one_at_a_time, "resources.max_outage_seconds=0")
        assert counts == {"llm_error": 2, "ok": 1}
    assert PLAIN_QUESTION["content"] not in str(tables.read("llm_calls").to_pylist())
    counts, tables, _ = explain(copied, Fakes(), *one_at_a_time)
    assert counts == {"ok": 3} and not tables.count("candidates", "status = 'llm_error'")


def test_an_outage_in_the_last_try_of_a_feature_leaves_no_trace(copied, monkeypatch):
    monkeypatch.setattr(outage, "PAUSE_SECONDS", 0.5)
    # Two calls a try: in the third, which would go on without answers, the LLM goes down.
    services = Fakes({"planted/1": 20}, poisoned=4)
    one_at_a_time = ("resources.search.num_actors=1", "resources.searches_per_actor=1")
    counts, tables, _ = explain(copied, services, *one_at_a_time)
    assert counts == {"ok": 3}
    assert not tables.count("candidates", "status = 'llm_error'")


@pytest.mark.parametrize("transient", [True, False])
def test_an_llm_that_never_answers_ends_the_stage_and_leaves_no_row(copied, transient):
    everywhere = {f"planted/{i}": 10**6 for i in range(3)}
    with pytest.raises(UserError, match="RateLimitError 429"):
        explain(copied, Fakes(everywhere, transient=transient))
    assert Tables(str(copied)).count("explanations") == 0


@pytest.mark.parametrize("max_failures", [2, 5])
def test_an_outage_is_waited_out_and_leaves_no_trace(copied, monkeypatch, max_failures):
    monkeypatch.setattr(outage, "MAX_FAILURES", max_failures)
    monkeypatch.setattr(outage, "PAUSE_SECONDS", 0.5)
    pauses, failed = [], Outage.failed
    monkeypatch.setattr(Outage, "failed", lambda self, *args: failed(self, *args) or pauses.append(self.down))
    services = Fakes({"planted/1": 16, "planted/2": 16})  # more than any number of tries
    counts, tables, _ = explain(copied, services, "resources.searches_per_actor=1")
    assert counts == {"ok": 3} and pauses.count(True) >= 5
    assert not tables.count("candidates", "status = 'llm_error'")


def test_a_budget_ends_searches_with_what_they_have_and_more_of_it_goes_on(copied):
    told = copied.parent / "told"

    def limit(usd):
        def over_budget(spent):
            if spent < usd:
                return None
            told.touch()
            return f"budget.max_usd is {usd}"

        return over_budget

    class Slow(Fakes):
        """Each answer is a little better than the one before it, so that a search would go on."""

        def __call__(self, *arguments):
            services, calls = super().__call__(*arguments), Counter()

            async def generate(request, feature_key):
                calls[feature_key] += 1
                while calls[feature_key] > 2 and not told.exists():  # the account is looked at now and then
                    await asyncio.sleep(0.05)
                await asyncio.sleep(1.0)
                truth = FEATURES[FeatureId.parse(feature_key).index].truth[0].activates_on
                wrong = "citrus fruits" if feature_key == "planted/0" else "words about ships and the sea"
                rules = [(truth, 5), (wrong, max(5 - calls[feature_key] // 2, 0))]
                content = [{"activates_on": text, "strength": strength} for text, strength in rules]
                return LLMReply(json.dumps(content), "stop", 10, 10)

            return services._replace(llms=dict.fromkeys(services.llms, generate))

    slow = Slow()
    one_at_a_time = ("resources.searches_per_actor=1", "explainers.t.depth=9", "explainers.t.stop_score=1", *PRICES)
    counts, tables, figures = explain(copied, slow, *one_at_a_time, over_budget=limit(2))
    assert counts == {"budget": 1, "no_budget": 2}
    assert any("budget.max_usd is 2" in figure.get("stopping", "") for figure in figures if figure)
    (cut,) = tables.read("explanations", where="status = 'budget'").to_pylist()
    assert cut["explanation"] is not None and cut["num_candidates"] >= 3
    paid = tables.count("llm_calls")
    config = planted_config(copied, TREE, *one_at_a_time)
    assert not arms_left(config, tables, live_features(tables))
    counts, tables, _ = explain(copied, slow, *one_at_a_time, over_budget=limit(2))  # the same budget: nothing more
    assert counts == {"budget": 1, "no_budget": 2} and tables.count("llm_calls") == paid
    counts, tables, _ = explain(copied, slow, *one_at_a_time, over_budget=limit(1000))
    assert counts == {"ok": 3}
    hashes = tables.read("llm_calls")["request_hash"].to_pylist()
    assert len(hashes) == len(set(hashes)) > paid


def test_what_is_searched_again_is_graded_again_with_all_its_arms_and_nothing_else_is(copied):
    arms = "explainers={t: {method: lexical, simulator: oracle}, u: {method: one_shot, llm: knows, simulator: oracle}}"
    config, tables = planted_config(copied, arms), Tables(str(copied))
    cut, finished = arm_ids(config, "t")[0], arm_ids(config, "u")[0]
    statuses = {(cut, 0): "budget", (finished, 0): "ok", (cut, 1): "ok", (finished, 1): "ok", ("other@1", 0): "ok"}
    for number, ((arm, index), status) in enumerate(statuses.items()):
        row = {"feature_key": f"planted/{index}", "explainer": arm, "simulator": "s@1"}
        tables.append("explanations", [{**row, "status": status}])
        tables.append("candidates", [{**row, "node": 0}])
        tables.append("scores", [{**row, "control": "", "scorer": "r2", "source": "s", "split": "test"}])
        tables.append("test_records", [{"feature_key": row["feature_key"], "explainer": arm, "sequence_id": number}])
    reopen(config, tables, lambda usd: None)

    def left(table):
        rows = tables.read(table, ["explainer", "feature_key"]).to_pylist()
        return {(row["explainer"], int(row["feature_key"][-1])) for row in rows}

    assert left("explanations") == left("candidates") == statuses.keys() - {(cut, 0)}
    # What the winner of before called for goes; what others did is called for again, by the winners of then.
    assert left("test_records") == left("scores") == {(cut, 1), (finished, 1), ("other@1", 0)}


def test_a_falsifier_in_the_loop_finds_silent_sequences_that_sound_like_the_rule(copied):
    falsifier = "explainers.t.falsifier={num_drawn: 20, num_added: 3}"
    mistaken = planted_config(copied, TREE, falsifier)

    class Mistaken(Fakes):
        def __call__(self, *arguments):
            services = super().__call__(*arguments)

            async def generate(request, feature_key):
                rules = [("words about ships and the sea", request.seed % 2 + 4), ("citrus fruits", 0)]
                content = [{"activates_on": text, "strength": strength} for text, strength in rules]
                return LLMReply(json.dumps(content), "stop", 10, 10)

            async def retrieve(requests):  # where a rule says that the feature is silent, nothing need be shown
                assert {text for request in requests for text in request.texts} == {"words about ships and the sea"}
                return await services.retrieve(requests)

            return services._replace(llms=dict.fromkeys(mistaken.llms, generate), retrieve=retrieve)

    _, tables, _ = explain(copied, Mistaken(), falsifier, "explainers.t.lexical_root=false")
    rows = {row["feature"]: row for row in tables.read("explanations").to_pylist()}
    assert rows[2]["num_falsifiers"] == 3  # it is silent where there are ships
    assert rows[0]["num_falsifiers"] == 0  # there the rule is true
    revised = tables.read("candidates", where="feature_key = 'planted/2' and kind = 'revision'").to_pylist()
    assert revised and all("stays silent" in node["feedback"] for node in revised)


def test_a_faulty_endpoint_leaves_every_feature_with_a_row_and_scores_only_what_was_parsed(copied, monkeypatch):
    monkeypatch.setenv("RAYINTERP_TEST_KEY", "sk-canary-7")
    good = '[{"activates_on": "words about ships and the sea", "strength": 4}]'
    seen = []
    with faulty_endpoint(3, 0.3, good, hang_seconds=1.0, seen=seen) as url:
        endpoint = (
            f"llms.faulty={{provider: openai, model: m, base_url: '{url}', api_key_env: RAYINTERP_TEST_KEY, "
            "max_retries: 2, timeout_seconds: 0.5}"
        )
        tree = "explainers={t: {method: tree, llm: faulty, simulator: oracle, num_llm_roots: 5, depth: 2}}"
        counts, tables, _ = explain(copied, RealEndpoints(), endpoint, tree)
    assert sum(counts.values()) == 3
    assert {fault for fault, _ in seen} > {"", "rate_limit", "malformed"}
    for node in tables.read("candidates", where="kind <> 'lexical'").to_pylist():
        parsed = node["explanation"] is not None
        assert parsed == (node["status"] in ("ok", "undefined", "duplicate"))
        assert parsed or node["train_score"] is None
        assert not parsed or node["explanation"] == good
    for name in ("candidates", "explanations", "llm_calls"):
        assert "sk-canary-7" not in str(tables.read(name).to_pylist())
