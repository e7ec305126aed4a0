"""The plan of small configs with sizes written by hand: what it says can be worked out on paper."""

import json
import math

import pytest
from rich.console import Console
from transformers import BertConfig, GPT2Config, LlamaConfig

from rayinterp.config import RunConfig, load_config, parse_config
from rayinterp.errors import UserError
from rayinterp.plan import (
    CONSTANTS,
    START_SECONDS,
    ModelSize,
    SaeSizes,
    Sizes,
    StagePlan,
    assumptions,
    by_stage,
    calls_of_a_feature,
    features_with_llm,
    nodes_per_round,
    plan_run,
    total,
)
from rayinterp.plan_table import beyond_budget, dollars, duration, plan_as_json, short, show_plan
from rayinterp.sizes import count, deepest, measure, parse_params
from tests.conftest import CONFIGS

SIZES = Sizes(
    num_cores=2,
    saes=SaeSizes(num_saes=2, num_features=100, d_sae=16384, num_params=1e6),
    models={
        "subject.model": ModelSize(5e9, 4096, 24),
        "index.embedder": ModelSize(85e6, 768, 12),
        "simulators.late.embedder": ModelSize(10e6, 384, 6),
        "simulators.judge.model": ModelSize(4e9, 2560, 36),
        "llms.own.model": ModelSize(7e9, 4096, 32, head_params=5e8),
    },
)
PRICES = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 4.0}


def config_of(**sections) -> RunConfig:
    data = {
        "name": "a run",
        "run_dir": "nowhere",
        "subject": {"model": "some/model", "saes": {"sae_id": "sae_{layer}", "layers": [0, 23]}, "features": 50},
        "corpus": {"dataset": "texts", "num_sequences": 100_000},
        "llms": {"writer": {"provider": "openai", "model": "w", **PRICES}, "own": {"provider": "local", "model": "o"}},
        "simulators": {"late": {"engine": "late_interaction"}, "judge": {"engine": "transformers", "model": "j"}},
        "explainers": {
            "lexical": {"method": "lexical", "simulator": "late"},
            "tree": {"method": "tree", "llm": "writer", "simulator": "judge"},
        },
        "score": {"simulators": ["late", "judge"]},
        "resources": {"harvest": {"num_actors": 2, "num_gpus": 1}, "simulator": {"num_actors": 3, "num_gpus": 1}},
    }
    for section, content in sections.items():
        data[section] = content if section in ("explainers", "llms") else {**data.get(section, {}), **content}
    return parse_config(data)


def stages(sizes: Sizes = SIZES, **sections) -> dict[str, StagePlan]:
    return {plan.stage: plan for plan in plan_run(config_of(**sections), sizes)}


def test_the_harvest_is_tokens_times_flops_over_speed():
    harvest = stages()["harvest"]
    tokens = 100_000 * 33
    flops = tokens * (2 * 5e9 + 4 * 32 * 4096 * 24 + 2 * 1e6)
    assert harvest.num_tokens == tokens
    assert harvest.flops == pytest.approx(flops)
    working = flops / (2 * 312e12 * CONSTANTS["gpu subject"].value)
    assert harvest.seconds == pytest.approx(START_SECONDS["harvest"] + working)
    assert harvest.gpu_hours == pytest.approx(2 * harvest.seconds / 3600)
    assert harvest.num_bytes == pytest.approx(100_000 * 32 * 100 * 64 / 16384 * 13.4)


def test_twice_the_sequences_are_twice_the_work_up_to_records():
    one, two = stages(), stages(corpus={"num_sequences": 200_000})
    for stage in ("corpus", "harvest", "index"):
        assert two[stage].num_tokens == 2 * one[stage].num_tokens
        assert two[stage].num_bytes == pytest.approx(2 * one[stage].num_bytes)
        start = START_SECONDS[stage]
        assert two[stage].seconds - start == pytest.approx(2 * (one[stage].seconds - start))
    assert two["explain"] == one["explain"]


