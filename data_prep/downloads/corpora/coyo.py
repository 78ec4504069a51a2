"""COYO-700M (Byeon et al., 2022): 746,972,269 English pairs from Common Crawl with many scores."""

from data_prep.downloads.corpus import Corpus

CORPUS = Corpus(
    name="coyo",
    about="Parquet with url, text, width, height and scores; smaller sides from 200 pixels",
    width=("width",),
    height=("height",),
    scores={
        "clip_similarity_vitb32": "cosine of CLIP's ViT-B/32 embeddings; higher is better",
        "clip_similarity_vitl14": "cosine of CLIP's ViT-L/14 embeddings; higher is better",
        "nsfw_score_opennsfw2": "not safe for work, by OpenNSFW2; lower is better, at most 0.5",
        "nsfw_score_gantman": "not safe for work, by GantMan's model; lower is better",
        "watermark_score": "probability of a watermark; lower is better",
        "aesthetic_score_laion_v2": "LAION's aesthetic predictor 2, about 1 to 10",
        "num_faces": "faces found by SCRFD",
        "word_count": "words of the text",
    },
    labels={"image_phash": "perceptual hash of the image"},
)
