"""What nodes measure of their links reaches the control plane: each link counts, and the threshold moves with them.

Chapter 13.
"""

from dataclasses import replace

import pytest
from test_cluster_life import GREEDY, _turns_are_short  # noqa: F401
from test_two_datacenters import prompts_of
from world import World

from minprfaas.config import LinkSample
from minprfaas.scheduling.control import ControlPlane, ControlSettings, LinkMeasured, NewThreshold
from minprfaas.scheduling.paper_case import paper_fleet


def test_the_samples_of_each_link_of_a_process_count(hybrid):
    """A PrfaaS node sends to two decode nodes; each of its lines is half busy, so together they are busy."""
    now_s = [1000.0]
    with World(*hybrid, prfaas=1, pd=3, split=1, clock=lambda: now_s[0]) as world:
        ends = [world.machines["prfaas-0"].ends[name] for name in ("pd-1", "pd-2")]
        assert measured(world, ends, now_s, 0.45, turns=12) == "scarce"
        assert measured(world, ends, now_s, 0.2, turns=30) == "abundant"


def test_a_link_that_carries_nothing_says_so_once_a_second_and_when_that_changes_at_once(hybrid):
    heard = []

    class Recording(ControlPlane):
        def hear(self, event, now_s):
            if isinstance(event, LinkMeasured):
                heard.append((event.sample.at_s, event.sample.utilization))
            return super().hear(event, now_s)

    with World(*hybrid, prfaas=1, pd=2, split=1, plane=Recording(ControlSettings(100, 1.0))) as world:
        end = world.machines["prfaas-0"].ends["pd-1"]
        for quarter in range(1, 14):
            end.samples = (*end.samples, LinkSample(quarter / 4, 1.0, 0.5 if quarter in (10, 11) else 0.0, 0.0))
            world.step()
            world.step()  # a second time, in which there is nothing new
    assert heard == [(0.25, 0), (1.25, 0), (2.25, 0), (2.5, 0.5), (2.75, 0.5), (3.0, 0)]


def measured(world, ends, now_s, utilization, turns, gbps=1.0):
    """What the control plane makes of so many seconds with this sample of each line."""
    for _ in range(turns):
        now_s[0] += 1.0
        for end in ends:
            end.samples = (LinkSample(now_s[0], gbps, utilization, 0.0),)
        world.step()
    return world.front.plane.regime(now_s[0])


@pytest.mark.parametrize("gbps, direction", [(1e-6, 1), (100.0, -1)])
def test_the_live_threshold_moves_with_what_the_line_is_measured_to_give(hybrid, gbps, direction):
    now_s = [1000.0]
    fleet = replace(paper_fleet(), prfaas_instances=1, pd_instances=2)
    settings = ControlSettings(50, 1.0, fleet=fleet, adaptive=True)
    with World(*hybrid, prfaas=1, pd=2, split=1, plane=ControlPlane(settings), clock=lambda: now_s[0]) as world:
        measured(world, [world.machines["prfaas-0"].ends["pd-1"]], now_s, 0.5, turns=20, gbps=gbps)
        for number in range(66):
            world.front.submit(str(number), prompts_of(20 + number)[0], GREEDY)
        measured(world, [world.machines["prfaas-0"].ends["pd-1"]], now_s, 0.5, turns=3, gbps=gbps)
        moves = [action for action in world.front.take_actions() if isinstance(action, NewThreshold)]
        for number in range(66):
            world.front.abort(str(number))
        world.step_until(lambda: world.is_empty)
    assert moves and (moves[0].threshold - 50) * direction > 0, moves
    assert f"{fleet.prfaas_instances} PrfaaS" in moves[0].reason and "Gbps" in moves[0].reason
