from types import SimpleNamespace

import pytest

from rayinterp.progress import Published, Throughput, silent


def test_a_report_counts_from_what_was_done_before(gauges, clock):
    seen = []
    throughput = Throughput("run", "harvest", done=4, total=10)
    throughput.report(lambda done, total, note="": seen.append((done, total, note)))
    clock.seconds = 4.0
    throughput.add(2, 500)
    throughput.report(lambda done, total, note="": seen.append((done, total, note)))
    assert seen == [(4, 10, ""), (6, 10, "125 tokens/s")]


@pytest.fixture
def gauges(monkeypatch):
    """What gauges were last set to, by name, and a clock that the test moves."""
    last = {}
    monkeypatch.setattr("ray.util.metrics.Gauge.set", lambda self, value, tags=None: last.update({self._name: value}))
    return last


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("rayinterp.progress.time.monotonic", lambda: now.seconds)
    return now


def test_progress_is_told_to_rays_metrics_and_passed_on(gauges, clock):
    seen = []
    told = Published("run", "explain", lambda done, total, note="": seen.append((done, total, note)))
    told(4, 10)
    assert gauges == {"rayinterp_units_done": 4, "rayinterp_units_total": 10}  # nothing is known of the speed
    clock.seconds = 6.0
    told(7, 10, "a note")
    assert gauges["rayinterp_units_done"] == 7
    assert gauges["rayinterp_seconds_left"] == 6.0  # three units took as long, and three are left
    clock.seconds = 8.0
    told(10, 10)
    assert gauges["rayinterp_seconds_left"] == 0
    assert seen == [(4, 10, ""), (7, 10, "a note"), (10, 10, "")]


def test_units_of_another_kind_have_a_speed_of_their_own(gauges, clock):
    told = Published("run", "records", silent)
    told(0, 2)
    clock.seconds = 100.0
    told(2, 2)
    told(5, 50)
    clock.seconds = 101.0
    told(6, 50)
    assert gauges["rayinterp_seconds_left"] == 44.0


def test_throughput_is_a_metric_too(gauges, clock):
    throughput = Throughput("run", "harvest", done=4, total=10)
    clock.seconds = 3.0
    throughput.add(3, 900)
    assert gauges == {"rayinterp_tokens_per_second": 300.0}
