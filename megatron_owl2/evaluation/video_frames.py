"""Frames of videos and animated GIFs, decoded by PyAV (the extra `video`).

Frames are counted by decoding: what a file says of its duration and rate is not believed. The
rotation that a file may ask for is not applied, as for images.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_owl2.data.images import check_tensor
from megatron_owl2.errors import BadSampleError, TaskError
from megatron_owl2.evaluation.video_files import Video, frame_numbers

if TYPE_CHECKING:
    import av

_logger = logging.getLogger(__name__)
_SHORT = 0.9  # share of the stated duration below which a video may have been cut


def read_frames(video: Video) -> list[torch.Tensor]:
    """The frames that a video is shown by, in order, each uint8 [3, H, W].

    The whole video, or segment, is decoded, so that damage anywhere in it is found. Raises
    TaskError naming the file if it cannot be decoded, was cut or has no frame there, or if PyAV is
    not installed.
    """
    packets = None if video.segment else _packets(video.path)
    if packets == 0:
        raise TaskError(f"{video.path} has no frame")
    # Packets are counted fast and are the frames, but for codecs with packets that show nothing.
    expected = packets or _decode(video, [])[1]
    shown, count = _decode(video, _numbers(video, expected))
    if count != expected and count:
        shown, count = _decode(video, _numbers(video, count))
    if not count:
        where = f" in {video.unit} {list(video.segment)}" if video.segment else ""
        raise TaskError(f"{video.path} has no frame{where}")
    return shown


def _numbers(video: Video, count: int) -> list[int]:
    return frame_numbers(count, video.frames, ends=video.ends) if count else []


def _packets(path: Path) -> int:
    """The number of packets of the video stream; raises TaskError if the file was cut."""
    count, is_cut, end = 0, False, 0.0
    with _stream(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty, to flush the decoder
                count += 1
                is_cut |= packet.is_corrupt
                stop = (packet.pts or 0) + (packet.duration or 0)
                end = max(end, float(stop * (packet.time_base or 0)))
        if is_cut or stream.frames > count:
            stated = f" of {stream.frames}" if stream.frames else ""
            raise TaskError(
                f"{path} is cut: it holds {count}{stated} frames; copy or download it again"
            )
        duration = (container.duration or 0) / 1e6  # from microseconds
        if count and end < _SHORT * duration:
            _logger.warning(
                "%s states a duration of %.1f s and ends after %.1f s; it may have been cut",
                path,
                duration,
                end,
            )
    return count


def _decode(video: Video, numbers: list[int]) -> tuple[list[torch.Tensor], int]:
    """The frames of these numbers, counted from the segment's start, and how many there are."""
    wanted = {number: torch.empty(0) for number in numbers}
    count = 0
    with _stream(video.path) as (container, stream):
        for frame in _inside(video, container, stream):
            if count in wanted:
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                try:
                    wanted[count] = check_tensor(pixels)
                except BadSampleError as error:
                    raise TaskError(f"{video.path}: {error}") from None
            count += 1
    return [wanted[number] for number in numbers], count


def _inside(video: Video, container, stream) -> Iterator["av.VideoFrame"]:
    """The decoded frames of a video, or of its segment."""
    if not video.segment:
        yield from container.decode(stream)
        return
    start, end = video.segment
    if video.unit == "frames":
        yield from islice(container.decode(stream), int(start), int(end))
        return
    first = stream.start_time or 0  # time stamps may begin anywhere, as those of what was cut out
    if start > 0:
        begin = float(first * stream.time_base)
        container.seek(int((begin + start) * 1e6), backward=True)  # to a key frame before it
    for frame in container.decode(stream):
        if frame.time is None:
            raise TaskError(f"{video.path} has frames without a time; its segments cannot be found")
        time = float((frame.pts - first) * frame.time_base)
        if time >= end:
            return
        if time >= start:
            yield frame


@contextmanager
def _stream(path: Path):
    """The container of a file and its first video stream; errors of reading it are TaskError."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise TaskError("videos need PyAV: pip install 'megatron-owl2[video]'") from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise TaskError(f"{path} holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"{path} cannot be decoded: {reason}") from None
