"""VQAv2 (Goyal et al. 2017) as published: v2_OpenEnded_mscoco_train2014_questions.json and, beside
it, v2_mscoco_train2014_annotations.json."""

from data_prep.formats.common.vqa_files import VqaFiles
from data_prep.formats.format import Format

FORMATS: tuple[Format, ...] = (VqaFiles("vqav2", "v2_OpenEnded_mscoco_train2014_questions.json"),)
