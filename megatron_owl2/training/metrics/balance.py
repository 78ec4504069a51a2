"""Balance of the data-parallel ranks: how much their shares of one step differ."""

from collections import Counter

import torch


class RankBalance:
    """Spread over the ranks of the tokens and images of each step: every rank waits for the one
    with most."""

    def __init__(self, tokens_per_image: int, device: torch.device):
        self._tokens_per_image, self._device = tokens_per_image, device
        self._steps: list[tuple[int, int]] = []

    def add(self, counts: Counter[str]) -> None:
        """Count one step of this rank."""
        images = counts["vision_tokens"] // self._tokens_per_image
        self._steps.append((int(counts["tokens"]), int(images)))

    def take(self) -> dict[str, float]:
        """The widest of the steps since the last call, all ranks together: `token_spread`, the
        largest less the smallest number of tokens as a share of the mean, and `image_spread`, the
        same in images. Padding does not count."""
        mine = torch.tensor(self._steps, dtype=torch.float64, device=self._device)
        self._steps = []
        every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, mine)
        shares = torch.stack(every)  # [ranks, steps, 2]
        spread = shares.amax(0) - shares.amin(0)
        tokens = spread[:, 0] / shares.mean(0)[:, 0].clamp(min=1)
        return {
            "token_spread": round(float(tokens.max()), 6),
            "image_spread": int(spread[:, 1].max()),
        }
