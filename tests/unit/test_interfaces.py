"""Names of interfaces: how long they are remembered, and what an index without an interface is called."""

from __future__ import annotations

from nfq_agent.interfaces import Interfaces


class Kernel:
    """Interfaces by index; keeps for which it was asked."""

    def __init__(self) -> None:
        self.names = {2: "eth0", 3: "wg0"}
        self.asked: list[int] = []

    def name(self, index: int) -> str:
        self.asked.append(index)
        if index not in self.names:
            raise OSError(6, "No such device or address")
        return self.names[index]


def test_a_name_is_asked_once_in_five_seconds() -> None:
    kernel = Kernel()
    known = Interfaces(kernel.name)
    assert [known.name(2, now) for now in (100.0, 100.0, 103.0, 105.0)] == ["eth0"] * 4
    assert kernel.asked == [2]
    kernel.names[2] = "lan"
    assert known.name(2, 105.0) == "eth0"
    assert known.name(2, 105.001) == "lan"
    assert kernel.asked == [2, 2]


def test_a_clock_that_was_set_back_keeps_no_name_for_longer() -> None:
    kernel = Kernel()
    known = Interfaces(kernel.name)
    known.name(2, 100.0)
    kernel.names[2] = "lan"
    assert known.name(2, 50.0) == "lan"
    assert kernel.asked == [2, 2]


def test_an_index_without_an_interface_has_its_number() -> None:
    kernel = Kernel()
    known = Interfaces(kernel.name)
    assert known.name(9, 100.0) == "if-9"
    assert known.name(9, 101.0) == "if-9"
    assert known.name(0, 100.0) == ""
    assert kernel.asked == [9]
