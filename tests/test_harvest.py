import json
import shutil

import numpy as np
import pytest
import torch

from rayinterp.errors import UserError
from rayinterp.harvest import (
    Harvester,
    SameDtype,
    _harvest_shards,
    batch_size,
    check_finite,
    check_reconstruction,
    check_same_dtype,
    choose_features,
    count_outliers,
    load_subject,
)
from rayinterp.planted import FEATURES, VOCABULARY, fires
from rayinterp.postings import ACCURACY, MARKER, QUANTILES
from rayinterp.progress import silent
from rayinterp.subject import SubjectCheck, sparsify
from rayinterp.tables import Tables
from tests.conftest import planted_config


def test_a_count_is_a_seeded_sample_not_the_first_features(tmp_path):
    config = planted_config(tmp_path, "subject.features=20")
    chosen = choose_features(config, "layer_1", 1000)
    assert chosen == choose_features(config, "layer_1", 1000) == sorted(set(chosen))
    assert len(chosen) == 20
    assert chosen != list(range(20))
    assert chosen != choose_features(config, "layer_2", 1000)
    assert chosen != choose_features(config.model_copy(update={"seed": 1}), "layer_1", 1000)


@pytest.mark.parametrize(
    ("features", "chosen"), [("all", [0, 1, 2, 3, 4]), ("[3,1]", [1, 3]), ("{start: 1, stop: 3}", [1, 2])]
)
def test_features_are_chosen_by_list_range_or_all(tmp_path, features, chosen):
    assert choose_features(planted_config(tmp_path, f"subject.features={features}"), "a", 5) == chosen


@pytest.mark.parametrize("features", ["6", "[0, 5]", "{start: 4, stop: 6}"])
def test_a_feature_beyond_the_width_is_refused(tmp_path, features):
    with pytest.raises(UserError, match=r"subject\.features.*SAE a"):
        choose_features(planted_config(tmp_path, f"subject.features={features}"), "a", 5)


def test_a_bad_reconstruction_stops_the_harvest_and_names_likely_causes():
    for share in (0.3, None):
        check_reconstruction({"a": SubjectCheck(share, 1.0)}, 0.5)
    for share in (0.9, float("nan")):
        with pytest.raises(UserError, match="wrong hook point"):
            check_reconstruction({"a": SubjectCheck(share, 1.0)}, 0.5)


def test_outlier_tokens_are_counted_and_the_most_frequent_named():
    token_ids = torch.tensor([[5, 6, 7], [5, 5, 8]])
    norms = np.array([[99.0, 1.0, 10.0], [50.0, 9.9, 1.0]])
    sparse = sparsify(torch.zeros(2, 3, 1), torch.from_numpy(norms))
    found = count_outliers(sparse, token_ids, limit=10.0)
    assert found == {"num_outlier_tokens": 3, "outliers": {5: 2, 7: 1}}


def test_activations_that_are_no_numbers_are_refused_by_name():
    sparse = sparsify(torch.tensor([[[1.0, float("inf")]]]), torch.ones(1, 1))
    with pytest.raises(UserError, match=r"SAE a .*shard 4.*subject\.dtype"):
        check_finite({"a": sparse}, shard=4)
    check_finite({"a": sparsify(torch.ones(1, 1, 1), torch.ones(1, 1))}, shard=4)


def test_a_harvest_is_not_gone_on_with_in_another_precision(planted_run):
    check_same_dtype(planted_run.tables, "float32")
    with pytest.raises(UserError, match=r"begun in float32.*give bfloat16"):
        check_same_dtype(planted_run.tables, "bfloat16")


