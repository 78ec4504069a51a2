"""The formats that tools/preprocess_data.py reads, by name."""

from data_prep import conversations, documents, img2dataset

FORMATS = {"conversations": conversations, "documents": documents, "img2dataset": img2dataset}
