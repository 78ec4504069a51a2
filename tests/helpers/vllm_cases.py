"""Prompts of vllm_reference.py with the engine's answers, for the environment of vLLM."""

import base64
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")
if "OWL2_VLLM_REFERENCE" not in os.environ:
    pytest.skip("needs the reference that tests/vllm.sh makes", allow_module_level=True)

REFERENCE = Path(os.environ["OWL2_VLLM_REFERENCE"])
CASES = json.loads((REFERENCE / "cases.json").read_text())


def as_openai(message: dict) -> dict:
    """A message with its images as data URLs."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            data = base64.b64encode((REFERENCE / f"{part['image']}.png").read_bytes()).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        parts.append(part)
    return message | {"content": parts}
