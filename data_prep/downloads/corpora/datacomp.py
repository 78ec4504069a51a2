"""DataComp (Gadre et al., 2023): 1.4 billion pairs of DataComp-1B, or CommonPool's 12.8 billion.

The tables come with the boxes of faces, which the download blurs, and the hash of every image as
it was found, so that an address that shows another image by now is left out.
"""

from data_prep.downloads.corpus import Corpus

CORPUS = Corpus(
    name="datacomp",
    about="Parquet with uid, url, text, sizes, scores, boxes of faces and hashes",
    width=("original_width",),
    height=("original_height",),
    scores={
        "clip_b32_similarity_score": "cosine of CLIP's ViT-B/32 embeddings; higher is better",
        "clip_l14_similarity_score": "cosine of CLIP's ViT-L/14 embeddings; higher is better",
    },
    labels={"uid": "the pair's name in DataComp"},
    sha256="sha256",
    faces="face_bboxes",
)