def test_twice_the_features_are_twice_the_records_calls_and_pairs():
    more = SIZES._replace(saes=SIZES.saes._replace(num_features=200))
    one, two = stages(), stages(more)
    assert two["records"].num_bytes == pytest.approx(2 * one["records"].num_bytes)
    for field in ("num_pairs", "llm_calls", "llm_tokens", "usd"):
        assert getattr(two["explain"], field) == pytest.approx(2 * getattr(one["explain"], field))
    assert two["score"].num_pairs == pytest.approx(2 * one["score"].num_pairs)


def test_more_gpus_take_less_time_and_cpus_stand_in_where_there_are_none():
    four = stages(resources={"harvest": {"num_actors": 4, "num_gpus": 1}})["harvest"]
    two = stages()["harvest"]
    start = START_SECONDS["harvest"]
    assert two.seconds - start == pytest.approx(2 * (four.seconds - start))
    faster = stages(resources={"harvest": {"num_actors": 2, "num_gpus": 1}, "gpu_tflops": 624})["harvest"]
    assert faster.seconds == pytest.approx(four.seconds)
    cpu = stages(resources={"harvest": {"num_actors": 2}})["harvest"]
    assert cpu.gpu_hours == 0
    assert cpu.seconds - start == pytest.approx(cpu.flops / (2 * CONSTANTS["cpu subject"].value))


def test_without_an_llm_arm_there_are_no_calls_and_no_dollars():
    explain = stages(explainers={"lexical": {"method": "lexical", "simulator": "late"}})["explain"]
    assert (explain.llm_calls, explain.llm_tokens, explain.usd, explain.gpu_hours) == (0, 0, 0, 0)
    assert explain.num_pairs == 100 * 5 * (30 + 30)  # rules, records of train and valid


def test_the_calls_of_a_tree_are_counted_by_rounds():
    config = config_of()
    assert nodes_per_round(config.explainers["lexical"]) == [1]
    # Three LLM roots and a lexical one; then three kept nodes with two children each.
    assert nodes_per_round(config.explainers["tree"]) == [4, 6, 6, 6]
    assert calls_of_a_feature(config)["writer"].num_calls == 3 + 18
    narrow = config_of(
        explainers={"t": {"method": "tree", "llm": "writer", "simulator": "late", "num_llm_roots": 1,
            "lexical_root": False, "depth": 2}},
    )  # fmt: skip
    # One root has two children; of those three, three are kept.
    assert nodes_per_round(narrow.explainers["t"]) == [1, 2, 6]


def test_a_root_that_two_arms_ask_for_is_paid_for_once():
    tree = {"method": "tree", "llm": "writer", "simulator": "late", "depth": 0, "num_llm_roots": 2}
    one_shot = {"method": "one_shot", "llm": "writer", "simulator": "late"}
    shared = config_of(explainers={"one_shot": one_shot, "tree": tree})
    apart = config_of(explainers={"one_shot": {**one_shot, "temperature": 0.5}, "tree": tree})
    assert calls_of_a_feature(shared)["writer"].num_calls == 2
    assert calls_of_a_feature(apart)["writer"].num_calls == 3


def test_max_calls_caps_the_calls_at_whole_features():
    writer = {"provider": "openai", "model": "w", **PRICES}
    config = config_of(llms={"writer": {**writer, "max_calls": 100}})
    # 21 nodes, each asked at most twice: two features.
    assert features_with_llm(config, 100) == 2
    assert stages(llms={"writer": {**writer, "max_calls": 100}})["explain"].llm_calls == 2 * 21
    assert stages(llms={"writer": {**writer, "max_calls": 5}})["explain"].llm_calls == 0


def test_dollars_are_tokens_by_price_and_gpu_hours_by_theirs():
    one, dear = stages(), stages(budget={"usd_per_gpu_hour": 3.0})
    twice = {name: 2 * price for name, price in PRICES.items()}
    priced = stages(llms={"writer": {"provider": "openai", "model": "w", **twice}})
    assert priced["explain"].usd == pytest.approx(2 * one["explain"].usd)
    assert one["harvest"].usd == 0
    assert dear["harvest"].usd == pytest.approx(3 * one["harvest"].gpu_hours)
    assert dear["explain"].usd == pytest.approx(one["explain"].usd + 3 * one["explain"].gpu_hours)
    unpriced = stages(llms={"writer": {"provider": "openai", "model": "w"}})
    assert unpriced["explain"].usd is None
    assert unpriced["explain"].llm_calls == one["explain"].llm_calls


