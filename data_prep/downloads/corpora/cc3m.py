"""Conceptual Captions (Sharma et al., 2018): 3.3 million pairs with cleaned alternative texts."""

from data_prep.downloads.corpus import Corpus

CORPUS = Corpus(
    name="cc3m",
    about="Train_GCC-training.tsv: caption TAB address, without a header; 3,318,333 rows",
    header=("caption", "url"),
)
