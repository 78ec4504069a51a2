"""SentencePiece with the behaviour of LLaMA-2's tokenizer: unk 0, BOS 1, EOS 2, padding = unk."""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from megatron_owl2.errors import ConfigError, StorageError


class Tokenizer:
    """A SentencePiece model file behind LLaMA-2's special ids.

    Raises FileNotFoundError if there is no file at `path`, OSError if it cannot be read, and
    ValueError if it is not a SentencePiece model or numbers its special pieces differently.
    """

    unk_id = 0
    bos_id = 1
    eos_id = 2
    pad_id = 0  # LLaMA-2 has no padding piece; the official code pads with unk

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            data = self.path.read_bytes() if self.path.is_file() else None
        except OSError as error:
            raise OSError(f"{self.path} cannot be read: {error.strerror}") from None
        if data is None:
            raise FileNotFoundError(
                f"{self.path}: no such tokenizer model; give the tokenizer.model file of LLaMA-2 "
                "or of the corpus"
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(
                f"{self.path}: not a SentencePiece model; Git LFS pointers and "
                "tokenizer.json files cannot be used, take the binary tokenizer.model"
            ) from None
        found = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        if found != (self.unk_id, self.bos_id, self.eos_id):
            raise ValueError(
                f"{self.path}: unk, BOS and EOS have the ids {found}, LLaMA-2 has (0, 1, 2); "
                "train the model with train_tokenizer or take LLaMA-2's"
            )

        self.data = data  # the content of the file
        self.fingerprint = hashlib.sha256(data).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of pieces, the three special ones included."""
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without BOS and EOS; the dummy prefix makes its first word "▁word"."""
        return self._model.encode(text)

    def piece_bytes(self, token: int) -> bytes:
        """What one piece stands for, in UTF-8: the byte of a byte piece, nothing of unk, BOS and
        EOS, else its text with the space before it."""
        if token in (self.unk_id, self.bos_id, self.eos_id):
            return b""
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace("\u2581", " ").encode()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; unk, BOS and EOS are dropped, or spelled "<unk>", "<s>" and "</s>".

        Raises IndexError for an id outside the vocabulary (such as an image placeholder).
        """
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise IndexError(
                f"ids {outside[:5]} are outside the vocabulary of {self.vocab_size} pieces; "
                "remove image placeholders and ignored labels before decoding"
            )
        special = (self.unk_id, self.bos_id, self.eos_id)
        if skip_special:
            return self._model.decode([i for i in ids if i not in special])
        # SentencePiece decodes control pieces to nothing, so the runs between them decode alone.
        parts, run = [], []
        for i in ids:
            if i in special:
                parts += [self._model.decode(run), self._model.id_to_piece(i)]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._model.decode(run)])


def load_tokenizer(path: str | os.PathLike, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model that embeds `vocab_size` pieces.

    Raises ConfigError if there is none, or one with more pieces than that, and StorageError if it
    cannot be read.
    """
    try:
        tokenizer = Tokenizer(path)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise StorageError(str(error)) from None
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{path} has {tokenizer.vocab_size} pieces, but the model embeds {vocab_size}: it is "
            "another model's tokenizer; name the model's own, or set model.decoder.vocab_size if "
            "the model is new"
        )
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], path: str | os.PathLike, vocab_size: int = 512
) -> Tokenizer:
    """Train a byte-pair model with LLaMA-2's settings on `texts`, write it to `path`, return it.

    A corpus too small for `vocab_size` pieces gets the largest multiple of 64 that it can fill. The
    same texts give the same bytes. Raises ValueError if `vocab_size` does not divide by 8 (the
    embedding could not be split over tensor-parallel ranks) or if no size works.
    """
    if vocab_size % 8:
        raise ValueError(
            f"vocab_size {vocab_size} does not divide by 8; take {vocab_size // 8 * 8}"
        )
    # A newline inside a sentence would become a piece of its own; LLaMA-2 spells it with a byte.
    lines = [line for text in texts for line in text.split("\n") if line]
    smaller = range((vocab_size - 1) // 64 * 64, 256, -64)
    for size in (vocab_size, *smaller):
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                vocab_size=size,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=True,
                remove_extra_whitespaces=False,
                split_digits=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = error
            if "Vocabulary size too high" in str(error):
                continue
            break
        Path(path).write_bytes(model.getvalue())
        return Tokenizer(path)
    raise ValueError(
        f"no vocabulary of {vocab_size} pieces or fewer can be made from {len(lines)} lines of "
        f"text: {reason}"
    )