def test_a_service_holds_its_gpus_in_every_stage_from_the_first_that_asks_it():
    explain, score = (stages()[stage] for stage in ("explain", "score"))
    for plan in (explain, score):
        assert plan.gpu_hours == pytest.approx(3 * plan.seconds / 3600)
    tree = {"method": "tree", "llm": "writer", "simulator": "late"}
    assert stages(explainers={"tree": tree})["explain"].gpu_hours == 0  # late interaction takes none
    assert stages(explainers={"tree": tree})["score"].gpu_hours > 0


def test_a_model_of_our_own_reads_and_writes_here():
    own = {"tree": {"method": "tree", "llm": "own", "simulator": "late"}}
    explain, endpoint = stages(explainers=own)["explain"], stages()["explain"]
    assert (explain.usd, explain.llm_calls) == (0, endpoint.llm_calls)
    assert explain.flops > 2 * 7e9 * explain.llm_tokens
    assert explain.seconds > explain.llm_tokens * 2 * 7e9 / (2 * CONSTANTS["cpu llm"].value)


def test_a_cascade_spares_the_simulator():
    tree = {"method": "tree", "llm": "writer", "simulator": "judge"}
    cascade = {**tree, "cascade": {"simulator": "late", "keep": 1, "audit": 0.0}}
    audited = {**tree, "cascade": {"simulator": "late", "keep": 1, "audit": 1.0}}
    whole, spared, all_audited = (stages(explainers={"tree": arm})["explain"].flops for arm in (tree, cascade, audited))
    assert spared < whole / 2 < whole < all_audited  # the first look is paid for too


def test_halving_spares_pairs_and_a_falsifier_takes_some():
    tree = {"method": "tree", "llm": "writer", "simulator": "judge"}
    halving = {**tree, "strategy": "successive_halving", "halving": {"simulator": "late", "num_looks": 1}}
    falsified = {**tree, "falsifier": {"num_drawn": 10, "num_finalists": 4, "num_valid": 5}}
    counts = [stages(explainers={"tree": arm})["explain"].num_pairs for arm in (tree, halving, falsified)]
    whole, halved, attacked = counts
    assert halved < whole
    # 3 rounds of 3 candidates on 3 x 10 records, then 4 finalists on 4 x 5: with 5 rules each, on 100 features.
    assert attacked - whole == pytest.approx((3 * 3 * 30 + 4 * 20) * 5 * 100)


def test_budgets_of_a_grader_cap_its_pairs():
    judge = {"engine": "transformers", "model": "j", "max_pairs": 300}
    only = {"simulators": ["judge"]}
    assert stages(simulators={"judge": judge}, score=only)["score"].num_pairs == 300
    few = stages(simulators={"judge": {**judge, "max_pairs": None, "num_features": 1}}, score=only)["score"]
    all_ = stages(score=only)["score"]
    assert few.num_pairs == pytest.approx(all_.num_pairs / 50)  # one of 50 features of each SAE


def test_holistic_passes_are_a_part_of_records():
    planned = plan_run(config_of(records={"holistic": "positive"}), SIZES)
    by_name = {plan.stage: plan for plan in planned}
    sequences = 100 * 10
    assert by_name["holistic"].num_tokens == sequences * (33 + 32 * 31 / 2)
    assert "holistic" not in by_stage(planned)
    assert by_stage(planned)["records"].seconds == by_name["records"].seconds + by_name["holistic"].seconds
    assert "holistic" not in stages()


def test_an_unknown_model_is_unknown_and_never_free():
    models = {field: size for field, size in SIZES.models.items() if field != "subject.model"}
    planned = stages(SIZES._replace(models=models))
    assert planned["harvest"].flops is planned["harvest"].seconds is planned["harvest"].gpu_hours is None
    assert planned["harvest"].num_tokens and planned["harvest"].num_bytes
    assert planned["index"].seconds and planned["explain"].llm_calls
    assert total(list(planned.values())).seconds is None
    nothing = stages(Sizes(2, SaeSizes(), {}))
    assert nothing["explain"].llm_calls is nothing["explain"].usd is nothing["records"].num_bytes is None
    assert not any(isinstance(v, float) and math.isnan(v) for plan in nothing.values() for v in plan[1:])


