"""Visual tokens of the images of prompts, each tensor object encoded once."""

from collections.abc import Sequence

import torch

from megatron_owl2.model.owl2 import Owl2


class ImageEncoder:
    """ViT and abstractor, with the visual tokens of the last images: neighbours share them."""

    def __init__(self, model: Owl2):
        self.model = model
        self._images: dict[int, torch.Tensor] = {}  # held, as the ids of objects may come again
        self._tokens: dict[int, torch.Tensor] = {}

    def encode(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Visual tokens [n, tokens per image, h] of images [3, H, W] and the frames of videos
        [frames, 3, H, W] in order, each uint8 or normalised float. With `model.vision.temporal` a
        video is one of the n."""
        if not images:
            config, context = self.model.model, self.model.context
            shape = (0, config.tokens_per_image, config.decoder.hidden_size)
            return torch.empty(shape, dtype=context.dtype, device=context.device)
        distinct = {id(image): image for image in images}
        tokens = {key: known for key, known in self._tokens.items() if key in distinct}
        new = {key: image for key, image in distinct.items() if key not in tokens}
        temporal = self.model.model.vision.temporal
        alike: dict[tuple[bool, int], dict[int, torch.Tensor]] = {}  # what is encoded at once
        for key, image in new.items():
            pixels = image if image.dim() == 4 else image[None]
            together = len(pixels) if temporal else 1
            alike.setdefault((image.is_floating_point(), together), {})[key] = pixels
        for (_, frames), group in alike.items():
            pixels = torch.cat([*group.values()]).to(self.model.context.device)
            sizes = [len(one) // frames for one in group.values()]
            tokens |= zip(group, self.model.encode_images(pixels, frames).split(sizes), strict=True)
        self._images, self._tokens = distinct, tokens
        return torch.cat([tokens[id(image)] for image in images])
