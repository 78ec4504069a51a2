"""vLLM with the plugin against the engine: the same ids, and log probabilities to 1e-4.

`bash tests/vllm.sh` makes the environment and the reference, whose folder is OWL2_VLLM_REFERENCE.
"""

import gc

import pytest

pytest.importorskip("vllm")

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm_cases import CASES, REFERENCE, as_openai

GREEDY = SamplingParams(temperature=0, max_tokens=12, min_tokens=12, logprobs=0)
SETTINGS = {
    "whole": {"enforce_eager": True},
    # Chunks of 16 cut images of 9 rows; blocks of 32 are cached.
    "chunked": {"enforce_eager": True, "max_num_batched_tokens": 16, "block_size": 32},
    "compiled": {"enforce_eager": False, "block_size": 32},
    "tensor": {"enforce_eager": True, "tensor_parallel_size": 2},
    # Without compilation vLLM's runner for CPUs cannot.
    "pipeline": {"enforce_eager": False, "pipeline_parallel_size": 2},
}


@pytest.fixture(scope="module", params=SETTINGS)
def llm(request):
    settings = SETTINGS[request.param]
    ranks = settings.get("tensor_parallel_size", 1) * settings.get("pipeline_parallel_size", 1)
    found = LLM(
        str(REFERENCE / "model"),
        dtype="float32",
        seed=0,
        max_num_seqs=8,
        distributed_executor_backend="uni" if ranks == 1 else "mp",
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 4},
        **settings,
    )
    yield found
    del found
    gc.collect()
    cleanup_dist_env_and_memory()


def image(name: str) -> Image.Image:
    return Image.open(REFERENCE / f"{name}.png")


def answers(llm, cases: list[dict]) -> list:
    plain = [c for c in cases if "prompt" in c]
    prompts = [
        {"prompt": c["prompt"], "multi_modal_data": {"image": [image(n) for n in c["images"]]}}
        if c["images"]
        else c["prompt"]
        for c in plain
    ]
    found = llm.generate(prompts, GREEDY, use_tqdm=False) if prompts else []
    chats = [[as_openai(m) for m in c["messages"]] for c in cases if "messages" in c]
    return found + (llm.chat(chats, GREEDY, use_tqdm=False) if chats else [])


def check(found, case) -> float:
    """The greatest difference of log probabilities of an answer whose ids are the engine's."""
    assert list(found.prompt_token_ids) == case["prompt_ids"]
    (answer,) = found.outputs
    assert list(answer.token_ids) == case["ids"], case
    chosen = [step[token].logprob for step, token in zip(answer.logprobs, case["ids"], strict=True)]
    return max(abs(a - b) for a, b in zip(chosen, case["logprobs"], strict=True))


def test_the_engines_answers_in_a_batch_again_and_alone(llm, record_property):
    alone = [answers(llm, [case])[0] for case in CASES[-4:]]
    rounds = [answers(llm, CASES), answers(llm, CASES), alone]
    worst = 0.0
    for found in rounds:
        for one, case in zip(found, CASES[-len(found) :], strict=True):
            worst = max(worst, check(one, case))
    record_property("greatest_difference", worst)
    print(f"\ngreatest difference of log probabilities: {worst:.1e}")
    assert worst < 1e-4
    if llm.llm_engine.vllm_config.cache_config.block_size == 32:
        assert sum(one.num_cached_tokens for one in rounds[1]) > 100  # the prefixes were found


def test_places_without_images_and_images_without_places_are_refused(llm):
    shown = {"image": [image("56x56")]}
    for prompt in (
        "a <|image|>",
        {"prompt": "a", "multi_modal_data": shown},
        {"prompt": "<|image|> <|image|>", "multi_modal_data": shown},
    ):
        with pytest.raises(VLLMValidationError):
            llm.generate(prompt, GREEDY, use_tqdm=False)
    assert check(answers(llm, CASES[:1])[0], CASES[0]) < 1e-4  # it lives on


def test_registering_again_changes_nothing():
    from vllm.tokenizers.registry import TokenizerRegistry

    from megatron_owl2.vllm_plugin import register

    before = dict(TokenizerRegistry.tokenizers)
    register()
    register()
    assert TokenizerRegistry.tokenizers == before | {
        "owl2": ("megatron_owl2.vllm_plugin.tokenizer", "Owl2Tokenizer")
    }
