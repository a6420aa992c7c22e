"""The tiny matrix gives the numbers that it always gave."""

import json

import pytest
from golden import GOLDEN, collect

pytestmark = pytest.mark.workflow


def test_the_numbers_are_those_of_before(project):
    expected, found = json.loads(GOLDEN.read_text()), collect(project.path("results"))
    assert found["losses"].keys() == expected["losses"].keys()
    for name, losses in expected["losses"].items():
        assert found["losses"][name] == pytest.approx(losses, rel=1e-4), name
    if found["processor"] == expected["processor"]:
        assert found["digests"] == expected["digests"]
