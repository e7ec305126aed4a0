"""Records of a feature that fires on given tokens."""

import numpy as np

from rayinterp.records import ActivationRecord
from rayinterp.simulate.simulator import TokenSequence


def record(number, activations, source="positive"):
    tokens = tuple(f" w{i}" for i in range(len(activations)))
    return ActivationRecord(TokenSequence(number, tokens), number, source, (0,) * len(tokens), np.array(activations))


def few_records():
    return {
        "train": [record(0, [5.0, 0, 0]), record(1, [0, 0, 0.0], "random_negative")],
        "valid": [record(2, [0, 5.0, 0]), record(3, [0, 0, 0.0], "random_negative")],
    }
