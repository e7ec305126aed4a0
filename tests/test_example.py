import io

from rich.console import Console

from examples.one_feature import main


def test_the_example_explains_a_feature_without_a_cluster():
    output = io.StringIO()
    score = main(console=Console(file=output, width=200))
    assert "correlation on" in output.getvalue()
    assert score is not None and score > 0.2
