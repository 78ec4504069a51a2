"""The score of captions, CIDEr-D in percent, and their file for other scorers."""

import json
from collections.abc import Mapping

from megatron_owl2.evaluation.cider import approximate_ptb, cider_d, cider_table
from megatron_owl2.evaluation.pycocoevalcap_scores import one_line, reference_score
from megatron_owl2.evaluation.scoring import check_ids

VARIANTS: tuple[str, ...] = ("approximate_ptb", "split_at_spaces", "pycocoevalcap")
_NOTE = (
    "tokens are nearly, not exactly, those of published figures; --variant pycocoevalcap has these"
)


def score(predictions: Mapping, gold: Mapping, variant: str = "approximate_ptb") -> dict:
    """CIDEr-D of captions against all of an image's, times 100 as in papers, per `skill`.

    "approximate_ptb" tokenises both sides by `cider.approximate_ptb`, which `note` says;
    "split_at_spaces" takes texts that were tokenised before; "pycocoevalcap" is the published
    scorer with Stanford's tokeniser, which gives `bleu_4` and `rouge_l` as well, and needs Java.
    N-grams are weighted over the whole set, so few images give no figure to compare. Raises
    ScoreError for missing or unknown ids, and TaskError if what a variant needs is not installed.
    """
    check_ids(predictions, gold)
    if variant == "pycocoevalcap":
        return reference_score(predictions, gold)
    tokens = {"approximate_ptb": approximate_ptb, "split_at_spaces": str.split}[variant]
    values = cider_d(
        {i: tokens(text) for i, text in predictions.items()},
        {i: [tokens(text) for text in row["answers"]] for i, row in gold.items()},
    )
    table = cider_table(values, gold)
    if variant == "approximate_ptb":
        table["overall"]["note"] = _NOTE
    return table


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """COCO's result file, which pycocoevalcap reads: a JSON list of image_id and caption."""
    rows = [{"image_id": i, "caption": one_line(text)} for i, text in predictions.items()]
    return "coco_captions.json", json.dumps(rows).encode()
