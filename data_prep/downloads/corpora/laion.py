"""LAION (Schuhmann et al., 2021 and 2022): pairs from Common Crawl that CLIP finds similar.

Three versions of the tables differ in columns: laion400m and laion2B-en (with NSFW and LICENSE),
laion2B-en-joined (with punsafe and pwatermark instead), and cuts by aesthetic score.
"""

from data_prep.downloads.corpus import Corpus

CORPUS = Corpus(
    name="laion",
    about="Parquet with URL, TEXT, WIDTH, HEIGHT and scores; laion2B-en has 2.3 billion rows",
    width=("width",),
    height=("height",),
    scores={
        "similarity": "cosine of CLIP's ViT-B/32 embeddings; all are above 0.28",
        "punsafe": "probability that the image is not safe for work; lower is better",
        "pwatermark": "probability of a watermark; lower is better",
        "aesthetic": "predicted aesthetic score, about 1 to 10; higher is better",
        "AESTHETIC_SCORE": "the same, as another version names it",
    },
    labels={
        "NSFW": "UNLIKELY, UNSURE or NSFW, by CLIP",
        "LICENSE": "as found beside the image, mostly ?",
    },
)
