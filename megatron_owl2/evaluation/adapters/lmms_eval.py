"""Model of lmms-eval, a harness for images and videos, that this project's engine computes.

python -m lmms_eval --model megatron_owl2 --model_args checkpoint=CKPT_OR_HF_DIR,precision=bf16 \
    --tasks mme --batch_size 32

lmms-eval finds it by the entry point of the group `lmms_eval.models`. Questions are asked in the
model's template, images before them unless they hold `<|image|>`. Importing this needs lmms-eval.
"""

# Optional, so it may not be there to be looked into.
# pyright: reportMissingImports=false

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.adapters.generation import (
    batch_size_of,
    generation_options,
    texts_of,
)
from megatron_owl2.evaluation.video_files import Video
from megatron_owl2.evaluation.video_frames import read_frames
from megatron_owl2.inference import api
from megatron_owl2.inference.messages import Conversation, from_question
from megatron_owl2.inference.options import GenerationOptions
from megatron_owl2.inference.requests import Request

try:
    from lmms_eval.api.instance import GenerationResult, Instance
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError:
    raise TaskError("lmms-eval is not installed: pip install lmms-eval") from None


def manifest() -> ModelManifest:
    """What the entry point tells lmms-eval."""
    return ModelManifest("megatron_owl2", simple_class_path=f"{__name__}.MegatronOwl2")


class MegatronOwl2(lmms):
    """A checkpoint or HF export under lmms-eval's interface, in one process.

    Arguments are those of `--model_args`; `frames` are shown of a video, and `max_new_tokens` is
    for tasks that name no length. The harness names a `device`; the model goes to this process's
    GPU, or to the CPU where there is none.
    """

    def __init__(
        self,
        checkpoint: str,
        precision: str = "fp32",
        adapter: str | None = None,
        system: str = "",
        frames: int = 4,
        max_new_tokens: int = 1024,
        batch_size: str | int = 1,
        device: str | None = None,
    ):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise TaskError("lmms-eval asks this model in one process; start it without torchrun")
        if precision not in ("fp32", "bf16"):
            raise TaskError(f"precision is {precision!r}; it must be fp32 or bf16")
        self.model = api.load(checkpoint, precision, adapter=adapter)
        self.batch_size, self.system = batch_size_of(batch_size), system
        self.frames, self.max_new_tokens = int(frames), int(max_new_tokens)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, stripped, which end before a stop string."""

        def asked() -> Iterator[Request]:  # images are read as places come free
            for request in requests:
                context, given, visuals, number, task, split = request.args
                # The model has its own way to make a square of an image.
                known = {k: v for k, v in given.items() if k != "image_aspect_ratio"}
                options = generation_options(known, self.max_new_tokens)
                yield self._request(context, visuals, self.task_dict[task][split][number], options)

        positions = self.model.config.decoder.max_positions
        generator = self.model.generator
        return texts_of(generator, asked(), len(requests), self.batch_size, positions)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The loss of each continuation as an answer, the mean over its ids as lmms-eval's models
        return it (its tasks take the least), and whether it is greedy.

        The pair is inside a GenerationResult, because lmms-eval 0.7.3 makes text of a bare one.
        """
        found = []
        for request in requests:
            context, target, visuals, number, task, split = request.args
            row = self.task_dict[task][split][number]
            text = target if isinstance(target, str) else target(row)
            prompt = self._request(context, visuals, row, GenerationOptions())
            ids = self.model.tokenizer.encode(text.strip())
            (score,) = self.model.generator.log_likelihoods([prompt.prompt], [ids], [prompt.images])
            answer: Any = (-score.total / score.tokens, score.greedy)
            found.append(GenerationResult(answer))
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise TaskError("tasks of several rounds are not for this model; choose others")

    def _request(self, context: str, visuals: Any, row: Any, options: GenerationOptions) -> Request:
        """The request of a row of a task; `visuals(row)` gives its images and paths of videos."""
        shown = [self._image(visual) for visual in visuals(row) or [] if visual is not None]
        conversation: Conversation = from_question(context, shown)
        conversation.system = self.system
        return self.model.request(conversation, options)

    def _image(self, visual: Any) -> Any:
        if isinstance(visual, Image.Image):
            return visual
        if isinstance(visual, str | os.PathLike):
            return read_frames(Video(Path(visual), self.frames))
        raise TaskError(f"the task shows a {type(visual).__name__}; this model sees images, videos")
