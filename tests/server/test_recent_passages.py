from openbook.v1 import openbook_pb2 as pb
from openbook_server.knowledge.recent_passages import RecentPassages
from openbook_server.knowledge.records import Passage


class Shelf:
    """Passages 0 to 99 with a text of 1,000 characters each, and what was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, numbers):
        self.asked.append(list(numbers))
        return {n: Passage(id=f"d{n}#0", document_id=f"d{n}", text=f"{n:03}" + "x" * 997, start=0) for n in numbers if n < 100}


def test_what_was_read_lately_is_not_read_again():
    shelf = Shelf()
    recent = RecentPassages(shelf)
    assert {n: passage.id for n, passage in recent([3, 1]).items()} == {3: "d3#0", 1: "d1#0"}
    assert set(recent([1, 2, 3])) == {1, 2, 3}
    assert shelf.asked == [[3, 1], [2]]
    assert recent([2, 2, 7, 7])[7].text.startswith("007")
    assert recent([]) == {}


def test_one_that_is_not_stored_is_left_out_and_asked_for_again():
    shelf = Shelf()
    recent = RecentPassages(shelf)
    assert recent([100]) == {} == recent([100])
    assert shelf.asked == [[100], [100]]
    assert recent.bytes == 0


def test_bytes_are_bounded_and_the_one_used_last_stays():
    shelf = Shelf()
    recent = RecentPassages(shelf, capacity=10_000)
    for n in range(100):
        recent([0, n])
        assert recent.bytes <= 10_000
    assert recent.bytes > 5_000
    asked = len(shelf.asked)
    recent([0, 99])
    assert len(shelf.asked) == asked  # neither was read again
    recent([50])
    assert shelf.asked[-1] == [50]


def test_a_passage_that_is_too_large_is_given_and_not_kept():
    shelf = Shelf()
    recent = RecentPassages(shelf, capacity=1_000)
    assert recent([5])[5].id == "d5#0"
    assert recent.bytes == 0


def test_text_that_is_not_ascii_is_counted_with_its_utf8_whenever_that_is_made():
    def load(numbers):
        return {n: Passage(id=f"d{n}#0", document_id=f"d{n}", text=f"{n:04}" + "щ" * 500, start=0) for n in numbers}

    recent = RecentPassages(load, capacity=100_000)
    for n in range(500):
        passage = recent([n])[n]
        pb.Hit(text=passage.text)  # Python now keeps the text a second time
    assert recent.bytes <= 100_000
    assert 20 < len(recent._known._values) < 60
