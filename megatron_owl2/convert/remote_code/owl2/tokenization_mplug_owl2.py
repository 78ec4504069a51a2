"""LLaMA's tokenizer as mPLUG-Owl and mPLUG-Owl2 were trained with it."""

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class MPLUGOwl2Tokenizer(SentencePieceBackend):
    """The SentencePiece model itself, with a BOS in front.

    Every text gets the dummy prefix, leading spaces or not, and the spellings of special pieces
    such as "</s>" are ordinary text: transformers' LlamaTokenizer does neither.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, **kwargs):
        fixed = {"legacy": True, "split_special_tokens": True, "special_tokens_pattern": "bos"}
        super().__init__(vocab_file=vocab_file, **kwargs | fixed)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without control tokens, whatever it spells, and without a BOS."""
        return self.convert_tokens_to_ids(self.tokenize(text)) if text else []

    def _convert_id_to_token(self, index: int) -> str:
        """The piece of an id; rows of images below 0, and those that a model has beyond the pieces,
        have no text."""
        known = 0 <= index < self.sp_model.get_piece_size()
        return super()._convert_id_to_token(index) if known else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; special ones are spelled, which SentencePiece would not do."""
        special, parts, run = set(self.all_special_tokens), [], []
        for token in tokens:
            if token in special:
                parts += [self.sp_model.decode(run), token]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.sp_model.decode(run)])
