"""OK-VQA (Marino et al. 2019) as published: OpenEnded_mscoco_train2014_questions.json and, beside
it, mscoco_train2014_annotations.json.

Its annotations hold each answer twice: `raw_answer` as it was typed, `answer` in the form that is
scored. The latter is used, as for VQAv2.
"""

from data_prep.formats.common.vqa_files import VqaFiles
from data_prep.formats.format import Format

FORMATS: tuple[Format, ...] = (VqaFiles("okvqa", "OpenEnded_mscoco_train2014_questions.json"),)
