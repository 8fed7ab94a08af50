"""Lines of the table that need another host than the bed, each with the test that tries it."""

from __future__ import annotations

from dataclasses import dataclass

from evasion_line import ANY_USER, RAW


@dataclass(frozen=True)
class Elsewhere:
    """text, who, outcome: as in the page. test: FILE::NAME of the test that holds the outcome, below tests/."""

    text: str
    who: str
    outcome: str
    test: str


_NAMES = "kernel/test_names.py::"
_FORGED = "kernel/test_names_forged.py::"
_MIDSTREAM = "kernel/test_midstream.py::"
_MARKS = "kernel/test_offload_marks.py::"

LINES = (
    Elsewhere(
        "HTTPS records of a zone of the user's own, which name an allowed host with other addresses", ANY_USER, "not believed",
        _FORGED + "test_a_zone_of_others_proves_no_allowed_name",
    ),
    Elsewhere(
        "An allowed name, in TLS or HTTP, at an address that DNS did not give for it", ANY_USER,
        'blocked with `verify = "dns"`; without it a limit: a name is what the client says',
        _NAMES + "test_a_name_counts_for_the_addresses_that_dns_gave",
    ),
    Elsewhere(
        "`dst_name`: any protocol to an address that DNS did not give for an allowed name", ANY_USER, "blocked",
        _NAMES + "test_a_name_counts_for_the_addresses_that_dns_gave",
    ),
    Elsewhere(
        "An answer with another number, question or type, with an error, for another owner, or the second to a question",
        "who can send from the resolver's address", "not believed", _FORGED + "test_forged_answers_are_not_believed",
    ),
    Elsewhere(
        "An answer of a resolver that is not believed", ANY_USER, "not believed",
        _FORGED + "test_the_answer_of_another_resolver_is_not_believed",
    ),
    Elsewhere(
        "An answer from a believed address without a question", RAW, "not believed",
        _FORGED + "test_an_answer_without_a_question_is_not_believed",
    ),
    Elsewhere(
        "A connection in the moment in which the answer arrives", ANY_USER, "its name is known by then",
        _NAMES + "test_no_connection_comes_before_its_name",
    ),
    Elsewhere(
        "A worker that dies, a reload with another setting or another name: a denied connection continues", ANY_USER, "blocked",
        _MIDSTREAM + "test_a_denied_connection_stays_denied",
    ),
    Elsewhere(
        "The same, and a restart or a crash of the agent: an allowed connection continues", ANY_USER, "it is not cut",
        _MIDSTREAM + "test_an_allowed_connection_continues",
    ),
    Elsewhere(
        "A flood of one user, where rules by `uid` give that user a queue of its own: new flows of others", ANY_USER,
        "each is judged; without such rules a limit: the kernel has no queue for each source",
        "kernel/test_known_flows.py::test_a_flood_of_one_user_in_a_queue_of_its_own_decides_for_no_new_flow_of_others",
    ),
    Elsewhere(
        "310 seconds of silence, then another connection", ANY_USER, "the silent one is not cut",
        _MIDSTREAM + "test_a_connection_is_silent_for_310_seconds",
    ),
    Elsewhere(
        "310 seconds of silence behind the SYN, to be taken for a connection that began before the agent", ANY_USER, "blocked",
        _MIDSTREAM + "test_a_connection_that_says_nothing_for_310_seconds_is_judged",
    ),
    Elsewhere(
        "110,000 SYNs from spoofed addresses, to have an allowed connection forgotten", RAW, "it is not cut",
        _MIDSTREAM + "test_110_000_spoofed_syns",
    ),
    Elsewhere(
        "A connection that began before the agent says a denied name", ANY_USER,
        'blocked where a segment begins with the message in its plain form; any other with `midstream = "drop"`',
        _MIDSTREAM + "test_a_connection_that_began_before_the_agent",
    ),
    Elsewhere(
        "An element of a user answers REPEAT each time, with other bytes too, or queues a packet again", "an element",
        "it gets `on_error` after 16 times",
        "kernel/test_elements_offload.py::test_an_element_that_always_answers_repeat_gets_on_error",
    ),
    Elsewhere(
        "A policy that names facts without `dpi` before it: nothing shows a name", "who writes the configuration",
        "refused by `check`", "kernel/test_config.py::test_bad_configuration_is_refused",
    ),
    Elsewhere(
        "A policy that denies, on a queue with `fail_open = true` or `bypass = true`", "who writes the configuration",
        "`check` warns", "unit/test_rules.py::test_a_policy_that_enforces_is_not_left_open_unsaid",
    ),
    Elsewhere(
        "Several datagrams in one send, with `rate-limit`, `sample`, `log` and `chaos`", ANY_USER, "each is judged and counted",
        "kernel/test_udp_segments.py::test_each_datagram_of_one_send_is_judged_and_counted",
    ),
    Elsewhere(
        "IPv6 extension headers of up to 5,104 bytes before the ports, from outside", RAW, "the ports are read",
        "kernel/test_extension_headers.py::test_ports_behind_extension_headers",
    ),
    Elsewhere(
        "UDP: bytes behind the datagram in its packet, which its receiver cuts off", RAW, "they hide nothing",
        "kernel/test_cut_datagrams.py::test_bytes_behind_a_datagram_hide_no_message",
    ),
    Elsewhere(
        "MPTCP with `refuse-mptcp`: the name would be split over two subflows", ANY_USER, "the connection becomes plain TCP",
        "kernel/test_mptcp.py::test_mptcp_is_refused_and_names_are_judged",
    ),
    Elsewhere(
        "A local stub (dnsmasq, systemd-resolved) that answers on loopback, where only output is judged", "no sender",
        "its answers are seen", _NAMES + "test_a_local_stub_by_the_hosts_own_settings",
    ),
    Elsewhere(
        "TCP to port 53 that is of no known protocol, behind which a query may come", ANY_USER,
        "limit: a conflict also where it is honest; servers pass over what is not a query, and answer one behind it",
        "unit/test_protocols_dns.py::test_tcp_to_the_port_of_dns_that_is_not_dns_is_a_conflict",
    ),
    Elsewhere(
        "HTTP: a request sent by `sendfile`, whose page the sender changes after the packet was judged", ANY_USER,
        "blocked with `gso = false`; without it a limit: the kernel sends a page as it is when it leaves",
        "kernel/test_changed_bytes.py::test_a_page_that_changes_after_its_verdict",
    ),
    Elsewhere(
        "TCP and UDP: bytes sent by `sendfile`, `splice`, `vmsplice` or `MSG_ZEROCOPY`, changed while the packet waits", ANY_USER,
        "blocked with `gso = false`; without it a limit, as above",
        "kernel/test_changed_bytes.py::test_a_page_that_changes_while_its_packet_waits",
    ),
    Elsewhere(
        "UDP: the same in a datagram whose checksum its sender adds up (`UDP_CORK`) or leaves out (`SO_NO_CHECK`)", ANY_USER,
        "limit: the kernel makes no copy of it, also with `gso = false`",
        "kernel/test_changed_bytes.py::test_a_datagram_whose_checksum_is_its_senders",
    ),
    Elsewhere(
        "The mark of `offload` on a packet of one's own (`SO_MARK`), which the kernel takes for a verdict of ours",
        "CAP_NET_ADMIN; CAP_NET_RAW since Linux 5.17",
        "limit: the flow passes unjudged. It opens nothing more: with that right a packet socket passes by netfilter as a whole. "
        "Take the right from what is to be judged (`CapabilityBoundingSet=` of its unit)",
        _MARKS + "test_a_process_with_the_right_to_set_marks_passes_by_the_mark_of_offload",
    ),
    Elsewhere(
        "A frame from a packet socket (AF_PACKET), which no hook of netfilter sees", "CAP_NET_RAW",
        "limit: no queue gets it", _MARKS + "test_a_packet_socket_passes_by_netfilter_as_a_whole",
    ),
    Elsewhere(
        "The mark of `offload` on packets of a container, or of another network namespace that is forwarded", "root in it",
        "blocked: the kernel clears marks between namespaces", _MARKS + "test_a_mark_does_not_leave_its_network_namespace",
    ),
    Elsewhere(
        "A silent connection among so many that 10,300 are forgotten while no element is shown a packet", ANY_USER, "blocked",
        "unit/test_lapsed_in_turns.py::test_more_are_forgotten_than_there_is_room_for",
    ),
    Elsewhere(
        "STARTTLS of POP3, IMAP, FTP and XMPP behind other commands and unknown lines, or a second hello behind it",
        ANY_USER, "blocked", "kernel/test_starttls.py::test_what_a_client_says_before_its_hello_hides_no_name",
    ),
)  # fmt: skip
