"""The line that names who stalls: from the ranks' words alone."""

from tracekin.distributed.stall import Word, names_of, stall_line


def word(**said: object) -> Word:
    known = {"step": 8, "phase": "step", "seconds": 600.0, "place": "train/exchange.py:71", "started": 412, "waits": 0}
    known["names"] = ["barrier", "all-reduce", "all-gather"]
    return Word(**(known | said))


def test_ranks_by_name() -> None:
    assert names_of([1]) == "rank 1"
    assert names_of([0, 1]) == "ranks 0, 1"
    assert names_of([0, 2, 3, 4, 5, 9]) == "ranks 0, 2 to 5, 9"


def test_who_waits_and_who_has_not_come() -> None:
    asleep = word(started=411, phase="data", place="data/stream.py:290")
    words = {0: word(waits=412), 1: asleep, 2: word(waits=412), 3: word(waits=412, seconds=601.2)}
    assert stall_line(words, 4) == (
        "step 8 has stalled for 601 s: ranks 0, 2, 3 wait in all-gather 412 (train/exchange.py:71),"
        " rank 1 has not come to all-gather 412: it is at data/stream.py:290 (data)."
    )


def test_where_no_host_waits_the_numbers_tell_who_is_behind() -> None:
    """On GPUs the host goes on to the next thing that needs a result."""
    ahead = word(place="train/record.py:64")
    words = {0: ahead, 1: word(started=410, step=7, place="train/miner.py:9"), 2: ahead}
    assert stall_line(words, 3) == (
        "step 8 has stalled for 600 s: ranks 0, 2 are at train/record.py:64 (step),"
        " rank 1 has not come to all-reduce 411: it is at train/miner.py:9 (step of step 7)."
    )


def test_a_rank_that_waits_in_an_earlier_collective_waits_for_its_neighbour() -> None:
    words = {0: word(waits=411), 1: word(started=412, waits=412), 2: word(started=410)}
    assert stall_line(words, 3) == (
        "step 8 has stalled for 600 s: rank 0 waits in all-reduce 411 (train/exchange.py:71),"
        " rank 1 waits in all-gather 412 (train/exchange.py:71),"
        " rank 2 has not come to all-reduce 411: it is at train/exchange.py:71 (step)."
    )


def test_silent_ranks() -> None:
    waiting = word(waits=412)
    assert stall_line({0: waiting, 4: waiting}, 5).endswith(
        "ranks 0, 4 wait in all-gather 412 (train/exchange.py:71), ranks 1 to 3 say nothing: stopped, dead or cut off."
    )
    assert stall_line({4: waiting}, 5, asked=False).endswith(
        "rank 4 waits in all-gather 412 (train/exchange.py:71), the other ranks were not asked."
    )


def test_a_collective_further_back_than_names_are_kept_has_its_number() -> None:
    assert "has not come to collective 3:" in stall_line({0: word(), 1: word(started=2)}, 2)


def test_a_stall_outside_of_steps() -> None:
    assert stall_line({0: word(step=0, phase="start")}, 1).startswith("the start has stalled for 600 s: rank 0 is at")
