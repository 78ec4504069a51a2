"""Conceptual 12M (Changpinyo et al., 2021): alternative texts from the web, filtered less."""

from data_prep.downloads.corpus import Corpus

CORPUS = Corpus(
    name="cc12m",
    about="cc12m.tsv: address TAB caption, without a header; 12,423,374 rows",
    url=("url", "image_url"),  # the latter in the Parquet version
    header=("url", "caption"),
)
