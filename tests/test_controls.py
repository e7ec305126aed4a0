import numpy as np

from rayinterp.controls import TokenLookupSimulator, by_sae, shuffled_features
from rayinterp.feature_id import FeatureId
from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import CONTROL_NULLS, NULL_EXPLANATIONS, RuleRequest, TokenSequence


def record(token_ids, activations):
    tokens = tuple(map(str, token_ids))
    return ActivationRecord(TokenSequence(0, tokens), 0, "positive", tuple(token_ids), np.array(activations))


def test_the_lookup_is_the_mean_over_train_and_silent_on_new_tokens():
    train = [record([1, 2, 1], [4.0, 0.0, 2.0]), record([2, 3], [0.0, 1.0])]
    sequence = record([1, 2, 3, 9], [0, 0, 0, 0]).sequence
    simulator = TokenLookupSimulator(train)
    for rule in ("ships", "anything else"):
        ((predicted,),) = simulator.simulate([RuleRequest(rule, (sequence,))])
        assert predicted.tolist() == [3.0, 0.0, 1.0, 0.0]


def test_shuffled_features_are_others_of_the_same_sae():
    features = [FeatureId(sae, i) for sae in ("a", "b") for i in range(6)]
    pools = by_sae(features)
    for feature in features[:6]:
        chosen = shuffled_features(feature, pools, 3, seed=0)
        assert len(set(chosen)) == 3
        assert all(f.sae == "a" and f != feature for f in chosen)
        assert chosen == shuffled_features(feature, by_sae(features[::-1]), 3, seed=0)
        assert set(shuffled_features(feature, pools, 99, seed=0)) == set(features[:6]) - {feature}
    assert len(shuffled_features(FeatureId("a", 99), pools, 99, seed=0)) == 6
    assert shuffled_features(FeatureId("c", 0), pools, 3, seed=0) == []


def test_calibration_and_control_share_no_null_text():
    assert not set(CONTROL_NULLS) & set(NULL_EXPLANATIONS)
