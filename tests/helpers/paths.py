"""Paths of the project that tests use."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
HELPERS = TESTS / "helpers"
TOOLS = ROOT / "tools"
EXAMPLES = ROOT / "examples"
