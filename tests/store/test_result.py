import numpy as np
import pytest

from millpond.store.result import Result


def test_a_result_shows_values_intervals_and_evidence():
    result = Result(
        "probe",
        {"auroc": 0.87654, "weights": np.zeros((3, 3)), "means": np.array([[1.23456], [-2e-7]]), "best": "C<1"},
        {"auroc": (0.8, 0.9)},
        {"rows": 12345},
    )
    assert result["auroc"] == 0.87654
    assert repr(result) == (
        "<Result probe: auroc=0.8765 [0.8, 0.9], weights=array(3, 3), means=[[1.235], [-2e-07]], best=C<1 | rows=12,345>"
    )
    assert list(dict(result)) == ["auroc", "weights", "means", "best"]
    with pytest.raises(KeyError, match="'auc' is no value of this probe; it has auroc, weights, means, best"):
        result["auc"]
    html = result._repr_html_()
    assert "0.8765 [0.8, 0.9]" in html
    assert "C&lt;1" in html
    assert "C<1" not in html
