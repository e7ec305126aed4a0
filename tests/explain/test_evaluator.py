import numpy as np
import pytest

from rayinterp.explain.evaluator import Evaluator, look_records
from rayinterp.explanation import Rule
from tests.explain.records import few_records, record


def simulator(answer, asked=None):
    """Predicts `answer(rule, sequence_id)` for every token of three."""

    async def simulate(requests):
        for request in requests:
            if asked is not None:
                asked.extend((request.rule, sequence.sequence_id) for sequence in request.sequences)
        return [
            [np.asarray(answer(r.rule, sequence.sequence_id), np.float32) for sequence in r.sequences] for r in requests
        ]

    return simulate


def truth(rule, number):
    return {0: [5, 0, 0], 2: [0, 5, 0]}.get(number, [0, 0, 0])


async def test_a_pair_is_simulated_once_whatever_is_asked_for():
    asked = []
    evaluator = Evaluator(few_records(), simulator(truth, asked), num_worst=1)
    first, second = await evaluator.scores([(Rule("a", 5), Rule("b", 2)), (Rule("b", 5),)])
    assert sorted(asked) == [(rule, number) for rule in "ab" for number in range(4)]
    await evaluator.scores([(Rule("b", 1), Rule("c", 1), Rule("c", 2))])
    assert sorted(asked[8:]) == [("c", number) for number in range(4)]
    evaluator.grow([record(7, [0, 0, 0.0], "rule_negative")])
    await evaluator.scores([(Rule("b", 1),)])
    assert asked[12:] == [("b", 7)]
    assert first.train_score == pytest.approx(1) and second.valid_score == pytest.approx(1)


async def test_train_and_valid_are_scored_apart():
    evaluator = Evaluator(few_records(), simulator(lambda rule, number: [5 * (number % 2 == 0), 0, 0]), 1)
    (evaluation,) = await evaluator.scores([(Rule("first word", 5),)])
    assert evaluation.train_score == pytest.approx(1)
    assert evaluation.valid_score < 0
    assert "w1" not in evaluation.feedback.split("Text:")[0]


async def test_falsifiers_lower_the_train_score_alone_and_are_named_in_the_feedback():
    broad = simulator(lambda rule, number: [0, 5, 0] if number in (2, 9) else [5 * (number == 0), 0, 4 * (number == 8)])
    evaluator = Evaluator(few_records(), broad, 1)
    (before,) = await evaluator.scores([(Rule("any word", 5),)])
    drawn = [record(number, [0, 0, 0.0], "rule_negative") for number in (7, 8, 9)]
    assert await evaluator.mistaken([(Rule("any word", 5),), (Rule("any word", 2),)], drawn) == [0, 4, 5]
    evaluator.grow(drawn[1:])
    (after,) = await evaluator.scores([(Rule("any word", 5),)])
    assert before.train_score == pytest.approx(1) and after.train_score < 0.8
    assert before.valid_score == after.valid_score
    assert "stays silent" in after.feedback and '"w1" 5' in after.feedback
    assert "stays silent" not in before.feedback
    (right,) = await evaluator.scores([(Rule("any word", 1),)])  # too weak to count as wrong
    assert "stays silent" not in right.feedback


async def test_looks_use_the_cheap_simulator_and_their_own_records():
    asked, cheap = [], []
    records = few_records()
    looks = look_records(records["train"], [2], [1, 0])
    evaluator = Evaluator(records, simulator(truth, asked), 1, simulator(truth, cheap), looks)
    assert await evaluator.looks([(Rule("a", 5),)], 0) == [pytest.approx(1)]
    assert asked == [] and sorted(cheap) == [("a", 0), ("a", 1)]
    own = Evaluator(records, simulator(truth, asked), 1, None, looks)
    await own.looks([(Rule("a", 5),)], 0)
    await own.scores([(Rule("a", 5),)])
    assert sorted(asked) == [("a", number) for number in range(4)]  # a look of the arm's own simulator counts


def test_each_look_sees_what_the_one_before_it_saw_and_more():
    train = [record(i, [5.0, 0], "positive" if i < 10 else "random_negative") for i in range(20)]
    order = list(np.random.default_rng(0).permutation(20))
    looks = look_records(train, [4, 8, 99], order)
    assert [len(look) for look in looks] == [4, 8, 20]
    numbers = [{r.sequence.sequence_id for r in look} for look in looks]
    assert numbers[0] < numbers[1] < numbers[2]
    for look in looks[:2]:
        assert sum(r.source == "positive" for r in look) == len(look) / 2
    assert numbers[0] != {0, 1, 10, 11}
