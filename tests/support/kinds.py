"""Fixtures that give a test each architecture in turn."""

import pytest
from models import CONFIGS, make_base
from transformers import PreTrainedModel


@pytest.fixture(params=list(CONFIGS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def base(kind) -> PreTrainedModel:
    return make_base(kind)
