"""Texts and images to the inputs of mPLUG-Owl2."""

from collections.abc import Iterable

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .prompt_mplug_owl2 import (
    IMAGE,
    RenderedPrompt,
    default_chat_template,
    is_rendered,
    mark_messages,
    mark_text,
    prompt_ids,
)
from .text_options_mplug_owl2 import TextOptions

_PLACEHOLDER = -200  # of an image among ids, before its rows take its place
_LOGGER = logging.get_logger(__name__)


class MPLUGOwl2Processor(ProcessorMixin):
    """Tokenizer and image processor, and the rows that an image takes in the text."""

    placeholders = (IMAGE,)  # of media in a plain string, images first
    row_ids = {_PLACEHOLDER: 0}  # the id of the rows in place of that of a placeholder

    def __init__(
        self,
        image_processor,
        tokenizer,
        tokens_per_image=65,
        system="",
        after_image="",
        chat_template=None,
    ):
        template = chat_template or default_chat_template(system, after_image)
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.tokens_per_image = tokens_per_image
        self.system, self.after_image = system, after_image

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "modality", "pixel_values"]

    def apply_chat_template(self, conversation, *args, tokenize=False, **keywords):
        """ProcessorMixin's, whose ids are those of training, where texts of messages stay texts.

        A `<|image|>`, `</s>` or `<s>` that a message spells is text, and only parts of the type
        image are images. Without `tokenize=True` it gives a `RenderedPrompt`, of which a call of
        the processor makes the same ids, as long as it is passed on unchanged.
        """
        marked = [mark_messages(entry) for entry in conversation]
        if tokenize:
            reader = _TemplateReader(self)
            return ProcessorMixin.apply_chat_template(
                reader, marked, *args, tokenize=True, **keywords
            )
        text = super().apply_chat_template(marked, *args, tokenize=False, **keywords)
        return RenderedPrompt(text) if isinstance(text, str) else list(map(RenderedPrompt, text))

    def __call__(self, images=None, text=None, videos=None, audio=None, **keywords) -> BatchFeature:
        """One text or several with a `<|image|>` for each image, to padded inputs.

        images: the images in order, flat, or one list for each text; what the image processor
        takes. In place of an image a list of images, frames, fills one placeholder together,
        and so do several images of a text with one placeholder when there is a list per text.
        A text may be what `apply_chat_template` renders; in any other `</s>` is text.
        `keywords` are those of a tokenizer that `TextOptions` has, also in a dict `text_kwargs`.
        Returns input_ids (0 at image rows and padding), attention_mask, modality (1 at image
        rows, else 0), all int64 [b, s], and pixel_values [n, 3, H, W] if there are any. Raises
        ValueError if placeholders and images differ in number, without text, if truncation would
        cut an image, and for what a keyword cannot be; TypeError for a keyword that is unknown.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model reads neither videos nor audio; give frames as images")
        options = TextOptions.of(self.tokenizer, keywords)
        texts, frames = self._texts_and_frames(text, images)
        sizes = {_PLACEHOLDER: iter([len(group) * self.tokens_per_image for group in frames])}
        data = self._columns(texts, sizes, options)
        if frames:
            data["pixel_values"] = self._pixels(sum(frames, []), options)
        return BatchFeature(data, tensor_type=options.return_tensors)

    def _texts_and_frames(self, text, images) -> tuple[list[str], list[list]]:
        """The texts with marks, and the images of every placeholder in them."""
        image = self.placeholders[0]
        texts = [self._marked(entry) for entry in _texts(text, images, image)]
        return texts, _frames(images, [t.count(image) for t in texts], image)

    def _columns(self, texts: list[str], sizes: dict, options: TextOptions) -> dict:
        """Padded columns of texts with marks; `sizes` has, for the id of each placeholder, an
        iterator over the numbers of rows that take its place."""
        rows = [self._row(t, sizes, options.add_special_tokens) for t in texts]
        if options.add_special_tokens and ([], []) in rows:
            raise ValueError(f"text {rows.index(([], [])) + 1} of {len(rows)} is empty")
        return options.padded([options.truncated(row, i + 1) for i, row in enumerate(rows)])

    def _pixels(self, images: list, options: TextOptions):
        values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return values if options.return_tensors else list(values.numpy())

    def _marked(self, text: str) -> str:
        if self.tokenizer.eos_token in text and not is_rendered(text):
            _LOGGER.warning_once(
                f"a text spells {self.tokenizer.eos_token}, which is text there: turns end where "
                "apply_chat_template ends them, in ids or in the string that it gives, unchanged"
            )
        return mark_text(text, self.placeholders)

    def _row(self, marked: str, sizes: dict, add_bos: bool) -> tuple[list[int], list[int]]:
        """Ids and modality of a text, the next of `sizes` rows in place of every placeholder."""
        ids, modality = [], []
        for token in self._prompt_ids(marked, add_bos):
            rows = next(sizes[token]) if token in sizes else 0
            ids += [self.row_ids[token]] * rows if rows else [token]
            modality += [1] * rows if rows else [0]
        return ids, modality

    def _prompt_ids(self, marked: str, add_bos: bool) -> list[int]:
        return prompt_ids(marked, self.tokenizer, _PLACEHOLDER, add_bos)


class _TemplateReader:
    """The processor as `apply_chat_template` calls it: its texts are what the template wrote."""

    def __init__(self, processor: MPLUGOwl2Processor):
        self._processor = processor

    def __getattr__(self, name: str):
        return getattr(self._processor, name)

    def __call__(self, text, **keywords) -> BatchFeature:
        texts = [text] if isinstance(text, str) else text
        return self._processor(text=[RenderedPrompt(entry) for entry in texts], **keywords)


def _texts(text, images, placeholder: str) -> list[str]:
    """The texts; raises ValueError if there are none, or for what is no text."""
    texts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
    order = "images come first and text second; name them: processor(images=..., text=...)"
    if not texts or text is None:
        raise ValueError(f"give text: one string or several; {order}")
    for entry in texts:
        if not isinstance(entry, str):
            raise ValueError(f"text holds {type(entry).__name__}, not a string; {order}")
    given = images if isinstance(images, (list, tuple)) else [images]
    if any(isinstance(image, str) and placeholder in image for image in given):
        raise ValueError(f"images hold a text with {placeholder}; {order}")
    return texts


def _frames(images, placeholders: list[int], placeholder: str) -> list[list]:
    """The images of every placeholder; `placeholders` counts them in each text."""
    images = [] if images is None else images
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    lists = [entry is None or isinstance(entry, (list, tuple)) for entry in images]
    if all(lists) and len(images) == len(placeholders):  # a list for each text, None for no image
        groups = zip([entry or [] for entry in images], placeholders, strict=True)
        alone = [[group] if n == 1 and len(group) > 1 else group for group, n in groups]
        images = sum((list(group) for group in alone), [])
    if len(images) != sum(placeholders):
        raise ValueError(
            f"{sum(placeholders)} placeholders {placeholder}, but {len(images)} images; write one "
            "placeholder for each image"
        )
    frames = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
    if any(not group or any(image is None for image in group) for group in frames):
        raise ValueError("an image is an empty list or None; leave out its placeholder as well")
    return frames