def test_the_table_and_the_json_say_the_same():
    config = config_of(budget={"max_hours": 0.01, "max_gpu_hours": 1e6})
    planned, said = plan_run(config, SIZES), assumptions(config, SIZES)
    console = Console(record=True, width=60)
    show_plan(config, planned, said, console)
    text = console.export_text()
    content = json.loads(plan_as_json(config, planned, said))
    assert content["total"]["flops"] == pytest.approx(sum(stage["flops"] for stage in content["stages"]))
    assert short(content["total"]["flops"]) in text
    for stage in content["stages"]:
        assert stage["stage"] in text
    assert all(line in text for line in content["assumptions"])
    assert [line.split()[0] for line in content["beyond_budget"]] == ["budget.max_hours"]
    assert "A100" not in text and "312" in text


def test_the_total_of_a_table_says_that_there_is_more():
    config = config_of()
    console = Console(record=True, width=120)
    models = {field: size for field, size in SIZES.models.items() if field != "subject.model"}
    show_plan(config, plan_run(config, SIZES._replace(models=models)), [], console)
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("total")]
    assert line.count(">") == 3  # FLOPs, time, GPU-hours
    assert beyond_budget(config_of(budget={"max_hours": 0.01}), plan_run(config, Sizes(2, SaeSizes(), {}))) == []


def test_numbers_are_short():
    assert [short(n) for n in (0, 42, 999.6, 1234, 3.174e6, 5.93e16, None)] == [
        *("0", "42", "1 k", "1.23 k", "3.17 M", "59.3 P", "unknown")
    ]
    assert short(724_000, "B") == "724 kB"
    assert [duration(s) for s in (4.4, 99, 108, 720, 7200, None)] == [
        *("4 s", "99 s", "1.8 min", "12 min", "2.0 h", "unknown")
    ]
    assert [dollars(d) for d in (0, 0.126, 1234.5)] == ["0", "0.13", "1,234.50"]


