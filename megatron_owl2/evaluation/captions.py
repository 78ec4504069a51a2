"""The score of captions, CIDEr-D in percent, and their file for other scorers."""

import json
from collections.abc import Mapping

from megatron_owl2.evaluation.cider import approximate_ptb, cider_d
from megatron_owl2.evaluation.scoring import check_ids, group_by_skill

VARIANTS: tuple[str, ...] = ("approximate_ptb", "split_at_spaces")
_NOTE = "tokens are nearly, not exactly, those of published figures; pycocoevalcap gives these"


def score(predictions: Mapping, gold: Mapping, variant: str = "approximate_ptb") -> dict:
    """CIDEr-D of captions against all of an image's, times 100 as in papers, per `skill`.

    "approximate_ptb" tokenises both sides by `cider.approximate_ptb`, which `note` says;
    "split_at_spaces" takes texts that were tokenised before. N-grams are weighted over the whole
    set, so few images give no figure to compare. Raises ScoreError for missing or unknown ids.
    """
    check_ids(predictions, gold)
    tokens = {"approximate_ptb": approximate_ptb, "split_at_spaces": str.split}[variant]
    values = cider_d(
        {i: tokens(text) for i, text in predictions.items()},
        {i: [tokens(text) for text in row["answers"]] for i, row in gold.items()},
    )
    skills = group_by_skill((row["skill"], values[i]) for i, row in gold.items())
    overall = _row(list(values.values()))
    if variant == "approximate_ptb":
        overall["note"] = _NOTE
    return {"overall": overall, "skills": {skill: _row(v) for skill, v in skills.items()}}


def _row(values: list[float]) -> dict:
    return {"cider_d": round(100 * sum(values) / len(values), 2), "n": len(values)}


def submission(predictions: Mapping, gold: Mapping) -> tuple[str, bytes]:
    """COCO's result file, which pycocoevalcap reads: a JSON list of image_id and caption."""
    rows = [{"image_id": i, "caption": text} for i, text in predictions.items()]
    return "coco_captions.json", json.dumps(rows).encode()