def test_the_first_shard_settles_the_precision_of_all():
    check = SameDtype()
    for shard in range(3):
        check({"unit": shard, "dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"begun in bfloat16.*give float32.*subject\.dtype"):
        check({"unit": 3, "dtype": "float32"})


def test_a_shard_of_another_precision_ends_the_harvest(tmp_path, ray_session, monkeypatch):
    import ray.data

    results = [{"unit": n, "fragments": [], "num_tokens": 1, "dtype": d} for n, d in enumerate(["a", "b"])]
    monkeypatch.setattr("rayinterp.harvest.map_units", lambda *given: ray.data.from_items(results))
    with pytest.raises(UserError, match=r"begun in a, .* give b"):
        _harvest_shards(planted_config(tmp_path), Tables(str(tmp_path)), [], {}, [0, 1], 2, silent)


def test_batches_are_as_many_sequences_as_the_token_budget_holds():
    assert batch_size(torch.zeros(9, 32), 100) == 3
    assert batch_size(torch.zeros(9, 512), 100) == 1


def test_an_actor_loads_its_model_once_for_all_shards(planted_run, tmp_path, monkeypatch):
    loads = []

    def load(config, sources, features):
        loads.append(1)
        return load_subject(config, sources, features)

    monkeypatch.setattr("rayinterp.harvest.load_subject", load)
    tables = Tables(str(tmp_path))
    shutil.copytree(planted_run.tables.uri("sequences"), tables.uri("sequences"))
    tables.create_empty("activations")
    harvester = Harvester(planted_run.config, tables, *planted_run.prepared)
    results = [harvester({"shard": shard}) for shard in range(3)]
    assert len(loads) == 1
    assert [result["unit"] for result in results] == [0, 1, 2]
    assert all(result["fragments"] for result in results)


def test_harvested_activations_are_the_planted_ones(planted_run):
    tables = planted_run.tables
    sequences = {(s["shard"], s["row"]): s for s in tables.read("sequences").to_pylist()}
    for index in (0, 1, 2):
        feature, found = FEATURES[index], {}
        for posting in tables.read("activations", where=f"feature_key = 'planted/{index}'").to_pylist():
            for i, row in enumerate(posting["rows"]):
                span = slice(posting["offsets"][i], posting["offsets"][i + 1])
                found[posting["shard"], row] = dict(
                    zip(posting["positions"][span], posting["values"][span], strict=True)
                )
        for place, sequence in sequences.items():
            truth = fires(feature.truth, [VOCABULARY[i] for i in sequence["token_ids"]])
            expected = {i: feature.scale * s / 5 for i, s in enumerate(truth) if s}
            assert found.get(place, {}) == pytest.approx(expected), place


def test_every_shard_is_marked_and_counted_once(planted_run):
    markers = planted_run.tables.read("activations", where=f"feature = {MARKER}").to_pylist()
    shards = planted_run.tables.distinct("sequences", "shard")
    assert sorted(m["shard"] for m in markers) == sorted(shards)
    assert sum(m["num_sequences"] for m in markers) == planted_run.tables.count("sequences")


def test_feature_statistics_are_those_of_the_corpus(planted_run):
    tables = planted_run.tables
    features = {row["feature"]: row for row in tables.read("features").to_pylist()}
    assert {i: row["status"] for i, row in features.items()} == {
        0: "live", 1: "live", 2: "live", 3: "dead", 4: "dense", 5: "too_few"
    }  # fmt: skip
    sequences = tables.read("sequences").to_pylist()
    truths = {
        s["sequence_id"]: np.asarray(fires(FEATURES[2].truth, [VOCABULARY[i] for i in s["token_ids"]])) * 12 / 5
        for s in sequences
    }
    row = features[2]
    assert row["num_sequences"] == sum(t.max() > 0 for t in truths.values())
    assert row["num_tokens"] == sum((t > 0).sum() for t in truths.values())
    assert row["density"] == pytest.approx(row["num_tokens"] / (len(sequences) * 16))
    train = [truths[s["sequence_id"]].max() for s in sequences if s["split"] == "train"]
    assert row["max_activation"] == pytest.approx(max(train))
    best = sorted(truths, key=lambda i: (-truths[i].max(), i))[: planted_run.config.harvest.num_top]
    assert row["top_sequence_ids"] == best
    assert row["top_activations"] == pytest.approx([truths[i].max() for i in best])
    values = np.concatenate([t[t > 0] for t in truths.values()])
    for quantile, found in zip(QUANTILES, row["quantiles"], strict=True):
        assert found == pytest.approx(np.quantile(values, quantile, method="lower"), rel=1.01 * ACCURACY)
    assert row["mean_activation"] == pytest.approx(values.mean(), rel=1e-6)
    assert features[3]["max_activation"] == 0 and features[3]["num_tokens"] == 0


def test_every_sae_has_a_row_with_its_check(planted_run):
    (row,) = planted_run.tables.read("saes").to_pylist()
    assert (row["sae"], row["num_features"], row["variance_unexplained"]) == ("planted", 6, 0.0)
    assert (row["num_outlier_tokens"], row["outlier_token_ids"]) == (0, [])
    marker = planted_run.tables.read("activations", where=f"feature = {MARKER}").to_pylist()[0]
    assert json.loads(marker["notes"])["planted"]["median_norm"] == 1.0
