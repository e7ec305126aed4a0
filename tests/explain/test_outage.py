from rayinterp.explain.outage import MAX_FAILURES, PAUSE_SECONDS, Outage


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def outage(has_answered=True, patience=600.0):
    clock = Clock()
    return Outage(has_answered, patience, clock), clock


def test_single_failures_among_answers_are_no_outage():
    one, _ = outage(has_answered=False)
    for _ in range(3 * MAX_FAILURES):
        assert not one.failed(transient=True)
        one.answered(1)
    assert not one.down and one.resume_at < 1000


def test_many_in_a_row_are_waited_out_and_an_answer_ends_it():
    one, clock = outage()
    assert not any(one.failed(transient=True) for _ in range(MAX_FAILURES))
    assert one.down and one.resume_at == clock.now + PAUSE_SECONDS
    clock.now += 500
    assert not one.failed(transient=True)
    one.answered(0)  # a feature that asked nothing says nothing
    assert one.down
    one.answered(2)
    assert not one.down
    clock.now += 500
    assert not any(one.failed(transient=True) for _ in range(MAX_FAILURES))  # the clock runs from the last answer


def test_it_is_given_up_when_it_lasts_too_long_will_not_pass_or_never_worked():
    one, clock = outage(patience=60)
    clock.now += 61
    assert [one.failed(transient=True) for _ in range(MAX_FAILURES)] == [False] * (MAX_FAILURES - 1) + [True]
    one, _ = outage()
    assert [one.failed(transient=False) for _ in range(MAX_FAILURES)][-1]
    one, _ = outage(has_answered=False)
    assert [one.failed(transient=True) for _ in range(MAX_FAILURES)][-1]


def test_a_plain_answer_ends_an_outage_and_says_nothing_of_the_explainers():
    one, _ = outage(has_answered=False)
    for _ in range(MAX_FAILURES - 1):
        one.failed(transient=True)
    one.is_up()
    assert not one.failed(transient=True) and not one.down and not one.has_answered
    one.answered(1)
    assert one.has_answered


def test_while_it_is_down_one_feature_at_a_time_is_tried_after_a_pause():
    one, clock = outage()
    assert one.lets(any_under_way=True)
    for _ in range(MAX_FAILURES):
        one.failed(transient=True)
    assert not one.lets(any_under_way=False)
    clock.now += PAUSE_SECONDS
    assert one.lets(any_under_way=False) and not one.lets(any_under_way=True)
    one.is_up()
    assert one.lets(any_under_way=True)


def test_before_the_first_answer_a_failure_waits_for_what_is_under_way():
    one, _ = outage(has_answered=False)
    assert one.lets(any_under_way=True)
    one.failed(transient=True)
    assert one.lets(any_under_way=False) and not one.lets(any_under_way=True)
    one.answered(1)
    one.failed(transient=True)
    assert one.lets(any_under_way=True)
