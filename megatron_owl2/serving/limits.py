"""Limits of a server: what a request may ask for, and how many are taken at a time."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that keep the memory and the time of every request finite.

    `max_batch` requests are generated together and `max_queue` more may wait. `request_seconds`
    run from a request's last byte to its answer's; `body_seconds` is the time to send it.
    `max_tokens` bounds new tokens, and is what a request gets that does not say how many, if the
    decoder has positions for so many. `max_positions` bounds the decoder positions of a prompt, its
    images and its answer together, below the model's own bound; the key/value cache holds so many
    for each of `max_batch` requests.
    """

    max_batch: int = 32
    max_queue: int = 64
    max_body: int = 32 * MIB
    max_images: int = 8
    max_image_bytes: int = 16 * MIB
    max_image_pixels: int = 40_000_000
    max_positions: int | None = None
    max_tokens: int = 1024
    request_seconds: float = 300.0
    body_seconds: float = 30.0
    grace_seconds: float = 20.0
