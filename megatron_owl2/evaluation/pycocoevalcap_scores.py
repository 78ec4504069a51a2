"""Scores of captions by pycocoevalcap (the extra `captions`), with Stanford's tokeniser in Java."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Mapping

from megatron_owl2.errors import TaskError
from megatron_owl2.evaluation.cider import cider_table
from megatron_owl2.evaluation.rows import Id


def reference_score(predictions: Mapping[Id, str], gold: Mapping[Id, Mapping]) -> dict:
    """CIDEr-D per skill and overall, and BLEU-4 and ROUGE-L overall, in percent.

    Raises TaskError if pycocoevalcap or Java is not installed, or Java fails.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu  # pyright: ignore
        from pycocoevalcap.cider.cider import Cider  # pyright: ignore
        from pycocoevalcap.rouge.rouge import Rouge  # pyright: ignore
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # pyright: ignore
    except ImportError:
        raise TaskError(
            "this variant needs pycocoevalcap: pip install 'megatron-owl2[captions]'"
        ) from None
    if shutil.which("java") is None:
        raise TaskError(
            "this variant needs a Java runtime (on Debian: apt-get install default-jre)"
        )
    said = {i: [{"caption": one_line(predictions[i])}] for i in gold}
    references = {
        i: [{"caption": one_line(text)} for text in row["answers"]] for i, row in gold.items()
    }
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what they print is no result
            tokeniser = PTBTokenizer()
            theirs, ours = tokeniser.tokenize(references), tokeniser.tokenize(said)
            _, cider = Cider().compute_score(theirs, ours)
            bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
            rouge, _ = Rouge().compute_score(theirs, ours)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise TaskError(f"pycocoevalcap or its Java failed: {error}") from None
    table = cider_table(dict(zip(theirs, map(float, cider), strict=True)), gold)
    others = {"bleu_4": bleu[3], "rouge_l": rouge}
    table["overall"] |= {name: round(100 * float(value), 2) for name, value in others.items()}
    return table


def one_line(text: str) -> str:
    """A caption for pycocoevalcap, which tells captions apart by lines: Java ends one at more
    characters than it replaces. White space makes no difference to the tokens."""
    return " ".join(text.split())
