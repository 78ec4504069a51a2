"""Continuous batching: every request gets the answer that it gets alone, whoever comes and goes."""

import pytest
import torch
from generation import SIZE, cases, recompute
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_owl2.data.image_tokens import IMAGE_TOKEN_ID
from megatron_owl2.errors import InferenceError
from megatron_owl2.inference.engine import Generator
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request
from megatron_owl2.inference.scheduler import Scheduler


def run(scheduler: Scheduler, after_step=lambda tokens: None) -> dict[int, list[int]]:
    """The ids of every request until none is left."""
    ids: dict[int, list[int]] = {}
    while scheduler.active or scheduler.waiting:
        tokens = scheduler.step()
        for token in tokens:
            known = ids.setdefault(token.request, [])
            known += [] if token.token_id is None else [token.token_id]
        after_step(tokens)
    return ids


@pytest.fixture(scope="module")
def alone(loaded):
    """Answers of single requests, found once: {(prompt, image numbers, length): ids}."""
    known = {}
    generator = Generator(loaded)

    def answer(prompt, numbers, images, length):
        key = (*prompt, -1, *numbers, length)
        if key not in known:
            (known[key],) = generator.generate_ids([prompt], [images], length)
        return known[key]

    return answer


POOL = torch.randint(0, 256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).byte()


@st.composite
def requests(draw):
    """A prompt of 1 to 20 ids with up to three images among them, and a length."""
    words = draw(st.lists(st.integers(3, 200), min_size=1, max_size=16))
    numbers = draw(st.lists(st.integers(0, 3), max_size=3))
    for _ in numbers:
        words.insert(draw(st.integers(0, len(words))), IMAGE_TOKEN_ID)
    return [1, *words], numbers, draw(st.integers(1, 10))


@settings(max_examples=40)
@given(st.lists(requests(), min_size=2, max_size=7), st.integers(1, 4))
def test_random_mixes_answer_one_by_one(loaded, alone, wanted, rows):
    scheduler = Scheduler(loaded, max_batch=rows)
    expected = {}
    for prompt, numbers, length in wanted:
        images = [POOL[i] for i in numbers]
        number = scheduler.add(Request(prompt, images, GenerationOptions(length)), text=False)
        expected[number] = alone(prompt, numbers, images, length)
    assert {number: ids for number, ids in run(scheduler).items() if ids} == {
        number: ids for number, ids in expected.items() if ids
    }


def test_requests_join_while_others_are_answered(loaded):
    prompts, images = cases(loaded)
    expected = [recompute(loaded, *case, 12) for case in zip(prompts, images, strict=True)]
    scheduler = Scheduler(loaded, max_batch=3)
    left = [
        Request(prompt, row, GenerationOptions(12))
        for prompt, row in zip(prompts, images, strict=True)
    ]
    numbers = [scheduler.add(left.pop(0))]

    def join(tokens) -> None:
        if left:
            numbers.append(scheduler.add(left.pop(0)))

    found = run(scheduler, join)
    assert [found[number] for number in numbers] == expected


def test_a_cancelled_request_frees_its_place_at_the_next_step(loaded):
    prompts, images = cases(loaded)
    options = GenerationOptions(12, 12)
    scheduler = Scheduler(loaded, max_batch=2)
    added = [scheduler.add(Request(prompts[i], images[i], options), text=False) for i in range(4)]
    scheduler.step()
    assert (scheduler.active, scheduler.waiting) == (2, 2)
    scheduler.cancel(added[0])
    scheduler.cancel(added[3])
    scheduler.cancel(99)  # nobody's
    assert (scheduler.active, scheduler.waiting) == (1, 1)
    scheduler.step()  # those under way first
    scheduler.step()
    assert (scheduler.active, scheduler.waiting) == (2, 0)
    found = run(scheduler)
    (whole,) = Generator(loaded).generate_ids([prompts[2]], [images[2]], 12, 12)
    assert found.keys() == {added[1], added[2]} and found[added[2]] == whole[1:]
    assert scheduler.step() == []


def test_those_under_way_get_a_token_between_two_groups_of_prompts(loaded):
    prompts, images = cases(loaded)
    scheduler = Scheduler(loaded, max_batch=8)
    first = scheduler.add(Request(prompts[0], images[0], GenerationOptions(12, 12)))
    scheduler.step()
    for i in range(1, 4):
        scheduler.add(Request(prompts[i], images[i], GenerationOptions(12, 12)))
    assert first in {token.request for token in scheduler.step()}


def test_a_request_that_can_never_fit_is_refused_at_once(loaded):
    scheduler = Scheduler(loaded, max_positions=16)
    with pytest.raises(InferenceError, match="passes? the decoder's 16|pass the decoder's 16"):
        scheduler.add(Request([1, 2, 3], [], GenerationOptions(15)))
    scheduler.add(Request([1, 2, 3], [], GenerationOptions(14)))
    assert scheduler.waiting == 1


def test_frames_of_a_video_take_one_place_and_all_their_rows(loaded):
    """As in the official code: the visual tokens of all frames follow each other."""
    frames = POOL[:3]
    video = Request([1, 40, IMAGE_TOKEN_ID, 50], [frames], GenerationOptions(8, 8))
    images = Request([1, 40, *[IMAGE_TOKEN_ID] * 3, 50], [*frames], GenerationOptions(8, 8))
    of_video, of_images = Generator(loaded).complete([video, images])
    assert of_video == of_images
    assert of_video.prompt_positions == 3 + 3 * loaded.config.tokens_per_image


def test_pixels_and_normalised_images_go_together(loaded):
    pixels = POOL[0]
    mean, std = (torch.tensor([value] * 3).view(3, 1, 1) for value in (0.2, 0.25))
    normalised = (pixels / 255 - mean) / std
    prompt = [1, 40, IMAGE_TOKEN_ID, 50]
    batch = [Request(prompt, [image], GenerationOptions(8, 8)) for image in (pixels, normalised)]
    first, second = Generator(loaded).complete(batch)
    assert first == second


def test_requests_are_taken_when_there_is_room(loaded):
    """Never more than two under way, beam searches at once, and each answer as it is alone."""
    prompts, images = cases(loaded)
    options = [GenerationOptions(8, beams=2 if i in (3, 4, 5, 11) else 1) for i in range(12)]
    wanted = [Request(*case) for case in zip(prompts, images, options, strict=True)]
    taken, found = [], {}

    def coming():
        for request in wanted:
            assert len(taken) - len(found) < 2
            taken.append(request)
            yield request

    generator = Generator(loaded)
    for place, completion in generator.as_they_end(coming(), 2, 64):
        found[place] = completion
    assert [found[i] for i in range(12)] == generator.complete(wanted)
    assert [*generator.as_they_end([], 2, 64)] == []


def test_a_cache_beyond_the_memory_is_refused(loaded):
    with pytest.raises(InferenceError, match=r"of 1,099,511,627,776 sequences .* GiB, more"):
        Scheduler(loaded, max_batch=2**40)
