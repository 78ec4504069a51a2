"""The formats that tools/preprocess_data.py reads, by name."""

from types import SimpleNamespace

from data_prep.formats import coco, conversations, documents, img2dataset, table, webdataset

FORMATS = {
    "coco": coco,
    "coco-one-caption": SimpleNamespace(plan=coco.plan_one_caption, read=coco.read),
    "conversations": conversations,
    "documents": documents,
    "img2dataset": img2dataset,
    "table": table,
    "webdataset": webdataset,
}
