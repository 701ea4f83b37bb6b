from hypothesis import given
from hypothesis import strategies as st

from decode_workers.stop import StopMatcher

letters = st.text(alphabet="ab", max_size=14)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4).map(tuple)


def feed(text: str, stop: tuple[str, ...], cuts: set[int]) -> tuple[str, str | None]:
    """Released text and the match, the text coming in pieces."""
    matcher, released, start = StopMatcher(stop), "", 0
    for end in [*sorted(cut for cut in cuts if cut < len(text)), len(text)]:
        output = matcher.push(text[start:end])
        released += output.text
        if output.match is not None:
            return released, output.match
        start = end
    return released + matcher.flush(), None


def by_definition(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(letters, stops, st.sets(st.integers(0, 14)))
def test_however_text_is_cut_the_result_is_the_same(text: str, stop: tuple[str, ...], cuts: set[int]) -> None:
    assert feed(text, stop, cuts) == by_definition(text, stop)


@given(letters, stops)
def test_nothing_that_may_start_a_stop_string_is_released(text: str, stop: tuple[str, ...]) -> None:
    matcher, released = StopMatcher(stop), ""
    for character in text:
        output = matcher.push(character)
        released += output.text
        assert not any(s in released for s in stop)
        if output.match is not None:
            break


def test_without_stop_strings_text_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.push("abc").text == "abc"
    assert matcher.flush() == ""
