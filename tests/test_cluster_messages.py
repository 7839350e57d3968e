"""Messages of the cluster: their envelopes, what is refused, and for whom a peer can speak. Chapter 13."""

import json
import queue
from datetime import timedelta

import pytest
import torch.distributed as dist
from cluster_support import FAST
from transport_support import IDENTITY

from minprfaas.cluster import messages
from minprfaas.cluster.envelope import FIELDS, BadMessage, Envelope, decode, encode
from minprfaas.cluster.mail import Mail
from minprfaas.config import FRONT
from minprfaas.transport.events import MessageReceived
from minprfaas.transport.wan.link import Link

ORDER = messages.PrefillOrder("a", 7, [1, 2, 3], 0, 8, 0, "", 0, 0, {"max_tokens": 3}, 60.0)


SAMPLES = {str: "a", int: 7, float: 0.5, bool: True, dict: {"a": 1}, list[int]: [1, 2], list[str]: ["a"],
           list[dict]: [{"a": 1}]}
FOREIGN = {str: 7, int: True, float: "0.5", bool: 1, dict: [], list[int]: [1, 2], list[str]: [1], list[dict]: ["a"]}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_a_message_comes_out_of_its_envelope_as_it_went_in_and_none_of_its_fields_may_be_another_thing(kind):
    message = kind(**{name: SAMPLES[wanted] for name, wanted in FIELDS[kind].items()})
    envelope = Envelope("prfaas-0", "pd-0/pdd", message)
    raw = json.loads(json.dumps(encode(envelope)))
    assert decode(raw) == envelope
    for name, wanted in FIELDS[kind].items():
        without = {other: value for other, value in raw["fields"].items() if other != name}
        for fields in (without, {**without, name: FOREIGN[wanted]}):
            with pytest.raises(BadMessage):
                decode({**raw, "fields": fields})


@pytest.mark.parametrize("change", [
    {"type": "Surprise"}, {"type": 3}, {"to": None}, {"fields": []}, {"more": 1},
    {"fields": {**encode(Envelope("a", "b", ORDER))["fields"], "start": "0"}},
    {"fields": {**encode(Envelope("a", "b", ORDER))["fields"], "start": True}},
    *[{"fields": {**encode(Envelope("a", "b", ORDER))["fields"], "token_ids": packed}}
      for packed in ([1, "2"], [1, 2], "", "I?", "IAQAA", "IAQID", "fAAAA", "qAAAAAA==", "I\u00e9AAA")],
    {"fields": {**encode(Envelope("a", "b", ORDER))["fields"], "stream_id": 2**64}},
    *[{"fields": {**encode(Envelope("a", "b", ORDER))["fields"], "deadline_s": no_time}}
      for no_time in (float("nan"), float("inf"), 10**400, True)],
    {"fields": {**encode(Envelope("a", "b", ORDER))["fields"], "unknown": 0}},
    {"fields": {"id": "a"}}])
def test_what_is_no_message_of_ours_is_refused(change):
    with pytest.raises(BadMessage):
        decode({**encode(Envelope("a", "b", ORDER)), **change})


def test_a_peer_can_speak_for_its_own_parts_only():
    with no_link() as (link, mail):
        mail.add_local(FRONT)
        mail.add_link(link, ["prfaas-0"])
        said = {sender: encode(Envelope(FRONT, sender, messages.Failed("a", "x", "lost")))
                for sender in ("prfaas-0", "pd-0/pdd", FRONT)}
        heard = {sender: mail.opened(MessageReceived(raw, link.name)) for sender, raw in said.items()}
        assert heard["prfaas-0"] is not None and heard["pd-0/pdd"] is None and heard[FRONT] is None
        assert mail.opened(MessageReceived(said["prfaas-0"], "another link")) is None


class no_link:
    """A link that was never connected, and an empty switchboard."""

    def __enter__(self):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
        self.link = Link("unconnected", store, 1, FAST, IDENTITY)
        return self.link, Mail(queue.SimpleQueue())

    def __exit__(self, *_):
        self.link.close()


@pytest.mark.parametrize("token_ids, byte_each", [
    ([], 0), ([0, 1, 151_935] * 1000, 6), ([2**32 - 1], 12), ([2**32, 7] * 1000, 11), ([-1, 2**63 - 1] * 1000, 11)])
def test_a_prompt_crosses_packed(token_ids, byte_each):
    """As JSON's digits it took a front end longer than all else that it does for a request."""
    order = messages.Serve("a", token_ids, 0, {"max_tokens": 4}, "pd-0", 1.0, "", 0)
    raw = encode(Envelope("pd-1", "front", order))
    assert len(raw["fields"]["token_ids"]) <= 1 + byte_each * len(token_ids)
    assert decode(json.loads(json.dumps(raw))).message == order
