"""A run's processes: what a topology may be, who lives where, and which mistakes of a command line get one line.

Chapter 13.
"""

import json
import socket

import pytest

from minprfaas.cluster.launch import StoreAddress, threads_of
from minprfaas.cluster.topology import Place, Topology
from minprfaas.commands.cluster import main, parser, with_site_lines
from minprfaas.commands.live_options import Run
from minprfaas.config import LineConfig, LinkConfig, Role
from minprfaas.errors import UserError
from minprfaas.scheduling.paper_case import paper_fleet


def roles(topology):
    return {part: role for place in topology.places() for part, role in place.roles.items()}


def test_the_front_end_is_rank_0_and_every_node_has_a_process_of_its_own():
    places = Topology.parse("prfaas=2,pd=3", split=1).places()
    assert [place.name for place in places] == ["front", "prfaas-0", "prfaas-1", "pd-0", "pd-1", "pd-2"]
    assert [place.site for place in places] == ["pd", "prfaas", "prfaas", "pd", "pd", "pd"]
    assert [place.parts for place in places] == [[place.name] for place in places]
    assert [place.has_front for place in places] == [True] + [False] * 5


def test_there_may_be_several_prfaas_datacenters_each_with_its_own_line():
    topology = Topology.parse("prfaas-a=1,pd=2,prfaas-b=2")
    assert [(place.name, place.site) for place in topology.places()] == [
        ("front", "pd"), ("prfaas-a-0", "prfaas-a"), ("prfaas-b-0", "prfaas-b"), ("prfaas-b-1", "prfaas-b"),
        ("pd-0", "pd"), ("pd-1", "pd")]
    args = parser().parse_args(["--prompts", "P", "--link-gbps", "0.02", "--rtt-ms", "5"])
    run = with_site_lines(Run(args, topology, LinkConfig(), LineConfig(0.02, 5.0), [], None, None),
                          ["prfaas-b=0.004"])
    assert run.lines == {"prfaas-a": LineConfig(0.02, 5.0), "prfaas-b": LineConfig(0.004, 5.0)}
    assert run.line_between("pd", "prfaas-b") == run.line_between("prfaas-b", "pd") == LineConfig(0.004, 5.0)
    assert run.line_between("prfaas-a", "prfaas-b") == LineConfig(), "nothing but messages crosses there"
    alone = Topology.parse("prfaas=2,pd=3")
    assert alone.prfaas_sites == {"prfaas": 2}
    run = Run(args, alone, LinkConfig(), LineConfig(0.02, 5.0), [], None, paper_fleet())
    assert with_site_lines(run, ["prfaas=0.004"]).fleet.link_gbps == 0.004, "a single one's line is planned with, too"


@pytest.mark.parametrize("split, prefill", [(None, 1), (0, 0), (1, 1), (2, 2)])
def test_split_says_how_many_pd_nodes_begin_as_prefill_nodes(split, prefill):
    found = [role for role in roles(Topology(1, 3, split)).values() if role is not Role.PRFAAS]
    assert found == [Role.PDP] * prefill + [Role.PDD] * (3 - prefill)


def test_a_single_pd_node_plays_both_roles_unless_it_is_told_to_decode():
    assert roles(Topology(1, 1)) == {"prfaas-0": Role.PRFAAS, "pd-0/pdp": Role.PDP, "pd-0/pdd": Role.PDD}
    assert roles(Topology(1, 1, split=0)) == {"prfaas-0": Role.PRFAAS, "pd-0": Role.PDD}


def test_two_datacenters_are_the_smallest_topology_with_the_front_end_beside_the_pd_node():
    prfaas, pd = Topology(1, 1).two_places()
    assert prfaas.parts == ["prfaas-0"] and pd.parts == ["front", "pd-0/pdp", "pd-0/pdd"]


@pytest.mark.parametrize("text", ["", "prfaas=2", "pd=3", "prfaas=2,pd=3,pd=4", "prfaas=2;pd=3", "prfaas=two,pd=3",
                                  "prfaas=-1,pd=3", "prfaas=2,pd=٣", "prfaas=1,pd=1,front=1", "=,="])
def test_what_is_no_topology_is_quoted_with_an_example(text):
    with pytest.raises(UserError, match="is not like prfaas=2,pd=3"):
        Topology.parse(text)


def test_a_datacenter_may_have_as_many_nodes_as_is_said():
    assert len(Topology.parse("prfaas=64,pd=64").places()) == 129
    assert len(Topology.parse("prfaas=0,pd=2", split=1).places()) == 3


