import numpy as np

from rayinterp.explain.explainer import first_messages
from rayinterp.feature_id import FeatureId
from rayinterp.records import load_records, read_holistic


def test_a_features_holistic_activations_are_read_by_sequence(planted_run):
    feature = FeatureId("planted", 1)
    records = load_records(planted_run.tables, feature, ("train",))["train"]
    holistic = read_holistic(planted_run.tables, feature)
    assert {record.sequence.sequence_id for record in records} <= set(holistic)
    for record in records:
        values = holistic[record.sequence.sequence_id]
        assert values.shape == record.activations.shape and values.dtype == np.float32
        if record.source == "positive":
            assert values.max() > 0
    assert read_holistic(planted_run.tables, FeatureId("planted", 99)) == {}


def test_what_a_feature_needs_is_shown_though_it_does_not_fire_there(planted_run):
    """'bank' after a river or a stream: the river is needed."""
    feature = FeatureId("planted", 1)
    records = load_records(planted_run.tables, feature, ("train",))["train"]
    arm = planted_run.config.explainers["right"].model_copy(update={"holistic": True, "few_shots": False})
    (asked,) = first_messages(records, arm, read_holistic(planted_run.tables, feature))
    needed = [line for line in asked["content"].splitlines() if line.startswith("Fires less without")]
    assert needed and any("river" in line or "stream" in line for line in needed)
    assert all("bank" in line for line in needed)
