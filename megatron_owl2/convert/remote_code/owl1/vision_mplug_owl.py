"""The ViT and the visual abstractor of mPLUG-Owl, version 1, for images and videos.

They are those of version 2 without positions in the abstractor. The video variant has an adapter
over the frames before every layer of the ViT, and temporal queries in the abstractor.
"""

import torch
from torch import nn

from .configuration_mplug_owl import MplugOwlConfig
from .vision_mplug_owl2 import MPLUGOwl2AbstractorLayer, MPLUGOwl2VisionLayer, MPLUGOwl2VisionModel

_TEMPORAL_NORM_EPS = 1e-5  # in the released code, whatever its config says


class MplugOwlVisionModel(MPLUGOwl2VisionModel):
    """Pixels to features, as in version 2, of images and of the frames of videos.

    Images [n, 3, H, W] become [n, 1 + patches, h]; videos [n, 3, T, H, W] become
    [n, T * (1 + patches), h], frame after frame. Raises ValueError for another image size than
    the model's.
    """

    def __init__(self, config: MplugOwlConfig):
        super().__init__(config, MplugOwlVisionLayer)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dim() != 5:
            return super().forward(pixels)
        videos, _, frames, height, width = pixels.shape
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"video_pixel_values are {list(pixels.shape)}, but this model takes "
                f"[videos, 3, frames, {self.image_size}, {self.image_size}]"
            )
        x = self.embeddings(pixels.transpose(1, 2).flatten(0, 1))
        for layer in self.encoder["layers"]:
            x = layer(x, frames)
        return self.post_layernorm(x).unflatten(0, (videos, frames)).flatten(1, 2)


class MplugOwlVisionLayer(MPLUGOwl2VisionLayer):
    """Layer of version 2; [videos * frames, tokens, h] to the same, after the adapter of videos."""

    def __init__(self, config: MplugOwlConfig):
        super().__init__(config)
        if config.vision_config["temporal"]:
            self.temporal = MplugOwlTemporalAdapter(config.vision_config["hidden_size"])

    def forward(self, x: torch.Tensor, frames: int = 1) -> torch.Tensor:
        return super().forward(x + self.temporal(x, frames) if frames > 1 else x)


class MplugOwlTemporalAdapter(nn.Module):
    """Convolution over the frames of a video, place by place, [videos * frames, tokens, h].

    The class token passes unchanged; so adding the result doubles it (official behaviour).
    """

    def __init__(self, size: int):
        super().__init__()
        half = size // 2
        self.ln = nn.LayerNorm(size, _TEMPORAL_NORM_EPS)
        self.down_proj = nn.Conv3d(size, half, 1)
        self.conv = nn.Conv3d(half, half, (3, 1, 1), padding=(1, 0, 0), groups=half)
        self.up_proj = nn.Conv3d(half, size, 1)

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        patches = self.ln(x[:, 1:]).unflatten(0, (-1, frames))  # [videos, frames, patches, h]
        hidden = self.conv(self.down_proj(patches.permute(0, 3, 1, 2).unsqueeze(-1)))
        hidden = self.up_proj(hidden * torch.sigmoid(1.702 * hidden))
        patches = hidden.squeeze(-1).permute(0, 2, 3, 1).flatten(0, 1)
        return torch.cat([x[:, :1], patches], dim=1)


class MplugOwlVisualAbstractor(nn.Module):
    """Learnable queries read the features of the ViT (paper, section 3.1).

    Features [n, t, h] and the queries [1, q, h] of images, followed for videos by the temporal
    ones, to visual tokens [n, q + 1, decoder width], vit_eos last.
    """

    def __init__(self, config: MplugOwlConfig):
        super().__init__()
        abstractor = config.visual_config["visual_abstractor"]
        size, width = abstractor["hidden_size"], config.text_config.hidden_size
        self.num_queries = config.num_query_tokens
        layers = [MPLUGOwl2AbstractorLayer(config) for _ in range(abstractor["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.visual_fc = nn.Linear(size, width)
        if config.vision_config["temporal"]:
            self.temporal_visual_fc = nn.Linear(size, width)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, width))

    def forward(self, features: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        queries = queries.to(features.device).expand(len(features), -1, -1)
        for layer in self.encoder["layers"]:
            queries = layer(queries, features)
        tokens = self.visual_fc(queries[:, : self.num_queries])
        if queries.shape[1] > self.num_queries:
            tokens = tokens + self.temporal_visual_fc(queries[:, self.num_queries :])
        return torch.cat([tokens, self.vit_eos.expand(len(features), -1, -1)], dim=1)