@pytest.mark.parametrize("text, split, said", [
    ("prfaas=1,pd=0", None, "pd=0; it must be from 1 to 64"),
    ("prfaas=65,pd=1", None, "prfaas=65; it must be from 0 to 64"),
    ("prfaas=1,pd=" + "9" * 5000, None, "pd=999999999"),
    ("prfaas=1,pd=3", 3, "split is 3; of 3 PD nodes, with 1 PrfaaS nodes, from 0 to 2"),
    ("prfaas=1,pd=3", -1, "split is -1"),
    ("prfaas=0,pd=3", 0, "from 1 to 2 can begin as PD-P"),
])
def test_a_number_out_of_range_is_named_with_its_limits(text, split, said):
    with pytest.raises(UserError) as caught:
        Topology.parse(text, split)
    assert said in str(caught.value) and len(str(caught.value)) < 200


def test_a_store_is_a_host_and_a_port():
    assert (StoreAddress.parse("host:29500").host, StoreAddress.parse("[::1]:29500").host) == ("host", "::1")
    for text in ("host", ":29500", "host:", "host:0", "host:65536", "host:" + "9" * 5000):
        with pytest.raises(UserError, match="must be HOST:PORT"):
            StoreAddress.parse(text)
    with pytest.raises(UserError, match="the host of --store 127..0.0.1:29500 is '127..0.0.1', which is no name or"):
        StoreAddress.parse("127..0.0.1:29500")


def test_a_store_is_served_at_an_address_of_either_version():
    for host, family in (("127.0.0.1", socket.AF_INET), ("[::1]", socket.AF_INET6)):
        try:
            with socket.create_server((host.strip("[]"), 0), family=family) as probe:
                address = StoreAddress.parse(f"{host}:{probe.getsockname()[1]}")
        except OSError:
            pytest.skip("this machine has no IPv6")
        store = address.open(serves=True)
        address.open().set("said", "by another")
        assert store.get("said") == b"by another"


@pytest.mark.parametrize("change, said", [
    (["--topology", "prfaas=2"], "is not like"), (["--split", "9"], "split is 9"),
    (["--node", "pd-0"], "--store says where processes meet that are started apart, by --node or --datacenter; it is"),
    (["--store", "127.0.0.1:5"], "neither is given"),
    (["--node", "pd-9", "--store", "127.0.0.1:5"], "node 'pd-9' has no process in topology prfaas=2,pd=3"),
    (["--node", "pd-0", "--datacenter", "pd", "--store", "127.0.0.1:5"], "exclude each other"),
    (["--topology", "prfaas=0,pd=2", "--datacenter", "prfaas", "--store", "127.0.0.1:5"], "datacenter prfaas has no"),
    (["--convert-roles"], "--profile (or --emulate) says it"),
    (["--requests", "3"], "--requests is about a --load"), (["--sustain-s", "-1"], "--sustain-s is -1.0"),
    (["--check-sample", "3"], "--check-sample is about a --load"),
    (["--site-line", "prfaas-c=1"], "it must be about one of prfaas, and once"),
    (["--site-line", "prfaas=fast"], "it must be like prfaas-a=0.02:WEATHER.json"),
    (["--topology", "prfaas-1=1,pd=2"], "is not like prfaas=2,pd=3"),
    (["--datacenter", "pd", "--store", "nowhere"], "--store is 'nowhere'"), (["--wait-s", "0"], "--wait-s is 0.0"),
])
def test_a_mistake_on_the_command_line_is_named_before_any_process_is_started(monkeypatch, tmp_path, change, said):
    monkeypatch.delenv("RANK", raising=False)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(UserError) as caught:
        main(["--prompts", str(prompts), *change])
    assert said in str(caught.value)


@pytest.mark.parametrize("cores, threads", [(1, [1, 1, 1, 1]), (2, [1, 1, 1, 1]), (4, [1, 1, 1, 1]), (6, [1, 1, 2, 2]),
                                            (7, [2, 1, 2, 2]), (16, [4, 4, 4, 4])])
def test_nodes_of_one_host_share_its_cores_and_those_that_prefill_get_what_remains(cores, threads):
    names = ("pd-1", "pd-2", "prfaas-0", "pd-0")
    roles = (Role.PDD, Role.PDD, Role.PRFAAS, Role.PDP)
    places = [Place("front", "pd", {}, has_front=True), *(Place(n, n[:2], {n: role}) for n, role in zip(names, roles))]
    assert threads_of(places, cores) == dict(zip(names, threads))
