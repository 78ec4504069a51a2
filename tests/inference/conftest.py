"""The random model that the tests of inference share, a file at a time."""

import generation
import pytest


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return generation.train(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return generation.random_model(tokenizer)