def test_parameters_are_counted_without_weights_and_without_embeddings():
    llama = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=1000,
    )  # fmt: skip
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert count(llama) == ModelSize(4 * layer + 64, 64, 4, 64_000)
    assert count(llama, 2) == ModelSize(2 * layer + 64, 64, 2, 64_000)
    assert llama.num_hidden_layers == 4
    gpt2 = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=500, n_positions=64)
    assert 12 * 48 * 48 * 2 < count(gpt2).num_params < 13 * 48 * 48 * 2  # positions are looked up
    bert = BertConfig(hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    assert count(bert).d_model == 48


def test_the_demo_is_measured_offline():
    sizes = measure(load_config(CONFIGS / "demo.yaml"))
    assert sizes.saes._replace(num_params=0) == SaeSizes(2, 18, 2048, 0)
    assert sizes.saes.num_params == 2 * 2048 * 576  # TopK meets every row
    assert sizes.models["subject.model"].num_layers == 10  # of 30: the deepest SAE reads after layer 9
    assert 3 * sizes.models["subject.model"].num_params == pytest.approx(
        sizes.models["simulators.smollm2.model"].num_params, rel=0.01
    )
    assert not sizes.notes


def test_a_model_that_cannot_be_reached_is_named_and_may_be_given(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config(CONFIGS / "gemma-2-9b.yaml")
    sizes = measure(config)
    assert "subject.model" not in sizes.models
    assert "subject.model (google/gemma-2-9b)" in sizes.notes[0] and "--params" in sizes.notes[0]
    # The release lists 42 layers: 21 even ones.
    assert sizes.saes[:3] == (21, 1050, 16384)
    planned = {plan.stage: plan for plan in plan_run(config, sizes)}
    assert planned["harvest"].flops is None and planned["explain"].usd > 0
    given = measure(config, {"subject.model": 9.2e9})
    assert given.models["subject.model"].num_params == pytest.approx(9.2e9 * 41 / 42)
    assert by_stage(plan_run(config, given))["harvest"].gpu_hours > 0


def test_parameters_that_are_no_number_or_nobodys_are_refused():
    assert parse_params(["9.2e9", "simulators.judge.model=4e9"]) == {
        "subject.model": 9.2e9,
        "simulators.judge.model": 4e9,
    }
    for value in ("many", "subject.model=-1", "subject.model="):
        with pytest.raises(UserError, match="--params"):
            parse_params([value])
    with pytest.raises(UserError, match=r"simulators\.nope\.model.*subject\.model"):
        measure(load_config(CONFIGS / "demo.yaml"), {"simulators.nope.model": 1e9})


def test_the_deepest_layer():
    assert [deepest(which, 42) for which in ("all", "even", "odd")] == [41, 40, 41]
    assert [deepest(which, 43) for which in ("all", "even", "odd")] == [42, 42, 41]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_can_be_planned_offline(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config(path)
    sizes = measure(config)
    assert [plan.stage for plan in plan_run(config, sizes) if plan.stage != "holistic"] == [
        *("corpus", "harvest", "index", "records", "explain", "score")
    ]
    assert all(assumptions(config, sizes))


def test_further_scorers_are_counted_by_their_questions():
    scorers = {
        "detection": {"method": "detection", "llm": "writer", "max_records": 20},
        "intruder": {"method": "intruder", "llm": "writer", "num_features": 10},
        "surprisal": {"method": "surprisal", "simulator": "judge"},
        "embedding": {"method": "embedding"},
    }
    plain, score = stages()["score"], stages(score={"scorers": scorers})["score"]
    # Two explainers, another feature's explanation for each and a null text; 20 records of each of 4 sources, 5 shown.
    detection = 100 * 5 * 80 / 5
    # Ten features of each SAE; every silent record: 30 of 2 sources and 10 that each of 2 explainers calls for.
    assert score.llm_calls == detection + 20 * (60 + 20)
    assert score.usd > 0 and plain.llm_calls == 0 and plain.usd == 0
    # 110 records behind five texts and behind none, each of the six texts once.
    tokens = 100 * 6 * (110 * 32 + CONSTANTS["surprisal prefix"].value)
    assert score.num_tokens - plain.num_tokens == pytest.approx(tokens)
    assert score.seconds > plain.seconds and score.gpu_hours > plain.gpu_hours
    none = stages(score={"scorers": scorers, "num_shuffled": 0, "num_rule_negatives": 0})["score"]
    assert none.llm_calls == 100 * 3 * 60 / 5 + 20 * 60


def test_max_calls_ends_a_further_scorer_at_whole_features():
    writer = {"provider": "openai", "model": "w", **PRICES, "max_calls": 100}
    one = {"method": "intruder", "llm": "writer", "max_records": 5}
    score = stages(llms={"writer": writer, "own": {"provider": "local", "model": "o"}}, score={"scorers": {"i": one}})
    assert score["score"].llm_calls == 15 * (100 // 30)


def test_an_endpoint_is_no_faster_than_its_limits_allow():
    def seconds(searches, **limits):
        llms = {"writer": {"provider": "openai", "model": "w", **PRICES, **limits}}
        explainers = {"one": {"method": "one_shot", "llm": "writer", "simulator": "late"}}
        resources = {"search": {"num_actors": 10}, "searches_per_actor": searches}
        planned = stages(SIZES._replace(num_cores=10**6), llms=llms, explainers=explainers, resources=resources)
        return planned["explain"].seconds - START_SECONDS["explain"]

    one_call = CONSTANTS["endpoint start"].value + 100 / CONSTANTS["endpoint writing"].value
    assert seconds(10, max_concurrency=20) == pytest.approx(100 * one_call / 20)
    assert seconds(1, max_concurrency=20) == pytest.approx(100 * one_call / 10), "ten searches are under way"
    assert seconds(10, max_concurrency=1) == pytest.approx(100 * one_call / 10), "each actor may make one call"
    assert seconds(10, max_concurrency=1000, requests_per_minute=2) == pytest.approx(100 * 30)


def test_the_cores_of_a_cluster_can_be_given():
    config = config_of()
    assert measure(config, {"subject.model": 5e9}, num_cores=640).num_cores == 640
    assert stages(SIZES._replace(num_cores=640))["records"].seconds < stages()["records"].seconds / 3
