import pytest

from rayinterp.progress import Throughput


def test_a_report_counts_from_what_was_done_before():
    seen = []
    throughput = Throughput("run", "harvest", done=4, total=10)
    throughput.report(lambda done, total, note="": seen.append((done, total, note)))
    throughput.add(2, 500)
    throughput.report(lambda done, total, note="": seen.append((done, total, note)))
    assert seen[0] == (4, 10, "")
    assert seen[1][:2] == (6, 10)
    rate = float(seen[1][2].removesuffix(" tokens/s").replace(",", ""))
    assert rate == pytest.approx(throughput.tokens_per_second, rel=0.5)


def test_the_same_figures_are_rays_metrics(ray_session, monkeypatch):
    published = {}

    def keep(self, value, tags=None):
        published[self._name] = value

    monkeypatch.setattr("ray.util.metrics.Gauge.set", keep)
    throughput = Throughput("run", "harvest", done=4, total=10)
    throughput.add(3, 900)
    names = ("units_done", "units_total", "tokens_per_second", "seconds_left")
    assert set(published) == {f"rayinterp_{name}" for name in names}
    assert (published["rayinterp_units_done"], published["rayinterp_units_total"]) == (7, 10)
    # Three of six shards are left to do: as many tokens again.
    expected = 900 / published["rayinterp_tokens_per_second"]
    assert published["rayinterp_seconds_left"] == pytest.approx(expected, rel=0.5)
