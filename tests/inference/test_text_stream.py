"""Text as it comes: joined it is the text of all ids, and a stop string never shows."""

from hypothesis import example, given
from hypothesis import strategies as st

from megatron_owl2.inference.text_stream import TextStream

IDS = st.lists(st.integers(0, 319), max_size=24)
TEXTS = st.text(st.sampled_from("ab é漢🙂\n red"), max_size=20)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.finish()]


@given(IDS)
def test_pieces_of_any_ids_join_to_their_text(tokenizer, ids):
    assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids)


@given(TEXTS)
@example("🙂🙂")
def test_no_piece_ends_inside_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    found = pieces(TextStream(tokenizer), ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in found)


@given(TEXTS, st.lists(st.text("ab red", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_and_behind_it_shows(tokenizer, text, stop):
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    places = [whole.find(one) for one in stop if one in whole]
    stream = TextStream(tokenizer, stop)
    shown = "".join(pieces(stream, ids))
    assert stream.stopped == bool(places)
    if not places:
        assert shown == whole
        return
    # The first that is complete ends the text, and what was shown before holds none of them.
    assert whole.startswith(shown) and not any(one in shown for one in stop)
    assert any(whole.startswith(one, len(shown)) for one in stop)
