"""Description of a published corpus: its columns and the meaning of its scores."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Corpus:
    """Corpus whose files hold addresses of images.

    `url`, `caption`, `width` and `height` are the names of these columns in any of the published
    versions, whatever their case; `header` holds the columns of a TSV file without a header line.
    `scores` (numbers) and `labels` (words) are further columns that can be filtered on, each with
    its meaning. `sha256` is the column with the hash of the image as it was found, `faces` the
    one with the boxes of faces, which the download blurs.
    """

    name: str
    about: str
    url: tuple[str, ...] = ("url",)
    caption: tuple[str, ...] = ("caption", "text")
    header: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    height: tuple[str, ...] = ()
    scores: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None
    faces: str | None = None
