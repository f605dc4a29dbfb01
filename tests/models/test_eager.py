"""Random numbers that are the same for each model that is asked, and nobody else's."""

from __future__ import annotations

import pytest
import torch

from lorafx.models.eager import same_draws


def test_draws_are_the_same_each_time_and_the_callers_go_on() -> None:
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(3)
        expected = torch.rand(2), torch.rand(2)
        torch.default_generator.manual_seed(3)
        assert torch.equal(torch.rand(2), expected[0])
        with same_draws():
            first = torch.rand(5)
        with same_draws():
            assert torch.equal(torch.rand(5), first)
        assert torch.equal(torch.rand(2), expected[1])


@pytest.mark.parametrize("started", [False, True])
def test_only_devices_in_use_are_seeded(monkeypatch: pytest.MonkeyPatch, started: bool) -> None:
    seeds: list[int] = []
    for device in (torch.cuda, torch.xpu, torch.mtia):
        monkeypatch.setattr(device, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with same_draws():
        pass
    assert seeds == ([0] if started else [])
