"""Which request takes which fault; what a fault does is tested with the server that does it."""

from __future__ import annotations

import threading

from md_assets.demo.loopback_faults import Fault, Faults


def test_the_first_that_fits_in_place_and_name_is_taken_and_counted_down() -> None:
    faults = Faults()
    faults.status("org/a/*.tar", 429, times=2)
    faults.cut("org/a/*", 100)
    faults.stall("org/b/x", 0.5, 10)
    assert faults.take("listing", "org/a/1.tar") is None
    assert faults.take("resolve", "org/b/1.tar") is None
    assert [faults.take("resolve", "org/a/deep/1.tar") for _ in range(3)].count(None) == 1
    cut, stall = faults.take("body", "org/a/1.tar"), faults.take("body", "org/b/x")
    assert cut == Fault("org/a/*", times=0, after_bytes=100, cut=True)
    assert stall == Fault("org/b/x", times=0, after_bytes=10, stall_s=0.5)
    assert faults.pending() == 0 and faults.take("body", "org/a/1.tar") is None


def test_faults_without_number_last_until_cleared() -> None:
    faults = Faults()
    faults.throttle("*", 1000)
    assert all(faults.take("body", "x") == Fault("*", times=None, bytes_per_s=1000) for _ in range(5))
    assert faults.pending() == 0
    faults.clear()
    assert faults.take("body", "x") is None


def test_threads_together_take_no_more_than_there_are() -> None:
    faults, taken = Faults(), list[Fault | None]()
    faults.corrupt("*", times=100)
    threads = [
        threading.Thread(target=lambda: taken.extend(faults.take("body", "x") for _ in range(50))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 200 and taken.count(None) == 100
