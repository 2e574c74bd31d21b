"""Two threads that draw again from one generator: each gets the numbers of its own state."""

from __future__ import annotations

import threading

import torch

from tightfit.device.generators import drawing_from


def test_one_thread_at_a_time_draws_again() -> None:
    generator, states, first = torch.default_generator, [], []
    for _ in range(2):
        states.append(generator.get_state())
        first.append(torch.rand(3))
    after, again, begun = generator.get_state(), {}, threading.Event()

    def draw(number: int) -> None:
        begun.set()
        with drawing_from(generator, states[number]):
            again[number] = torch.rand(3)

    other = threading.Thread(target=draw, args=(1,))
    with drawing_from(generator, states[0]):
        other.start()
        begun.wait()
        other.join(0.2)
        assert other.is_alive(), "the other thread did not wait"
        draw(0)
    other.join()
    assert all(torch.equal(first[number], again[number]) for number in range(2))
    assert torch.equal(generator.get_state(), after)
